"""Two streams and no partition: each phase launches what it has as soon as it can, and the hardware shares the units.

The baseline that asks what dividing the device is good for. Prompts run whole, since nothing would be gained by
slicing them: whoever's thread blocks are resident keeps the units. What that does to decode is the device's affair
(in simulation `drift_scheduler.cost.contention`); this policy knows no targets and keeps none.
"""

from __future__ import annotations

from drift_scheduler.dispatch.prompts import new_batch, next_block, whole_prompts
from drift_scheduler.domain import Device, Gang, Partition, PrefillBlock, Sharing
from drift_scheduler.errors import positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View


class Streams:
    """`max_batch_tokens`: most uncomputed tokens of one prefill, one longer prompt excepted."""

    ahead = True

    def __init__(self, max_batch_tokens: int = 8192) -> None:
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)

    def refuses(self, device: Device) -> str | None:
        """A device that only runs what is divided."""
        if Sharing.STREAMS in device.sharings:
            return None
        runs = ", ".join(sorted(sharing.value for sharing in device.sharings))
        return f"dispatch policy 'streams' needs a device that runs unpartitioned streams; {device.name} runs {runs}"

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """Whatever an idle lane has work for."""
        return both_lanes(view, Sharing.STREAMS, view.device.unpartitioned, self._max_tokens)


def both_lanes(view: View, sharing: Sharing, partition: Partition, max_tokens: int) -> Gang | None:
    """Whole prompts for an idle prefill lane and a step for an idle decode lane, each on its own schedule."""
    block = None if view.prefill_lane.busy else whole_block(view, max_tokens)
    step = view.decode_step()
    if block is None and step is None:
        return None
    return Gang(sharing, partition, prefill=block, decode=step)


def whole_block(view: View, max_tokens: int) -> PrefillBlock | None:
    """All layers of whole prompts; before that, what another policy left part-way."""
    if view.prefills:
        batch = view.prefills[-1]
        return next_block(batch, view.device.num_layers - batch.next_layer)
    chunks = whole_prompts(view, max_tokens)
    return next_block(new_batch(chunks), view.device.num_layers) if chunks else None
