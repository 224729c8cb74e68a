"""Shapes and dtypes that an op accepts: one line of ValueError that names the argument and what would fit.

Looks at metadata alone, so a check costs about a microsecond and never waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drift_kernels.inputs import AttentionInputs


def _refuse(name: str, tensor: Tensor, wanted: str) -> ValueError:
    return ValueError(f"{name} is {_looks(tensor)}; expected {wanted}")


def _looks(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def check_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """x[..., D] of at least one dimension, weight[D], residual like x; one dtype."""
    if x.dim() < 1:
        raise _refuse("x", x, "at least one dimension")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1] or weight.dtype != x.dtype:
        raise _refuse("weight", weight, f"one entry per feature of x {_looks(x)}, same dtype")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise _refuse("residual", residual, f"the shape and dtype of x {_looks(x)}")


def check_gate_up(gate_up: Tensor) -> None:
    """[..., 2F]."""
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise _refuse("gate_up", gate_up, "an even last dimension, gate then up")


def check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """q[T, Hq, D], k[T, Hk, D], cos and sin[T, D]; D even."""
    if q.dim() != 3 or q.shape[2] % 2:
        raise _refuse("q", q, "[tokens, heads, even head size]")
    tokens, _, size = q.shape
    if k.dim() != 3 or k.shape[0] != tokens or k.shape[2] != size or k.dtype != q.dtype:
        raise _refuse("k", k, f"[{tokens}, kv heads, {size}] of q's dtype")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape != (tokens, size):
            raise _refuse(name, angles, f"[{tokens}, {size}] as q {_looks(q)} has tokens and head size")


def _check_pages(k_pages: Tensor, v_pages: Tensor) -> None:
    if k_pages.dim() != 4 or not k_pages.is_contiguous():
        raise _refuse("k_pages", k_pages, "contiguous [pages, page tokens, kv heads, head size]")
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype or not v_pages.is_contiguous():
        raise _refuse("v_pages", v_pages, f"contiguous, the shape and dtype of k_pages {_looks(k_pages)}")


def check_write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """k, v[T, Hk, D] for pages [P, page tokens, Hk, D], slots int64[T]."""
    _check_pages(k_pages, v_pages)
    if k.dim() != 3 or k.shape[1:] != k_pages.shape[2:] or k.dtype != k_pages.dtype:
        raise _refuse("k", k, f"[tokens, kv heads, head size] to fit k_pages {_looks(k_pages)}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise _refuse("v", v, f"the shape and dtype of k {_looks(k)}")
    if slots.dim() != 1 or slots.shape[0] != k.shape[0] or slots.dtype != torch.int64:
        raise _refuse("slots", slots, f"int64[{k.shape[0]}], one per token of k")


def check_attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, inputs: AttentionInputs) -> None:
    """q[T, Hq, D] for pages [P, page tokens, Hk, D] with Hq a multiple of Hk."""
    _check_pages(k_pages, v_pages)
    heads, size = k_pages.shape[2:]
    if q.dim() != 3 or q.shape[2] != size or q.shape[1] % heads or q.dtype != k_pages.dtype:
        raise _refuse(
            "q", q, f"[tokens, a multiple of {heads} heads, {size}] to fit k_pages {_looks(k_pages)}"
        )
    if inputs.slots.shape[0] != q.shape[0]:
        raise ValueError(f"inputs lays out {inputs.slots.shape[0]} query tokens, q has {q.shape[0]}")
    starts, contexts, table = inputs.query_starts, inputs.context_lens, inputs.page_table
    sequences = contexts.shape[0]
    if starts.shape[0] != sequences + 1 or table.dim() != 2 or table.shape[0] != sequences:
        raise ValueError(
            f"inputs contradicts itself: query_starts {_looks(starts)}, context_lens {_looks(contexts)}, "
            f"page_table {_looks(table)} for the same sequences"
        )
    if not (starts.dtype == contexts.dtype == table.dtype == torch.int32 and table.is_contiguous()):
        raise ValueError(
            "inputs.query_starts, context_lens and page_table must be int32, page_table contiguous"
        )


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x[..., K], weight[N, K], bias[N]; one dtype."""
    if weight.dim() != 2:
        raise _refuse("weight", weight, "[outputs, inputs]")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise _refuse("x", x, f"[..., {weight.shape[1]}] of weight's dtype, weight being {_looks(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise _refuse("bias", bias, f"[{weight.shape[0]}] of weight's dtype, weight being {_looks(weight)}")
