"""TritonOps as a decoder uses it, on inputs of any maker; equal to ReferenceOps."""

from __future__ import annotations

import pytest
import torch
from ragged import Batch, close

from drift_kernels.inputs import AttentionInputs
from drift_kernels.ops import Ops, ReferenceOps
from drift_kernels.triton_ops.lane import AttentionShape
from drift_kernels.triton_ops.ops import TritonOps

LENGTHS = [(1, 20), (9, 40), (3, 3)]


def _layer(ops: Ops, batch: Batch, inputs: AttentionInputs, qk_norm: bool) -> torch.Tensor:
    """A decoder layer's ops in order."""
    torch.manual_seed(7)
    tokens, heads, head = batch.q.shape
    size = heads * head
    dtype = batch.q.dtype
    weights = {name: (torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for name, shape in {
        "qkv": (size + 2 * batch.shape.kv_heads * head, size), "out": (size, size), "up": (2 * size, size),
        "down": (size, size)}.items()}  # fmt: skip
    norm, angles = torch.rand(size).to(dtype), torch.rand(tokens, head)
    k_pages, v_pages = batch.k_pages.clone(), batch.v_pages.clone()
    residual = batch.q.reshape(tokens, size)
    qkv = ops.linear(ops.rms_norm(residual, norm, 1e-5), weights["qkv"]).view(tokens, -1, head)
    q, k, v = qkv.split((heads, batch.shape.kv_heads, batch.shape.kv_heads), dim=1)
    norms = (torch.rand(head).to(dtype), torch.rand(head).to(dtype)) if qk_norm else None
    q = ops.rotate_and_write(q, k, v, angles.cos(), angles.sin(), k_pages, v_pages, inputs.slots, norms, 1e-6)
    seen = ops.linear(ops.attend(q, k_pages, v_pages, inputs).reshape(tokens, size), weights["out"])
    normed, residual = ops.add_rms_norm(seen, residual, norm, 1e-5)
    return residual + ops.linear(ops.silu_and_mul(ops.linear(normed, weights["up"])), weights["down"])


@pytest.mark.parametrize(("window", "qk_norm"), [(None, False), (12, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_layer(dtype: torch.dtype, window: int | None, qk_norm: bool) -> None:
    batch = Batch.random(AttentionShape(4, 2, 64, 16), LENGTHS, dtype, window)
    inputs = AttentionInputs.build(
        batch.query_lens, batch.context_lens, batch.tables, 16, batch.scale, window
    )
    want = _layer(ReferenceOps(), batch, inputs, qk_norm)
    ops = TritonOps(2, 90)
    close(_layer(ops, batch, inputs, qk_norm) / 4, want / 4)  # values reach 4
    close(_layer(ops, batch, batch.plan(batch.lane()), qk_norm) / 4, want / 4)


def test_inputs_without_a_lane_are_planned_once_a_step() -> None:
    batch = Batch.random(AttentionShape(4, 2, 64, 16), LENGTHS)
    inputs = AttentionInputs.build(batch.query_lens, batch.context_lens, batch.tables, 16, batch.scale)
    ops = TritonOps(2, 90)
    close(ops.attend(batch.q, batch.k_pages, batch.v_pages, inputs), batch.want())
    first = ops._unplanned.last[2]
    ops.attend(batch.q, batch.k_pages, batch.v_pages, inputs)
    assert ops._unplanned.last[2] is first


def test_wrong_shapes_are_refused_by_name() -> None:
    ops = TritonOps(2, 90)
    with pytest.raises(ValueError, match=r"^weight is float32\[3\]"):
        ops.rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-5)
    with pytest.raises(ValueError, match=r"^k is "):
        ops.apply_rotary(torch.zeros(2, 4, 64), torch.zeros(3, 2, 64), torch.zeros(2, 64), torch.zeros(2, 64))
