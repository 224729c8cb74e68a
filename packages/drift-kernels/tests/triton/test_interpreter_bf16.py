"""The interpreter's bf16 is right in these tests, and would not be without the corrections."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from bf16_interpreter import SHIPPED, uncorrected


@triton.jit
def _bf16_arithmetic(a_ptr, b_ptr, product_ptr, sum_ptr, rounded_ptr, wide_ptr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a = tl.load(a_ptr + places)
    b = tl.load(b_ptr + places)
    tl.store(product_ptr + places, tl.dot(a, b))
    tl.store(sum_ptr + places, a + b)
    tl.store(rounded_ptr + places, tl.load(wide_ptr + places).to(tl.bfloat16))


@triton.jit
def _bf16_constant(out_ptr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, tl.full([1], 0.5, tl.bfloat16).sum(0) * 0.0 + 1.5)


def wrong_results() -> list[str]:
    """Which of dot, sum and rounding the interpreter gets wrong."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    wide = 1.0 + torch.arange(256).view(16, 16) / 512.0  # every other one halfway between two bf16 numbers
    product, total, rounded = torch.zeros(16, 16), torch.zeros_like(a), torch.zeros_like(a)
    _bf16_arithmetic[(1,)](a, b, product, total, rounded, wide)
    checks = {
        "dot": torch.allclose(product, a.float() @ b.float(), atol=1e-5),
        "sum": torch.equal(total, a + b),
        "rounding": torch.equal(rounded, wide.bfloat16()),
    }
    return [name for name, right in checks.items() if not right]


def test_bf16_is_right_here() -> None:
    assert wrong_results() == []


def test_bf16_is_wrong_without_the_corrections() -> None:
    """If this fails, Triton has mended its interpreter and the corrections can go."""
    with uncorrected(SHIPPED):
        assert wrong_results() == ["dot", "sum", "rounding"]
    assert wrong_results() == []


def test_bf16_constants_exist_only_with_the_corrections() -> None:
    out = torch.zeros(1, dtype=torch.bfloat16)
    _bf16_constant[(1,)](out)
    with uncorrected(SHIPPED), pytest.raises(Exception, match="get_bf16"):
        _bf16_constant[(1,)](out)
