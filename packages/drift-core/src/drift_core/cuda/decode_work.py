"""The attention work of a decode step, cut into equal shares in a fraction of the time that any batch takes.

`drift_kernels.triton_ops.plan` cuts any ragged batch and is the specification: what is built here has its
layout. A decode step has one query token a sequence, so kv heads are copies of each other: one head's line of
keys is cut for its share of the programs, and the cut repeated per head. A step later the same rows see one
key more each: `advance` lets each row's last item grow instead of cutting again. Knows nothing of torch or
devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ITEM_WORDS = 8
MERGE_WORDS = 8

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """`bounds`, `items` and `merges` as in `plan.WorkList`; `last`: each head and row's item with its last keys."""

    bounds: Words  # [programs + 1]
    items: Words  # [items, ITEM_WORDS]
    merges: Words  # [merges, MERGE_WORDS]
    last: Ints  # [kv_heads * rows]

    def advance(self) -> None:
        """Every row has one position more."""
        self.items[self.last, 4] += 1


def cut_decode(
    context: Ints, kv_heads: int, keys: int, least_keys: int, programs: int, window: int | None = None
) -> DecodeWork:
    """The work of rows that see `context` keys each, in tiles of `keys`, for at least `kv_heads` programs.

    `least_keys`: no share is cut finer. Shares differ by at most one tile; up to `kv_heads - 1` programs stay idle.
    """
    parts = programs // kv_heads
    assert parts, f"{programs} programs for {kv_heads} kv heads"
    first = np.zeros_like(context) if window is None else np.maximum(context - window, 0) // keys * keys
    length = -(-(context - first) // keys)
    ends = length.cumsum()
    total = int(ends[-1])
    busy = min(parts, -(-total * keys // least_keys))
    marks = np.minimum(np.arange(parts + 1), busy) * total // busy
    cuts = np.unique(np.concatenate([marks, ends]))  # marks hold 0 and the total
    begin, end = cuts[:-1], cuts[1:]
    row = ends.searchsorted(begin, side="right")
    tile = begin - (ends - length)[row]
    count = len(begin)
    one = np.zeros((count, ITEM_WORDS), np.int32)
    one[:, 0] = row
    one[:, 3] = start = first[row] + tile * keys
    one[:, 4] = np.minimum(context[row], start + (end - begin) * keys)
    pieces = np.flatnonzero(end - begin < length[row])
    one[:, 5] = -1
    one[pieces, 5] = np.arange(len(pieces))
    merge = _merges(row[pieces])
    heads = np.arange(kv_heads)
    items = np.concatenate([one] * kv_heads)
    items[:, 1] = heads.repeat(count)
    by_head = items.reshape(kv_heads, count, ITEM_WORDS)
    by_head[:, pieces, 5] += (heads * len(pieces)).astype(np.int32)[:, None]
    merges = np.concatenate([merge] * kv_heads)
    merges[:, 1] = heads.repeat(len(merge))
    merges.reshape(kv_heads, len(merge), MERGE_WORDS)[:, :, 3] += (heads * len(pieces)).astype(np.int32)[
        :, None
    ]
    bounds = np.full(programs + 1, kv_heads * count, np.int32)
    shares = cuts.searchsorted(marks[:-1])
    bounds[: parts * kv_heads] = (shares + (heads * count)[:, None]).ravel()
    last = cuts.searchsorted(ends) - 1
    return DecodeWork(bounds, items, merges, (last + (heads * count)[:, None]).ravel())


def _merges(rows: Ints) -> Words:
    """One per row in pieces: pieces of a row are neighbours, and so are their slots."""
    if not len(rows):
        return np.zeros((0, MERGE_WORDS), np.int32)
    starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    merge = np.zeros((len(starts), MERGE_WORDS), np.int32)
    merge[:, 0] = rows[starts]
    merge[:, 3] = starts
    merge[:, 4] = np.diff(np.append(starts, len(rows)))
    return merge
