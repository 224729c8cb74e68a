"""Cuts one step's attention into equal shares for a fixed number of programs; numpy on the host, no torch.

A *span* is one tile of query rows of one kv head of one sequence with all keys those rows see. Spans are laid end to
end, in tiles of keys, and the line is cut into as many equal parts as there are programs. A part is a
run of *items*; an item that is a whole span writes the output itself, one that is a piece of a span writes a partial
result to a slot of scratch, and a *merge* adds up the slots of a span. A cut makes at most two partial items, so slots
are bounded by programs, not by the batch, and the kernel that reads this list has a grid that never changes: one
captured graph serves all lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from drift_kernels.triton_ops.tiles import Tile

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

ITEM_WORDS = 8
"""int32 fields of an item: sequence, kv head, first row, first key, key after the last, slot or -1, two unused."""
MERGE_WORDS = 8
"""int32 fields of a merge: sequence, kv head, first row, first slot, slots, three unused."""


@dataclass(frozen=True, slots=True)
class WorkList:
    """What the programs of one launch do. Program p does items `bounds[p]:bounds[p + 1]`."""

    bounds: Words  # [programs + 1]
    items: Words  # [number of items, ITEM_WORDS]
    merges: Words  # [number of merges, MERGE_WORDS]


def most_items(spans: int, programs: int) -> int:
    """Items that this many spans can make: every cut adds at most one."""
    return spans + programs


def most_slots(programs: int) -> int:
    """Partial results there can be: the first and the last item of each program."""
    return 2 * programs


def most_spans(sequences: int, tokens: int, group: int, kv_heads: int, rows: int) -> int:
    """Spans that `sequences` with `tokens` query tokens in all can make in tiles of `rows`."""
    return kv_heads * (-(-tokens * group // rows) + sequences)


def build_work_list(
    sequences: Ints,
    query_lens: Ints,
    context_lens: Ints,
    group: int,
    kv_heads: int,
    tile: Tile,
    programs: int,
    window: int | None = None,
) -> WorkList:
    """The work of `sequences` (indices into the two arrays of lengths) shared among `programs`.

    group: query heads per kv head. window: see AttentionInputs. Shares differ by at most one tile of keys.
    """
    query, context = query_lens[sequences], context_lens[sequences]
    tiles_of = -(-query * group // tile.rows)
    owner = np.repeat(np.arange(len(sequences)), tiles_of)
    row = (np.arange(len(owner)) - np.repeat(tiles_of.cumsum() - tiles_of, tiles_of)) * tile.rows
    past = (context - query)[owner]
    last_token = np.minimum(query[owner] - 1, (row + tile.rows - 1) // group)
    stop = past + last_token + 1
    start = np.zeros_like(stop)
    if window is not None:
        earliest = np.maximum(0, past + row // group - window + 1)
        start = (
            earliest // tile.keys * tile.keys
        )  # aligned, so that a tile never straddles two pages' alignment
    spans = np.stack([sequences[owner], row, start, stop], axis=1)
    return _share(np.repeat(spans, kv_heads, axis=0), kv_heads, tile, programs)


def _share(spans: Ints, kv_heads: int, tile: Tile, programs: int) -> WorkList:
    """Cut spans [n, (sequence, row, start, stop)], kv heads innermost, into equal runs."""
    length = -(-(spans[:, 3] - spans[:, 2]) // tile.keys)
    ends = length.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    busy = min(programs, -(-total * tile.keys // tile.least_keys))
    marks = np.minimum(np.arange(programs + 1), busy) * total // max(busy, 1)
    cuts = np.union1d(np.concatenate([[0], ends]), marks)  # in tiles; items lie between neighbours
    bounds = np.searchsorted(cuts, marks).astype(np.int32)
    begin, end = cuts[:-1], cuts[1:]
    span = np.searchsorted(ends, begin, side="right")
    base = (ends - length)[span]
    items = np.zeros((len(span), ITEM_WORDS), dtype=np.int32)
    items[:, 0] = spans[span, 0]
    items[:, 1] = span % kv_heads
    items[:, 2] = spans[span, 1]
    items[:, 3] = spans[span, 2] + (begin - base) * tile.keys
    items[:, 4] = np.minimum(spans[span, 3], spans[span, 2] + (end - base) * tile.keys)
    partial = end - begin < length[span]
    items[:, 5] = np.where(partial, partial.cumsum() - 1, -1)
    return WorkList(bounds, items, _merges(items[partial], span[partial]))


def _merges(partial: Words, span: Ints) -> Words:
    """One row per span in pieces; its pieces are neighbours, so its slots are too."""
    _, first, count = np.unique(span, return_index=True, return_counts=True)
    merges = np.zeros((len(first), MERGE_WORDS), dtype=np.int32)
    merges[:, :3] = partial[first, :3]
    merges[:, 3] = partial[first, 5]
    merges[:, 4] = count
    return merges
