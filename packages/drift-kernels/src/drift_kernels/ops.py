"""One object per device and dtype that carries the ops a decoder needs, and the choice among implementations.

Knows nothing of models, requests or lanes: an op runs on the thread that calls it, with as many threads as
torch has on that thread (`torch.get_num_threads()`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from drift_kernels import checks, reference
from drift_kernels.cpu import CpuOps
from drift_kernels.inputs import AttentionInputs
from drift_kernels.native_library import NativeUnavailable, load_native


class Ops(Protocol):
    """The ops of a decoder layer; `drift_kernels.reference` says what each computes. Threads may share one.

    Every op raises ValueError, naming the argument, when shapes do not fit together.
    """

    @property
    def description(self) -> str:
        """One line for logs: which implementation, and why not a faster one."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor: ...

    def apply_rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...

    def write_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None: ...

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
        """What a layer does between its projection and attention, in as few launches as there may be."""
        ...

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, inputs: AttentionInputs) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


class ReferenceOps:
    """The torch specification itself, for any device."""

    def __init__(self, description: str = "torch reference") -> None:
        self.description = description

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        checks.check_norm(x, weight)
        return reference.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        checks.check_norm(x, weight, residual)
        return reference.add_rms_norm(x, residual, weight, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        checks.check_gate_up(gate_up)
        return reference.silu_and_mul(gate_up)

    def apply_rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        checks.check_rotary(q, k, cos, sin)
        return reference.apply_rotary(q, k, cos, sin)

    def write_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
        checks.check_write_kv(k, v, k_pages, v_pages, slots)
        reference.write_kv(k, v, k_pages, v_pages, slots)

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
        checks.check_rotary(q, k, cos, sin)
        checks.check_write_kv(k, v, k_pages, v_pages, slots)
        return reference.rotate_and_write(q, k, v, cos, sin, k_pages, v_pages, slots, norms, eps)

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, inputs: AttentionInputs) -> Tensor:
        checks.check_attend(q, k_pages, v_pages, inputs)
        return reference.attend(q, k_pages, v_pages, inputs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        checks.check_linear(x, weight, bias)
        return reference.linear(x, weight, bias)


def select_ops(
    device: str, dtype: torch.dtype, *, native: bool | None = None, num_sms: int | None = None
) -> Ops:
    """The fastest ops for tensors of `dtype` on `device` ("cpu", "cuda", "cuda:1").

    native: True insists on compiled kernels, False on torch, None takes what there is and says in `description`
    why it is not more. num_sms: multiprocessors of the partition on a CUDA device; None: all of them. Raises
    ValueError for a dtype no implementation carries, NativeUnavailable when insisting.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {dtype} is not supported; choose float32, bfloat16 or float16")
    if native is False:
        return ReferenceOps("torch reference, as asked")
    try:
        kind = torch.device(device).type
        if kind == "cuda":
            return _cuda_ops(torch.device(device), dtype, num_sms)
        if kind != "cpu":
            raise NativeUnavailable(f"no native kernels for device {device}")
        if dtype == torch.float16:
            raise NativeUnavailable("no native kernels for float16 on CPU; bfloat16 and float32 have them")
        return CpuOps(load_native())
    except NativeUnavailable as why:
        if native:
            raise
        return ReferenceOps(f"torch reference: {why}")


def _cuda_ops(device: torch.device, dtype: torch.dtype, num_sms: int | None) -> Ops:
    """Triton's, imported only here; NativeUnavailable says what is missing."""
    if dtype == torch.float32:
        raise NativeUnavailable("no native kernels for float32 on CUDA; bfloat16 and float16 have them")
    if not torch.cuda.is_available():
        raise NativeUnavailable("torch finds no CUDA device")
    try:
        from drift_kernels.triton_ops.ops import device_ops
    except ModuleNotFoundError as missing:
        raise NativeUnavailable(
            f"{missing.name} is not installed; pip install 'drift-kernels[cuda]'"
        ) from missing
    try:
        return device_ops(device, num_sms)
    except ValueError as too_old:
        raise NativeUnavailable(str(too_old)) from too_old
