"""What a simulated device does to two lanes that run at once; the scheduler has to guess it or learn it.

Side by side on a partition: compute is divided, the memory system is not. Each lane slows down by the model's worst
factor times the load on it, `s = 1 + (worst - 1) * load`, where load is the share of the bandwidth that both draw
together when each runs alone on its units, at most 1. The worst case of a device file or a table (at most 20% on
A100, 30% on H100, arXiv 2504.14489) is then what a saturated memory system does, and a mean run stays below it.

Two streams without a partition: the hardware gives each lane units in proportion to the thread blocks it offers. A
prefill's matmuls offer enough for every unit, a decode step for the share that draws all of the bandwidth; so they
get 1 and `bandwidth_saturation` parts. A decode kernel moreover starts only when tiles of a prefill retire, which
`STREAM_WAIT` accounts for. Nothing keeps decode to a target there, which is the point of comparing.
"""

from __future__ import annotations

from drift_scheduler.cost.hardware import DeviceSpec, ModelSpec
from drift_scheduler.domain import DecodeShape, Observation, Partition, PrefillShape
from drift_scheduler.protocols import CostModel

ACTIVATION_PASSES = 20
"""Times a layer reads or writes a token's hidden state, its wider intermediates counted in proportion."""

PASS_TOKENS = 8192
"""Prefill tokens per reading of the weights."""

STREAM_WAIT = 1.3
"""Factor on decode beside a prefill on another stream: its kernels wait for the tail of a wave of tiles. An estimate:
a 128x128 tile of a 4096-deep product takes about 45 us on an A100's SM, a decode kernel of a layer about 70."""


class Contended:
    """Implements `CostModel` around another (`inner`), whose `slowdown` is taken as the worst case."""

    def __init__(self, inner: CostModel, device: DeviceSpec, model: ModelSpec) -> None:
        self.inner = inner
        self._units = device.units
        self._bandwidth = device.count * device.bandwidth_gb_s * 1e9 * device.bandwidth_efficiency
        self._weights = (model.body_weights + model.head_weights) * model.bytes_per_weight
        self._kv = model.kv_bytes
        self._activations = 2.0 * ACTIVATION_PASSES * model.num_layers * model.hidden
        decode = max(1, round(device.units * device.bandwidth_saturation / (1 + device.bandwidth_saturation)))
        self._stream_units = Partition(max(1, device.units - decode), decode)

    def prefill(self, work: PrefillShape, units: int) -> float:
        """The inner model's."""
        return self.inner.prefill(work, units)

    def decode(self, work: DecodeShape, units: int) -> float:
        """The inner model's."""
        return self.inner.decode(work, units)

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """The inner model's."""
        return self.inner.fused(prefill, decode, units)

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """What this pair of shapes does to each other, factors (prefill, decode)."""
        if sum(partition) > self._units:
            return self._streams(prefill, decode)
        return self._beside(prefill, decode, partition)

    def observe(self, observation: Observation) -> None:
        """A device does not learn."""

    def load(self, prefill: PrefillShape, decode: DecodeShape, partition: Partition) -> float:
        """Share of the memory bandwidth that both lanes draw together, each at its pace alone; at most 1."""
        passes = -(-prefill.new_tokens // PASS_TOKENS)
        of_prefill = (
            passes * self._weights
            + self._kv * (prefill.new_tokens + prefill.reused_tokens)
            + self._activations * prefill.new_tokens
        ) / self.inner.prefill(prefill, partition.prefill)
        of_decode = (self._weights + self._kv * decode.context_tokens) / self.inner.decode(
            decode, partition.decode
        )
        return min(1.0, (of_prefill + of_decode) / self._bandwidth)

    def _beside(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        worst_prefill, worst_decode = self.inner.slowdown(prefill, decode, partition)
        load = self.load(prefill, decode, partition)
        return 1 + (worst_prefill - 1) * load, 1 + (worst_decode - 1) * load

    def _streams(self, prefill: PrefillShape, decode: DecodeShape) -> tuple[float, float]:
        shares = self._stream_units
        slow_prefill, slow_decode = self._beside(prefill, decode, shares)
        less_prefill = self.inner.prefill(prefill, shares.prefill) / self.inner.prefill(prefill, self._units)
        less_decode = self.inner.decode(decode, shares.decode) / self.inner.decode(decode, self._units)
        return max(1.0, less_prefill * slow_prefill), max(1.0, less_decode * slow_decode * STREAM_WAIT)
