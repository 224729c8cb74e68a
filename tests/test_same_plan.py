"""One event log, two executors, the same gangs: what a policy does in simulation is what it does on a machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from drift_core.assembly import cpu_executor
from drift_core.executor import CpuExecutor
from drift_core.kv import PoolPlan
from drift_core.model.config import ModelConfig, Rope
from drift_core.model.decoder import Decoder, KvCache
from drift_core.model.weights import random_weights
from drift_core.replay import EventLog, LoggedStep, ReplayExecutor
from drift_core.sampling_params import SamplingParams
from drift_kernels.affinity import CpuAffinity
from drift_kernels.ops import select_ops
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.table import CostTable, DecodeRow, PrefillRow
from drift_scheduler.dispatch import FACTORIES as POLICIES
from drift_scheduler.domain import (
    SLO,
    Device,
    Event,
    Finished,
    Gang,
    Partition,
    Request,
    RequestCancelled,
    Step,
)
from drift_scheduler.loop import serve
from drift_scheduler.partition import FACTORIES as PARTITIONS
from drift_scheduler.protocols import Executor, KvPool
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.simulation.executor import Overheads, SimulatedExecutor
from drift_scheduler.simulation.kv import CountingKv

LAYERS, PAGE_TOKENS, UNITS = 6, 16, 4
MENU = (Partition(4, 0), Partition(3, 1), Partition(2, 2), Partition(1, 3), Partition(0, 4))
DEVICE = Device(UNITS, MENU, LAYERS)
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_layers=LAYERS,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rms_eps=1e-5,
    rope=Rope(10000.0),
    layer_windows=(None,) * LAYERS,
    max_context=512,
)
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)


def costs() -> FittedCost:
    """Times of a made-up device of four units, a few milliseconds a step."""
    prefill = [
        PrefillRow(
            units=u, requests=1, new=n, reused=r, new_squared=n * n, new_times_reused=n * r,
            seconds=(2e-3 + 1e-4 * n + 1e-7 * n * (n + r)) / u**0.9,
        )
        for u in range(1, UNITS + 1) for n, r in ((16, 0), (128, 0), (400, 0), (64, 200))
    ]  # fmt: skip
    decode = [
        DecodeRow(units=u, batch=b, context_tokens=b * c, seconds=(3e-3 + 1e-4 * b + 1e-6 * b * c) / u**0.4)
        for u in range(1, UNITS + 1) for b in (1, 8) for c in (32, 256)
    ]  # fmt: skip
    return FittedCost(
        CostTable(
            device="four units",
            model="made up",
            num_layers=LAYERS,
            total_units=UNITS,
            menu=tuple((p.prefill, p.decode) for p in MENU),
            prefill=tuple(prefill),
            decode=tuple(decode),
        )
    )


def workload(seed: int, count: int = 24) -> list[Request]:
    """Ragged prompts, some with a common beginning, arriving in bursts.

    `prefix_keys` name the pages of the prompt by content, and those of the output by request: no two outputs
    here continue the same text.
    """
    draw = random.Random(seed)
    common = [draw.randrange(MODEL.vocab_size) for _ in range(96)]
    requests, now = [], 0.0
    for index in range(count):
        now += draw.choice((0.0, 0.002, 0.03))
        beginning = common[: draw.choice((0, 0, 48, 96))]
        prompt = [*beginning, *(draw.randrange(MODEL.vocab_size) for _ in range(draw.randrange(3, 220)))]
        pages = len(prompt) // PAGE_TOKENS
        keys = [tuple(prompt[: (page + 1) * PAGE_TOKENS]) for page in range(pages)]
        request = Request(
            id=f"r{index}",
            arrival=now,
            prompt_tokens=len(prompt),
            max_output_tokens=draw.randrange(1, 80),
            slo=SLO(ttft=draw.choice((0.05, 0.5)), tbt=0.01),
            prompt=prompt,
            prefix_keys=[*keys, *((index, page) for page in range(8))],
            key_tokens=PAGE_TOKENS,
        )
        requests.append(replace(request, output_tokens=request.max_output_tokens))
    return requests


@dataclass
class Run:
    log: EventLog
    steps: list[Step]

    @property
    def gangs(self) -> list[Gang]:
        return self.log.gangs

    def ends(self) -> list[tuple[str, str]]:
        return [
            (output.request_id, output.reason.value)
            for step in self.steps
            for output in step.outputs
            if isinstance(output, Finished)
        ]


def run(executor: Executor, kv: KvPool, policy: str, until: Callable[[int], None] | None = None) -> Run:
    result = Run(EventLog(), [])
    scheduler = Scheduler(
        executor.device,
        kv,
        POLICIES[policy](),
        PARTITIONS["tightest-decode"](),
        costs(),
        Limits(max_running=12),
    )
    ended = 0

    def deliver(step: Step) -> None:
        nonlocal ended
        assert not step.faults
        result.steps.append(step)
        ended += sum(isinstance(output, Finished) for output in step.outputs)
        if until is not None:
            until(ended)

    serve(scheduler, executor, deliver, [result.log])
    return result


def cpu(pages: int) -> CpuExecutor:
    """A CPU executor that offers the made-up device's menu, on whatever cores there are."""
    weights = random_weights(MODEL, torch.float32, seed=3)
    decoder = Decoder(MODEL, weights, select_ops("cpu", torch.float32))
    cache = KvCache.allocate(MODEL, pages, PAGE_TOKENS, torch.float32)
    plan = PoolPlan(pages, PAGE_TOKENS, 1, MODEL.max_context)
    return cpu_executor(decoder, cache, plan, CpuAffinity(1), device=DEVICE)


@pytest.fixture
def pages() -> int:
    return 44  # so few that decoding requests run out of them


@pytest.fixture
def machine(pages: int) -> Iterator[CpuExecutor]:
    executor = cpu(pages)
    yield executor
    executor.close()


def replay_on_cpu(executor: CpuExecutor, steps: list[LoggedStep], policy: str) -> Run:
    replay = ReplayExecutor(executor, steps, lambda request: executor.arrive(request, GREEDY))
    return run(replay, executor.kv, policy)


def replay_in_simulation(steps: list[LoggedStep], policy: str, pages: int) -> Run:
    return run(
        ReplayExecutor(SimulatedExecutor(DEVICE, costs(), ()), steps), CountingKv(pages, PAGE_TOKENS), policy
    )


@pytest.mark.parametrize("policy", ["drift", "gang", "chunked-prefill", "alternate", "prefill-first"])
def test_a_simulated_runs_log_gives_the_same_gangs_on_both_executors(
    policy: str, pages: int, machine: CpuExecutor
) -> None:
    interruptions: list[tuple[float, Event]] = [
        (0.05, RequestCancelled("r2")),
        (0.09, RequestCancelled("r7")),
    ]
    simulated = SimulatedExecutor(
        DEVICE, costs(), workload(1), overheads=Overheads(noise=0.2), seed=5, interruptions=interruptions
    )
    recorded = run(simulated, CountingKv(pages, PAGE_TOKENS), policy)
    assert len(recorded.ends()) == 24

    again = replay_in_simulation(recorded.log.steps, policy, pages)
    assert again.gangs == recorded.gangs
    real = replay_on_cpu(machine, recorded.log.steps, policy)
    assert real.gangs == recorded.gangs
    assert real.ends() == again.ends() == recorded.ends()


@pytest.mark.parametrize("policy", ["drift", "gang", "chunked-prefill"])
def test_a_cpu_runs_log_gives_the_same_gangs_in_simulation(
    policy: str, pages: int, machine: CpuExecutor
) -> None:
    requests = workload(2)
    begun = machine.now()
    for request in requests:
        machine.arrive(replace(request, arrival=begun + request.arrival / 10), GREEDY)

    def until(ended: int) -> None:
        if ended == len(requests):
            machine.shut_down()

    recorded = run(machine, machine.kv, policy, until)
    again = replay_in_simulation(recorded.log.steps, policy, pages)
    assert again.gangs == recorded.gangs
    assert again.ends() == recorded.ends()


def test_the_workload_exercises_what_plans_are_made_of(pages: int) -> None:
    """Partitions, layer slices, prefix hits, preemptions: otherwise the same gangs would say little."""
    kv = CountingKv(pages, PAGE_TOKENS)
    result = run(SimulatedExecutor(DEVICE, costs(), workload(1)), kv, "gang")
    finished = [o for step in result.steps for o in step.outputs if isinstance(o, Finished)]
    blocks = [gang.prefill for gang in result.gangs if gang.prefill is not None]
    assert len({gang.partition for gang in result.gangs}) > 2
    assert any(block.layers < LAYERS for block in blocks)
    assert kv.stats.hit_tokens > 0
    assert sum(output.timing.preemptions for output in finished) > 0
