"""Ceilings of this device, and how near the kernels come to them: bytes or operations counted over time
measured."""

from __future__ import annotations

from typing import Any

from gpu_parts.findings import Findings, Options, graph_of, milliseconds, need_cuda

ESTIMATE = (50.0, 90.0)
DEVICE = "cuda"
DECODE_SHARE, PREFILL_SHARE, SLICING = 0.85, 0.60, 1.02


def run(options: Options) -> Findings:
    """Needs a device."""
    torch = need_cuda()
    found = Findings()
    found.attempt("copy bytes/s", lambda: copy_rate(torch))
    found.attempt("matmul flop/s", lambda: matmul_rate(torch))
    copy, matmul = found.data["copy bytes/s"], found.data["matmul flop/s"]
    if not (isinstance(copy, float) and isinstance(matmul, float)):
        return found
    found.lines.append(f"copy {copy / 1e12:.2f} TB/s, bf16 matmul {matmul / 1e12:.0f} TFLOP/s")
    cells = ((64, 2048), (128, 2048), (64, 8192)) if not options.quick else ((64, 2048), (128, 4096))
    for batch, context in cells:
        name = f"decode attention {batch} x {context}"
        found.attempt(name, lambda b=batch, c=context: decode_attention(torch, b, c))
        if isinstance(found.data[name], float):
            found.at_least(f"{name}, share of copy bandwidth", found.data[name] / copy, DECODE_SHARE)
    for tokens in (2048, 8192):
        name = f"prefill attention {tokens}"
        found.attempt(name, lambda t=tokens: prefill_attention(torch, t))
        if isinstance(found.data[name], float) and tokens == 8192:
            found.at_least(f"{name}, share of matmul rate", found.data[name] / matmul, PREFILL_SHARE)
    found.attempt("row kernels, share of copy bandwidth", lambda: rows(torch, copy))
    found.attempt("sampling 128 x 128256, ms", lambda: sampling(torch))
    found.attempt("layer slicing", lambda: slicing(torch))
    if isinstance(found.data["layer slicing"], float):
        found.at_most("16 launches of 2 layers over one of 32", found.data["layer slicing"], SLICING)
    return found


def copy_rate(torch: Any) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2.0 * source.numel() / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def matmul_rate(torch: Any, size: int = 8192) -> float:
    """Operations per second of a large bf16 product of random numbers."""
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / (milliseconds(lambda: torch.mm(a, b, out=out), 10) * 1e-3)


def _plan(torch: Any, query: list[int], context: list[int], sms: int | None = None) -> Any:
    """Llama-3.1-8B's heads over random pages: (q, k, v, out, planned inputs)."""
    from drift_kernels.triton_ops.lane import AttentionLane, AttentionShape
    from drift_kernels.triton_ops.tiles import nearest_architecture

    page, heads, kv_heads, head = 16, 32, 8, 128
    counts = [-(-c // page) for c in context]
    order = torch.randperm(sum(counts)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    major, minor = torch.cuda.get_device_capability()
    units = torch.cuda.get_device_properties(0).multi_processor_count
    lane = AttentionLane(
        AttentionShape(heads, kv_heads, head, page), len(query), sum(query), max(context), units,
        nearest_architecture(10 * major + minor), DEVICE,
    )  # fmt: skip
    q = torch.randn(sum(query), heads, head, device=DEVICE).bfloat16()
    k, v = (torch.randn(sum(counts), page, kv_heads, head, device=DEVICE).bfloat16() for _ in range(2))
    return q, k, v, torch.empty_like(q), lane.plan(query, context, tables, head**-0.5, sms or units), lane


def decode_attention(torch: Any, batch: int, context: int) -> float:
    """Bytes of KV read per second."""
    q, k, v, out, planned, _lane = _plan(torch, [1] * batch, [context] * batch)
    graph = graph_of(lambda: planned.attend(q, k, v, out))
    return float(2 * batch * context * 8 * 128 * 2) / (milliseconds(graph.replay) * 1e-3)


def prefill_attention(torch: Any, tokens: int) -> float:
    """Operations per second that a causal prefill needs."""
    q, k, v, out, planned, _lane = _plan(torch, [tokens], [tokens])
    graph = graph_of(lambda: planned.attend(q, k, v, out))
    return 4.0 * 32 * 128 * tokens * (tokens + 1) / 2 / (milliseconds(graph.replay) * 1e-3)


def rows(torch: Any, copy: float, count: int = 8192) -> dict[str, float]:
    """Norm and activation over 8192 rows."""
    from drift_kernels.triton_ops.layers import launch_rms_norm, launch_silu_and_mul

    units = torch.cuda.get_device_properties(0).multi_processor_count
    x, residual, out, total = (torch.randn(count, 4096, device=DEVICE).bfloat16() for _ in range(4))
    weight = torch.ones(4096, device=DEVICE).bfloat16()
    norm = milliseconds(lambda: launch_rms_norm(x, weight, out, 1e-6, units, residual, total))
    gate_up = torch.randn(count, 28672, device=DEVICE).bfloat16()
    fed = torch.empty(count, 14336, device=DEVICE).bfloat16()
    silu = milliseconds(lambda: launch_silu_and_mul(gate_up, fed, units))
    return {
        "RMS norm with residual": 4 * x.numel() * 2 / (norm * 1e-3) / copy,
        "SiLU and multiply": 3 * fed.numel() * 2 / (silu * 1e-3) / copy,
    }


def sampling(torch: Any) -> dict[str, float]:
    """Choosing 128 tokens of a vocabulary of 128256."""
    from drift_kernels.triton_ops.sampling import MOST_PIECES, SamplingRows, launch_argmax, launch_sample

    units = torch.cuda.get_device_properties(0).multi_processor_count
    logits, out = torch.randn(128, 128256, device=DEVICE), torch.empty(128, dtype=torch.int64, device=DEVICE)
    peaks = torch.empty(128 * MOST_PIECES, device=DEVICE)
    places = torch.empty(128 * MOST_PIECES, dtype=torch.int32, device=DEVICE)
    ones = torch.ones(128, device=DEVICE)
    zeros = torch.zeros(128, dtype=torch.int32, device=DEVICE)
    columns = SamplingRows(ones, zeros + 50, ones * 0.9, zeros.float(), zeros.long(), zeros)
    return {
        "greedy": milliseconds(lambda: launch_argmax(logits, out, peaks, places, units)),
        "top-k 50, top-p 0.9": milliseconds(lambda: launch_sample(logits, out, columns, units)),
    }


def slicing(torch: Any) -> float:
    """2048 prompt tokens through 32 layers of Llama-3.1-8B's shape: in launches of 2 layers, over all at once."""
    from gpu_parts.subject import decoder_of

    decoder, cache = decoder_of("llama-3.1-8b", pages=200)
    tables = [list(range(128))]
    inputs = decoder.inputs([2048], [2048], tables, 16)
    hidden = decoder.embed(torch.arange(2048, device=DEVICE))

    def sliced(layers: int) -> None:
        state = hidden
        for start in range(0, 32, layers):
            state = decoder.run_layers(state, start, start + layers, cache, inputs)

    whole = milliseconds(lambda: sliced(32), 10)
    return milliseconds(lambda: sliced(2), 10) / whole
