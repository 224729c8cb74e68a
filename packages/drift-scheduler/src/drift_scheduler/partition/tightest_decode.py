"""The paper's rule: decode gets the fewest units whose worst case meets the TBT target, prefill the rest."""

from __future__ import annotations

from drift_scheduler.domain import DecodeStep, Partition, PrefillShape
from drift_scheduler.errors import OptionError
from drift_scheduler.protocols import CostModel
from drift_scheduler.view import View


class TightestDecode:
    """`margin`: share of the TBT target that the estimate may use, in (0, 1]."""

    def __init__(self, margin: float = 1.0) -> None:
        if not 0 < margin <= 1:
            raise OptionError(f"option 'margin' is {margin!r}, need a number above 0 and at most 1")
        self._margin = margin

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """The first split, fewest decode units first, whose estimate fits; the one with most of them if none does."""
        target = view.tbt_target * self._margin
        shape = decode.shape()
        splits = view.device.splits()
        for partition in splits:
            if costs.decode(shape, partition.decode) * costs.slowdown(prefill, shape, partition)[1] <= target:
                return partition
        return splits[-1]
