"""The list of work covers every key of every row exactly once, in equal shares, within its buffers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_kernels.triton_ops import plan, tiles
from drift_kernels.triton_ops.lane import AttentionLane, AttentionShape

LENGTHS = st.lists(
    st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(1, min(n, 90)), st.just(n))),
    min_size=1,
    max_size=6,
)
TILE = tiles.Tile(16, 64, 4, 3, 2, 128)


def _spans(work: plan.WorkList) -> dict[tuple[int, ...], list[tuple[int, int, int]]]:
    """(sequence, kv head, row) -> its (start, stop, slot) in order."""
    spans: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for item in work.items.tolist():
        spans.setdefault(tuple(item[:3]), []).append(tuple(item[3:6]))  # type: ignore[arg-type]
    return spans


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 16), st.integers(1, 4), st.integers(1, 300), st.none() | st.integers(1, 3000))
def test_every_key_of_every_row_once(
    lengths: list[tuple[int, int]], group: int, kv_heads: int, programs: int, window: int | None
) -> None:
    query, context = (np.array(side, dtype=np.int64) for side in zip(*lengths, strict=True))
    work = plan.build_work_list(
        np.arange(len(query)), query, context, group, kv_heads, TILE, programs, window
    )
    wanted = {
        (b, head, row)
        for b in range(len(query)) for head in range(kv_heads)
        for row in range(0, int(query[b]) * group, TILE.rows)
    }  # fmt: skip
    spans = _spans(work)
    assert spans.keys() == wanted
    for (b, _, row), pieces in spans.items():
        first, last = row // group, min(int(query[b]) - 1, (row + TILE.rows - 1) // group)
        past = int(context[b] - query[b])
        earliest = 0 if window is None else max(0, past + first - window + 1)
        assert pieces[0][0] == earliest // TILE.keys * TILE.keys
        assert pieces[-1][1] == past + last + 1
        assert all(start < stop and start % TILE.keys == 0 for start, stop, _ in pieces)
        assert all(before[1] == after[0] for before, after in pairwise(pieces))
        assert (len(pieces) == 1) == (pieces[0][2] == -1)
    assert work.bounds[0] == 0
    assert work.bounds[-1] == len(work.items)
    assert (np.diff(work.bounds) >= 0).all()
    assert len(work.bounds) == programs + 1
    assert len(work.items) <= plan.most_items(len(wanted), programs)
    _check_shares(work, programs)
    _check_merges(work, spans, programs)


def _check_shares(work: plan.WorkList, programs: int) -> None:
    lengths = -(-(work.items[:, 4] - work.items[:, 3]) // TILE.keys)
    shares = np.add.reduceat(np.append(lengths, 0), np.minimum(work.bounds[:-1], len(lengths)))
    shares[np.diff(work.bounds) == 0] = 0
    busy = shares[shares > 0]
    assert busy.max() - busy.min() <= 1
    assert len(busy) == programs or busy.max() <= TILE.least_keys // TILE.keys


def _check_merges(
    work: plan.WorkList, spans: dict[tuple[int, ...], list[tuple[int, int, int]]], programs: int
) -> None:
    slots = [slot for pieces in spans.values() for _, _, slot in pieces if slot >= 0]
    assert sorted(slots) == list(range(len(slots)))
    assert len(slots) <= plan.most_slots(programs)
    split = {key: pieces for key, pieces in spans.items() if len(pieces) > 1}
    assert len(work.merges) == len(split)
    for merge in work.merges.tolist():
        pieces = split[tuple(merge[:3])]
        assert [slot for _, _, slot in pieces] == list(range(merge[3], merge[3] + merge[4]))


SHAPE = AttentionShape(8, 2, 64, 16)


def _lane(**changes: int) -> AttentionLane:
    room = {"sequences": 4, "tokens": 32, "context": 128, "most_sms": 4, "architecture": 90} | changes
    return AttentionLane(SHAPE, device="cpu", **room)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lengths", "num_sms", "padded", "message"),
    [
        ([(1, 1)] * 5, 4, None, "the step has 5 sequences; this lane's buffers take 4"),
        ([(33, 40)], 4, None, "33 query tokens; this lane's buffers take 32"),
        ([(1, 129)], 4, None, "129 tokens of context; this lane's buffers take 128"),
        ([(1, 1)], 5, None, "5 multiprocessors; this lane's buffers take 4"),
        ([(1, 1)], 0, None, "num_sms must be at least 1, got 0"),
        ([(3, 9)], 4, 2, "padded_tokens is 2, the step has 3 query tokens"),
    ],
)
def test_a_step_too_large_is_refused(
    lengths: list[tuple[int, int]], num_sms: int, padded: int | None, message: str
) -> None:
    query, context = zip(*lengths, strict=True)
    with pytest.raises(ValueError, match=message):
        _lane().plan(query, context, [list(range(9))] * len(query), 0.1, num_sms, padded_tokens=padded)


def test_scratch_and_lists_hold_the_worst_case() -> None:
    """Lengths that make as many items and slots as there can be stay inside the buffers."""
    lane = _lane(sequences=4, tokens=32, context=128, most_sms=100)
    for lengths in ([(1, 128)] * 4, [(8, 128)] * 4, [(32, 128)], [(29, 128), (1, 1), (1, 1), (1, 128)]):
        query, context = zip(*lengths, strict=True)
        planned = lane.plan(query, context, [list(range(8))] * len(query), 0.1, 100)
        for work in filter(None, (planned.narrow, planned.wide)):
            slots = 1 + max(work.items[: int(work.bounds[-1]), 5].tolist(), default=-1)
            assert slots * work.tile.rows * SHAPE.head <= work.partial.numel()
            assert int(work.bounds[-1]) <= len(work.items)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((8, 2, 72, 16), "head size 72 has no kernel; choose 64, 80, 96, 128, 256"),
        ((8, 3, 64, 16), "8 query heads cannot share 3 kv heads evenly"),
        ((8, 2, 64, 8), "page_tokens is 8; the kernels take pages of 16 tokens or more"),
    ],
)
def test_shapes_without_kernels_are_refused(numbers: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionShape(*numbers)


def test_devices_map_to_the_architecture_whose_tiles_fit() -> None:
    known = {80: 80, 86: 89, 87: 89, 89: 89, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120}
    assert {capability: tiles.nearest_architecture(capability) for capability in known} == known
    with pytest.raises(ValueError, match=r"compute capability 7\.5 is not supported"):
        tiles.nearest_architecture(75)
