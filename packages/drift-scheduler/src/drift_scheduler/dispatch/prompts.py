"""Picking prompts from the queue: what every policy does before it decides how to run them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from drift_scheduler.domain import PrefillBatch, PrefillBlock, PrefillChunk, PrefillShape, Waiting
from drift_scheduler.protocols import CostModel
from drift_scheduler.view import View

MANY = 6
"""Prompts from which pricing them all at once is faster than one by one."""


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
    start = batch.next_layer
    return PrefillBlock.shaped(batch.batch_id, batch.chunks, start, start + layers, batch.shape)


def new_batch(chunks: tuple[PrefillChunk, ...]) -> PrefillBatch:
    """A proposal: a batch that the scheduler will number when it is launched."""
    shape = PrefillShape.of([(c.stop - c.start, c.start) for c in chunks])
    return PrefillBatch(-1, chunks, 0, float("inf"), shape)


def seconds_alone(costs: CostModel, prompts: Sequence[Waiting], units: int) -> list[float]:
    """What the cost model expects of each prompt alone on `units` units; all at once where it can and that pays."""
    each = getattr(costs, "prefill_each", None)
    if each is None or len(prompts) < MANY:
        return [
            costs.prefill(PrefillShape(1, n, r, n * n, n * r), units)
            for n, r in [(waiting.total - waiting.computed, waiting.computed) for waiting in prompts]
        ]
    reused = np.array([waiting.computed for waiting in prompts], np.int64)
    new = np.array([waiting.total for waiting in prompts], np.int64) - reused
    seconds: list[float] = each(new, reused, units).tolist()
    return seconds


class Fronts:
    """Shapes of the first tokens of a batch, for asking about many counts of them."""

    def __init__(self, batch: PrefillBatch) -> None:
        self._chunks = batch.chunks
        self._shape = batch.shape
        self._ends: list[int] = []  # tokens up to the end of each chunk
        self._shapes: list[PrefillShape] = [
            PrefillShape(0, 0, 0, 0, 0)
        ]  # of the chunks before each, and of all
        for chunk in batch.chunks:
            self._shapes.append(_longer(self._shapes[-1], chunk.stop - chunk.start, chunk.start))
            self._ends.append(self._shapes[-1].new_tokens)

    def shape(self, tokens: int) -> PrefillShape:
        """Of the first `tokens` tokens, all where there are fewer."""
        if tokens >= self._shape.new_tokens:
            return self._shape
        whole = bisect_right(self._ends, tokens)
        shape = self._shapes[whole]
        rest = tokens - shape.new_tokens
        return _longer(shape, rest, self._chunks[whole].start) if rest else shape

    def chunks(self, tokens: int) -> tuple[PrefillChunk, ...]:
        """The chunks that make up the first `tokens` tokens, the last one cut where it must be."""
        if tokens >= self._shape.new_tokens:
            return self._chunks
        whole = bisect_right(self._ends, tokens)
        chunks, rest = self._chunks[:whole], tokens - self._shapes[whole].new_tokens
        if not rest:
            return chunks
        cut = self._chunks[whole]
        return (*chunks, PrefillChunk(cut.request_id, cut.start, cut.start + rest, False))


def _longer(shape: PrefillShape, new: int, reused: int) -> PrefillShape:
    """The shape with one more request."""
    return PrefillShape(
        shape.requests + 1,
        shape.new_tokens + new,
        shape.reused_tokens + reused,
        shape.new_squared + new * new,
        shape.new_times_reused + new * reused,
    )
