# mypy: ignore-errors
"""Kernels of the partition measurements, in Triton's language."""

import triton
import triton.language as tl


@triton.jit
def where(out):
    """out[program] = the SM that the program runs on; it stays a while, so that others land elsewhere."""
    program = tl.program_id(0)
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r,r", [program], dtype=tl.int32, is_pure=False, pack=1
    )
    value = 0.0
    for i in range(2000):
        value = value * 0.5 + i
    tl.store(out + program, sm + tl.where(value < 0, 1, 0))


@triton.jit
def spin(sink, rounds):
    """Keep an SM busy with arithmetic."""
    value = tl.program_id(0) * 1.0
    for i in range(rounds):
        value = value * 0.999 + i
    tl.store(sink, value, mask=value < -1.0)


@triton.jit
def copy_blocks(source, target, count, BLOCK: tl.constexpr):
    """target = source, by a grid of a fixed size."""
    offsets = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        place = start + offsets
        inside = place < count
        tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)
