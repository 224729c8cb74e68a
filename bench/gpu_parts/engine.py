"""A small random model through the whole CUDA engine: tokens that the CPU engine and transformers would choose
too.

bf16 rounds differently in every kernel, so a token may differ where two are nearly alike. What is held: each
token the engine chose is, by transformers in float32 over the same text, within a small distance of the
likeliest one. Also counted: memory taken from the driver in service, and torch's own watch for hidden waits,
both to be nothing.
"""

from __future__ import annotations

import random
import tempfile
from math import inf
from pathlib import Path
from typing import Any

from gpu_parts.findings import Findings, Options, need_cuda

ESTIMATE = (60.0, 90.0)
POLICIES = ("gang", "drift", "chunked-prefill", "temporal", "streams", "alternate")
NEAR = 0.1
"""In standard deviations of a row of logits."""


def run(options: Options) -> Findings:
    """Needs a device and transformers."""
    torch = need_cuda()
    found = Findings()
    with tempfile.TemporaryDirectory() as folder:
        reference = make_model(torch, Path(folder))
        for policy in POLICIES[: 4 if options.quick else None]:
            if options.late:
                found.lines.append(f"{policy} left out: the time is up")
                continue
            found.attempt(policy, lambda p=policy: serve_with(torch, Path(folder), p))
            tokens = found.data.pop(policy)
            if "failed" in tokens:
                found.data[policy] = tokens
                continue
            near, same = compare(torch, reference, tokens["prompts"], tokens["outputs"])
            found.data[policy] = {
                "worst distance": near,
                "tokens alike": same,
                "allocations": tokens["allocations"],
            }
            found.at_most(f"{policy}: distance to transformers' likeliest token", near, NEAR, " sd")
            found.at_most(f"{policy}: allocations in service", tokens["allocations"], 0)
        found.attempt("cpu engine", lambda: cpu_tokens(torch, Path(folder)))
        cpu = found.data.pop("cpu engine")
        if "failed" not in cpu:
            near, _ = compare(torch, reference, cpu["prompts"], cpu["outputs"])
            found.at_most("CPU engine: distance to transformers' likeliest token", near, NEAR, " sd")
        else:
            found.data["cpu engine"] = cpu
    return found


def make_model(torch: Any, folder: Path) -> Any:
    """A random Llama of head size 64 on disk, in bf16; returned as transformers has it, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.03, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return model.float().eval()


def prompts() -> list[list[int]]:
    """Of lengths around page and tile boundaries."""
    draw = random.Random(2)
    return [
        [draw.randrange(4096) for _ in range(n)] for n in (1, 15, 16, 17, 63, 64, 65, 130, 300, 511, 40, 7)
    ]


def serve_with(torch: Any, folder: Path, policy: str) -> dict[str, Any]:
    """Serve the prompts on the device; what each yielded."""
    from drift_core.model.config import load_config
    from drift_core.model.weights import load_weights
    from gpu_parts.subject import executor_of

    config = load_config(folder)
    weights = load_weights(folder, config, torch.bfloat16, "cuda")
    executor = executor_of(
        config, weights, max_running=16, max_context=1024, prefill_tokens=2048, kv_bytes=1 << 28
    )
    executor.warm_up(mixed_tokens=2048)
    for _ in range(2):  # sizes of prefills and mixed passes: captured and allocated on first use
        outputs(executor, policy)
    before = executor.accelerator.allocations()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = outputs(executor, policy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    allocations = executor.accelerator.allocations() - before
    executor.close()
    return {"prompts": prompts(), "outputs": found, "allocations": allocations}


def cpu_tokens(torch: Any, folder: Path) -> dict[str, Any]:
    """The same on the CPU engine."""
    from drift_core.assembly import cpu_executor
    from drift_core.kv import PoolPlan
    from drift_core.model.config import load_config
    from drift_core.model.decoder import Decoder, KvCache
    from drift_core.model.weights import load_weights
    from drift_kernels.affinity import CpuAffinity
    from drift_kernels.ops import select_ops

    config = load_config(folder)
    weights = load_weights(folder, config, torch.bfloat16)
    decoder = Decoder(config, weights, select_ops("cpu", torch.bfloat16), 1024)
    cache = KvCache.allocate(config, 600, 16, torch.bfloat16)
    executor = cpu_executor(decoder, cache, PoolPlan(600, 16, 1, 1024), CpuAffinity())
    try:
        return {"prompts": prompts(), "outputs": outputs(executor, "alternate")}
    finally:
        executor.close()


def outputs(executor: Any, policy: str, length: int = 24) -> list[list[int]]:
    """Greedy tokens of every prompt, prompts arriving in three waves so that phases meet."""
    from drift_core.sampling_params import SamplingParams
    from drift_scheduler.conformance import FlatCosts
    from drift_scheduler.dispatch import FACTORIES
    from drift_scheduler.domain import SLO, Finished, FinishReason, Request, Tokens
    from drift_scheduler.loop import serve
    from drift_scheduler.partition import TightestDecode
    from drift_scheduler.scheduler import Limits, Scheduler

    made = [
        Request(f"r{i}", executor.now(), len(p), length, SLO(60.0, 10.0), prompt=p)
        for i, p in enumerate(prompts())
    ]
    dispatch = FACTORIES[policy](**({"token_budget": 96} if policy == "chunked-prefill" else {}))
    scheduler = Scheduler(executor.device, executor.kv, dispatch, TightestDecode(), FlatCosts(), Limits(16))
    executor.meanwhile = lambda: scheduler.plan_ahead(near=inf)  # whatever these crude costs predict
    found: dict[str, list[int]] = {request.id: [] for request in made}
    waiting = made[::-1]
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)
    left = len(made)

    def arrive(count: int) -> None:
        for _ in range(min(count, len(waiting))):
            executor.arrive(waiting.pop(), greedy)

    def deliver(step: Any) -> None:
        nonlocal left
        if step.faults:
            raise RuntimeError(step.faults[0])
        for output in step.outputs:
            if isinstance(output, Tokens):
                for request_id, token in zip(output.request_ids, output.token_ids or (), strict=True):
                    found[request_id].append(token)
                if sum(map(len, found.values())) % 5 == 0:
                    arrive(2)
            elif isinstance(output, Finished):
                if output.reason is not FinishReason.LENGTH:
                    raise RuntimeError(f"{output.request_id}: {output.reason}: {output.message}")
                left -= 1
                arrive(2)
                if not left:
                    executor.shut_down()

    arrive(4)
    serve(scheduler, executor, deliver)
    return [found[request.id] for request in made]


def compare(
    torch: Any, reference: Any, asked: list[list[int]], answered: list[list[int]]
) -> tuple[float, float]:
    """(the farthest any chosen token lies below the likeliest, in deviations of its row; the share that is it)."""
    worst, same, total = 0.0, 0, 0
    for prompt, output in zip(asked, answered, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(output)), torch.tensor(output)]
        distance = (logits.max(-1).values - chosen) / logits.std(-1)
        worst = max(worst, float(distance.max()))
        same += int((distance == 0).sum())
        total += len(output)
    return worst, same / total
