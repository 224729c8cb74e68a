"""Everything a report draws about one run: an observer that keeps it, within bounds.

Knows steps, not files or colours. Times in seconds on the run's clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drift_scheduler.domain import (
    DecodeDone,
    Finished,
    FloatArray,
    Gang,
    Lane,
    LaneFailed,
    PrefillDone,
    RequestArrived,
    StepRecord,
    Tokens,
)
from drift_scheduler.metrics import attains

MAX_SPANS = 20_000
MAX_PAIRS = 4_000


@dataclass(frozen=True, slots=True)
class Span:
    """A lane at work. `sharing`: the gang's; `units`: of the lane, and `total` of both lanes while it was launched."""

    lane: str
    start: float
    stop: float
    sharing: str
    prefill_units: int
    decode_units: int
    tokens: int
    layers: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One finished request, as `requests.jsonl` has it."""

    id: str
    reason: str
    arrival: float
    ttft: float | None
    tpot: float | None
    tbt_max: float
    e2e: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    late_tokens: int
    preemptions: int
    attained: bool


@dataclass(frozen=True)
class Recording:
    """One run. `alive`: `(time, requests arrived and not ended)`; `pairs`: predicted and measured seconds by lane."""

    ttft: FloatArray
    tbt: FloatArray
    requests: tuple[RequestRow, ...]
    spans: tuple[Span, ...]
    alive: tuple[tuple[float, int], ...]
    pairs: dict[str, FloatArray]
    dropped_spans: int = 0


class Recorder:
    """Implements `Observer`. Spans and pairs beyond a bound are dropped, and counted."""

    def __init__(self) -> None:
        self._ttft: list[FloatArray] = []
        self._tbt: list[FloatArray] = []
        self._requests: list[RequestRow] = []
        self._spans: list[Span] = []
        self._alive: list[tuple[float, int]] = []
        self._count = 0
        self._gangs: dict[Lane, Gang] = {}
        self._pairs: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
        self._dropped = 0

    def on_step(self, record: StepRecord) -> None:
        """Take one step in."""
        before = self._count
        for event in record.events:
            match event:
                case RequestArrived():
                    self._count += 1
                case PrefillDone():
                    self._span(Lane.PREFILL, record.now, event.seconds)
                case DecodeDone():
                    self._span(Lane.DECODE, record.now, event.seconds)
                case LaneFailed():
                    self._gangs.pop(event.lane, None)
        for output in record.step.outputs:
            match output:
                case Tokens():
                    (self._ttft if output.first else self._tbt).append(output.gaps)
                case Finished():
                    self._count -= 1
                    self._requests.append(_row(output))
        for seen in record.step.observations:
            pairs = self._pairs[seen.lane.value]
            if len(pairs) < MAX_PAIRS:
                pairs.append((seen.predicted, seen.measured))
        gang = record.step.gang
        if gang is not None:
            if gang.prefill is not None:
                self._gangs[Lane.PREFILL] = gang
            if gang.decode is not None:
                self._gangs[Lane.DECODE] = gang
        if self._count != before and len(self._alive) < MAX_SPANS:
            self._alive.append((record.now, self._count))

    def recording(self) -> Recording:
        """What was seen."""
        return Recording(
            ttft=_joined(self._ttft),
            tbt=_joined(self._tbt),
            requests=tuple(self._requests),
            spans=tuple(self._spans),
            alive=tuple(self._alive),
            pairs={lane: np.array(pairs).reshape(-1, 2) for lane, pairs in self._pairs.items()},
            dropped_spans=self._dropped,
        )

    def _span(self, lane: Lane, now: float, seconds: float) -> None:
        gang = self._gangs.pop(lane, None)
        if gang is None:
            return
        if len(self._spans) >= MAX_SPANS:
            self._dropped += 1
            return
        block = gang.prefill if lane is Lane.PREFILL else None
        if block is not None:
            tokens, layers = block.shape().new_tokens, (block.layer_start, block.layer_stop)
        else:
            tokens, layers = len(gang.decode.request_ids) if gang.decode is not None else 0, None
        self._spans.append(
            Span(
                lane.value,
                now - seconds,
                now,
                gang.sharing.value,
                gang.partition.prefill,
                gang.partition.decode,
                tokens,
                layers,
            )
        )


def _row(done: Finished) -> RequestRow:
    timing = done.timing
    return RequestRow(
        id=done.request_id,
        reason=done.reason.value,
        arrival=timing.arrival,
        ttft=timing.ttft,
        tpot=timing.tpot,
        tbt_max=timing.tbt_max,
        e2e=timing.e2e,
        prompt_tokens=timing.prompt_tokens,
        cached_tokens=timing.cached_tokens,
        output_tokens=timing.output_tokens,
        late_tokens=timing.late_tokens,
        preemptions=timing.preemptions,
        attained=attains(timing, done.slo),
    )


def _joined(parts: list[FloatArray]) -> FloatArray:
    return np.concatenate(parts) if parts else np.empty(0)
