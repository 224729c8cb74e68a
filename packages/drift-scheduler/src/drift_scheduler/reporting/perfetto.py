"""A run as a Chrome trace, which ui.perfetto.dev and chrome://tracing open: one lane per phase, and counters.

Times become microseconds. Knows nothing of policies.
"""

from __future__ import annotations

import json
from typing import Any

from drift_scheduler.reporting.recorder import Recording, Span

DEVICE, REQUESTS = 1, 2
LANES = {"prefill": 1, "decode": 2}


def to_trace(recording: Recording, title: str) -> str:
    """The JSON text: complete events for work, counters for units per lane and requests alive."""
    events: list[dict[str, Any]] = [
        _name("process_name", DEVICE, 0, title),
        _name("process_name", REQUESTS, 0, "requests"),
        *(_name("thread_name", DEVICE, lane, name) for name, lane in LANES.items()),
    ]
    events += [_work(span) for span in recording.spans]
    events += _units(recording)
    events += [_counter("alive", REQUESTS, time, {"requests": count}) for time, count in recording.alive]
    other = {"title": title, "dropped_spans": recording.dropped_spans}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}) + "\n"


def _work(span: Span) -> dict[str, Any]:
    args: dict[str, Any] = {
        "sharing": span.sharing,
        "prefill_units": span.prefill_units,
        "decode_units": span.decode_units,
    }
    if span.layers is None:
        name, args["requests"] = f"decode x{span.tokens}", span.tokens
    else:
        name = f"prefill {span.tokens} tokens, layers {span.layers[0]}-{span.layers[1]}"
        args["tokens"] = span.tokens
    return {
        "name": name,
        "cat": span.sharing,
        "ph": "X",
        "ts": _us(span.start),
        "dur": max(_us(span.stop) - _us(span.start), 0.001),
        "pid": DEVICE,
        "tid": LANES[span.lane],
        "args": args,
    }


def _units(recording: Recording) -> list[dict[str, Any]]:
    """A counter event wherever the partition of spatial work changes; whole-device work counts for its lane."""
    events: list[dict[str, Any]] = []
    last: tuple[int, int] | None = None
    for span in sorted(recording.spans, key=lambda s: s.start):
        units = (span.prefill_units, span.decode_units)
        if units != last:
            events.append(_counter("units", DEVICE, span.start, {"prefill": units[0], "decode": units[1]}))
            last = units
    return events


def _counter(name: str, pid: int, time: float, values: dict[str, int]) -> dict[str, Any]:
    return {"name": name, "ph": "C", "ts": _us(time), "pid": pid, "args": values}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
