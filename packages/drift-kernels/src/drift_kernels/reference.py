"""The specification of every op in plain torch, for any device and fp32, bf16 or fp16; short before fast.

Rounding follows transformers' Llama: the norm's statistics in fp32, everything else in the input's dtype,
except that attention accumulates in fp32 throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from drift_kernels.inputs import AttentionInputs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[..., D], weight[D] -> [..., D]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up[..., 2F], gate first -> silu(gate) * up, [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q[T, Hq, D], k[T, Hk, D] turned by cos, sin[T, D]; halves turn, not neighbours, as in transformers."""
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Store k, v[T, Hk, D] at slots[T] of k_pages, v_pages[P, page_tokens, Hk, D]."""
    k_pages.view(-1, *k.shape[1:])[slots] = k
    v_pages.view(-1, *v.shape[1:])[slots] = v


def attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, inputs: AttentionInputs) -> Tensor:
    """Causal attention of q[T, Hq, D] over each sequence's pages -> [T, Hq, D]."""
    out = torch.empty_like(q)
    group = q.shape[1] // k_pages.shape[2]
    starts, contexts = inputs.query_starts.tolist(), inputs.context_lens.tolist()
    for b, context in enumerate(contexts):
        pages = inputs.page_table[b, : -(-context // k_pages.shape[1])].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:context].float().repeat_interleave(group, dim=1)
            for cache in (k_pages, v_pages)
        )
        rows = slice(starts[b], starts[b + 1])
        age = inputs.positions[rows, None] - torch.arange(context, device=q.device)
        hidden = (age < 0) if inputs.window is None else (age < 0) | (age >= inputs.window)
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * inputs.scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[..., K] @ weight[N, K].T + bias[N] -> [..., N]."""
    return F.linear(x, weight, bias)
