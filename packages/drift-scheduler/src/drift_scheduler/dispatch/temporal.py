"""Temporal slicing: decode on the whole device, then as many prefill layers as the TBT target leaves time for."""

from __future__ import annotations

from drift_scheduler.dispatch.exclusive import exclusive_decode
from drift_scheduler.dispatch.prompts import new_batch, next_block, whole_prompts
from drift_scheduler.domain import Gang, PrefillBatch, Sharing
from drift_scheduler.errors import positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View


class Temporal:
    """`max_batch_tokens`: most uncomputed tokens of one prefill batch. At least one layer runs per step, so a target
    that a decode step and one layer cannot meet is missed rather than prefill starved."""

    ahead = True

    def __init__(self, max_batch_tokens: int = 8192) -> None:
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """A decode step and the layers that fit behind it, or the one phase that has work."""
        if view.prefill_lane.busy or view.decode_lane.busy:
            return None
        batch = view.prefills[-1] if view.prefills else None
        if batch is None:
            chunks = whole_prompts(view, self._max_tokens)
            if not chunks:
                return exclusive_decode(view)
            batch = new_batch(chunks)
        step = view.decode_step()
        left = view.device.num_layers - batch.next_layer
        if step is None:
            return Gang(Sharing.EXCLUSIVE, view.device.all_prefill, prefill=next_block(batch, left))
        t_decode = costs.decode(step.shape(), view.device.total_units)
        layers = max(1, min(left, layers_in(view, costs, batch, view.tbt_target - t_decode)))
        return Gang(Sharing.TEMPORAL, view.device.all_decode, prefill=next_block(batch, layers), decode=step)


def layers_in(view: View, costs: CostModel, batch: PrefillBatch, seconds: float) -> int:
    """Whole layers of a batch that the whole device runs in `seconds`; 0 when not one fits."""
    per_layer = costs.prefill(batch.shape, view.device.total_units) / view.device.num_layers
    if seconds <= 0 or per_layer <= 0:
        return 0 if seconds <= 0 else view.device.num_layers
    return int(min(seconds / per_layer, view.device.num_layers))
