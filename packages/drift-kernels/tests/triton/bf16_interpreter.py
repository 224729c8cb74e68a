"""Makes Triton's interpreter right about bf16, which it holds as raw bits and computes with as integers.

As of Triton 3.7: `tl.dot` multiplies the bits, arithmetic adds them, a store from fp32 truncates where the device
rounds to nearest even, and a bf16 constant cannot be made at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

PATCHED = ("create_dot", "binary_op", "create_fp_trunc", "create_fp_ext", "get_bf16")


def widen(bits: Any) -> Any:
    """bf16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> Any:
    """float32 as bf16 bits, to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide_handle(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def corrections() -> dict[str, Callable[..., Any]]:
    """Replacements for methods of InterpreterBuilder, by name."""
    original = {name: getattr(InterpreterBuilder, name, None) for name in PATCHED}

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original["create_dot"](self, _wide_handle(a), _wide_handle(b), *rest)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not _is_bf16(lhs):
            return original["binary_op"](self, lhs, rhs, op)
        output = op(widen(lhs.data), widen(rhs.data))
        return TensorHandle(output if output.dtype == np.bool_ else narrow(output), tl.bfloat16)

    def create_fp_trunc(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return TensorHandle(narrow(src.data), tl.bfloat16)
        return original["create_fp_trunc"](self, src, dst_type)

    def create_fp_ext(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.float32 and _is_bf16(src):
            return TensorHandle(widen(src.data), tl.float32)
        return original["create_fp_ext"](self, src, dst_type)

    def get_bf16(self: Any, value: float) -> Any:
        return TensorHandle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)

    replacements = (create_dot, binary_op, create_fp_trunc, create_fp_ext, get_bf16)
    return dict(zip(PATCHED, replacements, strict=True))


@contextmanager
def corrected() -> Iterator[None]:
    """The interpreter with the corrections, put back afterwards."""
    before = {name: InterpreterBuilder.__dict__.get(name) for name in PATCHED}
    for name, method in corrections().items():
        setattr(InterpreterBuilder, name, method)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def uncorrected(before: dict[str, Any]) -> Iterator[None]:
    """The interpreter as Triton ships it, inside `corrected`."""
    now = {name: InterpreterBuilder.__dict__.get(name) for name in PATCHED}
    _restore(before)
    try:
        yield
    finally:
        _restore(now)


def _restore(methods: dict[str, Any]) -> None:
    for name, method in methods.items():
        if method is not None:
            setattr(InterpreterBuilder, name, method)
        elif name in InterpreterBuilder.__dict__:
            delattr(InterpreterBuilder, name)


SHIPPED = {name: InterpreterBuilder.__dict__.get(name) for name in PATCHED}
