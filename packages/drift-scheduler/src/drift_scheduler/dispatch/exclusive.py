"""Policies that give the whole device to one phase at a time: the baselines, and the scheduler's own fallback."""

from __future__ import annotations

from drift_scheduler.dispatch.prompts import new_batch, next_block, whole_prompts
from drift_scheduler.domain import Gang, Sharing
from drift_scheduler.errors import positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View


def exclusive_prefill(view: View, max_tokens: int) -> Gang | None:
    """The rest of the batch under way, or whole prompts, on the whole device in one block."""
    if view.prefills:
        batch = view.prefills[-1]
    else:
        chunks = whole_prompts(view, max_tokens)
        if not chunks:
            return None
        batch = new_batch(chunks)
    block = next_block(batch, view.device.num_layers - batch.next_layer)
    return Gang(Sharing.EXCLUSIVE, view.device.all_prefill, prefill=block)


def exclusive_decode(view: View) -> Gang | None:
    """One decode step on the whole device."""
    step = view.decode_step()
    return None if step is None else Gang(Sharing.EXCLUSIVE, view.device.all_decode, decode=step)


class Alternate:
    """Strict alternation: one prefill of whole prompts, one decode step, and so on; the fallback policy.

    `max_batch_tokens`: most uncomputed tokens of one prefill, one longer prompt excepted.
    """

    ahead = True

    def __init__(self, max_batch_tokens: int = 8192) -> None:
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """The phase whose turn it is, or the other when that one has nothing to do."""
        if view.prefill_lane.busy or view.decode_lane.busy:
            return None
        decode = exclusive_decode(view)
        prefilled = view.last_partition == view.device.all_prefill
        if decode is not None and prefilled:
            return decode
        return exclusive_prefill(view, self._max_tokens) or decode


class PrefillFirst:
    """Prefill whenever a prompt waits, decode otherwise: best TTFT, and the stalls that chunking set out to cure."""

    ahead = True

    def __init__(self, max_batch_tokens: int = 8192) -> None:
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """A prefill if there is one."""
        if view.prefill_lane.busy or view.decode_lane.busy:
            return None
        return exclusive_prefill(view, self._max_tokens) or exclusive_decode(view)


class DecodeFirst:
    """Decode until the running requests are done, prefill only on an idle device: best TBT, worst TTFT."""

    ahead = True

    def __init__(self, max_batch_tokens: int = 8192) -> None:
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """A decode step if there is one."""
        if view.prefill_lane.busy or view.decode_lane.busy:
            return None
        return exclusive_decode(view) or exclusive_prefill(view, self._max_tokens)
