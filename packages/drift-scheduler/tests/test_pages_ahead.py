"""What waits until the device works, and what is done before: nothing lost, given twice or told in another order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from drift_scheduler.conformance import FlatCosts, random_requests, small_device
from drift_scheduler.dispatch import FACTORIES
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    DecodeShape,
    Event,
    Finished,
    FinishReason,
    Gang,
    Lane,
    LaneFailed,
    Output,
    Partition,
    PrefillDone,
    PrefillShape,
    Request,
    RequestArrived,
    RequestCancelled,
    Step,
    Tokens,
)
from drift_scheduler.loop import serve
from drift_scheduler.partition import TightestDecode
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.simulation.executor import SimulatedExecutor
from drift_scheduler.simulation.kv import CountingKv

AHEAD = sorted(name for name, factory in FACTORIES.items() if getattr(factory, "ahead", False))
PAGE = 16


class Desk:
    """A scheduler whose requests "a" and "b" decode; c, if there is one, waits."""

    def __init__(self, pages: int = 400, prompt: int = 30, output: int = 20, max_running: int = 4) -> None:
        self.kv = CountingKv(pages, PAGE)
        self.scheduler = Scheduler(
            small_device(),
            self.kv,
            GangPolicy(),
            TightestDecode(),
            FlatCosts(),
            Limits(max_running=max_running),
        )
        self.now = 0.0
        self.step(
            RequestArrived(self.request("a", prompt, output)), RequestArrived(self.request("b", prompt, 40))
        )
        self.step(PrefillDone(0.01), after=0.01)

    def request(self, name: str, prompt: int = 30, output: int = 20) -> Request:
        return Request(name, self.now, prompt, output, SLO(5.0, 0.1))

    def step(self, *events: Event, after: float = 0.0) -> Step:
        self.now += after
        return self.scheduler.step(self.now, events)

    @property
    def seconds(self) -> float:
        """What the decode step under way takes."""
        flight = self.scheduler.decode_flight
        assert flight is not None
        return flight.predicted

    def until_one_token_is_left(self) -> None:
        """Decode until "a" has one token to go, with a step under way that yields it."""
        while int(self.scheduler.rows.limit[0] - self.scheduler.rows.context[0]) > 1:
            self.step(DecodeDone(self.seconds), after=self.seconds)

    def held(self) -> int:
        self.kv.audit()
        return self.kv.total_pages - self.kv.free_pages

    def end(self) -> list[Output]:
        """Serve everybody to the end; what was told."""
        told: list[Output] = []
        s = self.scheduler
        while s.live:
            ends: list[Event] = []
            if s.prefill_flight is not None:
                ends.append(PrefillDone(0.01))
            if s.decode_flight is not None:
                ends.append(DecodeDone(0.01))
            told += self.step(*ends, after=0.01).outputs
        return told


def said(output: Output) -> tuple[Any, ...]:
    if isinstance(output, Tokens):
        return ("tokens", output.time, output.request_ids, output.gaps.tolist(), output.first)
    if isinstance(output, Finished):
        return ("finished", output.time, output.request_id, output.reason, output.timing)
    return ("accepted", output.request_id)


# ------------------------------------------------------------------------------------ what is put off


def test_pages_and_news_come_after_the_launch() -> None:
    desk = Desk()
    s = desk.scheduler
    s.plan_ahead()
    held, after = desk.held(), desk.seconds
    gang = s.begin(desk.now + after, [DecodeDone(after, stopped=("a",))])
    assert gang is not None
    assert gang.decode is not None
    assert gang.decode.request_ids == ("b",)
    assert desk.held() == held, "they are given back while the device works"
    assert s.running == 1
    step = s.complete()
    assert step.gang is gang
    assert step.ahead
    assert [type(output) for output in step.outputs] == [Tokens, Finished]
    assert step.ended == ("a",)
    assert len(step.observations) == 1
    assert desk.held() == held - 2
    assert s.decode_flight is not None
    assert s.decode_flight.predicted > 0


def test_without_a_plan_nothing_is_put_off() -> None:
    desk = Desk()
    s = desk.scheduler
    held, after = desk.held(), desk.seconds
    s.begin(desk.now + after, [DecodeDone(after, stopped=("a",))])
    assert desk.held() < held
    assert [type(output) for output in s.complete().outputs] == [Tokens, Finished]


class Undisturbed(FlatCosts):
    """Lanes that do not slow each other down."""

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        return 1.0, 1.0


def news(dispatch: str, ahead: bool, requests: Sequence[Request]) -> tuple[list[Any], int, CountingKv]:
    """Serve on a device that does what is predicted, but for outputs that stop early; all that clients hear."""
    device, kv = small_device(units=8, layers=6), CountingKv(4000, PAGE)
    scheduler = Scheduler(
        device, kv, FACTORIES[dispatch](), TightestDecode(), Undisturbed(), Limits(max_running=16)
    )
    executor = SimulatedExecutor(device, Undisturbed(), requests)
    wait, heard = executor.wait, list[Any]()

    def looking_ahead(until: float | None) -> Sequence[Event] | None:
        if ahead:
            scheduler.plan_ahead()
        return wait(until)

    executor.wait = looking_ahead  # type: ignore[method-assign]
    serve(scheduler, executor, lambda step: heard.extend((*map(said, step.outputs), step.ended)))
    kv.audit()
    assert kv.free_pages == kv.total_pages
    return heard, scheduler.plans_used, kv


@pytest.mark.parametrize("dispatch", AHEAD)
def test_clients_hear_the_same_in_the_same_order(dispatch: str) -> None:
    requests = random_requests(random.Random(7), 60, 3000)
    plain, _, kv = news(dispatch, False, requests)
    planned, used, same_kv = news(dispatch, True, requests)
    assert planned == plain
    assert used > 50
    assert (same_kv.stats.admissions, same_kv.stats.hit_tokens) == (kv.stats.admissions, kv.stats.hit_tokens)


def test_who_needs_pages_put_off_gets_them() -> None:
    desk = Desk(pages=12, prompt=30, output=6)
    desk.step(RequestArrived(desk.request("c", 100)))
    desk.until_one_token_is_left()
    s = desk.scheduler
    assert desk.kv.free_pages < -(-101 // PAGE), "as long as 'a' is there"
    assert s.plan_ahead()
    held = desk.held()
    assert s.planned is not None
    assert s.planned.prefill is not None, "'a' is expected to leave"
    gang = s.begin(desk.now + desk.seconds, [DecodeDone(desk.seconds)])
    assert gang is not None
    assert gang.prefill is not None
    assert [chunk.request_id for chunk in gang.prefill.chunks] == ["c"]
    assert desk.held() > held
    step = s.complete()
    assert step.ahead
    assert [said(output)[:1] for output in step.outputs] == [("tokens",), ("finished",)]
    desk.now += 0.01
    desk.end()
    assert desk.held() == 0


# ----------------------------------------------------------------------------- what is taken beforehand


def planned_with_c(desk: Desk) -> int:
    """ "c" waits and is planned for; the pages held before that."""
    desk.step(RequestArrived(desk.request("c", 100)))
    assert desk.scheduler.prefill_flight is None, "not beside the step under way"
    held = desk.held()
    assert desk.scheduler.plan_ahead()
    gang = desk.scheduler.planned
    assert gang is not None
    assert gang.prefill is not None
    assert desk.held() == held + 7, "its pages are taken"
    return held


def test_a_planned_prompt_has_its_pages_before_the_step_ends() -> None:
    desk = Desk()
    held = planned_with_c(desk)
    tracked = desk.scheduler.live["c"]
    assert not tracked.admitted
    assert tracked.scheduled_at is None
    step = desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    assert step.ahead
    assert step.gang is not None
    assert step.gang.prefill is not None
    assert tracked.admitted
    assert tracked.scheduled_at == desk.now
    assert desk.held() == held + 7
    assert desk.kv.stats.admissions == 3
    desk.end()
    assert desk.held() == 0


@pytest.mark.parametrize("what", ["arrival", "cancelled", "decoding one cancelled", "late", "lane failed"])
def test_pages_of_a_plan_that_comes_to_nothing_go_back(what: str) -> None:
    desk = Desk()
    planned_with_c(desk)
    after = desk.seconds
    events: list[Event] = [DecodeDone(after)]
    match what:
        case "arrival":
            events = [RequestArrived(desk.request("d", 200))]
            after = 0.0
        case "cancelled":
            events.append(RequestCancelled("c"))
        case "decoding one cancelled":
            events.append(RequestCancelled("a"))
        case "late":
            after *= 3
        case "lane failed":
            events = [LaneFailed(Lane.DECODE, "it broke")]
    step = desk.step(*events, after=after)
    assert not step.ahead
    assert not step.faults
    taken = desk.kv.stats.admissions
    assert taken == 2 + (step.gang is not None and step.gang.prefill is not None)
    told = [*step.outputs, *desk.end()]
    ends = {output.request_id: output.reason for output in told if isinstance(output, Finished)}
    assert ends.keys() >= {"a", "b", "c"}
    assert (ends["c"] is FinishReason.CANCELLED) == (what == "cancelled")
    assert desk.held() == 0


def test_policies_and_prefixes_are_changed_without_a_plans_pages() -> None:
    for change in ("policies", "prefixes"):
        desk = Desk()
        held = planned_with_c(desk)
        if change == "policies":
            desk.scheduler.set_policies(dispatch=GangPolicy())
        else:
            desk.scheduler.forget_prefixes()
        assert desk.held() == held
        assert desk.scheduler.planned is None


def test_a_plan_leaves_every_decoding_request_a_page() -> None:
    desk = Desk(pages=13)
    desk.step(RequestArrived(desk.request("c", 100)))
    held = desk.held()
    desk.scheduler.plan_ahead()
    assert desk.kv.free_pages >= desk.scheduler.headroom
    assert desk.held() in (held, held + 7)


def test_prompts_behind_one_that_ends_are_admitted_when_it_has() -> None:
    """Its pages may be a prefix of theirs."""
    desk = Desk()
    held = planned_with_c(desk)
    desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    desk.step(RequestArrived(desk.request("d", 100)))
    s = desk.scheduler
    while s.live["c"].row < 0:
        held = desk.held()
        s.plan_ahead()
        flight, decode = s.prefill_flight, s.decode_flight
        if flight is not None and flight.work.layer_stop == 6:  # type: ignore[union-attr]
            assert desk.held() <= held + 2, "no more than positions of who decodes"
        if flight is not None and (decode is None or flight.predicted <= decode.predicted):
            desk.step(PrefillDone(flight.predicted), after=flight.predicted)
        else:
            desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    desk.end()
    assert desk.held() == 0


# ------------------------------------------------------------------------- pages that decoding will need


def test_pages_for_the_next_positions_are_there_before_the_step_ends() -> None:
    desk = Desk(prompt=30, output=20)  # the first decode step writes position 30 of 32
    s = desk.scheduler
    desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    held = desk.held()
    assert s.rows.context[:2].tolist() == [32, 32]
    s.plan_ahead()
    assert desk.held() == held + 2
    assert s.rows.capacity[:2].tolist() == [48, 48]
    step = desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    assert step.ahead
    assert desk.held() == held + 2
    desk.end()
    assert desk.held() == 0


def test_no_page_is_taken_for_who_is_done_then() -> None:
    desk = Desk(prompt=30, output=3)
    desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    held = desk.held()
    desk.scheduler.plan_ahead()
    assert desk.held() == held + 1, "'a' ends with the step"


def test_where_pages_are_scarce_none_are_taken_beforehand() -> None:
    desk = Desk(pages=6)
    s = desk.scheduler
    desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    held = desk.held()
    assert desk.kv.free_pages == 2
    s.plan_ahead()
    assert desk.held() == held
    step = desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    assert step.gang is not None
    assert desk.held() == held + 2


def test_who_stops_gives_back_what_was_taken_for_it() -> None:
    desk = Desk()
    desk.step(DecodeDone(desk.seconds), after=desk.seconds)
    desk.scheduler.plan_ahead()
    desk.step(DecodeDone(desk.seconds, stopped=("a", "b")), after=desk.seconds)
    assert desk.held() == 0


def test_what_a_step_filled_is_cached_although_its_next_page_was_there_before() -> None:
    """A request that goes on where another one's output ended finds all of it."""
    for ahead in (False, True):
        kv = CountingKv(400, PAGE)
        s = Scheduler(small_device(), kv, GangPolicy(), TightestDecode(), FlatCosts(), Limits(max_running=4))
        keys = [("k", index) for index in range(8)]
        first = Request("first", 0.0, 30, 40, SLO(5.0, 0.1), prefix_keys=keys, key_tokens=PAGE)
        now, found = 0.0, []
        gang: Gang | None = s.step(now, [RequestArrived(first)]).gang
        later = Request("later", 0.0, 120, 1, SLO(5.0, 0.1), prefix_keys=keys, key_tokens=PAGE)
        for _ in range(20):
            assert gang is not None
            flight = s.decode_flight or s.prefill_flight
            assert flight is not None
            if ahead:
                s.plan_ahead()
            now += flight.predicted
            done = DecodeDone(0.01) if s.decode_flight is not None else PrefillDone(0.01)
            gang = s.step(now, [done]).gang
            found.append(kv.lookup(later, 120))
        assert found[0] == 16
        assert found == [16] * 2 + [32] * 16 + [48] * 2
