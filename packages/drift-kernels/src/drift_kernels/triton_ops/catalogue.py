"""Every kernel in every variant that is compiled ahead of time, each launched as the engine launches it.

Tensors are small and their values never read: of a size, only its divisibility gets into the code. The table of
docs/kernels.md and the tests compile what is listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from drift_kernels.triton_ops.ahead import Compiled, compiling_for
from drift_kernels.triton_ops.lane import AttentionLane, AttentionShape
from drift_kernels.triton_ops.layers import (
    launch_rms_norm,
    launch_rotary,
    launch_rotate_and_write,
    launch_silu_and_mul,
    launch_write_kv,
)
from drift_kernels.triton_ops.sampling import SamplingRows, launch_argmax, launch_mask, launch_sample
from drift_kernels.triton_ops.tiles import HEAD_SIZES, padded_head

_SMS = 8


@dataclass(frozen=True, slots=True)
class Variant:
    """What of a launch is compiled in. `plain` is the variant that docs name the kernel by."""

    head: int = 128
    dtype: torch.dtype = torch.bfloat16
    page_tokens: int = 16
    window: int | None = None
    group: int = 4

    def __str__(self) -> str:
        parts = [f"head {self.head}", str(self.dtype).removeprefix("torch."), f"page {self.page_tokens}"]
        parts += [f"group {self.group}"] + ([] if self.window is None else ["windowed"])
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel as compiled, and the resources the tables expect of it."""

    kernel: str
    variant: Variant
    compiled: Compiled
    programs_per_sm: int  # that must fit at once
    matrix: str | None  # the matrix instruction it must use


def attention_variants(head: int) -> Iterator[Variant]:
    """The plain variant, then those that differ in one respect; one per padded head size is enough of these."""
    yield Variant(head)
    if head == padded_head(head):
        yield Variant(head, dtype=torch.float16)
        yield Variant(head, page_tokens=128)
        yield Variant(head, window=1000)
        yield Variant(head, group=7)


def compile_attention(architecture: int, variant: Variant, kind: str) -> list[Entry]:
    """Decode ("narrow") or prefill ("wide") and its merge."""
    shape = AttentionShape(2 * variant.group, 2, variant.head, variant.page_tokens)
    tokens = {"narrow": 1, "wide": 64}[kind]
    lane = AttentionLane(shape, 1, tokens, 256, _SMS, architecture, "cpu")
    pages = torch.zeros(16, variant.page_tokens, 2, variant.head, dtype=variant.dtype)
    q = torch.zeros(tokens, shape.heads, variant.head, dtype=variant.dtype)
    planned = lane.plan([tokens], [200], [list(range(13))], 0.1, _SMS, variant.window)
    work = planned.wide or planned.narrow
    with compiling_for(architecture) as launches:
        planned.attend(q, pages, pages.clone(), torch.zeros_like(q))
    attend, merge = launches[-2:]
    name = {"narrow": "decode attention", "wide": "prefill attention"}[kind]
    matrix = {90: "wgmma", 100: "tcgen05"}.get(architecture, "mma.sync") if kind == "wide" else "mma.sync"
    return [
        Entry(name, variant, attend, work.tile.programs_per_sm, matrix),
        Entry(f"merge of {name.split()[0]}", variant, merge, 1, None),
    ]


def compile_layers(architecture: int, variant: Variant) -> list[Entry]:
    """Rotary embedding and KV write, with qk-norm and without, and each by itself."""
    heads, head, dtype = 4 * variant.group, variant.head, variant.dtype
    qkv = torch.zeros(3, heads + 8, head, dtype=dtype)
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + 4], qkv[:, heads + 4 :]
    angles, norm = torch.zeros(3, head), torch.zeros(head, dtype=dtype)
    k_pages = torch.zeros(2, variant.page_tokens, 4, head, dtype=dtype)
    v_pages, slots = k_pages.clone(), torch.zeros(3, dtype=torch.int64)
    q_out, k_out = q.contiguous(), k.contiguous()
    with compiling_for(architecture) as launches:
        for weight in (None, norm):
            launch_rotate_and_write(
                q, k, v, angles, angles, q_out, k_pages, v_pages, slots, _SMS, weight, weight, 1e-6
            )  # fmt: skip
        launch_rotary(q, k, angles, angles, q_out, k_out, _SMS)
        launch_write_kv(k, v, k_pages, v_pages, slots, _SMS)
    names = ("rotary and KV write", "qk-norm, rotary and KV write", "rotary alone", "KV write alone")
    return [Entry(name, variant, one, 1, None) for name, one in zip(names, launches, strict=True)]


def compile_rows(architecture: int, dtype: torch.dtype, size: int) -> list[Entry]:
    """The norm, the norm with residual and the activation, of rows of `size`."""
    x, weight = torch.zeros(3, size, dtype=dtype), torch.zeros(size, dtype=dtype)
    with compiling_for(architecture) as launches:
        launch_rms_norm(x, weight, x.clone(), 1e-6, _SMS)
        launch_rms_norm(x, weight, x.clone(), 1e-6, _SMS, x.clone(), x.clone())
        launch_silu_and_mul(torch.zeros(3, 2 * size, dtype=dtype), x.clone(), _SMS)
    names = (f"RMS norm of {size}", f"RMS norm of {size} with residual", "SiLU and multiply")
    variant = Variant(dtype=dtype)
    return [Entry(name, variant, one, 1, None) for name, one in zip(names, launches, strict=True)]


def compile_sampling(architecture: int) -> list[Entry]:
    """Greedy and filtered choice of a token, and bits that forbid tokens; fp32 logits."""
    logits, out = torch.zeros(3, 32000), torch.zeros(3, dtype=torch.int64)
    floats, ints = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    rows = SamplingRows(floats, ints, floats, floats, torch.zeros(4, dtype=torch.int64), ints)
    drawn = SamplingRows(floats, ints, floats, floats, rows.seeds, ints, draws=floats)
    with compiling_for(architecture) as launches:
        launch_argmax(logits, out, torch.zeros(256), torch.zeros(256, dtype=torch.int32), _SMS)
        launch_sample(logits, out, rows, _SMS)
        launch_sample(logits, out, drawn, _SMS)
        launch_mask(logits, ints[:2], torch.zeros(2, 1008, dtype=torch.int32), _SMS)
    names = ("argmax of pieces", "argmax of a row", "sample", "sample with given draws", "mask")
    return [Entry(name, Variant(), one, 2, None) for name, one in zip(names, launches, strict=True)]


def compilations(architecture: int) -> Iterator[Callable[[], list[Entry]]]:
    """Everything for one architecture, in pieces of a few seconds."""
    for head in HEAD_SIZES:
        for variant in attention_variants(head):
            for kind in ("narrow", "wide"):
                yield partial(compile_attention, architecture, variant, kind)
        yield partial(compile_layers, architecture, Variant(head))
    for dtype in (torch.bfloat16, torch.float16):
        for size in (2048, 4096, 8192):
            yield partial(compile_rows, architecture, dtype, size)
    yield partial(compile_sampling, architecture)


def faults(entry: Entry) -> list[str]:
    """What is wrong with a compiled kernel, one line each; empty when it is as the tables promise."""
    one = entry.compiled
    name = f"{entry.kernel} ({entry.variant}) on sm_{one.architecture}"
    found = []
    if one.stack:
        found.append(f"{name} spills: {one.stack} bytes of stack, {one.registers} registers")
    if one.programs_per_sm() < entry.programs_per_sm:
        found.append(
            f"{name} fits {one.programs_per_sm()} times on a multiprocessor, the tile table says "
            f"{entry.programs_per_sm}: {one.registers} registers, {one.shared} bytes of shared memory"
        )
    if entry.matrix is not None and entry.matrix not in one.matrix_instructions:
        found.append(f"{name} has no {entry.matrix}, but {sorted(one.matrix_instructions)}")
    return found
