"""A small model, a stub device and both executors over it: what the tests of the CUDA executor share."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import Any

import torch

from drift_core.assembly import cpu_executor
from drift_core.cuda.device import Partitions
from drift_core.cuda.executor import CudaExecutor
from drift_core.cuda.kernels import ReferenceKernels, Shape
from drift_core.cuda.stub import StubDevice
from drift_core.kv import PagedKv, PoolPlan
from drift_core.model.config import ModelConfig, Rope
from drift_core.model.decoder import Decoder, KvCache
from drift_core.model.weights import random_weights
from drift_core.sampling_params import SamplingParams
from drift_core.sequences import SequenceTable
from drift_kernels.affinity import CpuAffinity
from drift_kernels.ops import ReferenceOps
from drift_scheduler.conformance import FlatCosts
from drift_scheduler.dispatch import FACTORIES
from drift_scheduler.domain import (
    SLO,
    Device,
    Finished,
    FinishReason,
    Partition,
    Request,
    Sharing,
    Step,
    Tokens,
)
from drift_scheduler.loop import serve
from drift_scheduler.partition import TightestDecode
from drift_scheduler.scheduler import Limits, Scheduler

UNITS, LAYERS, PAGE_TOKENS, PAGES, VOCAB = 16, 4, 16, 200, 61
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_eps=1e-5,
    rope=Rope(10000.0),
    layer_windows=(None,) * LAYERS,
    max_context=256,
)
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
MENU = ((UNITS, 0), (12, 4), (8, 8), (4, 12), (0, UNITS))


class Splits:
    """A partition mechanism that only says so."""

    units = UNITS

    def __init__(self) -> None:
        self.closed = False

    def menu(self) -> tuple[tuple[int, int], ...]:
        return MENU

    def streams(self, split: tuple[int, int]) -> tuple[int, int]:
        return 1, 2

    def realised(self, split: tuple[int, int]) -> tuple[int, int]:
        return split

    def close(self) -> None:
        self.closed = True


@cache
def decoder() -> Decoder:
    weights = random_weights(MODEL, torch.float32, seed=1)
    return Decoder(MODEL, weights, ReferenceOps(), MODEL.max_context)


def stub_executor(
    stub: StubDevice, *, max_running: int = 8, prefill_tokens: int = 128, partitions: Partitions | None = None
) -> CudaExecutor:
    sequences = SequenceTable()
    kv = PagedKv(PAGES, PAGE_TOKENS, sequences.tokens_of, put_off=True)
    device = Device(
        UNITS, tuple(Partition(*entry) for entry in MENU), LAYERS, frozenset(Sharing), name="stub"
    )
    return CudaExecutor(
        stub,
        partitions or Splits(),
        decoder(),
        KvCache.allocate(MODEL, PAGES + 1, PAGE_TOKENS, torch.float32),
        ReferenceKernels(Shape.of(MODEL, PAGE_TOKENS)),
        kv,
        PoolPlan(PAGES, PAGE_TOKENS, 1, MODEL.max_context),
        sequences,
        device,
        max_running=max_running,
        prefill_tokens=prefill_tokens,
    )


def cpu() -> Any:
    plan = PoolPlan(PAGES, PAGE_TOKENS, 1, MODEL.max_context)
    return cpu_executor(
        decoder(), KvCache.allocate(MODEL, PAGES, PAGE_TOKENS, torch.float32), plan, CpuAffinity(1)
    )


@dataclass
class Load:
    """Requests of made-up prompts; `params` by index, greedy where it says nothing."""

    count: int = 7
    seed: int = 0
    prompt: tuple[int, int] = (1, 60)
    output: tuple[int, int] = (1, 16)
    params: Callable[[int], SamplingParams] = field(default=lambda index: GREEDY)

    def requests(self) -> list[tuple[Request, SamplingParams]]:
        draw = random.Random(self.seed)
        made = []
        for index in range(self.count):
            prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(*self.prompt))]
            output = draw.randint(*self.output)
            request = Request(f"r{index}", 0.0, len(prompt), output, SLO(10.0, 1.0), prompt=prompt)
            made.append((request, self.params(index)))
        return made


def run(
    executor: Any,
    load: Load,
    policy: str = "gang",
    *,
    max_running: int = 8,
    on_step: Callable[[Step], None] = lambda step: None,
    ends: Sequence[FinishReason] = (FinishReason.LENGTH, FinishReason.STOP),
    ahead: bool = True,
    **options: Any,
) -> dict[str, list[int]]:
    """Serve the load; the tokens of each request. Every request must end for one of `ends`.

    `ahead`: decide while the device works, as far as the executor lets the scheduler.
    """
    scheduler = Scheduler(
        executor.device,
        executor.kv,
        FACTORIES[policy](**options),
        TightestDecode(),
        FlatCosts(),
        Limits(max_running),
    )
    if ahead and hasattr(executor, "meanwhile"):
        executor.meanwhile = lambda: scheduler.plan_ahead(
            near=inf
        )  # the stub's times are not those predicted
        executor.planned = lambda: scheduler.planned
    found: dict[str, list[int]] = {}
    left = load.count

    def deliver(step: Step) -> None:
        nonlocal left
        assert not step.faults, step.faults
        on_step(step)
        for output in step.outputs:
            match output:
                case Tokens(request_ids=ids, token_ids=tokens):
                    for request_id, token in zip(ids, tokens or (), strict=True):
                        found.setdefault(request_id, []).append(token)
                case Finished(reason=reason, message=message):
                    assert reason in ends, message
                    left -= 1
                    if not left:
                        executor.shut_down()
                case _:
                    pass

    for request, params in load.requests():
        executor.arrive(request, params)
    serve(scheduler, executor, deliver)
    return found


def kinds(faults: Sequence[str]) -> set[str]:
    """The kinds of what a stub saw."""
    return {fault.partition(":")[0] for fault in faults}


def expected(load: Load) -> Mapping[str, list[int]]:
    """What the CPU executor makes of a load."""
    executor = cpu()
    try:
        return run(executor, load, "alternate")
    finally:
        executor.close()
