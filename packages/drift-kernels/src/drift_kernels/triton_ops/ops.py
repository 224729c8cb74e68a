"""The ops of a decoder layer as Triton kernels, with torch's own matrix product.

What it returns it allocates; a caller that must not allocate uses the launchers with its own buffers. Steps planned
by an AttentionLane run as they are; inputs built without one are planned here, once per step, which waits for the
device.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from drift_kernels import checks, reference
from drift_kernels.inputs import AttentionInputs
from drift_kernels.triton_ops.lane import AttentionLane, AttentionShape, PlannedInputs
from drift_kernels.triton_ops.layers import (
    LARGEST_NORM,
    launch_rms_norm,
    launch_rotary,
    launch_rotate_and_write,
    launch_silu_and_mul,
    launch_write_kv,
)
from drift_kernels.triton_ops.tiles import nearest_architecture


class TritonOps:
    """Ops for bf16 and fp16 tensors on a partition of `num_sms` multiprocessors; threads may share one.

    capability: of the device, 90 for 9.0; ValueError below 80.
    """

    def __init__(self, num_sms: int, capability: int) -> None:
        self.num_sms = num_sms
        self.architecture = nearest_architecture(capability)
        self.description = f"Triton kernels for sm_{self.architecture} on {num_sms} multiprocessors"
        self._unplanned = threading.local()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        checks.check_norm(x, weight)
        if x.shape[-1] > LARGEST_NORM:
            return reference.rms_norm(x, weight, eps)
        out = x.new_empty(x.shape)
        launch_rms_norm(_rows(x), weight, _rows(out), eps, self.num_sms)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        checks.check_norm(x, weight, residual)
        if x.shape[-1] > LARGEST_NORM:
            return reference.add_rms_norm(x, residual, weight, eps)
        out, total = x.new_empty(x.shape), x.new_empty(x.shape)
        launch_rms_norm(_rows(x), weight, _rows(out), eps, self.num_sms, _rows(residual), _rows(total))
        return out, total

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        checks.check_gate_up(gate_up)
        out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        launch_silu_and_mul(_rows(gate_up), _rows(out), self.num_sms)
        return out

    def apply_rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        checks.check_rotary(q, k, cos, sin)
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
        launch_rotary(_heads(q), _heads(k), *_angles(cos, sin), q_out, k_out, self.num_sms)
        return q_out, k_out

    def write_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
        checks.check_write_kv(k, v, k_pages, v_pages, slots)
        launch_write_kv(_heads(k), _heads(v), k_pages, v_pages, slots, self.num_sms)

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
        """qk-norm, apply_rotary and write_kv in one launch; returns the turned q. norms: weights[D] of q and k."""
        checks.check_rotary(q, k, cos, sin)
        checks.check_write_kv(k, v, k_pages, v_pages, slots)
        q_out = q.new_empty(q.shape)
        q_norm, k_norm = norms or (None, None)
        launch_rotate_and_write(
            _heads(q), _heads(k), _heads(v), *_angles(cos, sin), q_out, k_pages, v_pages, slots, self.num_sms,
            q_norm, k_norm, eps,
        )  # fmt: skip
        return q_out

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, inputs: AttentionInputs) -> Tensor:
        checks.check_attend(q, k_pages, v_pages, inputs)
        out = q.new_empty(q.shape)
        planned = inputs if isinstance(inputs, PlannedInputs) else self._plan(q, k_pages, inputs)
        planned.attend(_heads(q), k_pages, v_pages, out)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        checks.check_linear(x, weight, bias)
        return reference.linear(x, weight, bias)

    def _plan(self, q: Tensor, k_pages: Tensor, inputs: AttentionInputs) -> PlannedInputs:
        """Plan inputs of no lane; the layers of a step bring the same ones, so the last plan of a thread is kept."""
        shape = AttentionShape(q.shape[1], *_kv_shape(k_pages))
        known: _Known | None = getattr(self._unplanned, "last", None)
        if known is not None and known[0] is inputs and known[1] == shape:
            return known[2]
        starts, contexts = inputs.query_starts.cpu(), inputs.context_lens.cpu()
        lane = AttentionLane(
            shape, len(contexts), q.shape[0], inputs.max_context, self.num_sms, self.architecture, q.device
        )
        planned = lane.plan(
            starts.diff().numpy(), contexts.numpy(), inputs.page_table.cpu().numpy(),
            inputs.scale, self.num_sms, inputs.window,
        )  # fmt: skip
        self._unplanned.last = (inputs, shape, planned)
        return planned


_Known = tuple[AttentionInputs, AttentionShape, PlannedInputs]


def device_ops(device: torch.device, num_sms: int | None = None) -> TritonOps:
    """TritonOps for a CUDA device; num_sms None: all its multiprocessors. ValueError if the device is too old."""
    major, minor = torch.cuda.get_device_capability(device)
    if num_sms is None:
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return TritonOps(num_sms, 10 * major + minor)


def _kv_shape(k_pages: Tensor) -> tuple[int, int, int]:
    _, page_tokens, kv_heads, head = k_pages.shape
    return kv_heads, head, page_tokens


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [R, D] with neighbours in a row next to each other."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _heads(x: Tensor) -> Tensor:
    """[T, H, D], contiguous within a token: parts of one projection pass as they are."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.contiguous(), sin.contiguous()
