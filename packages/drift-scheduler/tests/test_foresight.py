"""Deciding ahead: what is foreseen is what comes, and where it is not, the policy is asked again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from drift_scheduler.conformance import CASES, FlatCosts, conform, random_requests, run_case, small_device
from drift_scheduler.dispatch import FACTORIES
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    DecodeShape,
    Event,
    Gang,
    Lane,
    Nudged,
    Observation,
    Partition,
    PrefillDone,
    PrefillShape,
    Request,
    RequestArrived,
    RequestCancelled,
    Step,
)
from drift_scheduler.foresight import ForeseenView, Plan, next_end
from drift_scheduler.loop import serve
from drift_scheduler.partition import TightestDecode
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.simulation.executor import SimulatedExecutor
from drift_scheduler.simulation.kv import CountingKv
from drift_scheduler.view import View

AHEAD = sorted(name for name, factory in FACTORIES.items() if getattr(factory, "ahead", False))


def test_the_built_ins_of_one_device_can_be_asked_ahead() -> None:
    assert {"drift", "gang", "chunked-prefill", "temporal", "streams", "alternate"} <= set(AHEAD)


# ------------------------------------------------------------------------- what is foreseen, and what comes


def facts(view: View) -> dict[str, Any]:
    """All that a policy can see, but for the time and what depends on it."""
    step = view.decode_step()
    lanes = [(lane.work is not None, lane.busy) for lane in (view.prefill_lane, view.decode_lane)]
    waiting = view.waiting(1000)
    return {
        "lanes": lanes,
        "sharing": view.sharing,
        "partition": view.partition,
        "last partition": view.last_partition,
        "prefills": [(b.batch_id, b.chunks, b.next_layer, b.shape) for b in view.prefills],
        "num_waiting": view.num_waiting,
        "waiting": [(w.request.id, w.computed, w.total, w.admitted, w.pages) for w in waiting],
        "found": [w.request.id for w in view.find_waiting([w.request.id for w in waiting])],
        "step": None if step is None else (sorted(step.request_ids), step.context_tokens),
        "decoding": view.num_decoding,
        "target": view.tbt_target,
        "running": view.num_running,
        "free": view.free_pages,
    }


class Looking:
    """Decides as another policy, and keeps what it sees when asked ahead, which it does not answer."""

    ahead = True

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.foreseen: dict[str, Any] | None = None
        self.slack: list[float] = []
        self.at = 0.0
        self.ends: frozenset[Lane] | None = None
        self.compared = 0

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        if isinstance(view, ForeseenView):
            self.foreseen, self.at = facts(view), view.now
            self.slack = sorted(view.tbt_slack().tolist())
            raise RuntimeError("only looking")
        if self.foreseen is not None:
            assert facts(view) == self.foreseen
            if abs(view.now - self.at) < 1e-9:
                assert sorted(view.tbt_slack().tolist()) == pytest.approx(self.slack, abs=1e-9)
            self.foreseen = None
            self.compared += 1
        return self.inner.choose(view, costs, partitions)


class Looked:
    """An executor that has the scheduler look ahead whenever it waits, and says when nothing unforeseen came."""

    def __init__(self, inner: SimulatedExecutor, scheduler: Scheduler, policy: Looking) -> None:
        self.inner, self.scheduler, self.policy = inner, scheduler, policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def wait(self, until: float | None) -> Sequence[Event] | None:
        s = self.scheduler
        self.policy.foreseen = None
        s.plan_ahead()
        end, kinds = next_end(s), {DecodeDone: Lane.DECODE, PrefillDone: Lane.PREFILL}
        events = self.inner.wait(until)
        ended = {kinds.get(type(event)) for event in events or ()}
        stopped = any(getattr(event, "stopped", ()) for event in events or ())
        if end is None or ended != end.lanes or stopped:
            self.policy.foreseen = None
        return events


@pytest.mark.parametrize("pages", [64, 400, 4000])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dispatch", AHEAD)
def test_what_is_foreseen_is_what_comes(dispatch: str, seed: int, pages: int) -> None:
    rng = random.Random(seed)
    device = small_device(units=8, layers=6)
    policy = Looking(FACTORIES[dispatch]())
    scheduler = Scheduler(
        device, CountingKv(pages, 16), policy, TightestDecode(), FlatCosts(), Limits(max_running=12)
    )
    requests = random_requests(rng, 60, min(pages, 200) * 16)
    executor = Looked(SimulatedExecutor(device, FlatCosts(), requests), scheduler, policy)
    ended: list[str] = []
    serve(scheduler, executor, lambda step: ended.extend(step.ended))  # type: ignore[arg-type]
    assert len(ended) == 60
    assert policy.compared > 100


# ------------------------------------------------------------------------------------- plans that hold


class Undisturbed(FlatCosts):
    """Lanes that do not slow each other down."""

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        return 1.0, 1.0


def serve_all(
    dispatch: str, ahead: bool, requests: Sequence[Request]
) -> tuple[Scheduler, list[Any], list[str]]:
    """Serve on a device that does what is predicted; the scheduler, its gangs with their times, and its faults."""
    device = small_device(units=8, layers=6)
    scheduler = Scheduler(
        device,
        CountingKv(4000, 16),
        FACTORIES[dispatch](),
        TightestDecode(),
        Undisturbed(),
        Limits(max_running=16),
    )
    executor = SimulatedExecutor(device, Undisturbed(), requests)
    wait, gangs, faults = executor.wait, list[Any](), list[str]()

    def looking_ahead(until: float | None) -> Sequence[Event] | None:
        if ahead:
            scheduler.plan_ahead()
        return wait(until)

    def deliver(step: Step) -> None:
        faults.extend(step.faults)
        if step.gang is not None:
            gangs.append((executor.now(), step.gang))

    executor.wait = looking_ahead  # type: ignore[method-assign]
    serve(scheduler, executor, deliver)
    return scheduler, gangs, faults


@pytest.mark.parametrize("dispatch", AHEAD)
def test_where_all_is_as_predicted_planning_ahead_changes_no_decision(dispatch: str) -> None:
    requests = random_requests(random.Random(5), 60, 3000)
    _, plain, _ = serve_all(dispatch, False, requests)
    scheduler, planned, faults = serve_all(dispatch, True, requests)
    assert planned == plain
    assert not faults
    assert scheduler.plans_used > 0.5 * scheduler.plans > 100


@pytest.mark.parametrize("case", [case for case in CASES if case.ahead], ids=str)
@pytest.mark.parametrize("dispatch", AHEAD)
def test_every_rule_is_kept_by_decisions_made_ahead(dispatch: str, case: Any) -> None:
    device = case.device
    policy = FACTORIES[dispatch]()
    refuses = getattr(policy, "refuses", None)
    assert refuses is None or refuses(device) is None
    outcome = run_case(case, dispatch=policy)
    conform(outcome)
    assert outcome.planned > 0


# ------------------------------------------------------------------------------ plans that come to nothing


class Counting(GangPolicy):
    """Counts how it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_asked = self.asked = 0
        self.fails_ahead = False

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        if isinstance(view, ForeseenView):
            self.ahead_asked += 1
            if self.fails_ahead:
                raise RuntimeError("not now")
        else:
            self.asked += 1
        return super().choose(view, costs, partitions)


class Desk:
    """A scheduler with two requests decoding, whose step is under way."""

    def __init__(
        self,
        policy: GangPolicy | None = None,
        costs: FlatCosts | None = None,
        stopwatch: Callable[[], float] | None = None,
    ) -> None:
        self.policy = policy or Counting()
        self.scheduler = Scheduler(
            small_device(),
            CountingKv(400, 16),
            self.policy,
            TightestDecode(),
            costs or FlatCosts(),
            Limits(max_running=4),
            stopwatch,
        )
        self.now = 0.0
        self.step(RequestArrived(self.request("a")), RequestArrived(self.request("b")))
        self.step(PrefillDone(0.01), after=0.01)
        flight = self.scheduler.decode_flight
        assert flight is not None
        self.seconds = flight.predicted

    def request(self, name: str) -> Request:
        return Request(name, self.now, 30, 20, SLO(5.0, 0.1))

    def step(self, *events: Event, after: float = 0.0) -> Step:
        self.now += after
        return self.scheduler.step(self.now, events)


def test_a_plan_is_followed_without_asking_again() -> None:
    desk = Desk(policy := Counting())
    asked = policy.asked
    assert desk.scheduler.plan_ahead()
    assert not desk.scheduler.plan_ahead(), "once a step"
    step = desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    assert step.gang is not None
    assert step.gang.decode is not None
    assert step.gang.decode.context_tokens == 2 * 32
    assert (policy.ahead_asked, policy.asked) == (1, asked)
    assert (desk.scheduler.plans, desk.scheduler.plans_used) == (1, 1)


def test_who_stopped_is_not_in_the_step_that_was_planned() -> None:
    desk = Desk(policy := Counting())
    asked = policy.asked
    desk.scheduler.plan_ahead()
    step = desk.step(DecodeDone(desk.seconds, stopped=("a",)), after=desk.seconds)
    assert step.gang is not None
    assert step.gang.decode is not None
    assert step.gang.decode.request_ids == ("b",)
    assert policy.asked == asked


@pytest.mark.parametrize(
    "what",
    [
        "arrival",
        "cancellation",
        "everyone stopped",
        "early",
        "late",
        "another policy",
        "flushed",
        "a nudge",
    ],
)
def test_the_policy_is_asked_again_where_something_else_came(what: str) -> None:
    desk = Desk(policy := Counting())
    asked = policy.asked
    desk.scheduler.plan_ahead()
    done, after = DecodeDone(desk.seconds), desk.seconds
    events: list[Event] = [done]
    match what:
        case "arrival":
            events.append(RequestArrived(desk.request("c")))
        case "cancellation":
            events.append(RequestCancelled("a"))
        case "everyone stopped":
            events = [DecodeDone(desk.seconds, stopped=("a", "b"))]
        case "early":
            after *= 0.5
        case "late":
            after *= 1.5
        case "another policy":
            policy = Counting()
            asked = 0
            desk.scheduler.set_policies(dispatch=policy)
        case "flushed":
            desk.scheduler.forget_prefixes()
        case "a nudge":
            events = [Nudged()]
            after = 0.0
    step = desk.step(*events, after=after)
    assert not step.faults
    assert desk.scheduler.plans_used == 0
    if what == "everyone stopped":
        assert step.gang is None
    else:
        assert policy.asked == asked + 1


def test_a_plan_holds_through_a_nudge_at_the_same_time() -> None:
    desk = Desk()
    desk.scheduler.plan_ahead()
    desk.step(Nudged(), DecodeDone(desk.seconds), after=desk.seconds)
    assert desk.scheduler.plans_used == 1


def test_a_policy_that_fails_when_asked_ahead_is_no_fault_until_it_does_so_in_earnest() -> None:
    desk = Desk(policy := Counting())
    policy.fails_ahead = True
    assert desk.scheduler.plan_ahead()
    step = desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    assert not step.faults
    assert step.gang is not None
    assert policy.ahead_asked == 1


class Slow(Counting):
    """Takes a second when asked ahead, and no time otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0.0

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        self.clock += isinstance(view, ForeseenView)
        return super().choose(view, costs, partitions)


def test_a_policy_that_takes_too_long_when_asked_ahead_is_at_fault() -> None:
    policy = Slow()
    desk = Desk(policy, stopwatch=lambda: policy.clock)
    assert desk.scheduler.plan_ahead()
    step = desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    assert step.faults == ("Slow took 1000.0 ms, allowed 50.0",)
    assert step.gang is not None
    assert desk.scheduler.policy_faults == 1


def test_a_fault_between_steps_is_not_blamed_on_a_policy_that_rightly_waits() -> None:
    costs = Pupil()
    desk = Desk(costs=costs)
    desk.scheduler.plan_ahead()
    desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    costs.sick = True
    desk.scheduler.plan_ahead()
    costs.sick = False
    step = desk.step(Nudged())
    assert step.faults == ("cost model: observe raised RuntimeError: sick",)
    assert step.gang is None, "its step is still under way"


class Unasked(GangPolicy):
    ahead = False


def test_a_policy_that_does_not_say_so_is_not_asked_ahead() -> None:
    desk = Desk(Unasked())
    assert not desk.scheduler.plan_ahead()


def test_nothing_is_planned_on_an_idle_device() -> None:
    scheduler = Scheduler(small_device(), CountingKv(40, 16), GangPolicy(), TightestDecode(), FlatCosts())
    assert not scheduler.plan_ahead()


class Pupil(FlatCosts):
    """Notes what it is shown; `sick`: raises instead."""

    def __init__(self) -> None:
        self.seen: list[Lane] = []
        self.sick = False

    def observe(self, observation: Observation) -> None:
        if self.sick:
            raise RuntimeError("sick")
        self.seen.append(observation.lane)


def test_where_a_plan_is_followed_the_cost_model_learns_when_the_device_works_again() -> None:
    desk = Desk(costs=(costs := Pupil()))
    assert costs.seen == [Lane.PREFILL]
    desk.scheduler.plan_ahead()
    step = desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    assert [seen.lane for seen in step.observations] == [Lane.DECODE]
    assert costs.seen == [Lane.PREFILL]
    desk.scheduler.plan_ahead()
    assert costs.seen == [Lane.PREFILL, Lane.DECODE]
    desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    desk.step(Nudged())
    assert costs.seen == [Lane.PREFILL, Lane.DECODE, Lane.DECODE], "nobody had time meanwhile"


def test_a_cost_model_that_fails_between_steps_is_a_fault_of_the_next() -> None:
    desk = Desk(costs=(costs := Pupil()))
    desk.scheduler.plan_ahead()
    assert not desk.step(DecodeDone(desk.seconds), after=desk.seconds).faults
    costs.sick = True
    desk.scheduler.plan_ahead()
    costs.sick = False
    step = desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    assert step.faults == ("cost model: observe raised RuntimeError: sick",)
    assert step.gang is not None
    assert not desk.step(Nudged()).faults


def test_a_plan_knows_what_it_is_for() -> None:
    plan = Plan(None, frozenset(Lane), 1.0, 0.1)
    assert plan.fits(1.05, [PrefillDone(0.1), DecodeDone(0.1)])
    assert not plan.fits(1.2, [PrefillDone(0.1), DecodeDone(0.1)])
    assert not plan.fits(1.0, [DecodeDone(0.1)])
    assert not plan.fits(1.0, [])
