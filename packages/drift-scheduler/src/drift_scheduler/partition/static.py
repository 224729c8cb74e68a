"""One split, fixed at start-up."""

from __future__ import annotations

from drift_scheduler.domain import DecodeStep, Partition, PrefillShape
from drift_scheduler.errors import OptionError, positive
from drift_scheduler.protocols import CostModel
from drift_scheduler.view import View


class Static:
    """`decode_units`: units of the decode lane; the menu entry with that many is always used."""

    def __init__(self, decode_units: int) -> None:
        self._units = positive("decode_units", decode_units)

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """The configured split. Raises OptionError listing the menu when the device has none such."""
        for partition in view.device.splits():
            if partition.decode == self._units:
                return partition
        menu = ", ".join(str(p.decode) for p in view.device.splits())
        raise OptionError(f"no split gives decode {self._units} units; the menu offers {menu or 'none'}")
