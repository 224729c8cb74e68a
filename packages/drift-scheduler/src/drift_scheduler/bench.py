"""A grid of goodput searches from a scenario file, and what a report folder holds.

Cells are system x workload x TBT target; every policy is searched in every cell. Cells chosen for detail also get
curves: attained rate over offered rate, attainment over the scale of both targets, and one recorded run per policy at
the base policy's goodput. Knows what is run and written, not how it is drawn or spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from drift_scheduler.domain import SLO
from drift_scheduler.errors import DriftError
from drift_scheduler.goodput import (
    Criterion,
    Outcome,
    PolicyGoodput,
    SearchPlan,
    Start,
    Trial,
    at_rate,
    begin,
    ratios,
)
from drift_scheduler.plugins import Registry, load
from drift_scheduler.reporting.recorder import Recording
from drift_scheduler.scenario_file import ScenarioFile, System, Workload, parse_scenario, read_source
from drift_scheduler.simulation.run import TRACE_SUFFIXES, Scenario, parse_choice
from drift_scheduler.toml_lines import Source
from drift_scheduler.tuning import Search, base_of, policy_search, to_document, tunable

SCHEMA = "drift.bench/1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell:
    """One system, workload and TBT target. `scenario` has the first policy as its dispatch."""

    key: str
    system: System
    workload: Workload
    tbt: float
    scenario: Scenario
    plan: SearchPlan
    start: Start

    @property
    def system_title(self) -> str:
        """What tables call the device with its model."""
        return f"{self.system.model} on {self.system.device}"


@dataclass(frozen=True)
class Grid:
    """A scenario file made ready: every cell's names resolved, nothing searched yet."""

    file: ScenarioFile
    cells: tuple[Cell, ...]
    base: str


@dataclass(frozen=True)
class Point:
    """A whole run for a curve: where it is on the x axis (a rate, or a scale), and its report."""

    x: float
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Detail:
    """A cell's curves by policy. `rate`: of the recorded runs and of the scaled ones."""

    cell: Cell
    rate: float
    by_rate: Mapping[str, Sequence[Point]]
    by_scale: Mapping[str, Sequence[Point]]
    recordings: Mapping[str, Recording]


@dataclass(frozen=True)
class Result:
    """A finished bench."""

    grid: Grid
    goodput: Mapping[str, Mapping[str, PolicyGoodput]]
    """Cell key -> policy -> goodput."""
    details: tuple[Detail, ...]

    def ratio(self, cell: Cell, policy: str) -> float | None:
        """A policy's goodput over the base's in a cell; `None` where the base never meets the targets."""
        found = self.goodput[cell.key]
        return ratios(found[policy], found[self.grid.base])[0]


def read_grid(path: str | Path, registry: Registry | None = None) -> Grid:
    """A scenario file, every name in it resolved. Raises DriftError `FILE:LINE: KEY: ...`."""
    registry = registry if registry is not None else load()
    source = read_source(path)
    return make_grid(parse_scenario(source), source, registry)


def make_grid(file: ScenarioFile, where: Source, registry: Registry) -> Grid:
    """The cells of a checked file. Raises DriftError as `read_grid`."""
    criterion = _at(where, "search.criterion", lambda: Criterion.parse(file.search.criterion))
    for i, policy in enumerate(file.policies):
        _at(where, f"policies[{i}]", partial(_check_policy, registry, policy))
    cells = []
    for s, system in enumerate(file.all_systems()):
        for w, workload in enumerate(file.workloads):
            plan = SearchPlan(
                criterion,
                file.search.seeds,
                workload.requests or file.search.requests,
                file.search.lifetimes if workload.lifetimes is None else workload.lifetimes,
                file.search.tolerance,
            )
            for tbt in workload.tbt or system.tbt or file.tbt:
                scenario = _scenario(file, where, system, workload, tbt)
                start = _begin(file, where, (s, w), scenario, plan, registry)
                key = f"{system.device}/{system.model}/{workload.title}/tbt={tbt:g}"
                cells.append(Cell(key, system, workload, tbt, scenario, plan, start))
    return Grid(file, tuple(cells), file.base or base_of(file.policies))


def cell_searches(grid: Grid, registry: Registry) -> dict[str, Search[PolicyGoodput]]:
    """One search per cell and policy, named `CELL POLICY`."""
    return {
        f"{cell.key} {policy}": policy_search(
            registry, replace(cell.scenario, dispatch=policy), cell.plan, cell.start
        )
        for cell in grid.cells
        for policy in grid.file.policies
    }


def collect(grid: Grid, found: Mapping[str, PolicyGoodput]) -> dict[str, dict[str, PolicyGoodput]]:
    """Results of `cell_searches` by cell and policy."""
    return {
        cell.key: {policy: found[f"{cell.key} {policy}"] for policy in grid.file.policies}
        for cell in grid.cells
    }


def detailed(grid: Grid) -> tuple[Cell, ...]:
    """The cells that get curves."""
    match grid.file.detail.cells:
        case "all":
            return grid.cells
        case "first":
            return grid.cells[:1]
        case _:
            return ()


def detail_search(grid: Grid, cell: Cell, found: Mapping[str, PolicyGoodput]) -> Search[Detail]:
    """A cell's whole runs, all at once. Runs of one policy share its tuned options and the first seed."""
    best = max(result.rate for result in found.values()) or cell.start.rate
    rate = found[grid.base].rate or best
    settings = grid.file.detail
    rates = [float(f"{best * share:.4g}") for share in settings.rates]
    trials: list[Trial] = []
    for result in found.values():
        scenario = replace(cell.scenario, dispatch=result.dispatch, seed=cell.plan.seeds[0])
        trials += [Trial(at_rate(scenario, r, cell.plan, cell.start)) for r in rates]
        there = at_rate(scenario, float(f"{rate:.4g}"), cell.plan, cell.start)
        trials += [Trial(replace(there, slo=_scaled(there.slo, scale))) for scale in settings.scales]
        trials.append(Trial(there, record=True))
    outcomes = list((yield trials))
    by_rate: dict[str, Sequence[Point]] = {}
    by_scale: dict[str, Sequence[Point]] = {}
    recordings: dict[str, Recording] = {}
    for policy in found:
        mine = [outcomes.pop(0) for _ in range(len(rates) + len(settings.scales) + 1)]
        by_rate[policy] = _points(rates, mine)
        by_scale[policy] = _points(settings.scales, mine[len(rates) :])
        recording = mine[-1].recording
        assert recording is not None
        recordings[policy] = recording
    return Detail(cell, rate, by_rate, by_scale, recordings)


def to_run_json(result: Result) -> dict[str, Any]:
    """`run.json`: the scenario file as read, and every cell's `drift.goodput/1`."""
    import msgspec

    file = result.grid.file
    cells = []
    for cell in result.grid.cells:
        document = to_document(cell.scenario, cell.plan, result.goodput[cell.key], result.grid.base)
        cells.append(
            {
                "key": cell.key,
                "device": cell.system.device,
                "model": cell.system.model,
                "workload": cell.workload.title,
                "goodput": document,
            }
        )
    return {
        "schema": SCHEMA,
        "title": file.title,
        "base": result.grid.base,
        "scenario": msgspec.to_builtins(file),
        "cells": cells,
        "summary": {
            policy: _spread(result, policy) for policy in file.policies if policy != result.grid.base
        },
        "details": [_detail(detail) for detail in result.details],
    }


def spread(result: Result, policy: str) -> tuple[float, float, float] | None:
    """Least, mean and largest ratio to the base over all cells in which the base meets its targets."""
    found = [result.ratio(cell, policy) for cell in result.grid.cells]
    known = [ratio for ratio in found if ratio is not None]
    return (min(known), sum(known) / len(known), max(known)) if known else None


def _spread(result: Result, policy: str) -> dict[str, float] | None:
    found = spread(result, policy)
    return None if found is None else dict(zip(("min", "mean", "max"), found, strict=True))


def _detail(detail: Detail) -> dict[str, Any]:
    return {
        "cell": detail.cell.key,
        "rate": detail.rate,
        "by_rate": {
            policy: [{"rate": p.x, **p.report["slo"]} for p in points]
            for policy, points in detail.by_rate.items()
        },
        "by_scale": {
            policy: [{"scale": p.x, **p.report["slo"]} for p in points]
            for policy, points in detail.by_scale.items()
        },
    }


def _points(xs: Sequence[float], outcomes: Sequence[Outcome]) -> list[Point]:
    points = []
    for x, outcome in zip(xs, outcomes, strict=False):
        assert outcome.report is not None
        points.append(Point(x, outcome.report))
    return points


def _scaled(slo: SLO, scale: float) -> SLO:
    return replace(slo, ttft=slo.ttft * scale, tbt=slo.tbt * scale)


def _scenario(file: ScenarioFile, where: Source, system: System, workload: Workload, tbt: float) -> Scenario:
    settings = file.simulation
    ttft = (file.ttft if workload.ttft is None else workload.ttft) * system.ttft_scale
    return Scenario(
        workload=_located(workload.name, where.name),
        device=system.device,
        model=system.model,
        dispatch=file.policies[0],
        slo=SLO(ttft, tbt),
        partition=settings.partition,
        cost=settings.cost,
        truth=settings.truth,
        noise=settings.noise,
        kv_pages=settings.kv_pages,
        page_tokens=settings.page_tokens,
        max_running=settings.max_running,
    )


def _located(name: str, where: str) -> str:
    """A trace's path counts from the scenario file's folder, where it is there."""
    path, colon, options = name.partition(":")
    if not ("/" in path or path.endswith(TRACE_SUFFIXES)) or Path(path).is_absolute():
        return name
    beside = Path(where).parent / path
    return f"{beside}{colon}{options}" if beside.exists() else name


def _begin(
    file: ScenarioFile,
    where: Source,
    place: tuple[int, int],
    scenario: Scenario,
    plan: SearchPlan,
    registry: Registry,
) -> Start:
    """Start values; a name that cannot be resolved is an error of the key it stands under."""
    from drift_scheduler.cost.hardware import device_spec, model_spec
    from drift_scheduler.simulation.run import cost_model, create, workload

    s, w = place
    system = f"systems[{s}]"
    device_key, model_key = f"{system}.device", f"{system}.model"
    if file.systems is None:
        models = len(file.models or ())
        device_key, model_key = f"devices[{s // models}]", f"models[{s % models}]"
    _at(where, device_key, lambda: device_spec(scenario.device))
    _at(where, model_key, lambda: model_spec(scenario.model))
    _at(where, "simulation.partition", lambda: create(registry, "partition policy", scenario.partition))
    _at(where, "simulation.cost", lambda: cost_model(registry, scenario.cost_name, scenario))
    if scenario.truth is not None:
        _at(where, "simulation.truth", lambda: cost_model(registry, str(scenario.truth), scenario))
    some = replace(scenario, rate=1.0, requests=plan.requests)
    _at(where, f"workloads[{w}].name", lambda: workload(registry, some))
    return _at(where, f"workloads[{w}]", lambda: begin(scenario, plan, registry))


def _check_policy(registry: Registry, choice: str) -> None:
    name, options = parse_choice(choice)
    registry.create("dispatch policy", name, **options)
    tunable(registry, choice)


def _at(where: Source, key: str, build: Callable[[], T]) -> T:
    try:
        return build()
    except DriftError as error:
        raise DriftError(f"{where.at(key)}: {key}: {' '.join(str(error).split())}") from error
