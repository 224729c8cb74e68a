"""Chunked prefill, stall-free (Sarathi-Serve, arXiv 2403.02310): every step decodes, and fills up with a prompt chunk.

One fused forward pass of at most `token_budget` tokens: the decoding requests' tokens first, prompt chunks in the rest.
"""

from __future__ import annotations

from drift_scheduler.dispatch.exclusive import exclusive_decode, exclusive_prefill
from drift_scheduler.dispatch.prompts import new_batch, next_block, prompt_pieces
from drift_scheduler.domain import Gang, Sharing
from drift_scheduler.errors import positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View


class ChunkedPrefill:
    """`token_budget`: tokens of one fused step. `max_batch_tokens`: of a prefill while nothing decodes.

    With nothing to decode there is nothing to stall, so prompts run whole.
    """

    ahead = True

    def __init__(self, token_budget: int = 512, max_batch_tokens: int = 8192) -> None:
        self._budget = positive("token_budget", token_budget)
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """A fused step, or the one phase that has work."""
        if view.prefill_lane.busy or view.decode_lane.busy:
            return None
        step = view.decode_step()
        if step is None or view.prefills:  # a batch under way was left by another policy
            return exclusive_prefill(view, self._max_tokens)
        chunks = prompt_pieces(view, self._budget - len(step.request_ids))
        if not chunks:
            return exclusive_decode(view)
        block = next_block(new_batch(chunks), view.device.num_layers)
        return Gang(Sharing.FUSED, view.device.all_decode, prefill=block, decode=step)
