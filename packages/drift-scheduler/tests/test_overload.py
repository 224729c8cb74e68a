"""Overload is reported when it is certain and not before: each request against its own target, at best speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from drift_scheduler.domain import (
    SLO,
    Observation,
    PrefillShape,
    Request,
    RequestArrived,
    StepRecord,
    Waiting,
)
from drift_scheduler.overload import NONE, OverloadWatch, overload
from drift_scheduler.scheduler import Scheduler
from drift_scheduler.simulation.run import Scenario, Simulation


class Costs:
    """A millisecond a token, whatever the units."""

    asked = 0

    def prefill(self, work: PrefillShape, units: int) -> float:
        self.asked += 1
        return work.new_tokens * 1e-3

    def observe(self, observation: Observation) -> None:
        raise AssertionError("nothing runs here")


def prompt(name: str, tokens: int, ttft: float, arrival: float = 0.0) -> Waiting:
    request = Request(name, arrival, tokens, 10, SLO(ttft, 0.1))
    return Waiting(request, 0, tokens, 1, arrival + ttft, False)


def judge(prompts: Sequence[Waiting], now: float = 0.0, begun: float = 0.0) -> tuple[int, float, bool]:
    said = overload(now, begun, prompts, Costs(), 10)  # type: ignore[arg-type]
    return said.lost, round(said.excess, 6), said.certain


def test_what_can_be_served_in_time_by_any_order_is_no_overload() -> None:
    assert judge([]) == (0, 0.0, False)
    patient_first = [prompt("patient", 1000, 1.2), prompt("urgent", 200, 0.2)]
    assert judge(patient_first) == (0, 0.0, False)
    assert judge(patient_first, begun=0.1) == (0, 0.1, True)


def test_each_is_held_against_its_own_target() -> None:
    queue = [prompt(f"chat{i}", 100, 0.5) for i in range(5)] + [prompt("batch", 5000, 60.0)]
    assert judge(queue) == (0, 0.0, False)
    assert judge([*queue, prompt("one more", 100, 0.5)]) == (0, 0.1, True)


def test_a_target_that_waiting_has_lost_counts_and_one_that_never_was_possible_does_not() -> None:
    assert judge([prompt("waited", 400, 0.5)], now=0.2) == (1, 0.0, True)
    assert judge([prompt("impossible", 9000, 0.5)], now=0.2) == (0, 0.0, False)


def test_the_backlog_is_all_of_it() -> None:
    said = overload(0.0, 0.5, [prompt("a", 100, 9.0), prompt("b", 9000, 0.5)], Costs(), 10)  # type: ignore[arg-type]
    assert said.backlog == pytest.approx(9.6)


SCENARIO = Scenario(
    "sharegpt", "h200", "llama-3.1-8b", "drift", SLO(0.5, 0.05), rate=20.0, requests=60, max_running=16
)


class Watching:
    """Asks after every step, as an engine does."""

    def __init__(self, scheduler: Scheduler, every: float = 0.1) -> None:
        self.watch = OverloadWatch(scheduler, every)
        self.certain: list[float] = []

    def on_step(self, record: StepRecord) -> None:
        if self.watch.now().certain:
            self.certain.append(record.now)


@pytest.mark.parametrize(("rate", "tells"), [(2.0, False), (2000.0, True)])
def test_a_simulated_device_tells_when_it_is_swamped_and_only_then(rate: float, tells: bool) -> None:
    simulation = Simulation(replace(SCENARIO, rate=rate))
    watching = Watching(simulation.scheduler)
    report = simulation.run([watching])
    assert bool(watching.certain) is tells
    assert (report["slo"]["ttft_attainment"] < 1) is tells


def test_asking_is_cheap_and_changes_nothing() -> None:
    scheduler = Simulation(SCENARIO).scheduler
    costs = Costs()
    watch = OverloadWatch(scheduler, every=1.0, scan=8)
    assert watch.now() is NONE
    slo = SLO(0.5, 0.1)
    arrivals = [RequestArrived(Request(f"r{i}", 0.0, 4000, 10, slo)) for i in range(40)]
    step = scheduler.step(0.0, arrivals)
    scheduler.costs = costs  # type: ignore[assignment]
    before = (list(scheduler.queue), scheduler.kv.free_pages, scheduler.steps)
    said = watch.now()
    assert said.backlog > 0
    assert step.gang is not None
    asked = costs.asked
    assert asked <= 8 + len(scheduler.batches)
    assert watch.now() is said
    assert costs.asked == asked
    assert before == (list(scheduler.queue), scheduler.kv.free_pages, scheduler.steps)
