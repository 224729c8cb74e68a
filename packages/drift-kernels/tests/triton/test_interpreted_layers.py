"""Norms, activation, rotary embedding and KV write in the interpreter: equal to the reference, rounding and all."""

from __future__ import annotations

import pytest
import torch
from ragged import FLOAT, TOLERANCE

from drift_kernels import reference
from drift_kernels.triton_ops.layers import (
    LARGEST_NORM,
    launch_rms_norm,
    launch_rotate_and_write,
    launch_silu_and_mul,
)
from drift_kernels.triton_ops.ops import TritonOps
from drift_kernels.triton_ops.tiles import HEAD_SIZES

NAN = float("nan")


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, NAN)


def _one_step(got: torch.Tensor, want: torch.Tensor) -> None:
    """At most one unit in the last place apart: the order of a sum decides a rounding now and then."""
    limit = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[got.dtype]
    torch.testing.assert_close(got.float(), want.float(), atol=1e-6, rtol=limit)


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (7, 100), (3, 2560)])
def test_norms(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(rows, 2 * size).to(dtype)[:, :size] for _ in range(2))
    weight = torch.randn(size).to(dtype)
    out = _poisoned(x.contiguous())
    launch_rms_norm(x, weight, out, 1e-5, 2)
    _one_step(out, reference.rms_norm(x, weight, 1e-5))
    out, total = _poisoned(out), _poisoned(out)
    launch_rms_norm(x, weight, out, 1e-5, 2, residual, total)
    want, want_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, want_total)
    _one_step(out, want)


def test_norm_in_place() -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    want, want_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    launch_rms_norm(x, weight, x, 1e-5, 1, residual, residual)
    _one_step(x, want)
    assert torch.equal(residual, want_total)


def test_too_wide_a_norm_is_refused() -> None:
    wide = torch.zeros(1, LARGEST_NORM + 1)
    with pytest.raises(ValueError, match="takes up to 16384"):
        launch_rms_norm(wide, wide[0], wide.clone(), 1e-5, 1)


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 1024), (2, 1500)])
def test_activation(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(rows, 2 * size)).to(dtype)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    out = torch.full((rows, size), NAN, dtype=dtype)
    launch_silu_and_mul(gate_up, out, 1)
    want = reference.silu_and_mul(gate_up)
    # exp differs in its last bit between libraries, and the activated gate is rounded before it is multiplied.
    torch.testing.assert_close(out.float(), want.float(), atol=1e-6, rtol=TOLERANCE[dtype])


def _projection(tokens: int, heads: int, kv_heads: int, head: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v as parts of one projection."""
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head).to(dtype)
    return list(qkv.split((heads, kv_heads, kv_heads), dim=1))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize("head", HEAD_SIZES)
def test_rotary_and_kv_write(head: int, dtype: torch.dtype, norm: bool) -> None:
    torch.manual_seed(head)
    q, k, v = _projection(5, 9, 3, head, dtype)
    cos, sin = torch.rand(5, head), torch.rand(5, head)
    norms = (torch.randn(head).to(dtype), torch.randn(head).to(dtype)) if norm else None
    slots = torch.tensor([3, 64, -1, 33, 16])
    want_pages = [torch.full((5, 16, 3, head), NAN, dtype=dtype) for _ in range(2)]
    got_pages = [_poisoned(pages) for pages in want_pages]
    want = reference.rotate_and_write(q, k, v, cos, sin, *want_pages, slots, norms, 1e-6)
    got = torch.full((5, 9, head), NAN, dtype=dtype)
    launch_rotate_and_write(q, k, v, cos, sin, got, *got_pages, slots, 2, *(norms or (None, None)), 1e-6)
    same = torch.equal if not norm else lambda a, b: torch.allclose(
        a.float(), b.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True
    )  # fmt: skip
    assert same(got, want)
    assert same(torch.nan_to_num(got_pages[0], 9.0), torch.nan_to_num(want_pages[0], 9.0))
    assert torch.equal(torch.nan_to_num(got_pages[1], 9.0), torch.nan_to_num(want_pages[1], 9.0))
    assert int(torch.isfinite(got_pages[0][..., 0, 0]).sum()) == 4, "a padding row is not stored"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotary_and_kv_write_apart(dtype: torch.dtype) -> None:
    """The ops that a decoder calls one by one."""
    torch.manual_seed(0)
    ops = TritonOps(2, 90)
    q, k, v = _projection(3, 4, 2, 64, dtype)
    cos, sin = torch.rand(3, 64), torch.rand(3, 64)
    got, want = ops.apply_rotary(q, k, cos, sin), reference.apply_rotary(q, k, cos, sin)
    assert all(map(torch.equal, got, want))
    slots = torch.tensor([17, 2, 5])
    pages = [torch.zeros(2, 16, 2, 64, dtype=dtype) for _ in range(4)]
    ops.write_kv(k, v, pages[0], pages[1], slots)
    reference.write_kv(k, v, pages[2], pages[3], slots)
    assert torch.equal(pages[0], pages[2])
    assert torch.equal(pages[1], pages[3])
