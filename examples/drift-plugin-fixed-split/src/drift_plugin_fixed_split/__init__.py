"""The partition policy `fixed-split`: decode gets the menu's nearest split to a fixed share of the device.

Takes no account of costs or targets, and so shows what choosing the split anew for each gang is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from drift_scheduler.domain import DecodeStep, Partition, PrefillShape
from drift_scheduler.plugins import hookimpl
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View

__all__ = ["FixedSplit", "drift_partition_policies"]


class FixedSplit:
    """`decode_share`: share of the device's units for decode, above 0 and below 1."""

    def __init__(self, decode_share: float = 0.25) -> None:
        if not 0 < decode_share < 1:
            raise ValueError(f"option 'decode_share' is {decode_share!r}, need a number above 0 and below 1")
        self._share = decode_share

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """The menu entry nearest to the share; of two equally near the one with fewer decode units."""
        wanted = self._share * view.device.total_units
        return min(view.device.splits(), key=lambda split: abs(split.decode - wanted))


@hookimpl
def drift_partition_policies() -> Mapping[str, Callable[..., PartitionPolicy]]:
    """Name -> factory; `fixed-split:decode_share=0.5` on the command line calls it with that option."""
    return {"fixed-split": FixedSplit}
