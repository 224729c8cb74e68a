"""Launches paged attention over a list of work that lies in device memory.

Knows a partition only as `num_sms`. Nothing here allocates, waits or reads device memory, so a launch can be
captured in a CUDA graph; replays see whatever list of work lies in the same buffers by then.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from drift_kernels.triton_ops import device_attention
from drift_kernels.triton_ops.tiles import Tile, padded_head

_LOG2_E = 1.4426950408889634
_MERGED_AT_ONCE = 8  # partial results read together
_WASTEFUL = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)


def most_registers(tile: Tile, wasteful: bool = _WASTEFUL) -> int | None:
    """What the compiler is held to, so that as many programs fit as the tile says; None: it keeps to that itself.

    Triton 3.6 takes 218 registers a thread where 3.7 takes 166 (decode, head 128, pages of 16, sm_90), and then
    two programs fit where three were launched. Held to 168 it does not spill.
    """
    return tile.most_registers if wasteful else None


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """A WorkList on the device, and the scratch its partial results go to. Scratch belongs to one lane."""

    tile: Tile
    bounds: Tensor  # int32[programs + 1]
    items: Tensor  # int32[capacity, ITEM_WORDS]
    merges: Tensor  # int32[capacity, MERGE_WORDS]
    merge_count: Tensor  # int32[1]
    partial: Tensor  # float32, at least most_slots(programs) * tile.rows * head size elements
    partial_weight: Tensor  # float32, at least most_slots(programs) * tile.rows elements


def launch_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    page_table: Tensor,
    work: DeviceWork,
    scale: float,
    window: int | None,
    num_sms: int,
) -> None:
    """Write the rows of out[T, Hq, D] that `work` lists: two launches, each of a grid fixed by `num_sms`.

    q and out may be strided between tokens, not within one. Raises ValueError when `work` was cut for another
    number of programs.
    """
    programs = num_sms * work.tile.programs_per_sm
    if work.bounds.shape[0] != programs + 1:
        raise ValueError(
            f"the list of work is for {work.bounds.shape[0] - 1} programs; "
            f"num_sms={num_sms} makes {programs} of this tile"
        )
    page_tokens, kv_heads, head = k_pages.shape[1:]
    group = q.shape[1] // kv_heads
    device_attention.attend_items[(programs,)](
        q, k_pages, v_pages, out, page_table, query_starts, context_lens,
        work.bounds, work.items, work.partial, work.partial_weight,
        scale * _LOG2_E, window or 0, q.stride(0), out.stride(0), kv_heads * head, page_table.stride(0),
        GROUP=group, HEAD=head, HEAD_PADDED=padded_head(head), PAGE=page_tokens,
        ROWS=work.tile.rows, KEYS=work.tile.keys, WINDOWED=window is not None,
        num_warps=work.tile.warps, num_stages=work.tile.stages, maxnreg=most_registers(work.tile),
    )  # fmt: skip
    device_attention.merge_items[(programs,)](
        out, query_starts, work.merges, work.merge_count, work.partial, work.partial_weight, out.stride(0),
        GROUP=group, HEAD=head, HEAD_PADDED=padded_head(head), ROWS=work.tile.rows, AT_ONCE=_MERGED_AT_ONCE,
        num_warps=1, num_stages=2,
    )  # fmt: skip
