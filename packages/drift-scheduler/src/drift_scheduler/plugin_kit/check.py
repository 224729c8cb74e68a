"""Holds a registered policy to the scheduler's rules and to a decision-time budget.

Every case of `drift_scheduler.conformance` is run with a fresh policy; then decisions are timed on a larger ride.
Clocks arrive as arguments: processor time for the 99th percentile, so that a busy machine condemns nobody, and wall
time for the median, so that a policy that sleeps or waits is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from drift_scheduler.conformance import CASES, Case, InvariantError, conform, exercise, run_case, small_device
from drift_scheduler.domain import DecodeStep, Gang, Partition, PrefillShape
from drift_scheduler.errors import UnknownNameError
from drift_scheduler.plugins import Registry
from drift_scheduler.protocols import CostModel, DispatchPolicy, PartitionPolicy
from drift_scheduler.scheduler import Limits
from drift_scheduler.simulation.run import parse_choice
from drift_scheduler.view import View

KINDS = ("dispatch policy", "partition policy")

BUDGET_US = 2000.0
"""A decision delays a decode step by as much: a tenth of a tight target of 20 ms."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How one ride went. `fault` is empty where all was well."""

    case: str
    steps: int
    requests: int
    faults: int
    fault: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one policy. Times in microseconds per decision; `refused`: why it cannot run on the cases'
    device, if it says so."""

    kind: str
    name: str
    plugin: str
    cases: tuple[CaseResult, ...]
    decisions: int
    wall_p50_us: float
    cpu_p99_us: float
    budget_us: float
    refused: str = ""

    @property
    def in_time(self) -> bool:
        """Whether decisions keep the budget."""
        return self.cpu_p99_us <= self.budget_us and self.wall_p50_us <= self.budget_us

    @property
    def passed(self) -> bool:
        """Whether every case went well, in time."""
        return not self.refused and self.in_time and not any(result.fault for result in self.cases)


def check(
    registry: Registry,
    name: str,
    *,
    wall: Clock,
    cpu: Clock,
    budget_us: float = BUDGET_US,
    cases: Sequence[Case] = CASES,
) -> list[Verdict]:
    """Check the policy `NAME[:option=value...]`, or every policy of the plugin called so. Raises DriftError.

    `wall`, `cpu`: clocks in seconds.
    """
    return [
        _verdict(registry, kind, choice, wall, cpu, budget_us, cases)
        for kind, choice in _find(registry, name)
    ]


def _find(registry: Registry, name: str) -> list[tuple[str, str]]:
    """(kind, choice) of each policy meant."""
    bare, _ = parse_choice(name)
    found = [(kind, name) for kind in KINDS if bare in registry.names[kind]]
    if not found:
        found = [
            (kind, registered)
            for kind in KINDS
            for registered, entry in registry.names[kind].items()
            if entry.plugin == name
        ]
    if not found:
        names = {n for kind in KINDS for n in registry.names[kind]}
        plugins = {entry.plugin for kind in KINDS for entry in registry.names[kind].values()}
        raise UnknownNameError("policy or plugin", name, names | plugins)
    return found


def _verdict(
    registry: Registry,
    kind: str,
    choice: str,
    wall: Clock,
    cpu: Clock,
    budget_us: float,
    cases: Sequence[Case],
) -> Verdict:
    name, options = parse_choice(choice)

    def fresh() -> Any:
        return registry.create(kind, name, **options)

    plugin = registry.plugin_of(kind, name)
    refuses = getattr(fresh(), "refuses", None)
    reason = refuses(small_device()) if refuses is not None else None
    if reason:
        return Verdict(kind, choice, plugin, (), 0, 0.0, 0.0, budget_us, str(reason))
    results = tuple(_run(case, kind, fresh()) for case in cases)
    walls, cpus = _timed(kind, fresh(), wall, cpu)
    p50 = float(np.quantile(walls, 0.5)) * 1e6 if walls else 0.0
    p99 = float(np.quantile(cpus, 0.99)) * 1e6 if cpus else 0.0
    return Verdict(kind, choice, plugin, results, len(walls), p50, p99, budget_us)


def _run(case: Case, kind: str, policy: Any) -> CaseResult:
    dispatch, partitions = (policy, None) if kind == KINDS[0] else (None, policy)
    try:
        outcome = run_case(case, dispatch=dispatch, partitions=partitions)
    except InvariantError as error:
        return CaseResult(case.name, 0, case.requests, 1, str(error))
    try:
        conform(outcome)
    except InvariantError as error:
        return CaseResult(case.name, outcome.steps, len(outcome.reasons), len(outcome.faults), str(error))
    return CaseResult(case.name, outcome.steps, len(outcome.reasons), 0, "")


def _timed(kind: str, policy: Any, wall: Clock, cpu: Clock) -> tuple[list[float], list[float]]:
    """Seconds of each decision, wall and processor, with up to 256 requests running on 16 units."""
    timer = _Timer(wall, cpu)
    dispatch: DispatchPolicy
    partitions: PartitionPolicy | None = None
    if kind == KINDS[0]:
        dispatch = _TimedDispatch(policy, timer)
    else:
        from drift_scheduler.dispatch.gang import GangPolicy

        dispatch, partitions = GangPolicy(), _TimedPartitions(policy, timer)
    with suppress(InvariantError):  # the cases have told already
        exercise(
            dispatch,
            seed=99,
            partitions=partitions,
            device=small_device(16, 32),
            requests=300,
            pages=4000,
            limits=Limits(max_running=256),
        )
    return timer.walls, timer.cpus


class _Timer:
    """Collects what calls took."""

    def __init__(self, wall: Clock, cpu: Clock) -> None:
        self.wall = wall
        self.cpu = cpu
        self.walls: list[float] = []
        self.cpus: list[float] = []

    def add(self, wall_begun: float, cpu_begun: float) -> None:
        """One call that began then and ends now."""
        self.cpus.append(self.cpu() - cpu_begun)
        self.walls.append(self.wall() - wall_begun)


class _TimedDispatch:
    """A dispatch policy under the clocks."""

    def __init__(self, policy: DispatchPolicy, timer: _Timer) -> None:
        self._policy = policy
        self._timer = timer

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """The policy's."""
        begun = self._timer.wall(), self._timer.cpu()
        try:
            return self._policy.choose(view, costs, partitions)
        finally:
            self._timer.add(*begun)


class _TimedPartitions:
    """A partition policy under the clocks."""

    def __init__(self, policy: PartitionPolicy, timer: _Timer) -> None:
        self._policy = policy
        self._timer = timer

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """The policy's."""
        begun = self._timer.wall(), self._timer.cpu()
        try:
            return self._policy.split(view, prefill, decode, costs)
        finally:
            self._timer.add(*begun)
