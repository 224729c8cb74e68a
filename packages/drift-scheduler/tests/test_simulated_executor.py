"""The simulated executor: fluid lanes, sharings, true lengths, its referee, and that it is lazy and deterministic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    DecodeShape,
    DecodeStep,
    Device,
    Event,
    Gang,
    Lane,
    LaneFailed,
    Observation,
    Partition,
    PrefillBlock,
    PrefillChunk,
    PrefillDone,
    PrefillShape,
    Request,
    RequestArrived,
    RequestCancelled,
    Sharing,
)
from drift_scheduler.simulation.executor import Overheads, SimulatedExecutor

SPLIT = Partition(6, 4)
DEVICE = Device(10, (Partition(10, 0), SPLIT, Partition(3, 7), Partition(0, 10)), num_layers=4)
WHOLE = DEVICE.all_decode


class Costs:
    """Prefill: 12 unit-seconds; decode: 4 unit-seconds; mixed: 1.5 s. Side by side x2 and x1.5."""

    def prefill(self, work: PrefillShape, units: int) -> float:
        return 12.0 / units

    def decode(self, work: DecodeShape, units: int) -> float:
        return 4.0 / units

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        return 1.5

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        return 2.0, 1.5

    def observe(self, observation: Observation) -> None:
        raise AssertionError("the truth does not learn")


def request(name: str, arrival: float = 0.0, output: int | None = None, limit: int = 100) -> Request:
    return Request(name, arrival, 8, limit, SLO(1, 1), output_tokens=output)


def block(ids: str = "a", start: int = 0, stop: int = 4, batch: int = 0) -> PrefillBlock:
    return PrefillBlock(batch, tuple(PrefillChunk(i, 0, 8) for i in ids), start, stop)


def step(*ids: str) -> DecodeStep:
    return DecodeStep(ids, 8 * len(ids))


def spatial(prefill: PrefillBlock | None = None, decode: DecodeStep | None = None) -> Gang:
    return Gang(Sharing.SPATIAL, SPLIT, prefill, decode)


def executor(*requests: Request, overheads: Overheads | None = None) -> SimulatedExecutor:
    return SimulatedExecutor(DEVICE, Costs(), requests, overheads=overheads)


def only(events: object) -> Event:
    assert isinstance(events, list)
    assert len(events) == 1
    event: Event = events[0]
    return event


def test_a_lane_alone_runs_at_its_solo_time() -> None:
    run = executor()
    run.submit(Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, block(stop=2)))
    done = only(run.wait(None))
    assert done == PrefillDone(0.6)  # 12 / 10 units, half the layers
    run.submit(Gang(Sharing.EXCLUSIVE, WHOLE, decode=step("a")))
    assert only(run.wait(None)) == DecodeDone(pytest.approx(0.4))
    assert run.now() == pytest.approx(1.0)
    assert run.wait(None) is None


def test_lanes_slow_each_other_down_only_while_both_run() -> None:
    run = executor()
    run.submit(spatial(block(), step("a")))
    # decode: 1 s solo x 1.5; meanwhile prefill does 0.75 of its 2 s, and the rest alone
    assert only(run.wait(None)) == DecodeDone(1.5)
    assert only(run.wait(None)) == PrefillDone(pytest.approx(1.5 + 1.25))


def test_rates_change_when_the_other_lane_starts() -> None:
    run = executor(request("x", arrival=0.5))
    run.submit(spatial(block()))
    assert isinstance(only(run.wait(None)), RequestArrived)
    run.submit(spatial(decode=step("a")))  # prefill has 1.5 s solo to go
    assert only(run.wait(None)) == DecodeDone(1.5)
    assert run.now() == 2.0
    run.submit(spatial(decode=step("a")))  # prefill has 0.75 s to go: 1.5 at half speed
    first, second = run.wait(None) or ()
    assert (first, second) == (DecodeDone(1.5), PrefillDone(3.5))
    assert run.now() == 3.5


def test_temporal_runs_decode_then_prefill_each_on_the_whole_device() -> None:
    run = executor()
    run.submit(Gang(Sharing.TEMPORAL, WHOLE, block(), step("a")))
    assert only(run.wait(None)) == DecodeDone(pytest.approx(0.4))
    with pytest.raises(AssertionError, match="units"):
        run.submit(Gang(Sharing.EXCLUSIVE, WHOLE, decode=step("a")))
    assert only(run.wait(None)) == PrefillDone(pytest.approx(1.2))
    assert run.now() == pytest.approx(1.6)


def test_fused_ends_both_at_once() -> None:
    run = executor()
    run.submit(Gang(Sharing.FUSED, WHOLE, block(), step("a")))
    assert run.wait(None) == [DecodeDone(1.5), PrefillDone(1.5)]


def test_overheads_are_added_and_a_switch_is_paid_only_on_a_change() -> None:
    run = executor(overheads=Overheads(block_seconds=0.1, step_seconds=0.2, switch_seconds=0.01))
    whole = Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, block())
    run.submit(whole)
    assert only(run.wait(None)) == PrefillDone(pytest.approx(1.3))
    run.submit(whole)
    assert only(run.wait(None)) == PrefillDone(pytest.approx(1.3))
    run.submit(Gang(Sharing.EXCLUSIVE, WHOLE, decode=step("a")))
    assert only(run.wait(None)) == DecodeDone(pytest.approx(0.61))


def test_noise_is_drawn_from_the_seed() -> None:
    def times(seed: int) -> list[float]:
        run = SimulatedExecutor(DEVICE, Costs(), (), overheads=Overheads(noise=0.2), seed=seed)
        found = []
        for _ in range(5):
            run.submit(Gang(Sharing.EXCLUSIVE, WHOLE, decode=step("a")))
            run.wait(None)
            found.append(run.now())
        return found

    assert times(1) == times(1) != times(2)


# ---------------------------------------------------------------------------------------- arrivals


def test_arrivals_are_pulled_one_ahead_and_time_jumps_to_them() -> None:
    pulled: list[int] = []

    def endless() -> Iterator[Request]:
        for i in range(1_000_000):
            pulled.append(i)
            yield request(f"r{i}", arrival=10.0 * i)

    run = SimulatedExecutor(DEVICE, Costs(), endless())
    for i in range(5):
        arrived = only(run.wait(None))
        assert isinstance(arrived, RequestArrived)
        assert arrived.request.id == f"r{i}"
        assert run.now() == 10.0 * i
    assert len(pulled) <= 7


def test_what_is_due_at_one_instant_comes_together_lanes_first() -> None:
    run = SimulatedExecutor(
        DEVICE,
        Costs(),
        [request("a", 1.2), request("b", 1.2)],
        interruptions=[(1.2, RequestCancelled("z"))],
    )
    run.submit(Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, block("z")))
    kinds = [type(event) for event in run.wait(None) or ()]
    assert kinds == [PrefillDone, RequestCancelled, RequestArrived, RequestArrived]
    assert run.wait(None) is None


def test_waiting_until_a_time_stops_there_and_loses_no_work() -> None:
    run = executor()
    run.submit(Gang(Sharing.EXCLUSIVE, WHOLE, decode=step("a")))
    assert run.wait(0.1) == ()
    assert run.now() == 0.1
    assert only(run.wait(9.0)) == DecodeDone(pytest.approx(0.4))
    assert run.wait(2.0) == ()
    assert run.now() == 2.0
    assert run.wait(None) is None


def test_arrivals_out_of_order_are_the_workloads_fault() -> None:
    run = executor(request("late", 2.0), request("early", 1.0))
    with pytest.raises(ValueError, match=r"'early' arrives at 1\.0 s, before 'late'"):
        run.wait(None)


def test_a_failing_lane_says_so_at_its_end() -> None:
    run = SimulatedExecutor(
        DEVICE, Costs(), (), fail=lambda lane, work: "out of memory" if lane is Lane.PREFILL else None
    )
    run.submit(spatial(block(stop=2), step("a")))
    assert isinstance(only(run.wait(None)), DecodeDone)
    assert only(run.wait(None)) == LaneFailed(Lane.PREFILL, "out of memory")
    run.submit(spatial(block(stop=1)))  # the batch is forgotten


# ----------------------------------------------------------------------------------------- true lengths


def decode(run: SimulatedExecutor, *ids: str) -> tuple[str, ...]:
    run.submit(Gang(Sharing.EXCLUSIVE, WHOLE, decode=step(*ids)))
    done = only(run.wait(None))
    assert isinstance(done, DecodeDone)
    return done.stopped


def prefill(run: SimulatedExecutor, ids: str, batch: int) -> tuple[str, ...]:
    run.submit(Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, block(ids, batch=batch)))
    done = only(run.wait(None))
    assert isinstance(done, PrefillDone)
    return done.stopped


def test_requests_stop_at_their_true_length_the_prefills_token_included() -> None:
    run = executor(request("a", output=1), request("b", output=3), request("c", output=4), request("d"))
    run.wait(None)
    assert prefill(run, "abcd", 0) == ("a",)
    run.forget(["a"])
    assert decode(run, "b", "c", "d") == ()
    assert decode(run, "b", "c", "d") == ("b",)
    run.forget(["b"])
    assert decode(run, "d", "c") == ("c",)
    run.forget(["c"])
    assert decode(run, "d") == ()


def test_a_request_cut_by_its_own_limit_is_left_to_the_scheduler() -> None:
    run = executor(request("a", output=2, limit=2))
    run.wait(None)
    assert prefill(run, "a", 0) == ()
    assert decode(run, "a") == ()


def test_preemption_and_recomputation_keep_the_count() -> None:
    run = executor(request("a", output=6), request("b", output=9))
    run.wait(None)
    prefill(run, "ab", 0)  # one token each
    assert decode(run, "a", "b") == ()  # two
    assert decode(run, "b") == ()  # a preempted; b three
    assert prefill(run, "a", 1) == ()  # a three
    assert decode(run, "a", "b") == ()  # four, four
    assert decode(run, "a", "b") == ()  # five, five
    assert prefill(run, "b", 2) == ()  # b preempted and back without a step between: six
    assert decode(run, "a", "b") == ("a",)  # six, seven
    run.forget(["a"])
    assert decode(run, "b") == ()
    assert decode(run, "b") == ("b",)


def test_chunks_that_do_not_end_the_prompt_and_blocks_that_do_not_end_the_model_yield_no_token() -> None:
    run = executor(request("a", output=1))
    run.wait(None)
    part = PrefillBlock(0, (PrefillChunk("a", 0, 4, last=False),), 0, 4)
    run.submit(Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, part))
    assert only(run.wait(None)) == PrefillDone(1.2)
    run.submit(Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, block(stop=3, batch=1)))
    assert only(run.wait(None)) == PrefillDone(pytest.approx(0.9))
    run.submit(Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, block(start=3, batch=1)))
    assert only(run.wait(None)) == PrefillDone(pytest.approx(0.3), stopped=("a",))


# --------------------------------------------------------------------------------------------- referee


@pytest.mark.parametrize(
    ("running", "gang", "message"),
    [
        (None, Gang(Sharing.SPATIAL, SPLIT), "without work"),
        (spatial(block()), spatial(block(batch=1)), "busy prefill lane"),
        (spatial(None, step("a")), spatial(None, step("a")), "busy decode lane"),
        (spatial(block()), Gang(Sharing.SPATIAL, Partition(3, 7), None, step("a")), "13 units of 10"),
        (spatial(None, step("a")), Gang(Sharing.SPATIAL, Partition(3, 7), block()), "busy on 6\\+4"),
        (spatial(block()), Gang(Sharing.EXCLUSIVE, WHOLE, None, step("a")), "16 units of 10"),
        (
            Gang(Sharing.EXCLUSIVE, WHOLE, None, step("a")),
            spatial(block()),
            "spatial gang on 6\\+4 with decode running",
        ),
        (Gang(Sharing.FUSED, WHOLE, block(), step("a")), spatial(block(batch=1)), "busy prefill lane"),
        (None, Gang(Sharing.SPATIAL, Partition(10, 0), None, step("a")), "without units"),
        (None, spatial(block(start=1)), "layer 1 instead of 0"),
        (None, spatial(block(stop=5)), r"layers \[0, 5\) of 4"),
    ],
)
def test_what_breaks_a_rule_of_the_device_is_an_assertion(
    running: Gang | None, gang: Gang, message: str
) -> None:
    run = executor()
    if running is not None:
        run.submit(running)
    with pytest.raises(AssertionError, match=message):
        run.submit(gang)


def test_blocks_of_a_batch_run_in_layer_order_and_gain_no_requests() -> None:
    run = executor()

    def go(work: PrefillBlock) -> None:
        run.submit(Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, work))
        run.wait(None)

    go(block("abc", 0, 1))
    go(block("z", 0, 4, batch=1))  # a short one in between
    with pytest.raises(AssertionError, match="continues at layer 2 instead of 1"):
        go(block("abc", 2, 3))
    with pytest.raises(AssertionError, match=r"\['d'\] joined batch 0"):
        go(block("abd", 1, 2))
    go(block("ac", 1, 3))
    with pytest.raises(AssertionError, match="joined"):
        go(block("abc", 3, 4))
    go(block("a", 3, 4))


def test_a_clock_from_outside_finds_everything_that_happened_until_then() -> None:
    executor = SimulatedExecutor(DEVICE, Costs(), ())
    assert executor.due is None
    assert executor.elapse(5.0) == []
    block = PrefillBlock(0, (PrefillChunk("a", 0, 8),), 0, 4)
    executor.submit(Gang(Sharing.TEMPORAL, WHOLE, block, DecodeStep(("b",), 1)))
    assert executor.due == pytest.approx(5.4)
    assert executor.elapse(5.3) == []
    decode, prefill = executor.elapse(9.0)  # the prefill began at 5.4, when the decode ended
    assert isinstance(decode, DecodeDone)
    assert isinstance(prefill, PrefillDone)
    assert (decode.seconds, prefill.seconds) == (pytest.approx(0.4), pytest.approx(1.2))
    assert executor.now() == 9.0
    assert executor.due is None
