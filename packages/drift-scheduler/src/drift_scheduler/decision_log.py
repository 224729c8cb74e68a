"""The decision log: one JSON line per step, schema `drift.log/1`, written as an observer while a run goes on.

The first line says what ran: device, KV pool, limits, the cost table where the cost model has one, configuration. Then
per step: what happened (arrivals in full, so that a log is also a trace), the view as the decision left it, the gang,
what clients were told (gaps and ends), and predicted against measured lane times. Times are seconds on the
executor's clock. `docs/plugins.md` has the schema; `drift_scheduler.log_reader` reads it; `drift replay` uses it.

A log holds no text and no token ids. Where prompts are real, pages are named by a hash under a key that is thrown away
with the process: equal names mean an equal beginning, and nothing else can be learnt from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes
from types import TracebackType
from typing import Any, BinaryIO, Literal

import msgspec
import numpy as np

from drift_scheduler.domain import (
    DecodeDone,
    Device,
    Event,
    Finished,
    Gang,
    LaneFailed,
    Nudged,
    Observation,
    PrefillDone,
    Request,
    RequestArrived,
    RequestCancelled,
    Step,
    StepRecord,
    Tokens,
)
from drift_scheduler.errors import DriftError
from drift_scheduler.scheduler import Scheduler

SCHEMA = "drift.log/1"

Source = Literal["simulation", "engine"]


class DecisionLog:
    """Implements `Observer`; a context manager that closes its file.

    `config`: what the run was started with. `source`: whether time was simulated. Lines are buffered; a process that
    is killed leaves a last line cut short, which readers drop.
    """

    def __init__(
        self, path: str | Path, scheduler: Scheduler, config: Mapping[str, Any], source: Source = "engine"
    ) -> None:
        self._scheduler = scheduler
        self._pages = _PageNames(scheduler.kv.page_tokens)
        self._encode = msgspec.json.Encoder(enc_hook=_plain).encode
        try:
            self._file: BinaryIO = Path(path).open("wb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise DriftError(f"log {path}: {error.strerror or error}") from error
        self._write(_header(scheduler, config, source))

    def on_step(self, record: StepRecord) -> None:
        """Append one step; keys without content are left out."""
        step = record.step
        line: dict[str, Any] = {
            "step": record.index,
            "now": record.now,
            "events": [self._event(event) for event in record.events if not isinstance(event, Nudged)],
            "view": view_digest(self._scheduler),
        }
        if step.gang is not None:
            line["gang"] = describe_gang(step.gang)
        if step.ahead:
            line["ahead"] = True
        self._add_news(line, step)
        if step.observations:
            line["lanes"] = [_observation(seen) for seen in step.observations]
        if step.faults:
            line["faults"] = step.faults
        if record.step_seconds is not None:
            line["step_seconds"] = record.step_seconds
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

    def _event(self, event: Event) -> dict[str, Any]:
        match event:
            case RequestArrived(request):
                keys, key_tokens = request.prefix_keys, request.key_tokens
                if request.prompt is not None:
                    keys, key_tokens = self._pages.begin(request), self._scheduler.kv.page_tokens
                return {"arrived": _request(request, keys, key_tokens)}
            case RequestCancelled():
                return {"cancelled": event.request_id, "reason": event.reason.value}
            case PrefillDone():
                return {"prefill_done": event.seconds, "stopped": event.stopped}
            case DecodeDone():
                return {"decode_done": event.seconds, "stopped": event.stopped}
            case LaneFailed():
                return {"lane_failed": event.lane.value, "message": event.message}
            case Nudged():
                return {}

    def _add_news(self, line: dict[str, Any], step: Step) -> None:
        """What clients were told: gaps between tokens with how many had them, and ends."""
        gaps = []
        finished = []
        for output in step.outputs:
            if isinstance(output, Tokens):
                self._pages.extend(output)
                if not output.first:
                    gaps.append(output.gaps)
            elif isinstance(output, Finished):
                finished.append(self._finished(output))
        if gaps:
            values, counts = np.unique(np.concatenate(gaps), return_counts=True)
            line["gaps"] = list(zip(values.tolist(), counts.tolist(), strict=True))
        if finished:
            line["finished"] = finished

    def _finished(self, done: Finished) -> dict[str, Any]:
        found: dict[str, Any] = {"id": done.request_id, "reason": done.reason.value}
        if done.timing.ttft is not None:
            found["ttft"] = done.timing.ttft
        found["output_tokens"] = done.timing.output_tokens
        if names := self._pages.end(done.request_id):
            found["keys"] = names
        return found

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(self._encode(line) + b"\n")


def view_digest(scheduler: Scheduler) -> dict[str, Any]:
    """Sizes of everything a policy decides from, as the step's decision left them. Changes nothing."""
    return {
        "waiting": len(scheduler.queue),
        "decoding": scheduler.rows.n,
        "running": scheduler.running,
        "prefills": [[batch.batch_id, batch.next_layer] for batch in scheduler.batches],
        "free_pages": scheduler.kv.free_pages,
        "blocked": scheduler.blocked_at is not None,
    }


def describe_gang(gang: Gang) -> dict[str, Any]:
    """A gang as logs have it."""
    line: dict[str, Any] = {
        "sharing": gang.sharing.value,
        "partition": [gang.partition.prefill, gang.partition.decode],
    }
    if gang.prefill is not None:
        block = gang.prefill
        line["prefill"] = {
            "batch": block.batch_id,
            "layers": [block.layer_start, block.layer_stop],
            "chunks": [[c.request_id, c.start, c.stop, c.last] for c in block.chunks],
        }
    if gang.decode is not None:
        line["decode"] = {"batch": len(gang.decode.request_ids), "context": gang.decode.context_tokens}
    return line


def _header(scheduler: Scheduler, config: Mapping[str, Any], source: Source) -> dict[str, Any]:
    limits = scheduler.limits
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "source": source,
        "device": _device(scheduler.device),
        "kv": {"total_pages": scheduler.kv.total_pages, "page_tokens": scheduler.kv.page_tokens},
        "limits": {
            "max_running": limits.max_running,
            "max_waiting": limits.max_waiting,
            "max_context_tokens": limits.max_context_tokens,
            "max_preemptions": limits.max_preemptions,
        },
        "config": dict(config),
    }
    table = _table_of(scheduler.costs) if source == "engine" else None  # a simulation names what it believes
    if table is not None:
        header["table"] = table
    return header


def _device(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "units": device.total_units,
        "layers": device.num_layers,
        "menu": [[p.prefill, p.decode] for p in device.menu],
        "sharings": sorted(sharing.value for sharing in device.sharings),
        "repartition_while_busy": device.repartition_while_busy,
        "system": device.system,
    }


def _table_of(costs: object) -> msgspec.Struct | None:
    """The cost table of a model, or of the one that it wraps; `None` where there is none."""
    while (inner := getattr(costs, "inner", None)) is not None:
        costs = inner
    table = getattr(costs, "table", None)
    return table if isinstance(table, msgspec.Struct) else None


def _request(request: Request, keys: Iterable[object], key_tokens: int) -> dict[str, Any]:
    return {
        "id": request.id,
        "arrival": request.arrival,
        "prompt_tokens": request.prompt_tokens,
        "max_output_tokens": request.max_output_tokens,
        "output_tokens": request.output_tokens,
        "slo": {
            "ttft": _finite(request.slo.ttft),
            "tbt": _finite(request.slo.tbt),
            "e2e": request.slo.e2e,
            "class": request.slo.name,
        },
        "priority": request.priority,
        "session": request.session,
        "turn": request.turn,
        "keys": list(keys),
        "key_tokens": key_tokens,
    }


def _finite(seconds: float) -> float | None:
    """JSON has no infinity: a target that was not set is null."""
    return seconds if seconds != float("inf") else None


def _observation(seen: Observation) -> dict[str, Any]:
    line: dict[str, Any] = {
        "lane": seen.lane.value,
        "sharing": seen.sharing.value,
        "partition": [seen.partition.prefill, seen.partition.decode],
        "layers": seen.layers,
        "predicted": seen.predicted,
        "measured": seen.measured,
        "overlapped": seen.overlapped,
    }
    if seen.prefill is not None:
        p = seen.prefill
        line["prefill"] = [p.requests, p.new_tokens, p.reused_tokens, p.new_squared, p.new_times_reused]
    if seen.decode is not None:
        line["decode"] = [seen.decode.batch, seen.decode.context_tokens]
    return line


def _plain(value: object) -> object:
    """Whatever else a configuration or a key holds, as text."""
    return str(value)


class _PageNames:
    """Names for the pages of real prompts and of what followed them, as the KV pool would share them.

    A page's name depends on its tokens, all tokens before, and the tenant's salt. Kept per live request: the last name
    and the tokens after it.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page = page_tokens
        self._key = token_bytes(32)
        self._live: dict[str, _Tail] = {}

    def begin(self, request: Request) -> list[int]:
        """Names of the full pages of its prompt."""
        assert request.prompt is not None
        tail = _Tail(blake2b(request.salt.encode(), digest_size=16, key=self._key).digest())
        self._live[request.id] = tail
        return self._take(tail, request.prompt)

    def extend(self, output: Tokens) -> None:
        """Requests got a token each."""
        if output.token_ids is None or not self._live:
            return
        for request_id, token in zip(output.request_ids, output.token_ids, strict=True):
            tail = self._live.get(request_id)
            if tail is not None:
                tail.names += self._take(tail, (token,))

    def end(self, request_id: str) -> list[int]:
        """Names of the pages that its output filled; nothing more is kept of it."""
        tail = self._live.pop(request_id, None)
        return tail.names if tail is not None else []

    def _take(self, tail: _Tail, tokens: Sequence[int]) -> list[int]:
        names = []
        tail.tokens.extend(tokens)
        whole = len(tail.tokens) // self._page * self._page
        for start in range(0, whole, self._page):
            page = np.asarray(tail.tokens[start : start + self._page], dtype="<i8").tobytes()
            tail.digest = blake2b(tail.digest + page, digest_size=16, key=self._key).digest()
            names.append(int.from_bytes(tail.digest[:7], "big") >> 4)  # 52 bits: exact in any JSON reader
        del tail.tokens[:whole]
        return names


class _Tail:
    """Where a request's chain of pages stands."""

    __slots__ = ("digest", "names", "tokens")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.tokens: list[int] = []
        self.names: list[int] = []
