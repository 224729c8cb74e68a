"""Native CPU ops against torch, interleaved: each round times every contender once, medians over the rounds.

With one thread its processor time is taken, which other processes disturb less than the wall clock.

python packages/drift-kernels/bench/cpu_ops.py [--threads 1] [--rounds 21] [--only linear,attend,small]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle

from drift_kernels.process import prepare_process

prepare_process()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from drift_kernels import AttentionInputs, reference, select_ops  # noqa: E402

COLD_BYTES = 200 << 20  # weights and KV are cycled through this much memory, so that they come from there


def medians_us(contenders: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    """Median time of one call, per contender."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            start = clock()
            for _ in range(calls):
                call()
            times[name].append((clock() - start) / calls * 1e6)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def show(what: str, times: dict[str, float], work: float = 0, unit: str = "") -> None:
    """One line: every contender's time, its speed over the first, and the rate of `work` where given."""
    (base, base_us), *others = times.items()
    cells = [f"{base} {base_us:9.1f} us"]
    cells += [f"{name} {us:9.1f} us ({base_us / us:5.2f}x)" for name, us in others]
    if work:
        cells.append("  ".join(f"{work / us / 1e3:6.1f}" for us in times.values()) + f" {unit}")
    print(f"{what:44s} " + "  ".join(cells), flush=True)


def bench_linear(rounds: int) -> None:
    """Small batches against weights that come from memory: the decode step."""
    for dtype in (torch.bfloat16, torch.float32):
        ops = select_ops("cpu", dtype)
        for outputs, inputs in ((9728, 896), (896, 4864), (1152, 896), (768, 256)):
            size = outputs * inputs * dtype.itemsize
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(max(2, COLD_BYTES // size))]
            for rows in (1, 2, 4, 8, 16, 32, 64, 128):
                x, ours, theirs = torch.randn(rows, inputs).to(dtype), cycle(weights), cycle(weights)
                times = medians_us(
                    {
                        "F.linear": lambda x=x, w=theirs: F.linear(x, next(w)),
                        "ops": lambda x=x, w=ours, ops=ops: ops.linear(x, next(w)),
                    },
                    rounds,
                    max(1, len(weights) // 4),
                )
                show(f"linear {name_of(dtype)} {rows}x{inputs} -> {outputs}", times, size, "GB/s of weights")


def gather_and_sdpa(q: Tensor, k_pages: Tensor, v_pages: Tensor, inputs: AttentionInputs) -> Tensor:
    """What a runner without kernels would do: per sequence gather, fold the query group, call SDPA."""
    out, group = torch.empty_like(q), q.shape[1] // k_pages.shape[2]
    starts = inputs.query_starts.tolist()
    for b, context in enumerate(inputs.context_lens.tolist()):
        pages = inputs.page_table[b, : -(-context // k_pages.shape[1])].long()
        k, v = (cache[pages].flatten(0, 1)[:context].transpose(0, 1) for cache in (k_pages, v_pages))
        rows = q[starts[b] : starts[b + 1]]
        if len(rows) == 1:
            folded = rows.view(k.shape[0], group, -1)
            out[starts[b]] = F.scaled_dot_product_attention(folded, k, v, scale=inputs.scale).view_as(rows[0])
            continue
        visible = torch.ones(len(rows), context, dtype=torch.bool).tril(context - len(rows))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        heads = rows.transpose(0, 1)[None]
        mixed = F.scaled_dot_product_attention(heads, k[None], v[None], attn_mask=visible, scale=inputs.scale)
        out[starts[b] : starts[b + 1]] = mixed[0].transpose(0, 1)
    return out


def bench_attend(rounds: int) -> None:
    """Paged attention, shuffled pages."""
    cases = [
        ("decode 8 x 1024", [1] * 8, [1024] * 8),
        ("decode 32 x 512", [1] * 32, [512] * 32),
        ("decode 1 x 4096", [1], [4096]),
        ("decode 16 x 64", [1] * 16, [64] * 16),
        ("prefill 512", [512], [512]),
        ("prefill 2048", [2048], [2048]),
        ("prefill 256 after 2048", [256], [2304]),
        ("mixed 8 x 512 + 256", [1] * 8 + [256], [512] * 8 + [256]),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        ops = select_ops("cpu", dtype)
        for heads, kv_heads, size in ((14, 2, 64), (32, 8, 128), (4, 2, 64)):
            for what, queries, contexts in cases:
                pages = sum(-(-c // 16) for c in contexts)
                k_pages, v_pages = (torch.randn(pages, 16, kv_heads, size).to(dtype) for _ in range(2))
                tables, order = [], torch.randperm(pages).tolist()
                for c in contexts:
                    tables.append([order.pop() for _ in range(-(-c // 16))])
                inputs = AttentionInputs.build(queries, contexts, tables, 16, size**-0.5)
                q = torch.randn(sum(queries), heads, size).to(dtype)
                arguments = (q, k_pages, v_pages, inputs)
                contenders: dict[str, Callable[[], object]] = {
                    "sdpa": lambda a=arguments: gather_and_sdpa(*a),
                    "ops": lambda a=arguments, ops=ops: ops.attend(*a),
                }
                if max(queries) <= 512:
                    contenders["reference"] = lambda a=arguments: reference.attend(*a)
                times = medians_us(contenders, max(3, rounds // 4), 1)
                show(f"attend {name_of(dtype)} {heads}/{kv_heads}x{size} {what}", times)


def bench_small(rounds: int) -> None:
    """Norm, activation, rotary and KV write, where the call itself is most of the time."""
    for dtype in (torch.bfloat16, torch.float32):
        ops = select_ops("cpu", dtype)
        for rows, hidden in ((1, 256), (8, 256), (8, 896), (512, 896)):
            x, residual, weight = (
                torch.randn(s).to(dtype) for s in ((rows, hidden), (rows, hidden), (hidden,))
            )
            gate_up = torch.randn(rows, hidden * 6).to(dtype)
            qkv = torch.randn(rows, hidden // 64 * 2, 64).to(dtype)
            q, k, v = qkv.split(
                [hidden // 64, hidden // 128, qkv.shape[1] - hidden // 64 - hidden // 128], dim=1
            )
            v = v[:, : k.shape[1]]
            cos, sin = torch.randn(rows, 64).to(dtype), torch.randn(rows, 64).to(dtype)
            k_pages, v_pages = (torch.zeros(rows // 16 + 1, 16, *k.shape[1:], dtype=dtype) for _ in range(2))
            slots = torch.randperm(rows)
            calls: list[tuple[str, tuple[object, ...]]] = [
                ("rms_norm", (x, weight, 1e-6)),
                ("add_rms_norm", (x, residual, weight, 1e-6)),
                ("silu_and_mul", (gate_up,)),
                ("apply_rotary", (q, k, cos, sin)),
                ("write_kv", (k, v, k_pages, v_pages, slots)),
            ]
            for name, arguments in calls:
                contenders = {
                    "torch": lambda name=name, a=arguments: getattr(reference, name)(*a),
                    "ops": lambda name=name, a=arguments, ops=ops: getattr(ops, name)(*a),
                }
                times = medians_us(contenders, rounds, 100 if rows < 100 else 5)
                show(f"{name} {name_of(dtype)} {rows}x{hidden}", times)


def name_of(dtype: torch.dtype) -> str:
    """Short."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def main() -> None:
    """Run what the flags name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="linear,attend,small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{select_ops('cpu', torch.bfloat16).description}; {options.threads} threads, torch {torch.__version__}"
    )
    for name in options.only.split(","):
        {"linear": bench_linear, "attend": bench_attend, "small": bench_small}[name](options.rounds)


if __name__ == "__main__":
    main()
