"""Launches the norms, the activation and the fused rotary embedding and KV write.

Knows nothing of models or requests. Outputs are arguments; a grid is as large as the work, up to what `num_sms`
multiprocessors hold at once.
"""

from __future__ import annotations

from torch import Tensor

from drift_kernels.triton_ops import device_layers
from drift_kernels.triton_ops.tiles import padded_head

_PROGRAMS_PER_SM = 8
_BLOCK = 1024
_HEADS_AT_ONCE = 8
LARGEST_NORM = 16384
"""Features of a row that one program normalises; wider rows are refused."""


def _grid(work: int, num_sms: int) -> tuple[int]:
    return (max(1, min(work, num_sms * _PROGRAMS_PER_SM)),)


def launch_rms_norm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    eps: float,
    num_sms: int,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """out = rms_norm(x[R, D]); with residual and total: total = x + residual and out its norm.

    x and residual may be strided between rows; out and total are contiguous. out may be x and total residual.
    Raises ValueError for a row wider than LARGEST_NORM.
    """
    rows, size = x.shape
    if size > LARGEST_NORM:
        raise ValueError(f"x has rows of {size} features; the kernel takes up to {LARGEST_NORM}")
    padded = padded_head(size)
    added = x if residual is None else residual
    device_layers.rms_norm_rows[_grid(rows, num_sms)](
        x, added, weight, out, out if total is None else total, rows, size, eps, x.stride(0), added.stride(0),
        ADD=residual is not None, SIZE_PADDED=padded, num_warps=4 if padded <= 2048 else min(16, padded // 512),
    )  # fmt: skip


def launch_silu_and_mul(gate_up: Tensor, out: Tensor, num_sms: int) -> None:
    """out[R, F] = silu(gate) * up of gate_up[R, 2F]; out contiguous, gate_up may be strided between rows."""
    rows, size = out.shape
    pieces = -(-size // _BLOCK)
    device_layers.silu_and_mul_rows[_grid(rows * pieces, num_sms)](
        gate_up, out, rows, size, gate_up.stride(0), BLOCK=_BLOCK, num_warps=4
    )


def launch_rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    num_sms: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Turn q[T, Hq, D] into q_out and k[T, Hk, D] into its pages, v[T, Hk, D] beside it; see the reference.

    q, k and v may be strided between tokens (parts of one projection); q_out is contiguous and may be q if
    q is. A slot below 0 stores nothing: a row that pads a captured batch.
    """
    weights = (q if q_norm is None else q_norm, k if k_norm is None else k_norm)
    _launch_rotary(
        q, k, v, cos, sin, weights, q_out, k_pages, v_pages, slots, num_sms, eps, q_norm is not None
    )


def launch_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, num_sms: int
) -> None:
    """apply_rotary alone, into contiguous q_out[T, Hq, D] and k_out[T, Hk, D]."""
    _launch_rotary(q, k, None, cos, sin, (q, k), q_out, k_out, None, None, num_sms, 0.0, False)


def launch_write_kv(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, num_sms: int
) -> None:
    """write_kv alone: k and v[T, Hk, D], strided between tokens or not, as they are."""
    _launch_rotary(None, k, v, None, None, (k, k), None, k_pages, v_pages, slots, num_sms, 0.0, False)


def _launch_rotary(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: tuple[Tensor, Tensor],
    q_out: Tensor | None,
    k_out: Tensor,
    v_out: Tensor | None,
    slots: Tensor | None,
    num_sms: int,
    eps: float,
    norm: bool,
) -> None:
    """One kernel for all three; what a variant leaves out is compiled away and gets k as a stand-in."""
    tokens, kv_heads, head = k.shape
    q_heads = 0 if q is None else q.shape[1]
    v_heads = 0 if v is None else kv_heads
    blocks = sum(-(-heads // _HEADS_AT_ONCE) for heads in (q_heads, kv_heads, v_heads))
    q, v = k if q is None else q, k if v is None else v
    cos, sin = k if cos is None else cos, k if sin is None else sin
    device_layers.rotate_and_write[_grid(tokens * blocks, num_sms)](
        q, k, v, cos, sin, *weights,
        k_out if q_out is None else q_out, k_out, k_out if v_out is None else v_out,
        k if slots is None else slots, tokens, eps,
        q.stride(0), k.stride(0), v.stride(0), cos.stride(0),
        Q_HEADS=q_heads, K_HEADS=kv_heads, V_HEADS=v_heads, OUT_HEADS=kv_heads,
        HEAD=head, HALF_PADDED=padded_head(head // 2), AT_ONCE=_HEADS_AT_ONCE,
        ROTATE=cos is not k, NORM=norm, PAGED=slots is not None, num_warps=4,
    )  # fmt: skip
