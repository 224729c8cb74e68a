# mypy: ignore-errors
"""Norms, activation, rotary embedding and KV write on the device; `drift_kernels.reference` is the specification.

Triton's language, not Python's, so there is nothing here for a type checker. Values are widened to fp32 before any
arithmetic and rounded to their own dtype wherever the reference rounds. Every kernel loops over its work with as
many programs as it is given.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def rms_norm_rows(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, rows, size, eps, x_stride, residual_stride,
    ADD: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """out = norm(x) * weight; with ADD, total = x + residual and out its norm. Outputs are contiguous."""
    columns = tl.arange(0, SIZE_PADDED)
    inside = columns < size
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + wide_row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            place = residual_ptr + wide_row * residual_stride + columns
            x = x + tl.load(place, mask=inside, other=0.0).to(tl.float32)
            x = x.to(dtype).to(tl.float32)
            tl.store(total_ptr + wide_row * size + columns, x.to(dtype), mask=inside)
        scale = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
        normed = (x * scale).to(dtype).to(tl.float32)
        tl.store(out_ptr + wide_row * size + columns, (normed * weight).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def silu_and_mul_rows(gate_up_ptr, out_ptr, rows, size, stride, BLOCK: tl.constexpr):
    """out[rows, size] = silu(gate) * up of gate_up[rows, 2 * size]."""
    dtype = out_ptr.dtype.element_ty
    pieces = tl.cdiv(size, BLOCK)
    for index in range(tl.program_id(0), rows * pieces, tl.num_programs(0)):
        row = tl.cast(index // pieces, tl.int64)
        columns = index % pieces * BLOCK + tl.arange(0, BLOCK)
        inside = columns < size
        gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * stride + size + columns, mask=inside, other=0.0).to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(out_ptr + row * size + columns, (activated * up).to(dtype), mask=inside)


@triton.jit
def _normed(low, high, weight_ptr, dims, inside, eps, dtype: tl.constexpr, HEAD: tl.constexpr):
    """RMS norm over a head in halves, rounded as the reference rounds it."""
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD
    scale = tl.rsqrt(mean + eps)[:, None]
    weight_low = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)[None, :]
    weight_high = tl.load(weight_ptr + HEAD // 2 + dims, mask=inside, other=0.0).to(tl.float32)[None, :]
    low = ((low * scale).to(dtype).to(tl.float32) * weight_low).to(dtype).to(tl.float32)
    high = ((high * scale).to(dtype).to(tl.float32) * weight_high).to(dtype).to(tl.float32)
    return low, high


@triton.jit
def _rotated(low, high, cos_ptr, sin_ptr, dims, inside, dtype: tl.constexpr, HEAD: tl.constexpr):
    """Halves turned by the angles of one token; every product and sum rounded to dtype."""
    cos_low = tl.load(cos_ptr + dims, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin_low = tl.load(sin_ptr + dims, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    cos_high = tl.load(cos_ptr + HEAD // 2 + dims, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin_high = tl.load(sin_ptr + HEAD // 2 + dims, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    turned_low = (low * cos_low).to(dtype).to(tl.float32) - (high * sin_low).to(dtype).to(tl.float32)
    turned_high = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(tl.float32)
    return turned_low, turned_high


@triton.jit(do_not_specialize=["tokens"])
def rotate_and_write(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight, k_weight, q_out, k_out, v_out, slots, tokens, eps,
    q_stride, k_stride, v_stride, angle_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, OUT_HEADS: tl.constexpr,
    HEAD: tl.constexpr, HALF_PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
    ROTATE: tl.constexpr, NORM: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Norm (NORM) and turn (ROTATE) q and k; q to q_out[T, Q_HEADS, HEAD], k and v to their slots (PAGED).

    Not PAGED: k to k_out[T, OUT_HEADS, HEAD] in order. A slot below 0 is a token that is not stored.
    """
    dims = tl.arange(0, HALF_PADDED)
    inside = dims < HEAD // 2
    Q_BLOCKS: tl.constexpr = (Q_HEADS + AT_ONCE - 1) // AT_ONCE
    K_BLOCKS: tl.constexpr = (K_HEADS + AT_ONCE - 1) // AT_ONCE
    V_BLOCKS: tl.constexpr = (V_HEADS + AT_ONCE - 1) // AT_ONCE
    BLOCKS: tl.constexpr = Q_BLOCKS + K_BLOCKS + V_BLOCKS
    for index in range(tl.program_id(0), tokens * BLOCKS, tl.num_programs(0)):
        token = tl.cast(index // BLOCKS, tl.int64)
        block = index % BLOCKS
        slot = token
        if PAGED:
            slot = tl.load(slots + token)
        angles = token * angle_stride
        if block < Q_BLOCKS:
            heads = block * AT_ONCE + tl.arange(0, AT_ONCE)
            held = (heads < Q_HEADS)[:, None] & inside[None, :]
            place = heads[:, None] * HEAD + dims[None, :]
            source = q_ptr + token * q_stride + place
            dtype: tl.constexpr = q_out.dtype.element_ty
            low = tl.load(source, mask=held, other=0.0).to(tl.float32)
            high = tl.load(source + HEAD // 2, mask=held, other=0.0).to(tl.float32)
            if NORM:
                low, high = _normed(low, high, q_weight, dims, inside, eps, dtype, HEAD)
            if ROTATE:
                low, high = _rotated(low, high, cos_ptr + angles, sin_ptr + angles, dims, inside, dtype, HEAD)
            target = q_out + token * (Q_HEADS * HEAD) + place
            tl.store(target, low.to(dtype), mask=held)
            tl.store(target + HEAD // 2, high.to(dtype), mask=held)
        elif block < Q_BLOCKS + K_BLOCKS:
            heads = (block - Q_BLOCKS) * AT_ONCE + tl.arange(0, AT_ONCE)
            held = (heads < K_HEADS)[:, None] & inside[None, :] & (slot >= 0)
            place = heads[:, None] * HEAD + dims[None, :]
            source = k_ptr + token * k_stride + place
            k_dtype: tl.constexpr = k_out.dtype.element_ty
            low = tl.load(source, mask=held, other=0.0).to(tl.float32)
            high = tl.load(source + HEAD // 2, mask=held, other=0.0).to(tl.float32)
            if NORM:
                low, high = _normed(low, high, k_weight, dims, inside, eps, k_dtype, HEAD)
            if ROTATE:
                low, high = _rotated(
                    low, high, cos_ptr + angles, sin_ptr + angles, dims, inside, k_dtype, HEAD
                )
            target = k_out + slot * (OUT_HEADS * HEAD) + place
            tl.store(target, low.to(k_dtype), mask=held)
            tl.store(target + HEAD // 2, high.to(k_dtype), mask=held)
        else:
            heads = (block - Q_BLOCKS - K_BLOCKS) * AT_ONCE + tl.arange(0, AT_ONCE)
            held = (heads < V_HEADS)[:, None] & inside[None, :] & (slot >= 0)
            place = heads[:, None] * HEAD + dims[None, :]
            source = v_ptr + token * v_stride + place
            target = v_out + slot * (OUT_HEADS * HEAD) + place
            tl.store(target, tl.load(source, mask=held, other=0.0), mask=held)
            high_value = tl.load(source + HEAD // 2, mask=held, other=0.0)
            tl.store(target + HEAD // 2, high_value, mask=held)
