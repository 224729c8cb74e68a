"""What a run amounts to, counted step by step in bounded memory: an observer, and the distributions it keeps.

Times come from the steps' own clock, simulated or real. Knows nothing of policies or of how a report looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    Device,
    Finished,
    FinishReason,
    FloatArray,
    Gang,
    IntArray,
    Lane,
    LaneFailed,
    PrefillDone,
    RequestArrived,
    RequestTiming,
    Sharing,
    StepRecord,
    Tokens,
)
from drift_scheduler.protocols import KvPool

EXACT = 100_000
"""Values a distribution keeps as they are; beyond, buckets 2% wide, so that quantiles are within 1%."""

_RATIO = 1.02
_LOWEST = 1e-7
_BUCKETS = 1 + math.ceil(math.log(1e6 / _LOWEST) / math.log(_RATIO))  # 0.1 us to 11 days
_MIDDLES: FloatArray = (_LOWEST * _RATIO ** (np.arange(_BUCKETS) - 0.5)).astype(np.float64)


class Distribution:
    """Quantiles of a stream of seconds, exact up to `EXACT` values and within 1% beyond. Mean and maximum are exact."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.maximum = 0.0
        self._values: FloatArray = np.empty(256)  # the first `count` of them, until there are too many
        self._counts: IntArray | None = None  # per bucket, from then on

    def add(self, value: float) -> None:
        """One value."""
        if self._counts is None and self.count < len(self._values):
            self._values[self.count] = value
            self.count += 1
            self.total += value
            self.maximum = max(self.maximum, value)
        else:
            self.extend(np.array([value]))

    def extend(self, values: FloatArray) -> None:
        """Many values at once."""
        if not len(values):
            return
        before, self.count = self.count, self.count + len(values)
        self.total += float(values.sum())
        self.maximum = max(self.maximum, float(values.max()))
        if self._counts is None and self.count > EXACT:
            self._counts = _bucketed(self._values[:before])
            self._values = np.empty(0)
        if self._counts is not None:
            self._counts += _bucketed(values)
            return
        if self.count > len(self._values):
            room = np.empty(min(EXACT, 2 * self.count))
            room[:before] = self._values[:before]
            self._values = room
        self._values[before : self.count] = values

    def quantile(self, q: float) -> float | None:
        """The nearest-rank quantile; `None` without values."""
        if not self.count:
            return None
        rank = max(0, math.ceil(q * self.count) - 1)
        if self._counts is None:
            return float(np.partition(self._values[: self.count], rank)[rank])
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank + 1))
        return min(float(_MIDDLES[bucket]), self.maximum)

    def summary(self) -> dict[str, float | None]:
        """mean, p50, p90, p99 and max; all `None` without values."""
        if not self.count:
            return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
        quantiles = {name: self.quantile(q) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
        return {"mean": self.total / self.count, **quantiles, "max": self.maximum}


def _bucketed(values: FloatArray) -> IntArray:
    """How many values fall into each bucket; bucket i ends at _LOWEST * _RATIO**i."""
    exponents = np.log(np.maximum(values, _LOWEST) / _LOWEST) / math.log(_RATIO)
    indexes = np.clip(np.ceil(exponents), 0, _BUCKETS - 1).astype(np.int64)
    return np.bincount(indexes, minlength=_BUCKETS).astype(np.int64)


@dataclass(slots=True)
class ClassCounts:
    """How the requests of one SLO class fared."""

    slo: SLO
    finished: int = 0
    lost: int = 0
    """Rejected or failed."""
    late_first_tokens: int = 0
    gaps: int = 0
    late_gaps: int = 0
    attained: int = 0

    @property
    def served(self) -> int:
        """Requests that count: all but those their client gave up."""
        return self.finished + self.lost

    @property
    def ttft_attainment(self) -> float:
        """Share of requests whose first token came in time; a lost one's did not."""
        return 1 - (self.late_first_tokens + self.lost) / self.served if self.served else 1.0

    @property
    def tbt_attainment(self) -> float:
        """Share of gaps between tokens within target."""
        return 1 - self.late_gaps / self.gaps if self.gaps else 1.0

    @property
    def attainment(self) -> float:
        """Share of requests that met all of their own targets (see `attains`)."""
        return self.attained / self.served if self.served else 1.0

    @property
    def met(self) -> bool:
        """Both 99th percentiles within target: at most one in a hundred requests and gaps late."""
        return self.ttft_attainment >= 0.99 and self.tbt_attainment >= 0.99


def attains(timing: RequestTiming, slo: SLO) -> bool:
    """Whether a request met its targets: TTFT, at most one in a hundred of its gaps over TBT, and e2e if given."""
    gaps = max(0, timing.output_tokens - 1)
    return (
        timing.ttft is not None
        and timing.ttft <= slo.ttft
        and timing.late_tokens <= 0.01 * gaps
        and (slo.e2e is None or timing.e2e <= slo.e2e)
    )


@dataclass(slots=True)
class LaneTime:
    """Where the device's time went, seconds. A bubble is a lane's units idle while the other lane works spatially."""

    prefill_busy: float = 0.0
    decode_busy: float = 0.0
    bubble_unit_seconds: float = 0.0
    busy_unit_seconds: float = 0.0
    sharing: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("spatial", "temporal", "fused", "streams", "exclusive_prefill", "exclusive_decode", "idle"), 0.0
        )
    )


class Metrics:
    """Implements `Observer`: counts everything a report says. Memory does not grow with the run.

    `device` tells what a lane's idle units are; `kv`, where given, is asked for its free pages at every step.
    """

    def __init__(self, device: Device, kv: KvPool | None = None) -> None:
        self.device = device
        self._kv = kv
        self.offered = 0
        self.ends = dict.fromkeys(FinishReason, 0)
        self.started: float | None = None
        self.now = 0.0
        self.ttft = Distribution()
        self.tbt = Distribution()
        self.tpot = Distribution()
        self.e2e = Distribution()
        self.queue = Distribution()
        self.step_us = Distribution()
        self.classes: dict[str, ClassCounts] = {}
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.preemptions = 0
        self.least_free_pages = kv.total_pages if kv is not None else 0
        self.lanes = LaneTime()
        self.steps = 0
        self.faults = 0
        self.first_fault: str | None = None
        self._prefill: Gang | None = None  # the gangs the lanes work on
        self._decode: Gang | None = None
        self._errors: dict[Lane, list[float]] = {Lane.PREFILL: [0.0, 0.0], Lane.DECODE: [0.0, 0.0]}
        self._pending: list[FloatArray] = []
        self._pending_gaps = 0

    def on_step(self, record: StepRecord) -> None:
        """Take one step in."""
        if self.started is None:
            self._start(record)
        self._spend(record.now)
        for event in record.events:
            match event:
                case DecodeDone():
                    self._decode = None
                case PrefillDone():
                    self._prefill = None
                case RequestArrived():
                    self.offered += 1
                case LaneFailed():
                    self._lane_failed(event.lane)
        step = record.step
        for output in step.outputs:
            match output:
                case Tokens():
                    self._tokens(output)
                case Finished():
                    self._finished(output)
        if step.gang is not None:
            self._launched(step.gang)
        for seen in step.observations:
            if seen.measured > 0:
                error = self._errors[seen.lane]
                error[0] += abs(seen.predicted / seen.measured - 1)
                error[1] += 1
        if self._kv is not None:
            self.least_free_pages = min(self.least_free_pages, self._kv.free_pages)
        if record.step_seconds is not None:
            self.step_us.add(record.step_seconds * 1e6)
        self.steps += 1
        self.faults += len(step.faults)
        if step.faults and self.first_fault is None:
            self.first_fault = step.faults[0]

    def settle(self) -> None:
        """Take in what was gathered for the next batch; ask before reading `tbt`."""
        if self._pending:
            self.tbt.extend(np.concatenate(self._pending))
            self._pending.clear()
            self._pending_gaps = 0

    @property
    def duration(self) -> float:
        """Seconds from the first arrival to the last step."""
        return self.now - self.started if self.started is not None else 0.0

    @property
    def peak_utilisation(self) -> float | None:
        """Largest share of pages referenced at once; `None` without a pool."""
        return None if self._kv is None else 1 - self.least_free_pages / self._kv.total_pages

    @property
    def bubble_ratio(self) -> float:
        """Unit-seconds idle while the other lane works spatially, of all unit-seconds in which either works."""
        busy = self.lanes.busy_unit_seconds
        return self.lanes.bubble_unit_seconds / busy if busy else 0.0

    def cost_error(self, lane: Lane) -> float | None:
        """Mean of |predicted / measured - 1| over a lane's finished work; `None` without any."""
        total, count = self._errors[lane]
        return total / count if count else None

    def _start(self, record: StepRecord) -> None:
        arrivals = [e.request.arrival for e in record.events if isinstance(e, RequestArrived)]
        self.started = min([record.now, *arrivals])
        self.now = record.now

    def _spend(self, now: float) -> None:
        """Attribute the time since the last step to what ran."""
        seconds = now - self.now
        self.now = now
        if seconds <= 0:
            return
        lanes, prefill, decode = self.lanes, self._prefill, self._decode
        gang = prefill or decode
        if gang is None:
            lanes.sharing["idle"] += seconds
            return
        if prefill is not None:
            lanes.prefill_busy += seconds
        if decode is not None:
            lanes.decode_busy += seconds
        lanes.busy_unit_seconds += seconds * self.device.total_units
        if gang.sharing is Sharing.EXCLUSIVE:
            lanes.sharing["exclusive_prefill" if prefill is not None else "exclusive_decode"] += seconds
            return
        lanes.sharing[gang.sharing.value] += seconds
        if gang.sharing is Sharing.SPATIAL and (prefill is None or decode is None):
            idle = gang.partition.prefill if prefill is None else gang.partition.decode
            lanes.bubble_unit_seconds += seconds * idle

    def _launched(self, gang: Gang) -> None:
        if gang.prefill is not None:
            self._prefill = gang
        if gang.decode is not None:
            self._decode = gang

    def _lane_failed(self, lane: Lane) -> None:
        if lane is Lane.PREFILL:
            self._prefill = None
        else:
            self._decode = None

    def _tokens(self, tokens: Tokens) -> None:
        n = len(tokens.request_ids)
        self.output_tokens += n
        if tokens.first:
            return
        self._pending.append(tokens.gaps)
        self._pending_gaps += n
        if self._pending_gaps >= 8192:
            self.settle()

    def _finished(self, done: Finished) -> None:
        self.ends[done.reason] += 1
        timing, counts = done.timing, self._class(done.slo)
        self.preemptions += timing.preemptions
        if done.reason in (FinishReason.REJECTED, FinishReason.FAILED):
            counts.lost += 1
            return
        if done.reason is FinishReason.CANCELLED:
            return
        self.prompt_tokens += timing.prompt_tokens
        self.cached_tokens += timing.cached_tokens
        counts.finished += 1
        counts.gaps += max(0, timing.output_tokens - 1)
        counts.late_gaps += timing.late_tokens
        counts.attained += attains(timing, done.slo)
        self._add_times(timing, done.slo, counts)

    def _add_times(self, timing: RequestTiming, slo: SLO, counts: ClassCounts) -> None:
        self.e2e.add(timing.e2e)
        if timing.ttft is not None:
            self.ttft.add(timing.ttft)
            counts.late_first_tokens += timing.ttft > slo.ttft
        if timing.tpot is not None:
            self.tpot.add(timing.tpot)
        if timing.queue is not None:
            self.queue.add(timing.queue)

    def _class(self, slo: SLO) -> ClassCounts:
        counts = self.classes.get(slo.name)
        if counts is None:
            counts = self.classes[slo.name] = ClassCounts(slo)
        return counts


def overall(classes: Sequence[ClassCounts]) -> ClassCounts:
    """All classes as one; its `slo` is the first class's."""
    first = classes[0].slo if classes else SLO(math.inf, math.inf)
    total = ClassCounts(first)
    for counts in classes:
        total.finished += counts.finished
        total.lost += counts.lost
        total.late_first_tokens += counts.late_first_tokens
        total.gaps += counts.gaps
        total.late_gaps += counts.late_gaps
        total.attained += counts.attained
    return total
