"""transformers' continuous batching as an outside peer: output tokens per second offline, on the same requests."""

from __future__ import annotations

import gc
import random
import time
from typing import Any

from gpu_parts.findings import Findings, Options, need_cuda

ESTIMATE = (90.0, 120.0)


def run(options: Options) -> Findings:
    """Needs a device and transformers."""
    torch = need_cuda()
    found = Findings()
    count = 48 if options.quick else 96
    requests = _requests(count)
    found.attempt("drift", lambda: ours(torch, options.model, requests))
    gc.collect()  # an executor and what serves it know each other
    torch.cuda.empty_cache()
    found.attempt("transformers", lambda: theirs(torch, options.model, requests))
    rates = [found.data[name].get("output_tokens_per_s") for name in ("drift", "transformers")]
    if all(rates):
        found.lines.append(
            f"offline, {count} requests: drift {rates[0]:.0f}, transformers {rates[1]:.0f} tokens/s"
        )
    return found


def _requests(count: int) -> list[tuple[list[int], int]]:
    from gpu_parts.serving import WORKLOADS

    draw, lengths = random.Random(1), WORKLOADS["sharegpt"]
    return [
        (
            [draw.randrange(1000, 100000) for _ in range(lengths.prompt.draw(draw))],
            min(lengths.output.draw(draw), 256),
        )
        for _ in range(count)
    ]


def ours(torch: Any, model: str, requests: list[tuple[list[int], int]]) -> dict[str, float]:
    """Everything at once through the scheduler and the executor."""
    from drift_scheduler.conformance import FlatCosts
    from drift_scheduler.dispatch import FACTORIES
    from drift_scheduler.domain import SLO, Request
    from gpu_parts.serving import trial
    from gpu_parts.subject import executor_of, model_of, weights_of

    config = model_of(model)
    executor = executor_of(
        config, weights_of(config), max_running=len(requests), max_context=4096, kv_bytes=24 << 30
    )
    executor.warm_up()
    made = [Request(f"r{i}", 0.0, len(p), n, SLO(1e4, 1e4), prompt=p) for i, (p, n) in enumerate(requests)]
    results = [
        trial(
            executor, FACTORIES["prefill-first"](), FlatCosts(), made, 0.0,
            max_running=len(requests), most_seconds=120.0, judged=False,
        )
        for _ in range(2)
    ]  # fmt: skip
    executor.close()
    last = results[-1]
    return {
        "output_tokens_per_s": last.tokens / last.seconds,
        "seconds": last.seconds,
        "finished": last.finished,
    }


def theirs(torch: Any, model: str, requests: list[tuple[list[int], int]]) -> dict[str, float]:
    """`generate_batch` over a model of the same shape with random weights."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from gpu_parts.subject import model_of

    shape = model_of(model)
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=shape.max_context, rope_theta=shape.rope.theta,
    )  # fmt: skip
    config._attn_implementation = "paged|sdpa"
    with torch.device("cuda"):
        made = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    longest = max(n for _, n in requests)
    settings = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [prompt for prompt, _ in requests]
    made.generate_batch(prompts[:4], generation_config=settings)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    results = made.generate_batch(prompts, generation_config=settings)
    seconds = time.perf_counter() - begun
    tokens = sum(len(result.generated_tokens) for result in results.values())
    return {"output_tokens_per_s": tokens / seconds, "seconds": seconds, "tokens": tokens}
