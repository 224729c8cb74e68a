"""Lists of decode work: every key of every row and head once, shares equal, the layout of the kernels' own planner."""

from __future__ import annotations

import numpy as np
import pytest

from drift_core.cuda.decode_work import Cut, DecodeWork, NativeCut, cut_decode, fastest_cut
from drift_core.cuda.kernels import ReferenceKernels, Shape
from drift_kernels.native_library import NativeUnavailable
from drift_kernels.triton_ops import plan
from drift_kernels.triton_ops.tiles import Tile

KEYS, LEAST = 64, 128


def covered(items: np.ndarray, rows: int, heads: int, context: np.ndarray) -> list[np.ndarray]:
    """How often each key of each (row, head) is looked at."""
    counts = [np.zeros(context[row], int) for row in range(rows) for _ in range(heads)]
    for row, head, first_row, start, stop, *_ in items.tolist():
        assert first_row == 0
        assert start % KEYS == 0
        assert stop <= context[row]
        counts[row * heads + head][start:stop] += 1
    return counts


def cuts() -> list[Cut]:
    """In numpy, and in C where that can be compiled."""
    try:
        return [cut_decode, NativeCut()]
    except NativeUnavailable:
        return [cut_decode]


def check(
    work: DecodeWork, context: np.ndarray, heads: int, programs: int, window: int | None = None
) -> None:
    rows = len(context)
    for index, counts in enumerate(covered(work.items, rows, heads, context)):
        seen = 0 if window is None else max(0, int(context[index // heads]) - window)
        assert (counts[seen:] == 1).all()
        assert not counts[: seen // KEYS * KEYS].any()
    assert len(work.bounds) == programs + 1
    assert work.bounds[0] == 0
    assert work.bounds[-1] == len(work.items)
    assert (np.diff(work.bounds) >= 0).all()
    assert len(work.items) <= plan.most_items(rows * heads, programs)
    slots = work.items[:, 5][work.items[:, 5] >= 0]
    assert sorted(slots) == list(range(len(slots)))
    assert len(slots) <= plan.most_slots(programs)
    named: list[int] = []
    for row, head, first_row, first, count, *_ in work.merges.tolist():
        pieces = work.items[(work.items[:, 5] >= first) & (work.items[:, 5] < first + count)]
        assert first_row == 0
        assert count > 1
        assert (pieces[:, :2] == (row, head)).all()
        named += range(first, first + count)
    assert sorted(named) == sorted(slots)
    last = work.items[work.last]
    assert sorted(map(tuple, last[:, :2].tolist())) == [(r, h) for r in range(rows) for h in range(heads)]
    assert (last[:, 4] == context[last[:, 0]]).all()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [None, 1, 100])
def test_every_key_is_seen_once(seed: int, window: int | None) -> None:
    draw = np.random.default_rng(seed)
    rows, heads = int(draw.integers(1, 40)), int(draw.choice([1, 2, 4, 8]))
    programs = heads * int(draw.integers(1, 50)) + int(draw.integers(heads))
    context = draw.integers(1, int(draw.choice([2, 70, 3000])), rows)
    found = [cut(context, heads, KEYS, LEAST, programs, window) for cut in cuts()]
    for work in found:
        check(work, context, heads, programs, window)
        for name in ("bounds", "items", "merges", "last"):
            assert (getattr(work, name) == getattr(found[0], name)).all(), name


def test_shares_differ_by_at_most_one_tile() -> None:
    context = np.random.default_rng(0).integers(1, 4000, 64)
    work = cut_decode(context, 8, KEYS, LEAST, 384)
    tiles = -(-(work.items[:, 4] - work.items[:, 3]) // KEYS)
    shares = np.array([tiles[a:b].sum() for a, b in zip(work.bounds, work.bounds[1:], strict=False)])
    assert shares.max() - shares.min() <= 1


def test_one_head_is_cut_exactly_as_the_kernels_planner_cuts_it() -> None:
    draw = np.random.default_rng(3)
    tile = Tile(16, KEYS, 4, 3, 3, LEAST)
    for programs in (1, 7, 30):
        context = draw.integers(1, 2000, 17)
        ours = cut_decode(context, 1, KEYS, LEAST, programs)
        theirs = plan.build_work_list(np.arange(17), np.ones(17, np.int64), context, 4, 1, tile, programs)
        assert (ours.items == theirs.items).all()
        assert (ours.bounds == theirs.bounds).all()
        assert (ours.merges == theirs.merges).all()


def test_advancing_sees_the_new_keys() -> None:
    context = np.random.default_rng(1).integers(1, 500, 9)
    work = cut_decode(context, 2, KEYS, LEAST, 20)
    for _ in range(70):
        work.advance()
    check(work, context + 70, 2, 20)


@pytest.mark.parametrize(("heads", "units"), [(32, 8), (2, 16), (8, 10)])
def test_programs_that_heads_cannot_share_are_not_left_idle(heads: int, units: int) -> None:
    kernels = ReferenceKernels(Shape(heads, heads, 128, 16, None))
    programs = units * kernels.narrow.programs_per_sm
    context = np.random.default_rng(2).integers(200, 3000, 20)
    work = kernels.cut_narrow(context, units)
    check(work, context, heads, programs)
    busy = np.count_nonzero(np.diff(work.bounds))
    assert busy >= 0.92 * programs
    size = kernels.narrow_size(20, units)
    assert len(work.items) <= size.items
    assert len(work.merges) <= size.merges


def test_without_a_compiler_lists_are_cut_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise NativeUnavailable("no C compiler 'cc' on the path")

    monkeypatch.setattr("drift_core.cuda.decode_work.load_native", none)
    assert fastest_cut() is cut_decode
