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
    past = context - query
    if len(sequences) and tiles_of.max() > 1:
        owner = np.arange(len(sequences)).repeat(tiles_of)
        row = (np.arange(len(owner)) - (tiles_of.cumsum() - tiles_of)[owner]) * tile.rows
        sequences, query, past = sequences[owner], query[owner], past[owner]
    else:
        row = np.zeros_like(sequences)
    stop = past + np.minimum(query, (row + tile.rows - 1) // group + 1)
    if window is None:
        start = np.zeros_like(stop)
    else:  # down to a multiple of the tile, so that a tile never lies across two pages of its own size
        start = np.maximum(0, past + row // group - window + 1) // tile.keys * tile.keys
    return _share(_Spans(sequences, row, start, stop), kv_heads, tile, programs)


@dataclass(frozen=True, slots=True)
class _Spans:
    """Of one kv head each; all heads' spans follow each other, the head changing fastest."""

    sequence: Ints
    row: Ints
    start: Ints
    stop: Ints


def _share(spans: _Spans, kv_heads: int, tile: Tile, programs: int) -> WorkList:
    """Cut the line of spans into equal runs. Positions on the line are in tiles of keys."""
    length = (-(-(spans.stop - spans.start) // tile.keys)).repeat(kv_heads)
    ends = length.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    busy = min(programs, -(-total * tile.keys // tile.least_keys))
    marks = np.minimum(np.arange(programs + 1), busy) * total // max(busy, 1)
    cuts = np.concatenate((marks, ends))
    cuts.sort(kind="stable")
    distinct = cuts[1:] != cuts[:-1]
    begin, end = cuts[:-1][distinct], cuts[1:][distinct]  # an item lies between two neighbouring cuts
    line = ends.searchsorted(begin, side="right")
    span, tiles_inside = line // kv_heads, length[line]
    first_key = spans.start[span] + (begin - ends[line] + tiles_inside) * tile.keys
    partial = end - begin < tiles_inside
    items = np.zeros((len(span), ITEM_WORDS), dtype=np.int32)
    items[:, 0] = spans.sequence[span]
    items[:, 1] = line - span * kv_heads
    items[:, 2] = spans.row[span]
    items[:, 3] = first_key
    items[:, 4] = np.minimum(spans.stop[span], first_key + (end - begin) * tile.keys)
    items[:, 5] = np.where(partial, partial.cumsum() - 1, -1)
    bounds = begin.searchsorted(marks).astype(np.int32)
    pieces = partial.nonzero()[0]
    return WorkList(bounds, items, _merges(items[pieces], line[pieces]))


def _merges(pieces: Words, line: Ints) -> Words:
    """One row per span in pieces. They are neighbours, and the n-th piece of all has slot n."""
    first = np.diff(line, prepend=-1).nonzero()[0]
    merges = np.zeros((len(first), MERGE_WORDS), dtype=np.int32)
    merges[:, :3] = pieces[first, :3]
    merges[:, 3] = first
    merges[:, 4] = np.diff(first, append=len(line))
    return merges
