"""The ops on CPU in C, each call one foreign function; shapes that the C code does not take go to the reference.

An op uses as many threads as torch has on the calling thread, on the team of workers that torch's own operators use
there. Long calls release the interpreter lock; short ones keep it, because getting it back from a busy thread costs
more than they take. Nothing is kept between calls, so lanes may share one object.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from drift_kernels import checks, reference
from drift_kernels.inputs import AttentionInputs
from drift_kernels.native_library import LEVELS, NativeLibrary

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Elements below which an elementwise call is over in a few microseconds.
_SHORT = 1 << 15
_MULTIPLICATIONS_SHORT = 1 << 17

# Rows up to which each path beats F.linear here (bench/cpu_ops.py); torch packs the weights anew on every call.
_AMX_ROWS = 128
_DPBF16_ROWS = 4
_FP32_ROWS = range(3, 17)
_FP32_WEIGHTS = 1 << 19  # smaller ones stay in cache, and there F.linear is as fast
_STACK_ELEMENTS = 1 << 17  # inputs of this many elements are packed on the stack (native.c knows this number)

_ATTEND_FAULTS = {
    1: "inputs.query_starts does not lay out q: it must rise from 0 to its tokens in steps of 1 to max_query",
    2: "inputs.context_lens must include each sequence's query tokens and not exceed max_context",
    3: "inputs.page_table is too narrow for the longest context",
    4: "inputs.page_table names a page that k_pages does not have",
}


class CpuOps:
    """Native ops for fp32 and bf16 tensors on CPU. `highest_level` (see LEVELS) keeps to lesser instructions."""

    def __init__(self, library: NativeLibrary, highest_level: int = 2) -> None:
        self._free = library.free
        self._held = library.held
        self._level = min(library.level, highest_level)
        self.description = f"native C, {LEVELS[self._level]}, {'' if library.threaded else 'not '}threaded"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        checks.check_norm(x, weight)
        size = x.shape[-1]
        if size % 16 or x.dtype not in _DTYPES:
            return reference.rms_norm(x, weight, eps)
        rows, stride = _rows(x)
        out = x.new_empty(x.shape)
        self._for(x).drift_rms_norm(
            rows.data_ptr(), None, _flat(weight).data_ptr(), out.data_ptr(), None,
            rows.shape[0], size, stride, 0, eps, _DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        checks.check_norm(x, weight, residual)
        size = x.shape[-1]
        if size % 16 or x.dtype not in _DTYPES:
            return reference.add_rms_norm(x, residual, weight, eps)
        (rows, stride), (others, other_stride) = _rows(x), _rows(residual)
        out, total = x.new_empty(x.shape), x.new_empty(x.shape)
        self._for(x).drift_rms_norm(
            rows.data_ptr(), others.data_ptr(), _flat(weight).data_ptr(), out.data_ptr(), total.data_ptr(),
            rows.shape[0], size, stride, other_stride, eps, _DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out, total

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        checks.check_gate_up(gate_up)
        size = gate_up.shape[-1] // 2
        if size % 16 or gate_up.dtype not in _DTYPES:
            return reference.silu_and_mul(gate_up)
        rows, stride = _rows(gate_up)
        out = gate_up.new_empty((*gate_up.shape[:-1], size))
        self._for(gate_up).drift_silu_and_mul(
            rows.data_ptr(),
            out.data_ptr(),
            rows.shape[0],
            size,
            stride,
            _DTYPES[gate_up.dtype],
            torch.get_num_threads(),
        )
        return out

    def apply_rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        checks.check_rotary(q, k, cos, sin)
        tokens, heads, size = q.shape
        angles = _DTYPES.get(cos.dtype)
        known = q.dtype in _DTYPES and sin.dtype == cos.dtype and cos.dtype in (q.dtype, torch.float32)
        if size < 32 or angles is None or not known:
            return reference.apply_rotary(q, k, cos, sin)
        q, k, cos, sin = _heads(q), _heads(k), _unit_stride(cos), _unit_stride(sin)
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
        self._for(q).drift_rotary(
            q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), q_out.data_ptr(), k_out.data_ptr(),
            tokens, heads, k.shape[1], size, q.stride(0), k.stride(0), cos.stride(0), sin.stride(0),
            _DTYPES[q.dtype], angles, torch.get_num_threads(),
        )  # fmt: skip
        return q_out, k_out

    def write_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
        checks.check_write_kv(k, v, k_pages, v_pages, slots)
        pages, page_tokens, heads, size = k_pages.shape
        k, v, slots, width = _heads(k), _heads(v), _flat(slots), k.element_size()
        wrong = self._for(k).drift_write_kv(
            k.data_ptr(), v.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), slots.data_ptr(), k.shape[0],
            heads * size * width, k.stride(0) * width, v.stride(0) * width, pages * page_tokens,
        )  # fmt: skip
        if wrong >= 0:
            raise ValueError(
                f"slots[{wrong}] is {int(slots[wrong])}; k_pages has slots 0 to {pages * page_tokens - 1}"
            )

    def rotate_and_write(
        self,
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
        """One after another: on a CPU a call more costs two microseconds. Every slot must be one of the pages'."""
        if norms is not None:
            q, k = self.rms_norm(q, norms[0], eps), self.rms_norm(k, norms[1], eps)
        q, k = self.apply_rotary(q, k, cos, sin)
        self.write_kv(k, v, k_pages, v_pages, slots)
        return q

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, inputs: AttentionInputs) -> Tensor:
        checks.check_attend(q, k_pages, v_pages, inputs)
        tokens, heads, size = q.shape
        pages, page_tokens, kv_heads, _ = k_pages.shape
        if size % 16 or size > 256 or q.dtype not in _DTYPES:
            return reference.attend(q, k_pages, v_pages, inputs)
        q, table = _heads(q), inputs.page_table
        out = q.new_empty(q.shape)
        short = tokens * heads * size * inputs.max_context < _MULTIPLICATIONS_SHORT
        fault = (self._held if short else self._free).drift_attend(
            q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), out.data_ptr(),
            inputs.query_starts.data_ptr(), inputs.context_lens.data_ptr(), table.data_ptr(),
            tokens, table.shape[0], heads, kv_heads, size, q.stride(0), table.shape[1], pages, page_tokens,
            inputs.max_query, inputs.max_context, inputs.window or 0,
            inputs.scale, _DTYPES[q.dtype], self._level, torch.get_num_threads(),
        )  # fmt: skip
        if fault:
            raise ValueError(_ATTEND_FAULTS[fault])
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        checks.check_linear(x, weight, bias)
        outputs, inputs = weight.shape
        rows, stride = _rows(x)
        count = rows.shape[0]
        if not self._takes_linear(count, outputs, inputs, x.dtype) or not weight.is_contiguous():
            return reference.linear(x, weight, bias)
        out = x.new_empty((*x.shape[:-1], outputs))
        level = self._level if x.dtype == torch.bfloat16 else 0
        elements = (count + 15) // 16 * 16 * inputs if level == 2 else 0
        packed = x.new_empty(elements) if elements > _STACK_ELEMENTS else None
        short = count * outputs * inputs < _MULTIPLICATIONS_SHORT
        (self._held if short else self._free).drift_linear(
            rows.data_ptr(), weight.data_ptr(), None if bias is None else _flat(bias).data_ptr(), out.data_ptr(),
            None if packed is None else packed.data_ptr(), count, outputs, inputs, stride,
            _DTYPES[x.dtype], level, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _takes_linear(self, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
        if dtype == torch.bfloat16:
            most = (0, _DPBF16_ROWS, _AMX_ROWS)[self._level]
            return 0 < rows <= most and inputs % 32 == 0 and outputs >= 32
        large = outputs * inputs >= _FP32_WEIGHTS
        return dtype == torch.float32 and large and inputs % 16 == 0 and rows in _FP32_ROWS

    def _for(self, x: Tensor) -> ctypes.CDLL:
        return self._held if x.numel() < _SHORT else self._free


def _flat(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x[..., D] as rows[R, D] whose elements lie together, and the step between rows."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    x = _unit_stride(x)
    return x, x.stride(0)


def _heads(x: Tensor) -> Tensor:
    """x[T, H, D] with each token's heads lying together; tokens may be apart, as in a slice of a fused projection."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
