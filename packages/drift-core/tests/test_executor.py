"""The CPU executor below the engine: batches, lanes and their faults."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from drift_core.assembly import cpu_device, cpu_executor
from drift_core.batches import Batch, BatchBuilder
from drift_core.executor import IDLE, CpuExecutor
from drift_core.kv import PagedKv, PoolPlan
from drift_core.lanes import Job, LaneThread
from drift_core.model.config import ModelConfig, Rope
from drift_core.model.decoder import Decoder, KvCache
from drift_core.model.weights import random_weights
from drift_core.sampler import SamplerState
from drift_core.sampling_params import SamplingParams
from drift_core.sequences import SequenceTable
from drift_kernels.affinity import CpuAffinity
from drift_kernels.ops import select_ops
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
    RequestCancelled,
    Sharing,
)
from drift_scheduler.errors import DriftError

PAGE_TOKENS, PAGES, LAYERS = 4, 200, 4
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=LAYERS,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rms_eps=1e-5,
    rope=Rope(10000.0),
    layer_windows=(None,) * LAYERS,
    max_context=256,
)
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def decoder() -> Decoder:
    return Decoder(MODEL, random_weights(MODEL, torch.float32, seed=1), select_ops("cpu", torch.float32))


@pytest.fixture
def executor() -> Iterator[CpuExecutor]:
    cache = KvCache.allocate(MODEL, PAGES, PAGE_TOKENS, torch.float32)
    plan = PoolPlan(PAGES, PAGE_TOKENS, 1, MODEL.max_context)
    made = cpu_executor(decoder(), cache, plan, CpuAffinity())
    yield made
    made.close()


def request(request_id: str, prompt: list[int]) -> Request:
    return Request(request_id, 0.0, len(prompt), 50, SLO(1.0, 1.0), prompt=prompt)


def arrive(executor: CpuExecutor, request_id: str, prompt: list[int]) -> None:
    """Make a request known and give it pages, as the scheduler does."""
    made = request(request_id, prompt)
    executor.arrive(made, GREEDY)
    assert executor.wait(None) == [RequestArrived(made)]
    assert executor.kv.admit(made, len(prompt), len(prompt) + 50) is not None


def chunk(request_id: str, stop: int, start: int = 0, last: bool = True) -> PrefillChunk:
    return PrefillChunk(request_id, start, stop, last)


def prefill(
    executor: CpuExecutor, batch_id: int, *chunks: PrefillChunk, layers: tuple[int, int] = (0, LAYERS)
) -> Gang:
    return Gang(
        Sharing.EXCLUSIVE, executor.device.all_prefill, prefill=PrefillBlock(batch_id, chunks, *layers)
    )


def decode(executor: CpuExecutor, *ids: str) -> Gang:
    return Gang(Sharing.EXCLUSIVE, executor.device.all_decode, decode=DecodeStep(ids, 0))


def finish(executor: CpuExecutor, gang: Gang) -> list[Event]:
    """Run a gang to its end."""
    executor.submit(gang)
    wanted = (gang.prefill is not None) + (gang.decode is not None)
    events: list[Event] = []
    while len(events) < wanted:
        events += executor.wait(executor.now() + 60.0) or ()
    return events


def tokens(events: list[Event]) -> list[int]:
    (event,) = events
    assert isinstance(event, PrefillDone | DecodeDone)
    return list(event.tokens or ())


# ----------------------------------------------------------------------------------------------- batches


class _World:
    """Sequences and a pool that grow as they would in service."""

    def __init__(self) -> None:
        self.draw = random.Random(0)
        self.decoder = decoder()
        self.sequences = SequenceTable()
        self.kv = PagedKv(PAGES, PAGE_TOKENS, self.sequences.tokens_of)
        self.builder = self.fresh_builder()
        self.names = 0

    def fresh_builder(self) -> BatchBuilder:
        return BatchBuilder(self.decoder, self.sequences, self.kv)

    def join(self) -> str:
        """A prefilled request: its prompt and a first token."""
        self.names += 1
        name = f"r{self.names}"
        prompt = [self.draw.randrange(61) for _ in range(self.draw.randrange(1, 15))]
        self.sequences.add(name, prompt, SamplerState(GREEDY, prompt, (), 61))
        assert self.kv.admit(request(name, prompt), len(prompt), len(prompt) + 1) is not None
        self.sequences[name].tokens.append(self.draw.randrange(61))
        return name

    def decode(self, builder: BatchBuilder, names: list[str]) -> Batch:
        for name in names:
            assert self.kv.extend(name, len(self.sequences[name].tokens))
        return builder.decode(tuple(names))

    def sampled(self, names: list[str]) -> None:
        found = [self.draw.randrange(61) for _ in names]
        for name, token in zip(names, found, strict=True):
            self.sequences[name].tokens.append(token)
        self.builder.decoded(found)


def same(kept: Batch, fresh: Batch) -> None:
    assert kept.sample_ids == fresh.sample_ids
    assert kept.states == fresh.states
    assert torch.equal(kept.token_ids, fresh.token_ids)
    for field in ("query_starts", "context_lens", "slots", "positions"):
        assert torch.equal(getattr(kept.inputs, field), getattr(fresh.inputs, field)), field
    for row, context in enumerate(fresh.inputs.context_lens.tolist()):
        pages = -(-context // PAGE_TOKENS)
        assert torch.equal(kept.inputs.page_table[row, :pages], fresh.inputs.page_table[row, :pages])


def test_decode_rows_kept_from_step_to_step_are_those_built_afresh() -> None:
    world = _World()
    running: list[str] = []
    for _ in range(120):
        change = world.draw.random()
        if change < 0.25 and len(running) < 9:
            running.append(world.join())
        elif change < 0.4 and running:
            gone = running.pop(world.draw.randrange(len(running)))
            world.kv.release(gone)
            world.sequences.forget([gone])
        elif change < 0.5:
            world.draw.shuffle(running)
        if running:
            kept = world.decode(world.builder, running)
            same(kept, world.decode(world.fresh_builder(), running))
            world.sampled(running)


def test_a_request_that_was_prefilled_again_is_read_anew() -> None:
    world = _World()
    names = [world.join(), world.join()]
    world.decode(world.builder, names)
    world.sampled(names)
    known = len(world.sequences[names[0]].tokens)
    world.kv.release(names[0])  # preempted: other pages, further tokens
    blocker = world.join()
    prompt = list(world.sequences[names[0]].tokens)
    assert world.kv.admit(request(names[0], prompt), known, known + 1) is not None
    world.builder.prefill([PrefillChunk(names[0], 0, known)])
    world.sequences[names[0]].tokens.append(7)
    assert blocker
    same(world.decode(world.builder, names), world.decode(world.fresh_builder(), names))


# ---------------------------------------------------------------------------------------------- executor


def test_layer_slices_of_a_batch_keep_their_hidden_state(executor: CpuExecutor) -> None:
    for name in ("whole", "a", "b"):
        arrive(executor, name, [3, 1, 4, 1, 5] if name != "b" else [2, 7])
    (expected,) = tokens(finish(executor, prefill(executor, 0, chunk("whole", 5))))
    both = chunk("a", 5), chunk("b", 2)
    for layers in ((0, 1), (1, 3)):
        assert tokens(finish(executor, prefill(executor, 1, *both, layers=layers))) == []
    assert tokens(finish(executor, prefill(executor, 1, *both, layers=(3, 4))))[0] == expected
    assert not executor._prefills


def test_a_request_that_drops_out_of_a_batch_leaves_the_others_rows(executor: CpuExecutor) -> None:
    prompts = {"alone": [3, 1, 4, 1, 5], "a": [9, 9], "b": [3, 1, 4, 1, 5], "c": [8] * 9}
    for name, prompt in prompts.items():
        arrive(executor, name, prompt)
    (expected,) = tokens(finish(executor, prefill(executor, 0, chunk("alone", 5))))
    three = chunk("a", 2), chunk("b", 5), chunk("c", 9)
    finish(executor, prefill(executor, 1, *three, layers=(0, 2)))
    executor.forget(["a", "c"])
    assert tokens(finish(executor, prefill(executor, 1, chunk("b", 5), layers=(2, 4)))) == [expected]


def test_a_batch_of_which_nothing_is_left_is_dropped(executor: CpuExecutor) -> None:
    arrive(executor, "a", [1, 2, 3])
    finish(executor, prefill(executor, 0, chunk("a", 3), layers=(0, 2)))
    assert executor._prefills
    executor.forget(["a", "never seen"])
    assert not executor._prefills


def test_chunks_and_decode_rows_run_in_one_fused_pass(executor: CpuExecutor) -> None:
    for name in ("plain", "chunked", "company"):
        arrive(executor, name, [5, 6, 7, 8, 9, 10, 11] if name != "company" else [1, 2])
    first = tokens(finish(executor, prefill(executor, 0, chunk("plain", 7))))
    first += [tokens(finish(executor, decode(executor, "plain")))[0] for _ in range(2)]
    finish(executor, prefill(executor, 1, chunk("company", 2)))
    found: list[int] = []
    for batch_id, piece in enumerate((chunk("chunked", 3, 0, False), chunk("chunked", 7, 3))):
        block = PrefillBlock(2 + batch_id, (piece,), 0, LAYERS)
        gang = Gang(Sharing.FUSED, executor.device.all_decode, block, DecodeStep(("company",), 0))
        prefilled, decoded = finish(executor, gang)
        assert isinstance(prefilled, PrefillDone)
        assert isinstance(decoded, DecodeDone)
        assert len(decoded.tokens or ()) == 1
        found += prefilled.tokens or ()
    assert len(found) == 1
    found += [tokens(finish(executor, decode(executor, "company", "chunked")))[1] for _ in range(2)]
    assert found == first


def test_temporal_work_runs_decode_first_then_prefill(executor: CpuExecutor) -> None:
    arrive(executor, "a", [1, 2, 3])
    arrive(executor, "b", [4, 5])
    finish(executor, prefill(executor, 0, chunk("a", 3)))
    block = PrefillBlock(1, (chunk("b", 2),), 0, LAYERS)
    events = finish(
        executor, Gang(Sharing.TEMPORAL, executor.device.all_decode, block, DecodeStep(("a",), 0))
    )
    assert [type(event) for event in events] == [DecodeDone, PrefillDone]
    assert all(event.seconds > 0 for event in events if isinstance(event, PrefillDone | DecodeDone))


@pytest.mark.skipif(CpuAffinity().units < 2, reason="one core cannot be split")
def test_lanes_run_side_by_side_on_disjoint_cores(executor: CpuExecutor) -> None:
    split = executor.device.splits()[0]
    arrive(executor, "a", [1, 2, 3])
    arrive(executor, "b", [4, 5])
    finish(executor, prefill(executor, 0, chunk("a", 3)))
    block = PrefillBlock(1, (chunk("b", 2),), 0, 2)
    executor.submit(Gang(Sharing.SPATIAL, split, block, DecodeStep(("a",), 0)))
    now = executor.lanes_now()
    assert (now.partition, now.sharing, now.prefill_requests, now.decode_requests) == (
        split,
        Sharing.SPATIAL,
        1,
        1,
    )
    events: list[Event] = []
    while len(events) < 2:
        events += executor.wait(None) or ()
    assert {type(event) for event in events} == {PrefillDone, DecodeDone}
    assert executor.lanes_now() == IDLE


def test_a_partition_never_changes_under_a_busy_lane(executor: CpuExecutor) -> None:
    arrive(executor, "a", [1, 2, 3])
    arrive(executor, "b", [4, 5])
    executor.submit(prefill(executor, 0, chunk("a", 3)))
    with pytest.raises(AssertionError, match="in force"):
        executor.submit(decode(executor, "b"))
    with pytest.raises(AssertionError, match="busy lane"):
        executor.submit(prefill(executor, 1, chunk("b", 2)))
    assert executor.wait(None)


def test_what_a_lane_raises_becomes_an_event(executor: CpuExecutor) -> None:
    arrive(executor, "a", [1, 2, 3])
    gang = prefill(executor, 0, chunk("a", 3))
    original = executor._decoder.weights
    executor._decoder.weights = replace(original, final_norm=torch.ones(1, 2, 3, 5))
    (event,) = finish(executor, gang)
    assert isinstance(event, LaneFailed)
    assert event.lane is Lane.PREFILL
    assert event.message.startswith("the prefill lane failed: ")
    executor._decoder.weights = original
    executor.forget(["a"])
    arrive(executor, "b", [1, 2, 3])
    assert len(tokens(finish(executor, prefill(executor, 1, chunk("b", 3))))) == 1


def test_a_fused_pass_that_raises_fails_both_phases(executor: CpuExecutor) -> None:
    arrive(executor, "a", [1, 2])
    arrive(executor, "b", [3, 4])
    finish(executor, prefill(executor, 0, chunk("a", 2)))
    executor._decoder.weights = replace(executor._decoder.weights, final_norm=torch.ones(1, 2, 3, 5))
    block = PrefillBlock(1, (chunk("b", 2),), 0, LAYERS)
    events = finish(executor, Gang(Sharing.FUSED, executor.device.all_decode, block, DecodeStep(("a",), 0)))
    assert [event.lane for event in events if isinstance(event, LaneFailed)] == [Lane.PREFILL, Lane.DECODE]


def test_wait_takes_all_there_is_and_keeps_time(executor: CpuExecutor) -> None:
    begun = executor.now()
    assert executor.wait(begun + 0.01) == ()
    assert executor.now() >= begun + 0.01
    assert executor.wait(begun - 1.0) == ()
    events = [RequestCancelled("a"), RequestCancelled("b")]
    threading.Thread(target=lambda: [executor.post(event) for event in events]).start()
    seen: list[Event] = []
    while len(seen) < 2:
        seen += executor.wait(None) or ()
    assert seen == events
    executor.post(events[0])
    executor.shut_down()
    assert executor.wait(None) is None


def test_an_id_in_use_is_refused(executor: CpuExecutor) -> None:
    arrive(executor, "a", [1])
    with pytest.raises(DriftError, match="'a' is in use"):
        executor.arrive(request("a", [1]), GREEDY)


def test_one_core_offers_no_spatial_sharing() -> None:
    device = cpu_device(CpuAffinity(1), LAYERS)
    assert device.menu == (Partition(1, 0), Partition(0, 1))
    assert Sharing.SPATIAL not in device.sharings
    assert not device.splits()


# -------------------------------------------------------------------------------------------------- lanes


def test_a_lane_moves_only_when_its_partition_changes_and_survives_faults() -> None:
    moved: list[tuple[Lane, Partition]] = []
    done: list[str] = []
    finished = threading.Event()
    lane = LaneThread(Lane.DECODE, lambda which, partition: moved.append((which, partition)))

    def fail() -> None:
        raise ValueError("no")

    one, two = Partition(1, 1), Partition(0, 2)
    for partition, run in ((one, fail), (one, lambda: done.append("a")), (two, lambda: done.append("b"))):
        lane.start(Job(partition, run, lambda error: done.append(str(error))))
    lane.start(Job(two, finished.set, lambda error: None))
    assert finished.wait(60)
    lane.close()
    assert done == ["no", "a", "b"]
    assert moved == [(Lane.DECODE, one), (Lane.DECODE, two)]


def test_a_lane_that_cannot_be_pinned_fails_its_job() -> None:
    failed: list[Exception] = []
    ended = threading.Event()

    def pin(lane: Lane, partition: Partition) -> None:
        raise OSError("no such core")

    lane = LaneThread(Lane.PREFILL, pin)
    lane.start(Job(Partition(1, 0), lambda: None, lambda error: (failed.append(error), ended.set())[0]))
    assert ended.wait(60)
    lane.close()
    assert isinstance(failed[0], OSError)


def test_known_tokens_are_plain_integers_for_the_pool() -> None:
    table = SequenceTable()
    table.add("a", [1, 2, 3], SamplerState(GREEDY, [1, 2, 3], (), 61))
    table["a"].tokens.append(4)
    assert list(table.tokens_of("a")) == [1, 2, 3, 4]
    assert np.array(table.tokens_of("a")[1:3]).tolist() == [2, 3]
    assert "a" in table
    assert len(table) == 1
