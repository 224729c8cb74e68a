"""The CUDA executor on the stub device: same tokens as the CPU's, and every planted fault is seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drift_core.cuda import executor as executor_module
from drift_core.cuda.choosing import Chooser
from drift_core.cuda.device import Place, Touches, Work
from drift_core.cuda.executor import CudaExecutor
from drift_core.cuda.stub import StubDevice, flat_cost
from drift_core.sampling_params import SamplingParams
from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    DecodeStep,
    Event,
    Gang,
    Lane,
    LaneFailed,
    Partition,
    PrefillBlock,
    PrefillChunk,
    PrefillDone,
    Request,
    RequestArrived,
    Sharing,
    Step,
)

sys.path.insert(0, str(Path(__file__).parent))

from cuda_world import (
    GREEDY,
    LAYERS,
    UNITS,
    Load,
    Splits,
    expected,
    kinds,
    run,
    stub_executor,
)

SPLIT = Partition(8, 8)
POLICIES = [
    ("gang", {}),
    ("drift", {}),
    ("chunked-prefill", {"token_budget": 24}),
    ("temporal", {}),
    ("streams", {}),
    ("alternate", {}),
    ("prefill-first", {}),
]


def ready(stub: StubDevice, **options: Any) -> CudaExecutor:
    made = stub_executor(stub, **options)
    made.warm_up()
    return made


def arrive(executor: CudaExecutor, name: str, prompt: list[int], params: SamplingParams = GREEDY) -> None:
    request = Request(name, 0.0, len(prompt), 50, SLO(1.0, 1.0), prompt=prompt)
    executor.arrive(request, params)
    assert executor.wait(None) == [RequestArrived(request)]
    assert executor.kv.admit(request, len(prompt), len(prompt) + 50) is not None


def block(batch: int, *chunks: PrefillChunk, layers: tuple[int, int] = (0, LAYERS)) -> PrefillBlock:
    return PrefillBlock(batch, chunks, *layers)


def finish(executor: CudaExecutor, gang: Gang) -> list[Event]:
    executor.submit(gang)
    wanted, events = (gang.prefill is not None) + (gang.decode is not None), []
    while len(events) < wanted:
        events += executor.wait(executor.now() + 100.0) or ()
    return events


def prefill_alone(executor: CudaExecutor, name: str, length: int, batch: int = 0) -> None:
    finish(
        executor,
        Gang(Sharing.EXCLUSIVE, executor.device.all_prefill, block(batch, PrefillChunk(name, 0, length))),
    )


def decode_alone(executor: CudaExecutor, *names: str) -> Gang:
    return Gang(Sharing.EXCLUSIVE, executor.device.all_decode, decode=DecodeStep(names, 0))


# ------------------------------------------------------------------------------------- same results


@pytest.fixture(scope="module")
def greedy_tokens() -> Any:
    return expected(Load())


@pytest.mark.parametrize(("policy", "options"), POLICIES, ids=[name for name, _ in POLICIES])
def test_every_policy_yields_the_cpu_executors_tokens(
    policy: str, options: dict[str, Any], greedy_tokens: Any
) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    assert run(executor, Load(), policy, **options) == greedy_tokens
    assert stub.faults == []


def test_lanes_overlap_under_a_split_and_use_both_places() -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    run(executor, Load(24, prompt=(30, 60), output=(20, 30)), "gang")
    spans = {lane: [] for lane in Lane}
    for name, place, start, stop in stub.log:
        if place.partition is not None and name in ("prefill", "decode"):
            spans[place.lane].append((start, stop))
    overlap = sum(
        max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in spans[Lane.PREFILL] for b in spans[Lane.DECODE]
    )
    assert overlap > 0
    assert stub.faults == []


def test_preempted_requests_are_recomputed_alike() -> None:
    load = Load(6, seed=4, prompt=(40, 60), output=(30, 50))
    stub = StubDevice(UNITS)
    executor = stub_executor(stub, max_running=12)
    executor.kv._empty = executor.kv._empty[-22:]  # a small pool
    executor.kv.total_pages = 22
    executor.warm_up()
    tight = run(executor, load, "gang", max_running=12)
    roomy = run(ready(StubDevice(UNITS), max_running=12), load, "gang", max_running=12)
    assert executor.kv.stats.admissions > load.count, "nobody was preempted"
    assert tight == roomy
    assert stub.faults == []


@pytest.mark.parametrize("policy", ["gang", "drift", "chunked-prefill", "temporal", "streams"])
def test_most_decisions_are_made_while_the_device_works(policy: str, greedy_tokens: Any) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    steps: list[Step] = []
    found = run(executor, Load(), policy, on_step=steps.append)
    assert found == greedy_tokens
    assert stub.faults == []
    decided = [step for step in steps if step.gang is not None]
    assert sum(step.ahead for step in decided) > 0.5 * len(decided)


STOPPING = SamplingParams(temperature=0.0, stop_token_ids=list(range(0, 61, 9)), ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_k=20, seed=3, ignore_eos=True)


def mixed_load(index: int) -> SamplingParams:
    return (GREEDY, STOPPING, DRAWN if index > 20 else GREEDY)[index % 3]


@pytest.fixture(scope="module")
def mixed_tokens() -> Any:
    return expected(Load(30, seed=6, prompt=(1, 40), output=(1, 30), params=mixed_load))


@pytest.mark.parametrize("policy", ["gang", "drift", "chunked-prefill", "temporal"])
def test_requests_that_come_and_go_all_the_time_get_the_cpu_executors_tokens(
    policy: str, mixed_tokens: Any
) -> None:
    """Some stop where nobody foresees it, some are drawn; pages turn, rows are left and tokens noted late."""
    load = Load(30, seed=6, prompt=(1, 40), output=(1, 30), params=mixed_load)
    stub, plain = StubDevice(UNITS), StubDevice(UNITS)
    executor = ready(stub)
    ahead: list[bool] = []
    found = run(executor, load, policy, on_step=lambda step: ahead.append(step.ahead))
    assert found == run(ready(plain), load, policy, ahead=False)
    assert stub.faults == plain.faults == []
    assert sum(ahead) > 0.3 * len(ahead)
    executor.kv.audit()
    assert executor.kv.free_pages == executor.kv.total_pages
    greedy = [f"r{index}" for index in range(30) if mixed_load(index) is not DRAWN]
    assert {name: found[name] for name in greedy} == {name: mixed_tokens[name] for name in greedy}


def test_how_rows_draw_is_read_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so that each is drawn for the place it will be at: the tokens are those of reading at the launch."""
    load = Load(16, seed=8, output=(4, 30), params=lambda index: DRAWN if index % 2 else GREEDY)
    found, early = [], []
    look_ahead = Chooser.look_ahead
    for ahead in (True, False):

        def looking(self: Chooser, *rows: Any, wanted: bool = ahead) -> bool:
            read = wanted and look_ahead(self, *rows)
            early.append(read)
            return read

        monkeypatch.setattr(Chooser, "look_ahead", looking)
        found.append(run(ready(StubDevice(UNITS)), load, "gang"))
    assert found[0] == found[1]
    assert sum(early) > 5


def test_a_request_that_ends_before_its_first_step_leaves_the_others_alone() -> None:
    executor = ready(StubDevice(UNITS))
    arrive(executor, "a", [1, 2, 3], DRAWN)
    prefill_alone(executor, "a", 3)
    executor.submit(decode_alone(executor, "a"))
    lane = executor.decode
    while lane.prepare(UNITS):
        pass
    arriving = Request("b", 0.0, 3, 50, SLO(1.0, 1.0), prompt=[4, 5, 6])
    executor.arrive(arriving, DRAWN)
    assert executor.kv.admit(arriving, 3, 53) is not None
    lane.expect(["b"])
    assert lane.prepare(UNITS), "its row is there"
    executor.kv.release("b")
    executor.forget(["b"])
    while lane.prepare(UNITS):
        pass
    events: list[Event] = []
    while not any(isinstance(event, DecodeDone) for event in events):
        events += executor.wait(executor.now() + 100.0) or ()
    (done,) = finish(executor, decode_alone(executor, "a"))
    assert isinstance(done, DecodeDone)


def test_a_step_is_prepared_for_the_units_that_were_planned() -> None:
    executor = ready(StubDevice(UNITS))
    cut: list[int] = []
    prepare = executor.decode.prepare

    def noting(units: int) -> bool:
        cut.append(units)
        return prepare(units)

    executor.decode.prepare = noting  # type: ignore[method-assign]
    planned: list[Gang | None] = [None]
    executor.planned = lambda: planned[0]
    arrive(executor, "a", [1, 2, 3])
    prefill_alone(executor, "a", 3)
    finish(executor, decode_alone(executor, "a"))
    assert set(cut) == {UNITS}
    for partition, units in ((SPLIT, 8), (Partition(12, 4), 4), (executor.device.all_decode, UNITS)):
        cut.clear()
        sharing = Sharing.EXCLUSIVE if units == UNITS else Sharing.SPATIAL
        planned[0] = Gang(sharing, partition, decode=DecodeStep(("a",), 0))
        finish(executor, decode_alone(executor, "a"))
        assert set(cut) == {units}


def test_tokens_are_noted_before_anybody_reads_them() -> None:
    executor = ready(StubDevice(UNITS))
    arrive(executor, "a", [1, 2, 3])
    prefill_alone(executor, "a", 3)
    state = executor._sequences["a"]
    for known in range(4, 8):
        assert len(state.tokens) == known
        gang = decode_alone(executor, "a")
        executor.submit(gang)
        while not (events := executor.wait(executor.now() + 100.0)):
            pass
        (done,) = events
        assert isinstance(done, DecodeDone)
        assert len(state.tokens) == known, "the next launch does not need it"
        executor.wait(executor.now())
        assert list(state.tokens)[-1:] == list(done.tokens or ())
        assert state.sampler.generated == known - 2


def test_a_request_that_decodes_again_is_read_with_its_latest_token() -> None:
    """A failed launch forgets the rows; what they are read from anew includes what came last."""
    executor = ready(StubDevice(UNITS))
    other = ready(StubDevice(UNITS))
    tokens: list[list[int]] = []
    for each in (executor, other):
        arrive(each, "a", [1, 2, 3])
        prefill_alone(each, "a", 3)
        found: list[int] = []
        for _ in range(4):
            (done,) = finish(each, decode_alone(each, "a"))
            assert isinstance(done, DecodeDone)
            found += done.tokens or ()
            if each is executor:
                each.decode.rows.reset()
        tokens.append(found)
    assert tokens[0] == tokens[1]


def test_nothing_else_is_done_meanwhile_when_nothing_runs() -> None:
    executor = ready(StubDevice(UNITS))
    asked: list[bool] = []

    def meanwhile() -> bool:
        asked.append(bool(executor._running))
        return False

    executor.meanwhile = meanwhile
    arrive(executor, "a", [1, 2, 3])
    prefill_alone(executor, "a", 3)
    finish(executor, decode_alone(executor, "a"))
    executor.shut_down()
    assert executor.wait(None) is None
    assert asked
    assert all(asked)


def test_host_chosen_tokens_are_those_of_the_cpu_executor() -> None:
    penalised = SamplingParams(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5, ignore_eos=True)
    biased = SamplingParams(temperature=0.7, seed=5, logit_bias={3: 4.0}, ignore_eos=True)
    load = Load(9, params=lambda index: (GREEDY, penalised, biased)[index % 3])
    stub = StubDevice(UNITS)
    found = run(ready(stub), load, "gang")
    assert found == expected(load)
    assert stub.faults == []


def test_logprobs_come_with_the_tokens() -> None:
    wanted = SamplingParams(temperature=0.0, logprobs=2, ignore_eos=True)
    stub = StubDevice(UNITS)
    executor = ready(stub)
    arrive(executor, "a", [1, 2, 3], wanted)
    arrive(executor, "b", [4, 5], GREEDY)
    (done,) = finish(
        executor,
        Gang(
            Sharing.EXCLUSIVE,
            executor.device.all_prefill,
            block(0, PrefillChunk("a", 0, 3), PrefillChunk("b", 0, 2)),
        ),
    )
    assert isinstance(done, PrefillDone)
    assert done.details is not None
    assert list(done.details) == ["a"]
    assert len(done.details["a"].top) == 2


def test_drawn_tokens_depend_on_seed_and_position_alone() -> None:
    drawn = [
        SamplingParams(temperature=0.9, top_k=20, seed=11, ignore_eos=True),
        SamplingParams(temperature=1.3, top_p=0.8, min_p=0.02, seed=12, ignore_eos=True),
    ]
    load = Load(8, params=lambda index: drawn[index % 2])
    results = []
    for policy, options in (("gang", {}), ("chunked-prefill", {"token_budget": 24}), ("alternate", {})):
        stub = StubDevice(UNITS)
        results.append(run(ready(stub), load, policy, **options))
        assert stub.faults == []
    assert results[0] == results[1] == results[2]
    assert results[0] != expected(Load(8))


def test_a_stop_token_ends_its_request() -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    arrive(executor, "a", [1, 2, 3])
    prefill_alone(executor, "a", 3)
    (done,) = finish(executor, decode_alone(executor, "a"))
    assert isinstance(done, DecodeDone)
    token = next(iter(done.tokens or ()))
    stopping = SamplingParams(temperature=0.0, stop_token_ids=[token], ignore_eos=True)
    other = ready(StubDevice(UNITS))
    arrive(other, "a", [1, 2, 3], stopping)
    prefill_alone(other, "a", 3)
    (done,) = finish(other, decode_alone(other, "a"))
    assert isinstance(done, DecodeDone)
    assert done.stopped == ("a",)


# ------------------------------------------------------------------------------- blocks and partitions


def test_a_batch_goes_on_under_another_split_and_loses_requests_on_the_way() -> None:
    prompt = [[7, 8, 9, 10], [11, 12, 13], [1, 2]]

    def first_tokens(moves: bool) -> dict[str, int]:
        stub = StubDevice(UNITS)
        executor = ready(stub)
        for name, tokens in zip("abc", prompt, strict=True):
            arrive(executor, name, tokens)
        chunks = tuple(PrefillChunk(n, 0, len(p)) for n, p in zip("abc", prompt, strict=True))
        kept = (chunks[0], chunks[2]) if moves else chunks
        where = (SPLIT, Partition(12, 4)) if moves else (SPLIT, SPLIT)
        finish(executor, Gang(Sharing.SPATIAL, where[0], block(0, *chunks, layers=(0, 1))))
        if moves:
            executor.kv.release("b")
            executor.forget(["b"])
        (done,) = finish(executor, Gang(Sharing.SPATIAL, where[1], block(0, *kept, layers=(1, LAYERS))))
        assert isinstance(done, PrefillDone)
        assert stub.faults == []
        return dict(zip([chunk.request_id for chunk in kept], done.tokens or (), strict=True))

    moved, straight = first_tokens(True), first_tokens(False)
    assert moved == {name: straight[name] for name in "ac"}


def test_an_urgent_batch_overtakes_one_under_way() -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    arrive(executor, "long", list(range(30)))
    arrive(executor, "short", [1, 2, 3])
    part = block(0, PrefillChunk("long", 0, 30), layers=(0, 2))
    finish(executor, Gang(Sharing.SPATIAL, SPLIT, part))
    (urgent,) = finish(executor, Gang(Sharing.SPATIAL, SPLIT, block(1, PrefillChunk("short", 0, 3))))
    rest = block(0, PrefillChunk("long", 0, 30), layers=(2, LAYERS))
    (late,) = finish(executor, Gang(Sharing.SPATIAL, SPLIT, rest))
    alone = ready(StubDevice(UNITS))
    arrive(alone, "long", list(range(30)))
    (straight,) = finish(alone, Gang(Sharing.SPATIAL, SPLIT, block(0, PrefillChunk("long", 0, 30))))
    assert isinstance(urgent, PrefillDone)
    assert isinstance(late, PrefillDone)
    assert isinstance(straight, PrefillDone)
    assert late.tokens == straight.tokens
    assert stub.faults == []


def test_a_prompt_longer_than_the_room_makes_room_and_says_so() -> None:
    load = Load(4, prompt=(100, 150), output=(2, 6))
    for policy, options in (("gang", {}), ("chunked-prefill", {"token_budget": 120})):
        stub = StubDevice(UNITS)
        assert run(ready(stub, prefill_tokens=32), load, policy, **options)
        assert stub.faults == []


def test_realised_units_decide_the_shares_of_work() -> None:
    class Fewer(Splits):
        def realised(self, split: tuple[int, int]) -> tuple[int, int]:
            return split[0] - 2, split[1] - 1

    executor = ready(StubDevice(UNITS), partitions=Fewer())
    assert executor.stream(Place(Lane.PREFILL, SPLIT))[1] == 6
    assert executor.stream(Place(Lane.DECODE, SPLIT))[1] == 7


def test_decode_is_launched_before_prefill_and_seen_between_its_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A finished step is reported while most of a long prefill is still to be launched."""
    monkeypatch.setattr(executor_module, "LAYERS_PER_LAUNCH", 1)

    def cost(work: Work, place: Place) -> float:
        return 1e-7 if work.name == "decode" else flat_cost(work, place)

    stub = StubDevice(UNITS, cost)
    executor = ready(stub)
    arrive(executor, "a", [1, 2, 3])
    prefill_alone(executor, "a", 3)
    arrive(executor, "b", list(range(40)))
    begun = len(stub.log)
    gang = Gang(Sharing.SPATIAL, SPLIT, block(1, PrefillChunk("b", 0, 40)), DecodeStep(("a",), 0))
    executor.submit(gang)
    assert [name for name, *_ in stub.log[begun:]][:2] == ["copy", "decode"]
    events = executor.wait(None)
    assert events is not None
    assert [type(event) for event in events] == [DecodeDone]
    assert sum(name == "prefill" for name, *_ in stub.log[begun:]) < LAYERS


def test_a_failing_launch_fails_its_lane_alone(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    arrive(executor, "a", [1, 2, 3])
    prefill_alone(executor, "a", 3)
    arrive(executor, "b", [4, 5])

    def broken(*_: object) -> None:
        raise ValueError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(executor.prefill, "_layers", lambda *_: broken)
        events = finish(
            executor, Gang(Sharing.SPATIAL, SPLIT, block(1, PrefillChunk("b", 0, 2)), DecodeStep(("a",), 0))
        )
    failures = [event for event in events if isinstance(event, LaneFailed)]
    assert [failure.lane for failure in failures] == [Lane.PREFILL]
    assert "ValueError: no such luck" in failures[0].message
    executor.forget(["b"])
    (done,) = finish(executor, decode_alone(executor, "a"))
    assert isinstance(done, DecodeDone)


def test_shutting_down_ends_the_wait_and_closing_gives_the_partitions_back() -> None:
    splits = Splits()
    executor = ready(StubDevice(UNITS), partitions=splits)
    executor.shut_down()
    assert executor.wait(None) is None
    executor.close()
    assert splits.closed


def test_waiting_ends_at_its_time() -> None:
    executor = ready(StubDevice(UNITS))
    until = executor.now() + 0.01
    assert executor.wait(until) == ()
    assert executor.now() >= until


def test_a_cancelled_request_gives_its_cell_back() -> None:
    stub = StubDevice(UNITS, runs=False)
    executor = ready(stub)
    for turn in range(3 * executor.decode.cells.count):
        name = f"r{turn}"
        arrive(executor, name, [1, 2])
        prefill_alone(executor, name, 2, turn)
        executor.kv.release(name)
        executor.forget([name])
    assert executor.decode.cells.free == executor.decode.cells.count


# ------------------------------------------------------------------------------------ planted faults


def test_a_lost_wait_is_seen() -> None:
    stub = StubDevice(UNITS, lost_waits=True)
    run(ready(stub), Load(), "gang")
    assert "order" in kinds(stub.faults)
    assert any("last token" in fault or "kv page" in fault for fault in stub.faults)


def test_a_missing_event_after_the_merge_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the prefill lane has finished goes unsaid to the decode lane."""
    stub = StubDevice(UNITS)
    executor = ready(stub)
    finished = executor.order.finished
    monkeypatch.setattr(
        executor.order, "finished", lambda mark: finished(mark) if mark.lane is Lane.DECODE else None
    )
    run(executor, Load(), "gang")
    assert "order" in kinds(stub.faults)


def test_scratch_shared_by_both_lanes_is_seen() -> None:
    stub = StubDevice(UNITS, shared_scratch=True)
    run(ready(stub), Load(24, prompt=(30, 60), output=(20, 30)), "gang")
    assert "order" in kinds(stub.faults)


def test_allocation_on_the_hot_path_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    send = executor.decode._steps.buffers.send

    def careless(*given: Any) -> None:
        executor.accelerator.empty((4,), executor.decode.outputs.tokens.dtype)
        send(*given)

    monkeypatch.setattr(executor.decode._steps.buffers, "send", careless)
    run(executor, Load(), "gang")
    assert kinds(stub.faults) == {"allocation"}


def test_a_split_that_changes_under_a_busy_lane_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    for name in "ab":
        arrive(executor, name, list(range(20)))
    prefill_alone(executor, "a", 20)
    executor.submit(Gang(Sharing.SPATIAL, SPLIT, block(1, PrefillChunk("b", 0, 20))))
    moved = Gang(Sharing.SPATIAL, Partition(4, 12), decode=DecodeStep(("a",), 0))
    with pytest.raises(AssertionError, match="in force"):
        executor.submit(moved)
    monkeypatch.setattr(executor, "_check", lambda gang: None)
    executor.submit(moved)
    assert kinds(stub.faults) == {"split"}


def test_a_graph_replayed_on_another_partitions_stream_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    graphs = executor.decode.graphs
    wrong = next(graph for (place, _), graph in graphs._graphs.items() if place.partition == Partition(12, 4))
    monkeypatch.setattr(graphs, "get", lambda *_: wrong)
    arrive(executor, "a", [1, 2, 3])
    prefill_alone(executor, "a", 3)
    finish(executor, Gang(Sharing.SPATIAL, SPLIT, decode=DecodeStep(("a",), 0)))
    assert kinds(stub.faults) == {"graph"}


def test_waiting_for_the_device_in_service_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    prepare = executor.decode.prepare
    monkeypatch.setattr(executor.decode, "prepare", lambda units: (stub.synchronize(), prepare(units))[1])
    run(executor, Load(), "gang")
    assert kinds(stub.faults) == {"wait"}


def test_a_copy_from_pageable_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    stub._pinned.clear()
    run(executor, Load(4), "gang")
    assert "copy" in kinds(stub.faults)


def test_a_host_block_rewritten_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubDevice(UNITS)
    executor = ready(stub)
    arrive(executor, "a", list(range(20)))
    prefill_alone(executor, "a", 20)
    executor.submit(decode_alone(executor, "a"))
    buffers = executor.decode._steps.buffers
    buffers.open()
    assert stub.faults == []
    buffers.open()
    assert kinds(stub.faults) == {"host-order"}


def test_the_watch_knows_a_race_from_an_order() -> None:
    stub = StubDevice(UNITS)
    memory = stub.empty((4,), torch.int64)
    left, right = (stub.stream(Place(lane, None)) for lane in Lane)
    write = Work("write", lambda: None, lambda: Touches((), [memory]))
    stub.launch(left, write)
    event = stub.event()
    stub.record(event, left)
    stub.wait(right, event)
    stub.launch(right, write)
    assert stub.faults == []
    stub.launch(left, write)
    assert kinds(stub.faults) == {"order"}


def test_the_host_is_told_apart_from_the_device() -> None:
    """What the host saw orders nothing between streams."""
    stub = StubDevice(UNITS)
    memory = stub.empty((4,), torch.int64)
    left, right = (stub.stream(Place(lane, None)) for lane in Lane)
    write = Work("write", lambda: None, lambda: Touches((), [memory]))
    stub.launch(left, write)
    event = stub.event()
    stub.record(event, left)
    while not stub.reached(event):
        stub.pause(1e-3)
    stub.launch(right, write)
    assert kinds(stub.faults) == {"order"}
