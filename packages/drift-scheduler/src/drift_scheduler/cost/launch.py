"""How a device launches work, on top of any cost model: graph buckets, the host's pace, blocks and switches.

Applied to what a simulated device does and to what the scheduler believes alike, so that neither is surprised by the
other. Knows how long nothing takes but launching; the model it wraps knows the rest.
"""

from __future__ import annotations

import numpy as np

from drift_scheduler.cost.hardware import DeviceSpec
from drift_scheduler.domain import (
    DecodeShape,
    FloatArray,
    IntArray,
    Lane,
    Observation,
    Partition,
    PrefillShape,
    Sharing,
)
from drift_scheduler.protocols import CostModel, PrefillEach


class Launched:
    """Implements `CostModel` around another (`inner`).

    Decode runs as captured graphs: a batch is padded to the next captured size (1, 2, 4 and multiples of `graph_step`),
    the padding reading no KV: the staircase. Prefill and fused passes are launched kernel by kernel, so no layer takes
    less than the host's `DeviceSpec.launch_seconds`. `block_seconds` and `switch_seconds` are what the scheduler adds
    per prefill block and per change of partition.
    """

    def __init__(self, inner: CostModel, device: DeviceSpec, num_layers: int) -> None:
        self.inner = inner
        self.block_seconds = device.block_us * 1e-6
        self.switch_seconds = device.switch_us * 1e-6
        self._step = device.graph_step
        self._floor = device.launch_seconds * num_layers
        # A decode step is priced by the policy, the scheduler and what learns from it: the same object each time.
        self._priced: DecodeShape | None = None
        self._price: dict[int, float] = {}
        self._each: PrefillEach | None = getattr(inner, "prefill_each", None)
        if self._each is not None:
            self.prefill_each = self._prefill_each  # not offered where the inner model does not

    def prefill(self, work: PrefillShape, units: int) -> float:
        """Seconds for all layers, at least the time to launch them."""
        return max(self.inner.prefill(work, units), self._floor)

    def _prefill_each(self, new: IntArray, reused: IntArray, units: int) -> FloatArray:
        """`prefill` of each of these requests alone."""
        assert self._each is not None
        seconds = self._each(new, reused, units)
        np.maximum(seconds, self._floor, out=seconds)
        return seconds

    def decode(self, work: DecodeShape, units: int) -> float:
        """Seconds for the graph that holds the batch."""
        if work is not self._priced:
            self._priced, self._price = work, {}
        seconds = self._price.get(units)
        if seconds is None:
            size = bucket(work.batch, self._step)
            padded = work if size == work.batch else DecodeShape(size, work.context_tokens)
            seconds = self._price[units] = self.inner.decode(padded, units)
        return seconds

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """Seconds for one mixed pass, at least the time to launch it."""
        return max(self.inner.fused(prefill, decode, units), self._floor)

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """The inner model's."""
        return self.inner.slowdown(prefill, decode, partition)

    def observe(self, observation: Observation) -> None:
        """Hand on what was measured, less what launching explains, so that the inner model learns only the rest.

        Beside the other lane a block's launch stays in: nobody adds it there to what the inner model's slowdown says.
        """
        seen = observation
        share = self._inner_share(seen)
        block = seen.sharing is Sharing.FUSED or (
            seen.lane is Lane.PREFILL and seen.sharing in (Sharing.EXCLUSIVE, Sharing.TEMPORAL)
        )
        launch = self.block_seconds if block else 0.0
        self._priced = None
        if share == 1.0 and not launch:
            self.inner.observe(seen)
            return
        measured = max(seen.measured - launch, 0.0) * share
        self.inner.observe(seen.with_measured(measured))

    def _inner_share(self, seen: Observation) -> float:
        """The inner model's time over ours for the observed work."""
        spatial = seen.sharing is Sharing.SPATIAL
        if seen.sharing is Sharing.FUSED:
            if seen.prefill is None or seen.decode is None:
                return 1.0
            return self._under_floor(self.inner.fused(seen.prefill, seen.decode, max(seen.partition)))
        if seen.lane is Lane.DECODE and seen.decode is not None:
            size = bucket(seen.decode.batch, self._step)
            if size == seen.decode.batch:
                return 1.0
            units = seen.partition.decode if spatial else max(seen.partition)
            ours = self.decode(seen.decode, units)
            return self.inner.decode(seen.decode, units) / ours if ours > 0 else 1.0
        if seen.lane is Lane.PREFILL and seen.prefill is not None:
            units = seen.partition.prefill if spatial else max(seen.partition)
            return self._under_floor(self.inner.prefill(seen.prefill, units))
        return 1.0

    def _under_floor(self, inner: float) -> float:
        """The share of a pass's time that is not waiting for the host."""
        return inner / self._floor if inner < self._floor else 1.0


def bucket(batch: int, step: int) -> int:
    """The captured size that holds `batch`: 1, 2, 4, or a multiple of `step`; with `step` 0 nothing is captured."""
    if not step or batch <= 2:
        return batch
    if batch <= 4 < step:
        return 4
    return -(-batch // step) * step


def innermost(costs: CostModel) -> CostModel:
    """The model inside whatever wraps it."""
    while (inner := getattr(costs, "inner", None)) is not None:
        costs = inner
    return costs
