"""Earliest deadline first (Liu and Layland, JACM 1973), with a request's next token as the job.

A waiting prompt is due at arrival plus TTFT target, a decoding request at its last token plus TBT target. The whole
device goes to the phase whose earliest deadline comes first, and prompts run in order of their deadlines. A job that
runs is not interrupted, which is where EDF loses to policies that slice or share: compare it with `drift`.
"""

from __future__ import annotations

from collections.abc import Sequence

from drift_scheduler.domain import Gang, PrefillBlock, PrefillChunk, Sharing, Waiting
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View


class EarliestDeadlineFirst:
    """`max_batch_tokens`: uncomputed tokens of one prefill batch; one longer prompt runs alone. `scan`: waiting
    requests that are looked at."""

    def __init__(self, max_batch_tokens: int = 4096, scan: int = 64) -> None:
        if max_batch_tokens < 1 or scan < 1:
            raise ValueError("options 'max_batch_tokens' and 'scan' need to be at least 1")
        self._max_tokens = max_batch_tokens
        self._scan = scan

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """The phase that is due first, on the whole device."""
        if view.prefill_lane.busy or view.decode_lane.busy:
            return None
        step = view.decode_step()
        waiting = sorted(view.waiting(self._scan), key=lambda w: w.deadline)
        decode_due = view.now + float(view.tbt_slack().min()) if step is not None else float("inf")
        if waiting and waiting[0].deadline <= decode_due:
            return self._prefill(view, waiting)
        if step is None:
            return None
        return Gang(Sharing.EXCLUSIVE, view.device.all_decode, decode=step)

    def _prefill(self, view: View, waiting: Sequence[Waiting]) -> Gang:
        """Prompts by deadline, until the batch or the free pages are full; the first is taken whatever its length."""
        chunks: list[PrefillChunk] = []
        tokens, pages = 0, view.free_pages
        for w in waiting:
            if chunks and (tokens + w.uncomputed > self._max_tokens or w.pages > pages):
                break
            chunks.append(PrefillChunk(w.request.id, w.computed, w.total))
            tokens += w.uncomputed
            pages -= w.pages
        block = PrefillBlock(-1, tuple(chunks), 0, view.device.num_layers)
        return Gang(Sharing.EXCLUSIVE, view.device.all_prefill, prefill=block)
