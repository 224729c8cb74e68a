"""The split with the most prefill progress among those that keep decode within its TBT target.

Where more prefill units always help this is `tightest-decode`; it differs where contention makes a smaller prefill lane
the faster one, and where no split meets the target: then it takes the split that misses by least.
"""

from __future__ import annotations

from drift_scheduler.domain import DecodeStep, Partition, PrefillShape
from drift_scheduler.errors import OptionError
from drift_scheduler.protocols import CostModel
from drift_scheduler.view import View


class BestProgress:
    """`margin`: share of the TBT target that the estimate may use, in (0, 1]."""

    def __init__(self, margin: float = 1.0) -> None:
        if not 0 < margin <= 1:
            raise OptionError(f"option 'margin' is {margin!r}, need a number above 0 and at most 1")
        self._margin = margin

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """Least worst-case prefill time within the target; least worst-case decode time without."""
        target = view.tbt_target * self._margin
        shape = decode.shape()
        best: Partition | None = None
        best_key = (True, float("inf"))
        for partition in view.device.splits():
            slow_prefill, slow_decode = costs.slowdown(prefill, shape, partition)
            t_decode = costs.decode(shape, partition.decode) * slow_decode
            late = t_decode > target
            key = (late, t_decode if late else costs.prefill(prefill, partition.prefill) * slow_prefill)
            if best is None or key < best_key:
                best, best_key = partition, key
        assert best is not None, "a device without splits"
        return best
