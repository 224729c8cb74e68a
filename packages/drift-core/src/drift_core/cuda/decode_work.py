"""The attention work of a decode step, cut into equal shares in a fraction of the time that any batch takes.

`drift_kernels.triton_ops.plan` cuts any ragged batch and is the specification: what is built here has its
layout. A decode step has one query token a sequence, so kv heads are copies of each other: one head's line of
keys is cut for its share of the programs, and the cut repeated per head. A step later the same rows see one
key more each: `advance` lets each row's last item grow instead of cutting again. Knows nothing of torch or
devices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from drift_kernels.native_library import NativeUnavailable, load_native

log = logging.getLogger("drift.executor")

Cut = Callable[..., "DecodeWork"]

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
    lent: tuple[Words, list[Words]] | None = None  # the memory of all four, and where it belongs

    def give_back(self) -> None:
        """Nobody looks at it any more: its memory may serve the next."""
        if self.lent is not None:
            block, shelf = self.lent
            shelf.append(block)

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


class NativeCut:
    """`cut_decode` in C: a tenth of the time. Raises NativeUnavailable where there is no compiler."""

    def __init__(self) -> None:
        self._cut = load_native().held.drift_cut_decode
        self._merged = np.zeros(1, np.int64)
        self._merged_at: int = self._merged.ctypes.data
        self._shelf: list[Words] = []  # memory given back: touching new pages takes longer than cutting

    def __call__(
        self,
        context: Ints,
        kv_heads: int,
        keys: int,
        least_keys: int,
        programs: int,
        window: int | None = None,
    ) -> DecodeWork:
        """As `cut_decode`."""
        rows = len(context)
        assert programs >= kv_heads, f"{programs} programs for {kv_heads} kv heads"
        context = np.ascontiguousarray(context, np.int64)
        lasts, most = kv_heads * rows, kv_heads * rows + programs
        sizes = (2 * lasts, programs + 1, most * ITEM_WORDS, programs * MERGE_WORDS)
        ends = list(accumulate(sizes))
        block = self._shelf.pop() if self._shelf else np.empty(0, np.int32)
        if len(block) < ends[-1]:
            block = np.empty(ends[-1] + ends[-1] // 4, np.int32)
        start: int = block.ctypes.data
        bounds, items, merges = (start + 4 * end for end in ends[:-1])
        count = self._cut(
            context.ctypes.data, rows, kv_heads, keys, least_keys, programs, 0 if window is None else window,
            bounds, items, merges, start, self._merged_at,
        )  # fmt: skip
        return DecodeWork(
            block[ends[0] : ends[1]],
            block[ends[1] : ends[2]].reshape(most, ITEM_WORDS)[:count],
            block[ends[2] : ends[3]].reshape(programs, MERGE_WORDS)[: int(self._merged[0])],
            block[: ends[0]].view(np.int64),
            (block, self._shelf),
        )


def fastest_cut() -> Cut:
    """C where it can be compiled, numpy elsewhere; both cut alike."""
    try:
        return NativeCut()
    except NativeUnavailable as why:
        log.info("lists of decode work are cut in Python: %s", why)
        return cut_decode


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
