"""What the suite for plugin authors notices, what its golden traces pin down, and that service goes on regardless."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drift_scheduler import Gang, Limits, Partition, Sharing
from drift_scheduler.conformance import (
    CASES,
    Case,
    Hazards,
    InvariantError,
    compare_golden,
    conform,
    exercise,
    record_golden,
    run_case,
)
from drift_scheduler.dispatch import CLUSTER_ONLY, FACTORIES
from drift_scheduler.dispatch.exclusive import Alternate
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.domain import SLO, PrefillShape
from drift_scheduler.partition import FACTORIES as PARTITIONS
from drift_scheduler.partition.tightest_decode import TightestDecode
from drift_scheduler.plugins import hookimpl, load
from drift_scheduler.simulation.run import Scenario, Simulation

TOOL = Path(__file__).resolve().parent.parent / "tools" / "golden_traces.py"
CALM = Hazards(cancel=0, stop=0)


def golden_traces() -> Any:
    spec = importlib.util.spec_from_file_location("golden_traces", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN = golden_traces()


# ------------------------------------------------------------------------------------- golden traces


@pytest.mark.parametrize("name", GOLDEN.names())
def test_built_ins_decide_as_their_golden_traces_say(name: str) -> None:
    path = GOLDEN.FOLDER / f"{name}.jsonl"
    again = "meant to? then run: python packages/drift-scheduler/tools/golden_traces.py"
    assert path.is_file(), f"no golden trace of {name}; {again}"
    found = compare_golden(path=path, **GOLDEN.names()[name])
    assert found.first is None, f"{name} decides otherwise: {found.first}; {again}"
    assert found.stopped is None, f"{path.name}: {found.stopped}; {again}"
    assert found.decisions > 20


def test_every_golden_trace_is_of_a_built_in() -> None:
    assert {path.stem for path in GOLDEN.FOLDER.glob("*.jsonl")} == set(GOLDEN.names())


def test_golden_traces_hold_what_plans_are_made_of() -> None:
    """Splits, layer slices, cancellations, stops and prefix hits: otherwise the same gangs would say little."""
    lines = [
        json.loads(line) for line in (GOLDEN.FOLDER / "dispatch-gang.jsonl").read_text().splitlines()[1:]
    ]
    gangs = [line["gang"] for line in lines if "gang" in line]
    assert len({tuple(gang["partition"]) for gang in gangs}) > 2
    assert any(gang["prefill"]["layers"] != [0, 6] for gang in gangs if "prefill" in gang)
    assert any(chunk[1] > 0 for gang in gangs if "prefill" in gang for chunk in gang["prefill"]["chunks"])
    reasons = {end["reason"] for line in lines for end in line.get("finished", ())}
    assert {"length"} < reasons


def test_a_changed_mind_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    record_golden(Alternate(), path)
    assert compare_golden(Alternate(), path).ratio == 1.0
    changed = compare_golden(GangPolicy(), path)
    assert changed.first is not None
    assert changed.stopped is None
    assert 0 < changed.agreed < changed.decisions
    split = compare_golden(
        GangPolicy(), GOLDEN.FOLDER / "dispatch-gang.jsonl", partitions=PARTITIONS["static"](3)
    )
    assert split.differ["partition"] > 0


def test_a_policy_that_raises_is_a_difference_and_the_comparison_goes_on(tmp_path: Path) -> None:
    class Raises:
        def choose(self, view, costs, partitions):
            raise RuntimeError("no")

    record_golden(Alternate(), tmp_path / "mine.jsonl")
    found = compare_golden(Raises(), tmp_path / "mine.jsonl")
    assert found.differ["fault"] == found.decisions > 20
    assert found.first is not None
    assert found.first.other == "raised RuntimeError: no"


# --------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("name", sorted(FACTORIES.keys() - CLUSTER_ONLY))
def test_built_in_dispatch_policies_come_through_every_case(name: str) -> None:
    for case in CASES[::2]:
        outcome = run_case(case, dispatch=FACTORIES[name]())
        conform(outcome)
        assert len(outcome.reasons) == case.requests


@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_built_in_partition_policies_come_through_every_case(name: str) -> None:
    for case in CASES[::3]:
        conform(
            run_case(case, partitions=PARTITIONS[name](**({"decode_units": 1} if name == "static" else {})))
        )


def test_cases_are_named_and_different() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)
    assert {case.units for case in CASES} >= {1, 2, 4, 16}
    with pytest.raises(ValueError, match="nothing to check"):
        run_case(CASES[0])


def test_a_policy_whose_fallback_had_to_decide_does_not_conform() -> None:
    class Lazy:
        def choose(self, view, costs, partitions):
            return None

    outcome = run_case(CASES[0], dispatch=Lazy())
    assert len(outcome.reasons) == CASES[0].requests
    with pytest.raises(
        InvariantError, match=r"Lazy left an idle device idle with work to do \(and \d+ more\)"
    ):
        conform(outcome)


# --------------------------------------------------------------------- what misbehaves is outlived


class FakeClock:
    """Seconds that pass only when somebody takes them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_policy_that_stalls_is_counted_and_then_replaced() -> None:
    clock = FakeClock()

    class Stalls:
        calls = 0

        def choose(self, view, costs, partitions):
            Stalls.calls += 1
            clock.now += 0.2
            return GangPolicy().choose(view, costs, partitions)

    limits = Limits(max_running=16, max_policy_faults=7, choose_seconds=0.05)
    outcome = exercise(Stalls(), seed=3, hazards=CALM, limits=limits, stopwatch=clock)
    assert {reason.value for reason in outcome.reasons.values()} == {"length"}
    assert outcome.faults == ["Stalls took 200.0 ms, allowed 50.0"] * 7
    assert Stalls.calls == 7
    assert outcome.steps > 50


def test_a_partition_policy_off_the_menu_is_counted_and_service_goes_on() -> None:
    class OffTheMenu:
        def split(self, view, prefill, decode, costs):
            return Partition(3, 3)

    outcome = run_case(Case("calm", 5, hazards=CALM), partitions=OffTheMenu())
    assert {reason.value for reason in outcome.reasons.values()} == {"length"}
    assert outcome.faults
    assert set(outcome.faults) == {"OffTheMenu chose partition 3+3 off the menu of splits (3+1, 2+2, 1+3)"}
    assert all(gang.sharing is Sharing.EXCLUSIVE for gang in outcome.gangs)


@pytest.mark.parametrize(
    "answer", [None, "half", (2, 2, 2), Partition(0, 4), Partition(-1, 5), Partition(2.0, 2.0), 1e9]
)
def test_a_partition_policy_that_returns_nonsense_is_outlived(answer: Any) -> None:
    class Nonsense:
        def split(self, view, prefill, decode, costs):
            return answer

    outcome = run_case(Case("calm", 6, hazards=CALM), partitions=Nonsense())
    assert len(outcome.reasons) == 30
    assert {fault.split(" ", 1)[0] for fault in outcome.faults} <= {"Nonsense"}


def test_a_partition_policy_that_raises_is_named_and_not_the_policy_that_asked() -> None:
    class Raises:
        def split(self, view, prefill, decode, costs):
            raise KeyError("no row")

    outcome = run_case(Case("calm", 7, hazards=CALM), partitions=Raises())
    assert len(outcome.reasons) == 30
    assert set(outcome.faults) == {"Raises raised KeyError: 'no row'"}
    asked = compare_golden(GangPolicy(), GOLDEN.FOLDER / "dispatch-gang.jsonl", partitions=Raises())
    assert asked.first is not None
    assert asked.first.other == "Raises raised KeyError: 'no row'"


def test_who_asks_for_a_split_where_there_is_none_is_named() -> None:
    class Asks(Alternate):
        def choose(self, view, costs, partitions):
            step = view.decode_step()
            if step is not None:
                partitions.split(view, PrefillShape.of([(1, 0)]), step, costs)
            return super().choose(view, costs, partitions)

    outcome = run_case(Case("undivided", 8, units=1, hazards=CALM), dispatch=Asks())
    assert len(outcome.reasons) == 30
    assert set(outcome.faults) == {"Asks proposed a split of a device that has none"}


def test_a_cost_model_that_raises_is_outlived() -> None:
    class Raises:
        def prefill(self, *work):
            raise RuntimeError("no")

        decode = fused = slowdown = observe = prefill

    outcome = exercise(GangPolicy(), seed=4, hazards=CALM, costs=Raises())
    assert {reason.value for reason in outcome.reasons.values()} == {"length"}
    assert any("cost model" in fault for fault in outcome.faults)


def test_the_report_counts_the_faults() -> None:
    class Illegal:
        def choose(self, view, costs, partitions):
            gang = GangPolicy().choose(view, costs, partitions)
            if gang is None or gang.decode is None or gang.prefill is not None:
                return gang
            return Gang(Sharing.FUSED, gang.partition, gang.prefill, gang.decode)

    hook = hookimpl(lambda: {"illegal": Illegal})
    hook.__name__ = "drift_dispatch_policies"
    registry = load([("acme", SimpleNamespace(drift_dispatch_policies=hook))], installed=False)
    scenario = Scenario(
        "sharegpt", "a100-80gb", "llama-3.1-8b", "illegal", SLO(1.0, 0.05), requests=5, rate=5.0
    )
    report = Simulation(scenario, registry).run()
    assert report["requests"]["finished"] == 5
    assert report["scheduler"]["faults"] == Limits().max_policy_faults
    assert report["scheduler"]["first_fault"] == "Illegal proposed fused gang needs work of both phases"
    healthy = Scenario("sharegpt", "a100-80gb", "llama-3.1-8b", "gang", SLO(1.0, 0.05), requests=5, rate=5.0)
    well = Simulation(healthy, registry).run()["scheduler"]
    assert (well["faults"], well["first_fault"]) == (0, None)


def test_the_split_of_a_golden_ride_is_the_partition_policys() -> None:
    seen = []

    class Watching(TightestDecode):
        def split(self, view, prefill, decode, costs):
            seen.append(super().split(view, prefill, decode, costs))
            return seen[-1]

    outcome = run_case(CASES[0], partitions=Watching())
    assert {gang.partition for gang in outcome.gangs if gang.sharing is Sharing.SPATIAL} <= set(seen)
