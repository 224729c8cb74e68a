"""Every kernel against its torch reference, on ragged random inputs, outputs poisoned with NaN beforehand."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_parts.findings import Findings, Options, need_cuda, relative_error

ESTIMATE = (60.0, 120.0)
DEVICE = "cuda"
BOUND = {"bfloat16": 1e-2, "float16": 2e-3}


def run(options: Options) -> Findings:
    """Needs a device."""
    torch = need_cuda()
    found = Findings()
    worst: dict[str, float] = {}
    draw = random.Random(7)
    found.data["relative errors"] = worst
    for name, error, dtype in _all(torch, draw, options.quick, found):
        key = f"{name}, {dtype}"
        worst[key] = max(worst.get(key, 0.0), error)
        found.keep()
        if options.late:
            found.lines.append(f"stopped at {key}: the time is up")
            break
    for key, error in worst.items():
        found.at_most(key, error, BOUND[key.rpartition(", ")[2]])
    return found


def _all(torch: Any, draw: random.Random, quick: bool, found: Findings) -> Any:
    heads = (64, 128) if quick else (64, 80, 96, 128, 256)
    variants = ((4, 16, None), (1, 64, None), (7, 256, 100), (8, 16, 1000))
    for dtype in (torch.bfloat16, torch.float16):
        tried: list[tuple[str, str, Any]] = []
        brief = quick and dtype == torch.float16  # most of the time goes into compiling
        for head in heads[-1:] if brief else heads:
            for group, page, window in variants[:1] if brief else variants:
                tried += [
                    (f"{name} attention", f"{(head, group, page, window)}",
                     partial(_attention, torch, head, group, page, window, lengths, dtype))
                    for name, lengths in _batches(draw)
                ]  # fmt: skip
            tried.append(
                (
                    "decode attention by the executor's lists",
                    str(head),
                    partial(_decode_lists, torch, head, dtype),
                )
            )
            tried.append(("rotary and KV write", str(head), partial(_rotary, torch, head, dtype)))
        tried.append(("RMS norm with residual", "", partial(_norm, torch, dtype)))
        tried.append(("SiLU and multiply", "", partial(_silu, torch, dtype)))
        if dtype == torch.bfloat16:
            tried.append(("share of sampled tokens that differ", "", partial(_sampling, torch)))
            tried.append(("share of masked logits that differ", "", partial(_masks, torch)))
        kind = str(dtype).removeprefix("torch.")
        for name, which, measure in tried:
            yield name, _guarded(found, f"{name} {which} {kind}", measure), kind


def _guarded(found: Findings, what: str, measure: Callable[[], float]) -> float:
    try:
        return measure()
    except Exception as error:
        found.lines.append(f"FAILED {what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return float("inf")


def _batches(draw: random.Random) -> list[tuple[str, list[tuple[int, int]]]]:
    """(query, context) lengths: one-token requests, page boundaries, empty and cached prefixes."""
    decode = [(1, draw.choice([1, 16, 17, 64, 65, 255, 256, 257, draw.randint(1, 3000)])) for _ in range(24)]
    fresh = [(n, n) for n in (1, 15, 16, 64, 129, draw.randint(200, 900))]
    cached = [(n, n + r) for n, r in ((1, 16), (5, 64), (100, 1), (33, 1000), (256, draw.randint(1, 700)))]
    return [
        ("decode", decode),
        ("prefill", fresh),
        ("cached prefill", cached),
        ("mixed", decode[:9] + cached),
    ]


def _pages(
    torch: Any, lengths: list[tuple[int, int]], page: int, kv_heads: int, head: int, dtype: Any
) -> Any:
    """Shuffled pages whose unused slots are NaN, and each sequence's table."""
    needed = [-(-context // page) for _, context in lengths]
    order = torch.randperm(sum(needed) + 3).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    shape = (sum(needed) + 3, page, kv_heads, head)
    caches = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    for table, (_, context) in zip(tables, lengths, strict=True):
        position = torch.arange(context)
        slots = (torch.tensor(table)[position // page] * page + position % page).to(DEVICE)
        for cache in caches:
            cache.view(-1, kv_heads, head)[slots] = torch.randn(context, kv_heads, head, device=DEVICE).to(
                dtype
            )
    return caches[0], caches[1], tables


def _attention(
    torch: Any, head: int, group: int, page: int, window: int | None, lengths: Any, dtype: Any
) -> float:
    from drift_kernels import reference
    from drift_kernels.inputs import AttentionInputs
    from drift_kernels.triton_ops.lane import AttentionLane, AttentionShape
    from drift_kernels.triton_ops.tiles import nearest_architecture

    kv_heads = 2
    k, v, tables = _pages(torch, lengths, page, kv_heads, head, dtype)
    query, context = [q for q, _ in lengths], [c for _, c in lengths]
    major, minor = torch.cuda.get_device_capability()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    shape = AttentionShape(group * kv_heads, kv_heads, head, page)
    lane = AttentionLane(
        shape, len(lengths), sum(query), max(context), sms, nearest_architecture(10 * major + minor), DEVICE
    )
    q = torch.randn(sum(query), group * kv_heads, head, device=DEVICE).to(dtype)
    worst = 0.0
    for num_sms in (sms, min(sms, max(8, sms // 3))):
        out = torch.full_like(q, float("nan"))
        lane.plan(query, context, tables, head**-0.5, num_sms, window).attend(q, k, v, out)
        plain = AttentionInputs.build(query, context, tables, page, head**-0.5, window, DEVICE)
        want = reference.attend(q.float(), k.float(), v.float(), plain)
        worst = max(worst, relative_error(out, want))
    return worst


def _decode_lists(torch: Any, head: int, dtype: Any, rows: int = 40, longest: int = 2500) -> float:
    """The executor's own lists of decode work, through its buffers, and advanced by some steps."""
    import numpy as np

    from drift_core.cuda.buffers import PassBuffers, Room
    from drift_core.cuda.device import Place
    from drift_core.cuda.kernels import Shape, TritonKernels
    from drift_core.cuda.lanes import NARROW, _fill_list
    from drift_core.cuda.torch_cuda import TorchCuda
    from drift_kernels import reference
    from drift_kernels.inputs import AttentionInputs
    from drift_scheduler.domain import Lane

    device, page, kv_heads, group = TorchCuda(), 16, 8, 4
    kernels = TritonKernels(Shape(group * kv_heads, kv_heads, head, page, None), device.capability, dtype)
    first = np.random.default_rng(0).integers(1, longest, rows)
    lengths = [(1, int(c)) for c in first + 70]
    k, v, tables = _pages(torch, lengths, page, kv_heads, head, dtype)
    width = max(map(len, tables))
    buffers = PassBuffers(
        device, Room(rows, rows, rows, width, narrow=kernels.narrow_size(rows, device.units))
    )
    scratch = kernels.scratch(device, Lane.DECODE, rows, device.units)
    stream = device.stream(Place(Lane.DECODE, None))
    q = torch.randn(rows, group * kv_heads, head, device=DEVICE).to(dtype)
    device.synchronize()
    worst = 0.0
    for sms in (device.units, min(16, device.units)):
        work = kernels.cut_narrow(first.copy(), sms)
        for _ in range(70):
            work.advance()
        host = buffers.open()
        for row, pages in enumerate(tables):
            buffers.table(host)[row, : len(pages)] = pages
        host["query_starts"][: rows + 1] = np.arange(rows + 1)
        host["context_lens"][:rows] = first + 70
        host["slots"][:rows], host["positions"][:rows] = 0, first + 69
        _fill_list(host, "narrow", work.bounds, work.items, work.merges)
        buffers.send(stream, rows)
        laid = AttentionInputs(
            buffers.tensor("query_starts")[: rows + 1], buffers.tensor("context_lens"),
            buffers.tensor("page_table").view(rows, width), buffers.tensor("slots"), buffers.tensor("positions"),
            1, 4096, head**-0.5, None,
        )  # fmt: skip
        planned: Any = kernels.inputs(laid, buffers, NARROW, scratch, sms)
        out = torch.full_like(q, float("nan"))
        device.synchronize()
        planned.attend(q, k, v, out)
        plain = AttentionInputs.build(
            [1] * rows, [c for _, c in lengths], tables, page, head**-0.5, None, DEVICE
        )
        worst = max(worst, relative_error(out, reference.attend(q.float(), k.float(), v.float(), plain)))
        device.synchronize()
    return worst


def _rotary(torch: Any, head: int, dtype: Any) -> float:
    from drift_kernels import reference
    from drift_kernels.triton_ops.layers import launch_rotate_and_write

    tokens, heads, kv_heads, page = 37, 16, 4, 16
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head, device=DEVICE).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = torch.rand(tokens, head // 2, device=DEVICE).repeat(1, 2) * 6.28
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(5 * page, device=DEVICE)[:tokens]
    slots[3] = -1
    pages = [
        torch.full((5, page, kv_heads, head), float("nan"), dtype=dtype, device=DEVICE) for _ in range(4)
    ]
    norms = [torch.rand(head, device=DEVICE).to(dtype) + 0.5 for _ in range(2)]
    worst = 0.0
    for with_norm in (False, True):
        given = tuple(norms) if with_norm else None
        out = torch.full((tokens, heads, head), float("nan"), dtype=dtype, device=DEVICE)
        launch_rotate_and_write(
            q, k, v, cos, sin, out, pages[0], pages[1], slots, 16, *(given or (None, None)), 1e-6
        )
        want = reference.rotate_and_write(q, k, v, cos, sin, pages[2], pages[3], slots, given, 1e-6)
        worst = max(worst, relative_error(out, want))
        kept = slots[slots >= 0]
        for ours, theirs in zip(pages[:2], pages[2:], strict=True):
            flat, other = ours.view(-1, kv_heads, head), theirs.view(-1, kv_heads, head)
            worst = max(worst, relative_error(flat[kept], other[kept]))
            untouched = torch.ones(len(flat), dtype=torch.bool, device=DEVICE)
            untouched[kept] = False
            if not bool(flat[untouched].isnan().all()):
                return float("inf")
    return worst


def _norm(torch: Any, dtype: Any) -> float:
    from drift_kernels import reference
    from drift_kernels.triton_ops.layers import launch_rms_norm

    worst = 0.0
    for rows, size in ((1, 4096), (33, 896), (300, 8192)):
        x, residual = (torch.randn(rows, size, device=DEVICE).to(dtype) for _ in range(2))
        weight = torch.rand(size, device=DEVICE).to(dtype)
        out, total = (torch.full_like(x, float("nan")) for _ in range(2))
        launch_rms_norm(x, weight, out, 1e-6, 16, residual, total)
        want, want_total = reference.add_rms_norm(x, residual, weight, 1e-6)
        worst = max(worst, relative_error(out, want), relative_error(total, want_total))
    return worst


def _silu(torch: Any, dtype: Any) -> float:
    from drift_kernels import reference
    from drift_kernels.triton_ops.layers import launch_silu_and_mul

    gate_up = torch.randn(129, 2 * 14336, device=DEVICE).to(dtype)
    out = torch.full((129, 14336), float("nan"), dtype=dtype, device=DEVICE)
    launch_silu_and_mul(gate_up, out, 16)
    return relative_error(out, reference.silu_and_mul(gate_up.float()))


def _sampling(torch: Any, rows: int = 96, vocab: int = 128256) -> float:
    """The share of rows whose token differs from the reference's: 0, but for draws that fall on a rounding."""
    from drift_kernels import reference
    from drift_kernels.triton_ops.sampling import MOST_PIECES, SamplingRows, launch_argmax, launch_sample

    logits = torch.randn(rows, vocab, device=DEVICE) * 3
    out = torch.full((rows,), -1, dtype=torch.int64, device=DEVICE)
    peaks = torch.empty(rows * MOST_PIECES, device=DEVICE)
    launch_argmax(logits, out, peaks, torch.empty(rows * MOST_PIECES, dtype=torch.int32, device=DEVICE), 64)
    if not bool((out == logits.argmax(-1)).all()):
        return float("inf")
    choose = torch.Generator().manual_seed(3)
    temperature = torch.tensor([0.0, 0.7, 1.3]).repeat(rows // 3).to(DEVICE)
    top_k = torch.tensor([0, 50, 0, 5]).repeat(rows // 4).int().to(DEVICE)
    top_p = torch.tensor([1.0, 0.9]).repeat(rows // 2).to(DEVICE)
    min_p = torch.tensor([0.0, 0.0, 0.02, 0.0, 0.0, 0.1]).repeat(rows // 6).to(DEVICE)
    draws = torch.rand(rows, generator=choose).to(DEVICE)
    seeds, places = torch.arange(rows).to(DEVICE), torch.arange(rows).int().to(DEVICE)
    columns = SamplingRows(temperature, top_k, top_p, min_p, seeds, places, draws=draws)
    launch_sample(logits, out, columns, 64)
    want = reference.sample(logits, temperature, top_k, top_p, min_p, draws)
    return float((out != want).float().mean())


def _masks(torch: Any, rows: int = 96, vocab: int = 128256) -> float:
    """The share of logits that differ from the reference's, rows without a mask included."""
    from drift_kernels import reference
    from drift_kernels.triton_ops.sampling import launch_mask

    logits = torch.randn(rows, vocab, device=DEVICE) * 3
    logits[7, 100:200] = float("nan")
    words = torch.randint(-(1 << 31), 1 << 31, (rows // 3, vocab // 32), device=DEVICE).int()
    picked = torch.arange(1, rows, 3, device=DEVICE).int()
    want = logits.clone()
    reference.mask_logits(want, picked, words)
    launch_mask(logits, picked, words, 64)
    return float((logits != want).float().mean())
