"""Picking prompts from the queue: what every policy does before it decides how to run them."""

from __future__ import annotations

from drift_scheduler.domain import PrefillBatch, PrefillBlock, PrefillChunk
from drift_scheduler.view import View


def whole_prompts(view: View, max_tokens: int) -> tuple[PrefillChunk, ...]:
    """Whole prompts in queue order, up to `max_tokens` uncomputed tokens in all and the pages that are free.

    The first prompt is taken whatever its length, so that none starves.
    """
    chunks: list[PrefillChunk] = []
    tokens = 0
    pages = view.free_pages
    while True:
        queue = view.waiting(len(chunks) + 1)
        if len(queue) == len(chunks):
            return tuple(chunks)
        head = queue[-1]
        if chunks and (tokens + head.uncomputed > max_tokens or head.pages > pages):
            return tuple(chunks)
        tokens += head.uncomputed
        pages -= head.pages
        chunks.append(PrefillChunk(head.request.id, head.computed, head.total))


def prompt_pieces(view: View, budget: int) -> tuple[PrefillChunk, ...]:
    """Prompts in queue order cut so that exactly `budget` tokens are computed, or fewer when there are no more."""
    chunks: list[PrefillChunk] = []
    pages = view.free_pages
    while budget > 0:
        queue = view.waiting(len(chunks) + 1)
        if len(queue) == len(chunks):
            break
        head = queue[-1]
        if chunks and head.pages > pages:
            break
        stop = min(head.total, head.computed + budget)
        chunks.append(PrefillChunk(head.request.id, head.computed, stop, stop == head.total))
        budget -= stop - head.computed
        pages -= head.pages
    return tuple(chunks)


def next_block(batch: PrefillBatch, layers: int) -> PrefillBlock:
    """The next `layers` layers of a batch under way."""
    return PrefillBlock(batch.batch_id, batch.chunks, batch.next_layer, batch.next_layer + layers)


def new_batch(chunks: tuple[PrefillChunk, ...]) -> PrefillBatch:
    """A proposal: a batch that the scheduler will number when it is launched."""
    shape = PrefillBlock(-1, chunks, 0, 1).shape()
    return PrefillBatch(-1, chunks, 0, float("inf"), shape)
