"""What another policy would have done with what a log saw: `drift replay`, report schema `drift.replay/1`.

Two answers. *Decisions*: at each decision of the log, with exactly the logged state, what would it have chosen? (A
policy that decides differently would soon see a different state; this does not say what becomes of that.) *Outcome*:
the logged arrivals, served anew in the simulator under the other policy, with the costs the log names or, for an
engine's log, costs fitted to its times. How far to trust the second is measured by simulating the log's own policy as
well: the error per statistic, and over several logs whether policies rank as they did (Kendall's tau).

Arrivals stay where they were: a client that would have sent its next turn earlier is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from math import sqrt
from typing import Any, Protocol

from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.domain import SLO, FinishReason
from drift_scheduler.errors import DriftError
from drift_scheduler.log_facts import Facts, MeasuredDevice, gather, measured_device
from drift_scheduler.log_reader import DecisionLogFile, open_log
from drift_scheduler.loop import serve
from drift_scheduler.metrics import Metrics
from drift_scheduler.plugins import Registry
from drift_scheduler.protocols import DispatchPolicy
from drift_scheduler.report import Report, build_report
from drift_scheduler.scheduler import Scheduler, refuse
from drift_scheduler.shadow import Agreement, compare
from drift_scheduler.simulation.executor import SimulatedExecutor
from drift_scheduler.simulation.kv import CountingKv
from drift_scheduler.simulation.run import Scenario, Simulation, create, parse_choice

SCHEMA = "drift.replay/1"

STATISTICS = (("ttft_s", "p50"), ("ttft_s", "p99"), ("tbt_s", "p50"), ("tbt_s", "p99"))
"""What the simulator is held to."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A dispatch and a partition policy, each `NAME[:option=value...]`."""

    dispatch: str
    partition: str


def replay(
    paths: Sequence[str],
    dispatch: Sequence[str],
    partition: str | None,
    registry: Registry,
) -> dict[str, Any]:
    """The report of one or more logs. `partition` `None`: each log's own. Raises DriftError.

    Each log's costs are its own. Only the ranking takes those of the first engine's log for all, so that what the
    others are ranked by was not fitted to them.
    """
    stages = [stage_of(open_log(path), registry) for path in paths]
    reports = [_report(stage, dispatch, partition, registry) for stage in stages]
    return {"schema": SCHEMA, "logs": reports, "ranking": _ranking(stages, reports)}


class Stage(Protocol):
    """Where a log's requests can be served again."""

    log: DecisionLogFile
    facts: Facts

    @property
    def own(self) -> Choice:
        """The policies that ran."""

    def scheduler(self, policy: DispatchPolicy, choice: Choice) -> Scheduler:
        """A fresh scheduler as the log's was, with another dispatch policy."""

    def simulate(self, choice: Choice) -> Report:
        """Serve the logged requests under other policies."""


def stage_of(log: DecisionLogFile, registry: Registry) -> Stage:
    """The stage of a log. Raises DriftError where its first line does not say enough."""
    return (SimulationStage if log.source == "simulation" else EngineStage)(log, registry)


class SimulationStage:
    """A simulated log's: the same scenario, with the logged requests."""

    def __init__(self, log: DecisionLogFile, registry: Registry) -> None:
        self.log = log
        self.facts = gather(log)
        self._registry = registry
        self._scenario = _scenario(log)

    @property
    def own(self) -> Choice:
        """The policies that ran."""
        return Choice(self._scenario.dispatch, self._scenario.partition)

    def scheduler(self, policy: DispatchPolicy, choice: Choice) -> Scheduler:
        """Device, pool and costs of the scenario."""
        run = Simulation(self._scenario, self._registry)
        if (run.device.menu, run.device.num_layers) != (self.log.device.menu, self.log.device.num_layers):
            raise DriftError(
                f"log {self.log.path}: device '{self.log.device.name}' is described differently by now; "
                "its decisions cannot be replayed"
            )
        refuse(run.device, create(self._registry, "dispatch policy", choice.dispatch))
        partitions = create(self._registry, "partition policy", choice.partition)
        return Scheduler(run.device, run.kv, policy, partitions, run.costs, self.log.limits)

    def simulate(self, choice: Choice) -> Report:
        """The scenario under other policies."""
        scenario = replace(self._scenario, dispatch=choice.dispatch, partition=choice.partition)
        run = Simulation(scenario, self._registry)
        run.requests = list(self.facts.requests)
        report = run.run()
        report["config"]["workload"] = self.log.path
        return report


class EngineStage:
    """An engine's log's: the device it says it had, with costs fitted to its lane times."""

    def __init__(self, log: DecisionLogFile, registry: Registry) -> None:
        self.log = log
        self.facts = gather(log)
        self._registry = registry
        self._own = Choice(_name(log, "dispatch"), _name(log, "partition"))
        self._measured: MeasuredDevice | None = None

    @property
    def own(self) -> Choice:
        """The policies that ran."""
        return self._own

    @property
    def measured(self) -> MeasuredDevice:
        """What its lane times say of the device."""
        if self._measured is None:
            self._measured = measured_device(self.log, self.facts)
        return self._measured

    def take_costs(self, other: EngineStage) -> None:
        """Use another log's. Raises DriftError where that ran on another device."""
        ours, theirs = self.log.device, other.log.device
        if (ours.total_units, ours.num_layers) != (theirs.total_units, theirs.num_layers):
            raise DriftError(
                f"log {self.log.path}: {ours.total_units} units and {ours.num_layers} layers, log {other.log.path} has "
                f"{theirs.total_units} and {theirs.num_layers}: logs of different devices are replayed one by one"
            )
        self._measured = other.measured

    def scheduler(self, policy: DispatchPolicy, choice: Choice) -> Scheduler:
        """The logged device and pool; the scheduler believes the log's own cost table, as it did then."""
        log = self.log
        refuse(log.device, self._create("dispatch policy", choice.dispatch))
        table = log.table if log.table is not None else self.measured.table
        kv = CountingKv(log.total_pages, log.page_tokens)
        partitions = self._create("partition policy", choice.partition)
        return Scheduler(log.device, kv, policy, partitions, FittedCost(table), log.limits)

    def simulate(self, choice: Choice) -> Report:
        """The logged requests and cancellations on a simulated device that takes as long as the logged one did."""
        facts, measured = self.facts, self.measured
        scheduler = self.scheduler(self._create("dispatch policy", choice.dispatch), choice)
        metrics = Metrics(self.log.device, scheduler.kv)
        executor = SimulatedExecutor(
            self.log.device, measured.costs(), facts.requests, interruptions=facts.interruptions
        )
        serve(scheduler, executor, lambda step: None, [metrics], on_fault=_end_run)
        left = metrics.offered - sum(metrics.ends.values())
        if left:
            raise DriftError(
                f"dispatch policy '{choice.dispatch}' left {left} of {metrics.offered} requests unserved"
            )
        config = {"workload": self.log.path, "device": self.log.device.name, **asdict(choice)}
        return build_report(metrics, config)

    def _create(self, kind: str, choice: str) -> Any:
        """A policy; the log's own gets the options that its engine was started with."""
        key = "dispatch" if kind == "dispatch policy" else "partition"
        name, options = parse_choice(choice)
        given = self.log.config.get(f"{key}_options")
        if choice == getattr(self._own, key) and isinstance(given, dict):
            options |= given
        return self._registry.create(kind, name, **options)


def _name(log: DecisionLogFile, key: str) -> str:
    value = log.config.get(key)
    if not isinstance(value, str):
        raise DriftError(f"log {log.path}:1: field config.{key}: {value!r} is no name of a policy")
    return value


def _scenario(log: DecisionLogFile) -> Scenario:
    """The scenario of a simulated log, its workload apart. Raises DriftError."""
    config = dict(log.config)
    known = {f.name for f in fields(Scenario)} - {"slo", "workload", "rate", "requests"}
    try:
        slo = SLO(float(config["slo_ttft"]), float(config["slo_tbt"]))
        settings = {name: value for name, value in config.items() if name in known}
        return Scenario(workload="synthetic", requests=1, rate=1.0, slo=slo, **settings)
    except (KeyError, TypeError, ValueError) as error:
        raise DriftError(f"log {log.path}:1: field config: not a simulation's: {error!r}") from error


def _end_run(observer: object, error: Exception) -> None:
    raise error


# --------------------------------------------------------------------------------------------- reports


def _report(
    stage: Stage, dispatch: Sequence[str], partition: str | None, registry: Registry
) -> dict[str, Any]:
    log, facts, own = stage.log, stage.facts, stage.own
    simulated = stage.simulate(own)
    logged = {"ttft_s": facts.ttft.summary(), "tbt_s": facts.tbt.summary()}
    others = [Choice(name, partition or own.partition) for name in dispatch]
    if not dispatch and partition is not None:
        others = [Choice(own.dispatch, partition)]
    return {
        "log": log.path,
        "source": log.source,
        "device": log.device.name,
        "dispatch": own.dispatch,
        "partition": own.partition,
        "steps": facts.steps,
        "truncated_line": log.truncated[0] if log.truncated else None,
        "faults": facts.faults,
        "requests": {
            "offered": len(facts.requests) + facts.unfinished,
            "finished": facts.ends[FinishReason.STOP] + facts.ends[FinishReason.LENGTH],
            "rejected": facts.ends[FinishReason.REJECTED],
            "cancelled": facts.ends[FinishReason.CANCELLED],
            "failed": facts.ends[FinishReason.FAILED],
            "unfinished": facts.unfinished,
        },
        "logged": logged,
        "simulated": {key: simulated[key] for key in logged},
        "error": errors(logged, simulated),
        "decisions": _decisions(stage, own, registry),
        "others": [_other(stage, choice, registry) for choice in others],
    }


def _other(stage: Stage, choice: Choice, registry: Registry) -> dict[str, Any]:
    return {
        **asdict(choice),
        "decisions": _decisions(stage, choice, registry),
        "report": stage.simulate(choice),
    }


def _decisions(stage: Stage, choice: Choice, registry: Registry) -> dict[str, Any]:
    """How a policy compares with the log's gangs; only the reason where it cannot run on the logged device."""
    policy = create(registry, "dispatch policy", choice.dispatch)
    if isinstance(stage, EngineStage):
        policy = stage._create("dispatch policy", choice.dispatch)
    try:
        found = compare(stage.log, policy, lambda p: stage.scheduler(p, choice), stage.facts.keys)
    except DriftError as error:
        return {"compared": 0, "agreed": 0, "ratio": None, "reason": str(error)}
    return _agreement(found)


def _agreement(found: Agreement) -> dict[str, Any]:
    return {
        "compared": found.decisions,
        "agreed": found.agreed,
        "ratio": found.ratio,
        "differ": {kind: count for kind, count in found.differ.items() if count},
        "first_difference": None if found.first is None else asdict(found.first),
        "followed_steps": found.followed,
        "states_differ": found.states_differ,
        "stopped": None if found.stopped is None else {"line": found.stopped[0], "reason": found.stopped[1]},
    }


def errors(logged: dict[str, Any], simulated: dict[str, Any]) -> dict[str, float | None]:
    """Simulated over logged, less one, per statistic; `None` where there is nothing to compare."""
    found: dict[str, float | None] = {}
    for key, quantile in STATISTICS:
        was, now = logged[key][quantile], simulated[key][quantile]
        name = f"{key.removesuffix('_s')}_{quantile}"
        found[name] = now / was - 1 if was and now is not None else None
    return found


def _ranking(stages: Sequence[Stage], reports: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Whether policies rank in simulation as they did in their logs; `None` with a single log."""
    if len(stages) < 2:
        return None
    names = [_label(stage.own, stages[0].own) for stage in stages]
    simulated = [report["simulated"] for report in reports]
    first = next((stage for stage in stages if isinstance(stage, EngineStage)), None)
    for i, stage in enumerate(stages):
        if isinstance(stage, EngineStage) and first is not None and stage is not first:
            stage.take_costs(first)
            simulated[i] = stage.simulate(stage.own)
    return {"policies": names, "statistics": ranks(names, [r["logged"] for r in reports], simulated)}


def _label(choice: Choice, usual: Choice) -> str:
    """The dispatch policy, and the partition policy where it is another than usual."""
    same = choice.partition == usual.partition
    return choice.dispatch if same else f"{choice.dispatch} / {choice.partition}"


def ranks(
    names: Sequence[str], logged: Sequence[dict[str, Any]], simulated: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Per statistic: Kendall's tau, and the names in both orders, least seconds first."""
    found = {}
    for key, quantile in STATISTICS:
        was = [times[key][quantile] for times in logged]
        now = [times[key][quantile] for times in simulated]
        if None in was or None in now:
            continue
        found[f"{key.removesuffix('_s')}_{quantile}"] = {
            "tau": kendall(was, now),
            "logged": [names[i] for i in sorted(range(len(names)), key=was.__getitem__)],
            "simulated": [names[i] for i in sorted(range(len(names)), key=now.__getitem__)],
        }
    return found


def kendall(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings: 1 the same order, -1 the reverse; `None` where one has only ties.

    Kendall, Rank Correlation Methods (1948): (concordant - discordant) / sqrt((pairs - ties in 1)(pairs - ties in 2)).
    """
    score = pairs = ties_first = ties_second = 0
    for i, j in combinations(range(len(first)), 2):
        a, b = _sign(first[i] - first[j]), _sign(second[i] - second[j])
        score += a * b
        pairs += 1
        ties_first += a == 0
        ties_second += b == 0
    below = (pairs - ties_first) * (pairs - ties_second)
    return score / sqrt(below) if below else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
