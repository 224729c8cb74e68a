"""The paper's gang scheduling (arXiv 2504.14489, section "gang scheduling"): spatial sharing only.

1. Both phases pending: decode goes first, beside it `ceil(T_decode * layers / T_prefill)` prefill layers.
2. When the decode step ends: choose the split again, repeat. A new split waits until both lanes are idle, so a lane
   that finishes first either goes on under the split in force or waits for the other: the bubble.
3. Decode drained: the rest of the prefill takes the whole device in one block. Nothing to prefill: decode takes it.
4. At a layer boundary a short urgent prefill may preempt a long one that can afford it; never a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, inf

from drift_scheduler.dispatch.exclusive import Alternate, exclusive_decode
from drift_scheduler.dispatch.prompts import new_batch, next_block, whole_prompts
from drift_scheduler.domain import (
    DecodeStep,
    Gang,
    Partition,
    PrefillBatch,
    PrefillBlock,
    PrefillChunk,
    PrefillShape,
    Sharing,
)
from drift_scheduler.errors import positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View


class GangPolicy:
    """`max_batch_tokens`: most uncomputed tokens of one prefill batch. `urgent_scan`: queued requests looked at for an
    urgent one at each layer boundary; 0 turns preemption off. `slice_layers`: false launches every prefill whole, for
    showing what slicing is worth."""

    ahead = True

    def __init__(
        self, max_batch_tokens: int = 8192, urgent_scan: int = 16, slice_layers: bool = True
    ) -> None:
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)
        self._scan = positive("urgent_scan", urgent_scan + 1) - 1
        self._slice = slice_layers
        self._undivided = Alternate(max_batch_tokens)  # for a device too small to split

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """What the idle lanes do next."""
        gang = self._choose(view, costs, partitions)
        if self._slice or gang is None or gang.prefill is None:
            return gang
        return replace(gang, prefill=replace(gang.prefill, layer_stop=view.device.num_layers))

    def _choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        if not view.device.splits():
            return self._undivided.choose(view, costs, partitions)
        if view.prefill_lane.busy:
            return beside_prefill(view, costs, partitions)
        if view.decode_lane.busy:
            return beside_decode(view, costs, partitions, self._next_batch)
        step = view.decode_step()
        batch = self._next_batch(view, costs)
        if batch is None:
            return exclusive_decode(view)
        layers_left = view.device.num_layers - batch.next_layer
        if step is None:
            return Gang(Sharing.EXCLUSIVE, view.device.all_prefill, prefill=next_block(batch, layers_left))
        split = partitions.split(view, batch.shape, step, costs)
        t_decode = worst_decode(costs, batch.shape, step, split)
        layers = layers_within(view, costs, batch, step, split, t_decode)
        return Gang(Sharing.SPATIAL, split, prefill=next_block(batch, layers), decode=step)

    def _next_batch(self, view: View, costs: CostModel) -> PrefillBatch | None:
        """The batch under way, an urgent prompt that may overtake it, or a new batch."""
        if view.prefills:
            return urgent_prompt(view, costs, self._scan) or view.prefills[-1]
        chunks = whole_prompts(view, self._max_tokens)
        return new_batch(chunks) if chunks else None


def beside_prefill(view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
    """The decode lane is idle: decode under the split in force, or wait for a better one."""
    step, block, current = view.decode_step(), view.prefill_lane.work, view.partition
    if step is None or view.sharing is not Sharing.SPATIAL or current is None:
        return None
    assert isinstance(block, PrefillBlock)
    shape = block.shape()
    wanted = partitions.split(view, shape, step, costs)
    if wanted != current:
        left = max(0.0, view.prefill_lane.expected_end - view.now)
        waiting = left + worst_decode(costs, shape, step, wanted)
        going_on = worst_decode(costs, shape, step, current)
        if waiting <= max(float(view.tbt_slack().min()), going_on):
            return None
    return Gang(Sharing.SPATIAL, current, decode=step)


def beside_decode(
    view: View,
    costs: CostModel,
    partitions: PartitionPolicy,
    next_batch: Callable[[View, CostModel], PrefillBatch | None],
) -> Gang | None:
    """The prefill lane is idle: further layers for as long as the decode step runs, under the same split."""
    step, current = view.decode_lane.work, view.partition
    if view.sharing is not Sharing.SPATIAL or current is None:
        return None
    assert isinstance(step, DecodeStep)
    batch = next_batch(view, costs)
    if batch is None or partitions.split(view, batch.shape, step, costs) != current:
        return None
    left = max(0.0, view.decode_lane.expected_end - view.now)
    layers = layers_within(view, costs, batch, step, current, left)
    return Gang(Sharing.SPATIAL, current, prefill=next_block(batch, layers))


def urgent_prompt(view: View, costs: CostModel, scan: int) -> PrefillBatch | None:
    """A shorter prompt that meets its TTFT target only by going first, if the long one still meets its own."""
    if len(view.prefills) != 1 or not scan or not view.num_waiting:
        return None
    long = view.prefills[0]
    units = view.device.total_units if view.partition is None else view.partition.prefill
    layers = view.device.num_layers
    long_left = costs.prefill(long.shape, units) * (layers - long.next_layer) / layers
    spare = long.deadline - view.now - long_left
    if spare <= 0:
        return None
    best: PrefillBatch | None = None
    best_deadline = inf
    for waiting in view.waiting(scan):
        could_wait = waiting.deadline >= view.now + long_left + spare
        if could_wait or waiting.deadline < view.now or waiting.pages > view.free_pages:
            continue
        shape = PrefillShape.of([(waiting.uncomputed, waiting.computed)])
        took = costs.prefill(shape, units)
        in_time = view.now + took <= waiting.deadline < view.now + long_left + took
        if took < min(long_left, spare) and in_time and waiting.deadline < best_deadline:
            chunk = PrefillChunk(waiting.request.id, waiting.computed, waiting.total)
            best, best_deadline = new_batch((chunk,)), waiting.deadline
    return best


def layers_within(
    view: View, costs: CostModel, batch: PrefillBatch, step: DecodeStep, split: Partition, seconds: float
) -> int:
    """Layers that fill `seconds` on the prefill lane, rounded up, at least one: `ceil(T * layers / T_prefill)`."""
    total = view.device.num_layers
    t_prefill = worst_prefill(costs, batch.shape, step, split)
    wanted = ceil(seconds * total / t_prefill) if t_prefill > 0 else total
    return max(1, min(wanted, total - batch.next_layer))


def worst_decode(costs: CostModel, prefill: PrefillShape, step: DecodeStep, split: Partition) -> float:
    """Worst-case seconds of a decode step beside that prefill: solo prediction x largest slowdown seen."""
    shape = step.shape()
    return costs.decode(shape, split.decode) * costs.slowdown(prefill, shape, split)[1]


def worst_prefill(costs: CostModel, prefill: PrefillShape, step: DecodeStep, split: Partition) -> float:
    """Worst-case seconds of all layers of a prefill beside that decode step."""
    return costs.prefill(prefill, split.prefill) * costs.slowdown(prefill, step.shape(), split)[0]
