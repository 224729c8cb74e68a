"""First principles: how long a phase takes on part of a device, from two description files.

Prefill is bound by compute, which scales with units; decode by reading weights (saturates at a share of the
units) and KV (scales with units, as the published fits show). On top: all-reduces between tensor-parallel devices and
fixed times, which do not depend on units. Knows nothing measured; `tools/a100_tables.py` prints its errors
against the published A100 latencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from drift_scheduler.cost.guard import ContentionGuard, refine
from drift_scheduler.cost.hardware import DeviceSpec, ModelSpec, device_spec, model_spec
from drift_scheduler.domain import DecodeShape, FloatArray, IntArray, Observation, Partition, PrefillShape


@dataclass(frozen=True, slots=True)
class _Rates:
    """Seconds per unit of work on some number of units, over all tensor-parallel devices."""

    per_flop: float
    per_attention_flop: float
    per_weight_byte: float
    per_kv_byte: float


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a mixed pass by what bounds them: products, reading weights, prefill attention, reading KV for decode,
    all-reduces. Fixed times are not among them."""

    linear: float
    weights: float
    attention: float
    kv: float
    link: float


def roofline(
    device: str,
    model: str,
    slowdown_prefill: float | None = None,
    slowdown_decode: float | None = None,
) -> RooflineCost:
    """The model of a named or pathed device and model (see `drift_scheduler.cost.FACTORIES`)."""
    return RooflineCost(device_spec(device), model_spec(model), slowdown_prefill, slowdown_decode)


class RooflineCost:
    """Implements `CostModel`; learns nothing but the contention guard's grid."""

    def __init__(
        self,
        device: DeviceSpec,
        model: ModelSpec,
        slowdown_prefill: float | None = None,
        slowdown_decode: float | None = None,
    ) -> None:
        self.device = device
        self.model = model
        self.guard = ContentionGuard(
            device.slowdown_prefill if slowdown_prefill is None else slowdown_prefill,
            device.slowdown_decode if slowdown_decode is None else slowdown_decode,
        )
        layers = model.num_layers
        links = 2 * layers if device.count > 1 else 0  # all-reduces of a forward pass
        self._body_flops = 2.0 * model.body_weights
        self._head_flops = 2.0 * model.head_weights
        self._pair_flops = model.attention_flops
        self._weights = (model.body_weights + model.head_weights) * model.bytes_per_weight
        self._kv = model.kv_bytes
        self._fixed = (device.step_us + device.layer_us * layers + device.link_latency_us * links) * 1e-6
        self._per_token = links * model.hidden * model.bytes_per_weight / (device.link_gb_s * 1e9)
        self._by_units: dict[int, _Rates] = {}
        self._latest: tuple[PrefillShape, DecodeShape, int, float] | None = None
        """The latest mixed pass: it is predicted once, and looked at four times when it has ended."""

    def prefill(self, work: PrefillShape, units: int) -> float:
        """Seconds for all layers of a prefill on `units` units, alone."""
        r = self._by_units.get(units) or self._rates(units)
        linear = (self._body_flops * work.new_tokens + self._head_flops * work.requests) * r.per_flop
        return (
            _either(linear, self._weights * r.per_weight_byte)
            + self._prefill_attention(work, r)
            + self._per_token * work.new_tokens
            + self._fixed
        )

    def prefill_each(self, new: IntArray, reused: IntArray, units: int) -> FloatArray:
        """`prefill` of each of these requests alone."""
        r = self._by_units.get(units) or self._rates(units)
        linear = (self._body_flops * new + self._head_flops) * r.per_flop
        linear *= linear
        weights = self._weights * r.per_weight_byte
        weights *= weights
        pairs = 0.5 * (new * new) + new * reused
        seconds: FloatArray = np.sqrt(np.sqrt(linear * linear + weights * weights))
        seconds += np.maximum(
            self._pair_flops * pairs * r.per_attention_flop, self._kv * reused * r.per_kv_byte
        )
        seconds += self._per_token * new
        seconds += self._fixed
        return seconds

    def decode(self, work: DecodeShape, units: int) -> float:
        """Seconds for one decode step on `units` units, alone."""
        r = self._by_units.get(units) or self._rates(units)
        linear = (self._body_flops + self._head_flops) * work.batch * r.per_flop
        return (
            _either(linear, self._weights * r.per_weight_byte)
            + self._kv * work.context_tokens * r.per_kv_byte
            + self._per_token * work.batch
            + self._fixed
        )

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """Seconds for one mixed pass: one reading of the weights, the sum of everything else."""
        known = self._latest
        if known is not None and known[0] is prefill and known[1] is decode and known[2] == units:
            return known[3]
        p = self.parts(prefill, decode, units)
        seconds = _either(p.linear, p.weights) + p.attention + p.kv + p.link + self._fixed
        self._latest = prefill, decode, units, seconds
        return seconds

    def nano_batched(self, prefill: PrefillShape, decode: DecodeShape, units: int, passes: int) -> float:
        """Seconds for one mixed pass split into `passes` nano-batches whose compute, memory and link work overlap.

        Weights are read and kernels launched once per nano-batch; what overlaps is bound by the longest, rounded
        off where bounds meet.
        """
        p = self.parts(prefill, decode, units)
        memory = passes * p.weights + p.kv
        return _either(_either(p.linear + p.attention, memory), p.link) + passes * self._fixed

    def parts(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> Parts:
        """What a mixed pass is made of."""
        r = self._by_units.get(units) or self._rates(units)
        tokens = prefill.new_tokens + decode.batch
        linear = self._body_flops * tokens + self._head_flops * (prefill.requests + decode.batch)
        return Parts(
            linear=linear * r.per_flop,
            weights=self._weights * r.per_weight_byte,
            attention=self._prefill_attention(prefill, r),
            kv=self._kv * decode.context_tokens * r.per_kv_byte,
            link=self._per_token * tokens,
        )

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """Worst factors (prefill, decode): the device's, until the guard has seen enough in a cell."""
        return self.guard.worst(prefill, decode, partition)

    def observe(self, observation: Observation) -> None:
        """Refine the contention guard from work that ran beside the other lane."""
        refine(self.guard, self, observation, self.model.num_layers)

    def _prefill_attention(self, work: PrefillShape, r: _Rates) -> float:
        """Half of the new-new pairs (causal) and all new-reused ones, or reading the reused KV if that is longer."""
        pairs = 0.5 * work.new_squared + work.new_times_reused
        return max(
            self._pair_flops * pairs * r.per_attention_flop, self._kv * work.reused_tokens * r.per_kv_byte
        )

    def _rates(self, units: int) -> _Rates:
        if units <= 0:
            raise ValueError(f"a lane without units has no cost (asked for {units} units)")
        d = self.device
        share = min(1.0, units / d.units)
        flops = d.count * d.tflops * 1e12 * share
        bandwidth = d.count * d.bandwidth_gb_s * 1e9
        drawn = 1 / _either(
            1.0, d.bandwidth_saturation / share
        )  # share of the bandwidth these units can draw
        rates = _Rates(
            per_flop=1 / (flops * d.matmul_efficiency),
            per_attention_flop=1 / (flops * d.attention_efficiency),
            per_weight_byte=1 / (bandwidth * d.bandwidth_efficiency * drawn),
            per_kv_byte=1 / (bandwidth * min(d.kv_efficiency * share, d.bandwidth_efficiency)),
        )
        self._by_units[units] = rates
        return rates


def _either(a: float, b: float) -> float:
    """The larger of two bounds, rounded off where they meet (4-norm): neither overlaps perfectly."""
    a, b = a * a, b * b
    return sqrt(sqrt(a * a + b * b))
