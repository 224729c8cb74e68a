"""Paged attention in the interpreter against its reference; pages, outputs and scratch are poisoned with NaN."""

from __future__ import annotations

import pytest
import torch
from ragged import FLOAT, Batch, close

from drift_kernels.triton_ops.attention import _MERGED_AT_ONCE
from drift_kernels.triton_ops.lane import AttentionShape
from drift_kernels.triton_ops.tiles import HEAD_SIZES

# One token alone; an empty prefix; one past, at and before a page's end; a cached prefix; a long decode.
RAGGED = [(1, 1), (5, 5), (1, 17), (1, 16), (15, 31), (3, 70), (1, 130)]


@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize("head", HEAD_SIZES)
def test_head_sizes_and_dtypes(head: int, dtype: torch.dtype) -> None:
    Batch.random(AttentionShape(4, 2, head, 16), RAGGED, dtype).check()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_query_heads_per_kv_head(group: int) -> None:
    Batch.random(AttentionShape(2 * group, 2, 64, 16), [(1, 40), (1, 1), (9, 33)]).check()


@pytest.mark.parametrize("window", [1, 2, 16, 50, 64, 65, 1000])
def test_windows(window: int) -> None:
    Batch.random(AttentionShape(2, 1, 64, 16), RAGGED, window=window).check()


def test_tokens_that_left_the_window_may_be_gone() -> None:
    batch = Batch.random(AttentionShape(2, 1, 64, 16), [(1, 100), (4, 90)], window=20)
    want = batch.want()
    for table, first_seen in zip(batch.tables, (80, 67), strict=True):
        for page in table[: first_seen // 16]:
            batch.k_pages[page] = batch.v_pages[page] = float("nan")
    planned = batch.plan(batch.lane())
    out = torch.full_like(batch.q, float("nan"))
    planned.attend(batch.q, batch.k_pages, batch.v_pages, out)
    close(out, want)


@pytest.mark.parametrize("page", [16, 32, 48, 64, 128, 256])
def test_page_sizes(page: int) -> None:
    lengths = [(1, page), (1, page + 1), (2, page - 1), (page // 2, 2 * page)]
    Batch.random(AttentionShape(2, 1, 64, page), lengths, torch.float16).check()


@pytest.mark.parametrize("num_sms", [1, 3, 8])
def test_any_partition_gives_the_same(num_sms: int) -> None:
    Batch.random(AttentionShape(4, 2, 64, 16), [(1, 700), (1, 3), (40, 300)]).check(num_sms)


def test_more_pieces_than_are_merged_at_once() -> None:
    batch = Batch.random(AttentionShape(2, 1, 64, 16), [(1, 1300), (1, 3)])
    lane = batch.lane(8)
    assert int(batch.plan(lane, 8).narrow.merges[0, 4]) > _MERGED_AT_ONCE
    batch.check(8)


def test_a_piece_that_a_row_sees_nothing_of() -> None:
    """Rows of one tile see different keys of a window; cut small, some pieces are hidden from some rows."""
    Batch.random(AttentionShape(1, 1, 64, 16), [(128, 900)], window=700).check(8)
    Batch.random(AttentionShape(1, 1, 64, 16), [(100, 900)], window=3).check(8)


@pytest.mark.parametrize("architecture", [80, 89, 120])
def test_tiles_of_other_architectures(architecture: int) -> None:
    Batch.random(AttentionShape(4, 2, 128, 16), RAGGED, torch.bfloat16).check(architecture=architecture)


def test_strided_queries_and_padding_rows() -> None:
    """q as a part of one projection; a captured graph's bucket has rows beyond the batch."""
    shape = AttentionShape(4, 2, 64, 16)
    batch = Batch.random(shape, [(1, 20), (1, 35)])
    lane = Batch.random(shape, [(1, 20), (1, 35), (1, 1), (1, 1)]).lane()
    projection = torch.full((4, 8, 64), float("nan"))
    projection[:2, :4] = batch.q
    planned = lane.plan(batch.query_lens, batch.context_lens, batch.tables, batch.scale, 2, padded_tokens=4)
    out = torch.full((4, 4, 64), 7.0)
    planned.attend(projection[:, :4], batch.k_pages, batch.v_pages, out)
    close(out[:2], batch.want())
    assert (out[2:] == 7.0).all()
    assert planned.slots.tolist()[2:] == [-1, -1]


def test_one_lane_serves_one_step_after_another() -> None:
    """The same buffers at the same addresses, as a replayed graph sees them."""
    shape = AttentionShape(4, 2, 64, 16)
    steps = [Batch.random(shape, lengths, seed=i) for i, lengths in
             enumerate([[(1, 300), (1, 9), (1, 64)], [(1, 5)], [(1, 33), (20, 40)]])]  # fmt: skip
    lane = Batch.random(shape, [(1, 300), (20, 40), (1, 1)]).lane()
    addresses = set()
    for step in steps:
        planned = step.plan(lane)
        work = planned.narrow
        addresses.add((planned.page_table.data_ptr(), work.items.data_ptr(), work.bounds.data_ptr()))
        out = torch.full_like(step.q, float("nan"))
        planned.attend(step.q, step.k_pages, step.v_pages, out)
        close(out, step.want())
    assert len(addresses) == 1


def test_large_scores_do_not_overflow() -> None:
    batch = Batch.random(AttentionShape(2, 1, 64, 16), [(1, 100), (7, 30)])
    batch.q.mul_(300.0)
    planned = batch.plan(batch.lane())
    out = torch.full_like(batch.q, float("nan"))
    planned.attend(batch.q, batch.k_pages, batch.v_pages, out)
    torch.testing.assert_close(out, batch.want(), atol=1e-3, rtol=1e-3)  # scores in the thousands, to 24 bits
