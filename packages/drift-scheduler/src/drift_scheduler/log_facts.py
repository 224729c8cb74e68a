"""What a decision log amounts to: its requests as a workload, what their clients saw, and how long work took.

One pass, in memory that grows with requests and not with steps. Also a cost model and overheads fitted to the lane
times of a log, so that a device that was measured in service can be simulated. Knows nothing of policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from statistics import median
from typing import Any

import numpy as np

from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.table import CostTable, DecodeRow, FusedRow, PrefillRow
from drift_scheduler.domain import (
    DecodeShape,
    Event,
    FinishReason,
    Lane,
    Observation,
    Partition,
    PrefillShape,
    Request,
    RequestArrived,
    RequestCancelled,
    Sharing,
)
from drift_scheduler.errors import DriftError
from drift_scheduler.log_reader import DecisionLogFile, LoggedEnd, LoggedStep
from drift_scheduler.metrics import Distribution

KEPT = 20_000
"""Lane times kept of one log: evenly spaced once there are more."""

SERVED = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class Timed:
    """One finished piece of work; `seconds` from the decision that launched it to the step that saw its end."""

    seen: Observation
    seconds: float


class Sample:
    """An evenly spaced sample of a stream: when it is full, every second value goes and every second is skipped."""

    def __init__(self, size: int = KEPT) -> None:
        self.values: list[Timed] = []
        self._size = size
        self._stride = 1
        self._count = 0

    def add(self, value: Timed) -> None:
        """One value."""
        if self._count % self._stride == 0:
            self.values.append(value)
            if len(self.values) > self._size:
                self.values = self.values[::2]
                self._stride *= 2
        self._count += 1


@dataclass(slots=True)
class Facts:
    """A log in one pass. `requests`: those that ended, in order of arrival, with their true lengths and all their
    prefix keys. `interruptions`: cancellations and their times. Times in seconds from the first arrival for an
    engine's log, on the simulation's clock otherwise."""

    requests: list[Request] = field(default_factory=list)
    interruptions: list[tuple[float, Event]] = field(default_factory=list)
    keys: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Names of the pages that outputs filled, by request."""
    ends: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))
    unfinished: int = 0
    steps: int = 0
    faults: int = 0
    ttft: Distribution = field(default_factory=Distribution)
    tbt: Distribution = field(default_factory=Distribution)
    sample: Sample = field(default_factory=Sample)


def gather(log: DecisionLogFile) -> Facts:
    """Read the whole log. Raises DriftError at a bad line, and where it holds no request that ended."""
    facts = Facts()
    arrived: dict[str, Request] = {}
    launched: dict[Lane, float] = {}
    for step in log.steps():
        facts.steps += 1
        facts.faults += len(step.faults)
        for event in step.events:
            if isinstance(event, RequestArrived):
                arrived[event.request.id] = event.request
            elif isinstance(event, RequestCancelled) and event.reason is FinishReason.CANCELLED:
                facts.interruptions.append((step.now, event))
        for end in step.finished:
            _note_end(facts, arrived.pop(end.id, None), end)
        for gap, count in step.gaps:
            facts.tbt.extend(np.full(count, gap))
        _note_lanes(facts, step, launched)
    facts.unfinished = len(arrived)
    if not facts.requests:
        raise DriftError(f"log {log.path}: no request that arrived in it ended in it")
    facts.requests.sort(key=lambda request: request.arrival)
    if log.source == "engine":
        _shift(facts, facts.requests[0].arrival)
    return facts


def _note_end(facts: Facts, request: Request | None, end: LoggedEnd) -> None:
    facts.ends[end.reason] += 1
    if request is None:
        return
    if end.keys:
        facts.keys[end.id] = end.keys
        request = replace(request, prefix_keys=(*request.prefix_keys, *end.keys))
    if request.output_tokens is None and end.reason is not FinishReason.CANCELLED:
        request = replace(request, output_tokens=max(1, end.output_tokens))
    facts.requests.append(request)
    if end.reason in SERVED and end.ttft is not None:
        facts.ttft.add(end.ttft)


def _note_lanes(facts: Facts, step: LoggedStep, launched: dict[Lane, float]) -> None:
    for seen in step.observations:
        begun = launched.pop(seen.lane, None)
        if begun is None or seen.measured <= 0:
            continue
        waited = (
            seen.sharing is Sharing.TEMPORAL and seen.lane is Lane.PREFILL
        )  # for the decode step before it
        facts.sample.add(Timed(seen, seen.measured if waited else max(step.now - begun, seen.measured)))
    if step.gang is not None:
        if step.gang.prefill is not None:
            launched[Lane.PREFILL] = step.now
        if step.gang.decode is not None:
            launched[Lane.DECODE] = step.now


def _shift(facts: Facts, origin: float) -> None:
    """Let time begin at the first arrival."""
    facts.requests = [replace(request, arrival=request.arrival - origin) for request in facts.requests]
    facts.interruptions = [(max(0.0, at - origin), event) for at, event in facts.interruptions]


# ------------------------------------------------------------------------------------- fitted to a log


class MeasuredCost:
    """Implements `CostModel`: what work took in a log, as factors on a table's solo times.

    `factors`: measured over predicted of work that ran alone, by phase and units (0: any). `slow`: the typical
    slowdown (prefill, decode) of work beside the other lane, by decode units of the split (0: any).
    """

    def __init__(
        self,
        base: FittedCost,
        factors: Mapping[tuple[str, int], float],
        slow: Mapping[int, tuple[float, float]],
    ) -> None:
        self.base = base
        self._factors = factors
        self._slow = slow

    def prefill(self, work: PrefillShape, units: int) -> float:
        """Typical seconds for all layers."""
        return self.base.prefill(work, units) * self.factor("prefill", units)

    def decode(self, work: DecodeShape, units: int) -> float:
        """Typical seconds for a step."""
        return self.base.decode(work, units) * self.factor("decode", units)

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """Typical seconds for one mixed pass."""
        return self.base.fused(prefill, decode, units) * self.factor("fused", units)

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """Typical, not worst, factors: this model is what a device does, not what a scheduler fears."""
        return self._slow.get(partition.decode) or self._slow.get(0) or (1.0, 1.0)

    def observe(self, observation: Observation) -> None:
        """Does not learn: the log is over."""

    def factor(self, phase: str, units: int) -> float:
        """Of a phase on so many units."""
        return self._factors.get((phase, units)) or self._factors.get((phase, 0)) or 1.0


class DrawnCost(MeasuredCost):
    """A measured model in which each piece of work deviates from the typical as one of the log's did, drawn by a seed.

    Deviations are drawn independently, so a machine that was slow for a second is not slow for a second here.
    """

    def __init__(self, typical: MeasuredCost, deviations: Mapping[str, Sequence[float]], seed: int) -> None:
        super().__init__(typical.base, typical._factors, typical._slow)
        self._deviations = deviations
        self._random = Random(seed)

    def factor(self, phase: str, units: int) -> float:
        """The typical factor times a deviation."""
        drawn = self._deviations.get(phase)
        return super().factor(phase, units) * (self._random.choice(drawn) if drawn else 1.0)


@dataclass(frozen=True, slots=True)
class MeasuredDevice:
    """What a log says of the device it ran on: how long work takes, launching it and noticing its end included.

    `deviations`: actual over typical seconds of each piece of work, by phase.
    """

    typical: MeasuredCost
    deviations: Mapping[str, Sequence[float]]
    table: CostTable

    def costs(self, seed: int = 0) -> DrawnCost:
        """A model of what the device does."""
        return DrawnCost(self.typical, self.deviations, seed)


def measured_device(log: DecisionLogFile, facts: Facts) -> MeasuredDevice:
    """Fit the log's times, over its cost table where it has one. Raises DriftError where there are none."""
    table = log.table if log.table is not None else _table(log, facts.sample.values)
    base = FittedCost(table)
    typical = MeasuredCost(base, {}, {})
    for _ in range(2):  # factors from what ran alone, then slowdowns relative to them
        typical = MeasuredCost(base, *_ratios(typical, log, facts))
    return MeasuredDevice(typical, _deviations(typical, log, facts), table)


def _ratios(
    costs: MeasuredCost, log: DecisionLogFile, facts: Facts
) -> tuple[dict[tuple[str, int], float], dict[int, tuple[float, float]]]:
    alone: dict[tuple[str, int], list[float]] = {}
    beside: dict[tuple[str, int], list[float]] = {}
    for timed in facts.sample.values:
        phase, units, typical = _predicted(costs, timed.seen, log.device.num_layers)
        if typical <= 0:
            continue
        if timed.seen.overlapped:
            for cell in ((phase, timed.seen.partition.decode), (phase, 0)):
                beside.setdefault(cell, []).append(timed.seconds / typical)
        else:
            for cell in ((phase, units), (phase, 0)):
                alone.setdefault(cell, []).append(timed.seconds / typical * costs.factor(*cell))
    factors = {cell: median(values) for cell, values in alone.items() if len(values) >= 3 or not cell[1]}
    slow = {
        units: (_slow(beside.get(("prefill", units))), _slow(beside.get(("decode", units))))
        for units in {units for _, units in beside}
    }
    return factors, slow


def _slow(ratios: Sequence[float] | None) -> float:
    return max(1.0, median(ratios)) if ratios else 1.0


def _deviations(costs: MeasuredCost, log: DecisionLogFile, facts: Facts) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for timed in facts.sample.values:
        seen = timed.seen
        phase, _, typical = _predicted(costs, seen, log.device.num_layers)
        if typical <= 0:
            continue
        if seen.overlapped and seen.prefill is not None and seen.decode is not None:
            slow_prefill, slow_decode = costs.slowdown(seen.prefill, seen.decode, seen.partition)
            typical *= slow_prefill if seen.lane is Lane.PREFILL else slow_decode
        found.setdefault(phase, []).append(timed.seconds / typical)
    return found


def _predicted(costs: FittedCost | MeasuredCost, seen: Observation, layers: int) -> tuple[str, int, float]:
    """Phase, units and solo seconds of observed work; 0 seconds where it cannot be told."""
    spatial = seen.sharing is Sharing.SPATIAL
    total = max(1, *seen.partition)
    if seen.sharing is Sharing.FUSED:
        if seen.prefill is None or seen.decode is None:
            return "fused", total, 0.0
        return "fused", total, costs.fused(seen.prefill, seen.decode, total)
    if seen.lane is Lane.PREFILL:
        units = max(1, seen.partition.prefill) if spatial else total
        if seen.prefill is None:
            return "prefill", units, 0.0
        return "prefill", units, costs.prefill(seen.prefill, units) * seen.layers / layers
    units = max(1, seen.partition.decode) if spatial else total
    return "decode", units, 0.0 if seen.decode is None else costs.decode(seen.decode, units)


def _table(log: DecisionLogFile, sample: Iterable[Timed]) -> CostTable:
    """A cost table out of the log's own lane times, for a log that has none."""
    prefill, decode, fused = [], [], []
    layers = log.device.num_layers
    for o in (timed.seen for timed in sample):
        units = max(1, o.partition.decode if o.lane is Lane.DECODE else o.partition.prefill)
        units = units if o.sharing is Sharing.SPATIAL else log.device.total_units
        if o.sharing is Sharing.FUSED:
            if o.prefill is not None and o.decode is not None and o.lane is Lane.DECODE:
                fused.append(_fused_row(o.prefill, o.decode, units, o.measured))
        elif o.lane is Lane.PREFILL and o.prefill is not None:
            prefill.append(_prefill_row(o.prefill, units, o.measured * layers / max(1, o.layers)))
        elif o.lane is Lane.DECODE and o.decode is not None:
            decode.append(
                DecodeRow(
                    units=units,
                    batch=o.decode.batch,
                    context_tokens=o.decode.context_tokens,
                    seconds=o.measured,
                )
            )
    if not prefill or not decode:
        raise DriftError(
            f"log {log.path}: has neither a cost table nor lane times of both phases to fit one to"
        )
    return CostTable(
        device=log.device.name,
        model="as logged",
        num_layers=layers,
        total_units=log.device.total_units,
        menu=tuple((p.prefill, p.decode) for p in log.device.menu),
        prefill=tuple(prefill),
        decode=tuple(decode),
        fused=tuple(fused),
        source=f"lane times of {log.path}",
    )


def _prefill_row(shape: PrefillShape, units: int, seconds: float) -> PrefillRow:
    return PrefillRow(
        units=units,
        requests=shape.requests,
        new=shape.new_tokens,
        reused=shape.reused_tokens,
        new_squared=shape.new_squared,
        new_times_reused=shape.new_times_reused,
        seconds=seconds,
    )


def _fused_row(prefill: PrefillShape, decode: DecodeShape, units: int, seconds: float) -> FusedRow:
    return FusedRow(
        units=units,
        requests=prefill.requests,
        new=prefill.new_tokens,
        reused=prefill.reused_tokens,
        new_squared=prefill.new_squared,
        new_times_reused=prefill.new_times_reused,
        batch=decode.batch,
        context_tokens=decode.context_tokens,
        seconds=seconds,
    )
