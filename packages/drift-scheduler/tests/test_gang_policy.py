"""The paper's procedure, step by step, on a device whose costs are easy to reckon with."""

from __future__ import annotations

import pytest

from drift_scheduler import (
    SLO,
    DecodeDone,
    Device,
    Gang,
    Limits,
    OptionError,
    Partition,
    PrefillDone,
    Request,
    RequestArrived,
    RequestCancelled,
    Scheduler,
    Sharing,
)
from drift_scheduler.dispatch.chunked_prefill import ChunkedPrefill
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.domain import DecodeShape, Event, Finished, Observation, PrefillShape, Tokens
from drift_scheduler.partition import Static, TightestDecode
from drift_scheduler.simulation.kv import CountingKv

LAYERS = 10


class Reckoned:
    """Prefill: 1 ms a token over units/10; decode: 20 ms on 2 of 10 units, 10 ms on 5, 5 ms on 8 or more."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def prefill(self, work: PrefillShape, units: int) -> float:
        return work.new_tokens * 1e-3 * 10 / units

    def decode(self, work: DecodeShape, units: int) -> float:
        return 0.020 if units <= 2 else 0.010 if units <= 5 else 0.005

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        return self.prefill(prefill, units) + self.decode(decode, units)

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        return 1.0, 1.0

    def observe(self, observation: Observation) -> None:
        self.seen.append(observation)


class Bench:
    """A scheduler fed by hand."""

    def __init__(self, policy=None, partitions=None, menu=(2, 5, 8), **limits) -> None:
        splits = [Partition(10 - d, d) for d in menu]
        self.device = Device(10, (Partition(10, 0), Partition(0, 10), *splits), LAYERS)
        self.kv = CountingKv(1000, 16)
        self.costs = Reckoned()
        self.scheduler = Scheduler(
            self.device,
            self.kv,
            policy or GangPolicy(),
            partitions or TightestDecode(),
            self.costs,
            Limits(**limits),
        )
        self.now = 0.0
        self.outputs: list[object] = []

    def feed(self, *events: Event, at: float | None = None) -> Gang | None:
        self.now = self.now if at is None else at
        step = self.scheduler.step(self.now, events)
        assert step.faults == ()
        self.outputs += step.outputs
        return step.gang

    def arrive(
        self, request_id: str, prompt: int, *, ttft: float = 10.0, tbt: float = 0.025, output: int = 50
    ) -> RequestArrived:
        return RequestArrived(Request(request_id, self.now, prompt, output, SLO(ttft, tbt)))

    def decoding(self, *names: str, tbt: float = 0.025) -> Gang | None:
        """Bring requests of 16 tokens to decode; returns the gang then launched."""
        self.feed(*[self.arrive(name, 16, tbt=tbt) for name in names])
        return self.feed(PrefillDone(0.01), at=self.now + 0.01)


def test_with_decode_idle_prefill_takes_the_whole_device_in_one_block() -> None:
    bench = Bench()
    gang = bench.feed(bench.arrive("a", 100), bench.arrive("b", 30))
    assert gang is not None
    assert gang.prefill is not None
    assert (gang.sharing, gang.partition) == (Sharing.EXCLUSIVE, Partition(10, 0))
    assert (gang.prefill.layer_start, gang.prefill.layer_stop) == (0, LAYERS)
    assert [c.request_id for c in gang.prefill.chunks] == ["a", "b"]


def test_with_nothing_to_prefill_decode_takes_the_whole_device() -> None:
    gang = Bench().decoding("a", "b")
    assert gang is not None
    assert gang.decode is not None
    assert (gang.sharing, gang.partition) == (Sharing.EXCLUSIVE, Partition(0, 10))
    assert gang.decode.request_ids == ("a", "b")
    assert gang.decode.context_tokens == 2 * 17


def test_both_pending_launches_decode_beside_as_many_layers_as_fit_it() -> None:
    bench = Bench()
    bench.decoding("a")
    bench.feed(bench.arrive("long", 80))
    gang = bench.feed(DecodeDone(0.005), at=bench.now + 0.005)
    assert gang is not None
    assert gang.prefill is not None
    assert gang.decode is not None
    # The target of 25 ms is met with 2 units (20 ms); prefill on 8: 80 tokens take 100 ms, so ceil(20 * 10 / 100).
    assert (gang.sharing, gang.partition) == (Sharing.SPATIAL, Partition(8, 2))
    assert (gang.prefill.layer_start, gang.prefill.layer_stop) == (0, 2)


def test_a_tighter_target_gives_decode_more_units() -> None:
    for tbt, decode_units in ((0.025, 2), (0.015, 5), (0.006, 8), (0.001, 8)):
        bench = Bench()
        bench.decoding("a", tbt=tbt)
        bench.feed(bench.arrive("long", 80, tbt=1.0))
        gang = bench.feed(DecodeDone(0.005), at=bench.now + 0.005)
        assert gang is not None
        assert gang.partition.decode == decode_units


def spatial(bench: Bench, prompt: int = 80) -> Gang:
    bench.decoding("a")
    bench.feed(bench.arrive("long", prompt))
    gang = bench.feed(DecodeDone(0.005), at=bench.now + 0.005)
    assert gang is not None
    return gang


def test_a_lane_that_ends_first_goes_on_under_the_split_in_force() -> None:
    bench = Bench()
    spatial(bench)
    gang = bench.feed(PrefillDone(0.015), at=bench.now + 0.015)
    assert gang is not None
    assert gang.prefill is not None
    assert gang.decode is None
    # 5 ms of the decode step are left and a layer takes 10: one layer.
    assert (gang.partition, gang.prefill.layer_start, gang.prefill.layer_stop) == (Partition(8, 2), 2, 3)
    gang = bench.feed(DecodeDone(0.02), at=bench.now + 0.005)
    assert gang is not None
    assert gang.decode is not None
    assert gang.prefill is None
    assert gang.partition == Partition(8, 2)


def test_a_new_split_waits_until_both_lanes_are_idle() -> None:
    bench = Bench()
    spatial(bench)
    bench.scheduler.rows.tbt[0] = 0.012  # from now on the request asks for more
    bench.scheduler.rows._changed()
    assert bench.feed(PrefillDone(0.015), at=bench.now + 0.015) is None
    gang = bench.feed(DecodeDone(0.02), at=bench.now + 0.005)
    assert gang is not None
    assert gang.partition == Partition(5, 5)
    assert gang.prefill is not None
    assert gang.decode is not None


def test_when_decode_drains_the_rest_runs_in_one_block_on_the_whole_device() -> None:
    bench = Bench()
    spatial(bench)
    bench.feed(RequestCancelled("a"))
    assert bench.feed(DecodeDone(0.02), at=bench.now + 0.01) is None  # the block still runs
    gang = bench.feed(PrefillDone(0.02), at=bench.now + 0.01)
    assert gang is not None
    assert gang.prefill is not None
    assert (gang.sharing, gang.partition) == (Sharing.EXCLUSIVE, Partition(10, 0))
    assert (gang.prefill.layer_start, gang.prefill.layer_stop) == (2, LAYERS)


def test_a_finished_prefill_joins_the_next_decode_step() -> None:
    bench = Bench()
    bench.decoding("a")
    bench.feed(bench.arrive("b", 10))
    gang = bench.feed(DecodeDone(0.005), at=bench.now + 0.005)
    assert gang is not None
    assert gang.prefill is not None
    assert gang.prefill.layer_stop == LAYERS  # 10 tokens fit beside one decode step
    bench.feed(PrefillDone(0.0125), at=bench.now + 0.0125)
    gang = bench.feed(DecodeDone(0.02), at=bench.now + 0.0075)
    assert gang is not None
    assert gang.decode is not None
    assert gang.decode.request_ids == ("a", "b")


class TestPreemptionAtLayerBoundaries:
    def start(self, long_ttft: float) -> Bench:
        """A 1000-token prefill beside a decode, its first block done, the decode step still running."""
        bench = Bench()
        bench.decoding("a")
        bench.feed(bench.arrive("long", 1000, ttft=long_ttft))
        bench.feed(DecodeDone(0.005), at=bench.now + 0.005)
        return bench

    def boundary(self, bench: Bench) -> Gang | None:
        assert bench.feed(DecodeDone(0.02), at=bench.now + 0.02) is not None  # goes on: the lane is busy
        return bench.feed(PrefillDone(0.125), at=bench.now + 0.105)

    def test_an_urgent_short_prompt_overtakes_a_long_one_that_can_afford_it(self) -> None:
        bench = self.start(long_ttft=10.0)
        bench.feed(bench.arrive("short", 40, ttft=0.5))
        gang = self.boundary(bench)
        assert gang is not None
        assert gang.prefill is not None
        assert [c.request_id for c in gang.prefill.chunks] == ["short"]
        assert [b.next_layer for b in bench.scheduler.batches] == [1, 0]

    def test_not_when_the_long_one_would_miss_its_target(self) -> None:
        bench = self.start(long_ttft=1.25)
        bench.feed(bench.arrive("short", 40, ttft=0.5))
        gang = self.boundary(bench)
        assert gang is not None
        assert gang.prefill is not None
        assert gang.prefill.chunks[0].request_id == "long"

    def test_not_when_the_short_one_can_wait(self) -> None:
        bench = self.start(long_ttft=10.0)
        bench.feed(bench.arrive("short", 40, ttft=9.0))
        gang = self.boundary(bench)
        assert gang is not None
        assert gang.prefill is not None
        assert gang.prefill.chunks[0].request_id == "long"

    def test_it_does_not_recurse(self) -> None:
        bench = self.start(long_ttft=10.0)
        bench.feed(bench.arrive("short", 400, ttft=1.2))
        gang = self.boundary(bench)
        assert gang is not None
        assert gang.prefill is not None
        assert gang.prefill.chunks[0].request_id == "short"
        bench.feed(bench.arrive("shorter", 10, ttft=0.2))
        gang = None
        while gang is None or gang.prefill is None:
            decode = bench.scheduler.decode_flight
            event = DecodeDone(0.02) if decode is not None else PrefillDone(0.05)
            gang = bench.feed(event, at=bench.now + 0.02)
        assert gang.prefill.chunks[0].request_id == "short"
        assert len(bench.scheduler.batches) == 2


def test_cancelling_a_request_under_a_lane_keeps_its_pages_until_the_lane_is_done() -> None:
    bench = Bench()
    gang = spatial(bench)
    assert gang.prefill is not None
    free = bench.kv.free_pages
    bench.feed(RequestCancelled("long"))
    assert [o.request_id for o in bench.outputs if isinstance(o, Finished)] == ["long"]
    assert bench.kv.free_pages == free
    bench.feed(PrefillDone(0.02), at=bench.now + 0.02)
    assert bench.kv.free_pages == free + 6
    assert bench.scheduler.batches == []


def test_a_cancelled_request_drops_out_of_its_batch_at_the_next_block() -> None:
    bench = Bench()
    bench.decoding("a")
    bench.feed(bench.arrive("b", 60), bench.arrive("c", 60))
    bench.feed(DecodeDone(0.005), at=bench.now + 0.005)
    bench.feed(RequestCancelled("b"))
    gang = bench.feed(PrefillDone(0.015), at=bench.now + 0.015)
    assert gang is not None
    assert gang.prefill is not None
    assert [c.request_id for c in gang.prefill.chunks] == ["c"]


def test_observations_tell_the_cost_model_predicted_and_measured() -> None:
    bench = Bench()
    spatial(bench)
    bench.feed(DecodeDone(0.023), at=bench.now + 0.023)
    seen = bench.costs.seen[-1]
    assert (seen.predicted, seen.measured, seen.overlapped) == (0.020, 0.023, True)
    assert seen.partition == Partition(8, 2)
    assert seen.decode == DecodeShape(1, 18)


class TestChunkedPrefill:
    def test_each_step_decodes_and_fills_up_with_a_chunk(self) -> None:
        bench = Bench(ChunkedPrefill(token_budget=32))
        bench.decoding("a", "b")
        bench.feed(bench.arrive("long", 80))
        chunks = []
        for _ in range(3):
            gang = bench.feed(DecodeDone(0.03), *self.prefilled(bench), at=bench.now + 0.03)
            assert gang is not None
            assert gang.sharing is Sharing.FUSED
            assert gang.prefill is not None
            chunks += [(c.start, c.stop, c.last) for c in gang.prefill.chunks]
        assert chunks == [(0, 30, False), (30, 60, False), (60, 80, True)]
        gang = bench.feed(DecodeDone(0.03), PrefillDone(0.03), at=bench.now + 0.03)
        assert gang is not None
        assert gang.decode is not None
        assert gang.decode.request_ids == ("a", "b", "long")

    @staticmethod
    def prefilled(bench: Bench) -> list[Event]:
        return [PrefillDone(0.03)] if bench.scheduler.prefill_flight is not None else []


def test_preempted_requests_come_back_and_say_so_in_their_timing() -> None:
    bench = Bench(max_running=8)
    bench.scheduler.kv = bench.kv = CountingKv(7, 16)
    bench.feed(bench.arrive("old", 32, output=40), at=0.0)
    bench.now = 0.001
    bench.feed(bench.arrive("young", 32, output=40))
    bench.feed(PrefillDone(0.01), at=0.01)
    for _ in range(400):
        flying = bench.scheduler.prefill_flight, bench.scheduler.decode_flight
        if flying == (None, None):
            break
        event: Event = DecodeDone(0.01) if flying[1] is not None else PrefillDone(0.01)
        bench.feed(event, at=bench.now + 0.01)
    finished = {o.request_id: o.timing for o in bench.outputs if isinstance(o, Finished)}
    assert finished["old"].preemptions == 0
    assert finished["young"].preemptions >= 1
    assert finished["young"].recomputed_tokens > 0
    assert finished["young"].output_tokens == finished["old"].output_tokens == 40
    firsts = [i for o in bench.outputs if isinstance(o, Tokens) and o.first for i in o.request_ids]
    assert sorted(firsts) == ["old", "young"]  # a recomputed token is no second first token


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GangPolicy(max_batch_tokens=0), "option 'max_batch_tokens' is 0"),
        (lambda: GangPolicy(urgent_scan=-1), "option 'urgent_scan'"),
        (lambda: ChunkedPrefill(token_budget=True), "option 'token_budget' is True"),
        (lambda: TightestDecode(margin=1.5), "option 'margin' is 1.5"),
        (lambda: Static(decode_units=0), "option 'decode_units' is 0"),
    ],
)
def test_bad_options_name_themselves(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_static_split_off_the_menu_lists_the_menu_and_service_goes_on() -> None:
    bench = Bench(partitions=Static(decode_units=3))
    bench.decoding("a")
    bench.feed(bench.arrive("long", 80))
    step = bench.scheduler.step(1.0, [DecodeDone(0.005)])
    assert "menu offers 2, 5, 8" in step.faults[0]
    assert step.gang is not None


@pytest.mark.parametrize(
    ("prompt", "output", "message"),
    [
        (0, 5, "no tokens"),
        (5, 0, "max_output_tokens is 0"),
        (90, 20, "never fits the context of 100"),
        (16000, 10, "KV pool"),
    ],
)
def test_impossible_requests_are_rejected_with_the_reason(prompt: int, output: int, message: str) -> None:
    bench = Bench(max_context_tokens=100 if prompt < 1000 else None)
    bench.feed(bench.arrive("a", prompt, output=output))
    (finished,) = bench.outputs
    assert isinstance(finished, Finished)
    assert finished.reason.value == "rejected"
    assert message in finished.message


def test_a_full_queue_rejects() -> None:
    bench = Bench(max_waiting=1)
    bench.feed(bench.arrive("a", 10))
    bench.feed(bench.arrive("b", 10))
    bench.feed(bench.arrive("c", 10))
    assert "queue is full: 1 " in next(o for o in bench.outputs if isinstance(o, Finished)).message
