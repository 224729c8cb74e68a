"""The decision log: one JSON line per step, schema `drift.log/1`, written as an observer while a run goes on.

The first line says what ran. Then per step: what happened (arrivals in full, so that a log is also a trace), the gang,
what finished, and predicted against measured lane times. Times in seconds on the executor's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from drift_scheduler.domain import (
    DecodeDone,
    Device,
    Event,
    Finished,
    Gang,
    LaneFailed,
    Observation,
    PrefillDone,
    Request,
    RequestArrived,
    RequestCancelled,
    StepRecord,
)
from drift_scheduler.errors import DriftError

SCHEMA = "drift.log/1"


class DecisionLog:
    """Implements `Observer`; a context manager that closes its file."""

    def __init__(self, path: str | Path, device: Device, config: Mapping[str, Any]) -> None:
        try:
            self._file: BinaryIO = Path(path).open("wb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise DriftError(f"log {path}: {error.strerror or error}") from error
        self._encode = msgspec.json.Encoder().encode
        self._write(
            {
                "schema": SCHEMA,
                "device": {
                    "name": device.name,
                    "units": device.total_units,
                    "layers": device.num_layers,
                    "menu": [[p.prefill, p.decode] for p in device.menu],
                },
                "config": dict(config),
            }
        )

    def on_step(self, record: StepRecord) -> None:
        """Append one step; keys without content are left out."""
        step = record.step
        line: dict[str, Any] = {
            "step": record.index,
            "now": record.now,
            "events": [_event(event) for event in record.events],
        }
        if step.gang is not None:
            line["gang"] = _gang(step.gang)
        finished = [[o.request_id, o.reason.value] for o in step.outputs if isinstance(o, Finished)]
        if finished:
            line["finished"] = finished
        if step.observations:
            line["lanes"] = [_observation(seen) for seen in step.observations]
        if step.faults:
            line["faults"] = step.faults
        self._write(line)

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def __enter__(self) -> DecisionLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(self._encode(line) + b"\n")


def _event(event: Event) -> dict[str, Any]:
    match event:
        case RequestArrived():
            return {"arrived": _request(event.request)}
        case RequestCancelled():
            return {"cancelled": event.request_id, "reason": event.reason.value}
        case PrefillDone():
            return {"prefill_done": event.seconds, "stopped": event.stopped}
        case DecodeDone():
            return {"decode_done": event.seconds, "stopped": event.stopped}
        case LaneFailed():
            return {"lane_failed": event.lane.value, "message": event.message}


def _request(request: Request) -> dict[str, Any]:
    return {
        "id": request.id,
        "arrival": request.arrival,
        "prompt_tokens": request.prompt_tokens,
        "max_output_tokens": request.max_output_tokens,
        "output_tokens": request.output_tokens,
        "slo": {"ttft": request.slo.ttft, "tbt": request.slo.tbt, "class": request.slo.name},
        "priority": request.priority,
        "session": request.session,
        "turn": request.turn,
    }


def _gang(gang: Gang) -> dict[str, Any]:
    line: dict[str, Any] = {
        "sharing": gang.sharing.value,
        "partition": [gang.partition.prefill, gang.partition.decode],
    }
    if gang.prefill is not None:
        block = gang.prefill
        line["prefill"] = {
            "batch": block.batch_id,
            "layers": [block.layer_start, block.layer_stop],
            "chunks": [[c.request_id, c.start, c.stop] for c in block.chunks],
        }
    if gang.decode is not None:
        line["decode"] = {"batch": len(gang.decode.request_ids), "context": gang.decode.context_tokens}
    return line


def _observation(seen: Observation) -> dict[str, Any]:
    return {
        "lane": seen.lane.value,
        "predicted": seen.predicted,
        "measured": seen.measured,
        "overlapped": seen.overlapped,
    }
