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


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Norm q and k per head by `norms` (weights[D] of q and k), turn both, store k and v; the turned q.

    Tokens whose slot is below 0 are not stored.
    """
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    q, k = apply_rotary(q, k, cos, sin)
    kept = slots >= 0
    write_kv(k[kept], v[kept], k_pages, v_pages, slots[kept])
    return q


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor
) -> Tensor:
    """One token per row of logits[R, V] by draws[R] in [0, 1) -> int64[R].

    In order: temperature (0: the largest logit), min-p, top-k (0: off), top-p of what those left (1: off); a token as
    likely as the last one admitted is admitted too. The token is the first, in token order, at which the
    running share of what is left exceeds the draw.
    """
    tokens = logits.argmax(-1)
    for r in torch.nonzero(temperature > 0).flatten().tolist():
        weights = (logits[r].double() / temperature[r]).softmax(-1)
        weights[weights < min_p[r] * weights.max()] = 0
        if 0 < (k := int(top_k[r])) < len(weights):
            weights[weights < weights.topk(k).values[-1]] = 0
        if (p := float(top_p[r])) < 1:
            ranked = weights.sort(descending=True).values
            needed = int((ranked.cumsum(-1) < p * ranked.sum()).sum())
            weights[weights < ranked[min(needed, len(ranked) - 1)]] = 0
        running = weights.cumsum(-1)
        tokens[r] = int((running <= draws[r] * running[-1]).sum())
    return tokens


FINITE = 1e30
"""What masked logits are kept within, so that a broken model's row does not leave its form."""


def mask_logits(logits: Tensor, picked: Tensor, words: Tensor) -> None:
    """Forbid tokens in rows `picked` int32[N] of float32 logits[R, V]: those whose bit in words int32[N, >= V/32] is 0.

    Bit t % 32 of word t // 32, lowest first, is token t's. Logits of allowed tokens become finite (NaN: 0).
    """
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
    kept = logits[picked.long()].nan_to_num(0.0).clamp(-FINITE, FINITE)
    logits[picked.long()] = torch.where(allowed, kept, float("-inf"))


def philox_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float32[R] in [0, 1) from int64 seeds and int32 positions: Philox 4x32-10, as Triton's `tl.rand` has it.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    low = 0xFFFFFFFF
    counter = [positions.long() & low, *(torch.zeros_like(seeds) for _ in range(3))]
    key = [seeds & low, (seeds >> 32) & low]
    for _ in range(10):
        high_0, low_0 = _multiply_32(counter[0], 0xD2511F53)
        high_2, low_2 = _multiply_32(counter[2], 0xCD9E8D57)
        counter = [high_2 ^ counter[1] ^ key[0], low_2, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    signed = torch.where(counter[0] >= 1 << 31, counter[0] - (1 << 32), counter[0])
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def _multiply_32(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two 32-bit numbers held in int64."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
