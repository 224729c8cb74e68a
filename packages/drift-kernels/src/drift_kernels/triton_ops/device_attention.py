# mypy: ignore-errors
"""Paged attention on the device: one kernel for decode and prefill, one that merges partial results.

Triton's language, not Python's, so there is nothing here for a type checker. `drift_kernels.reference.attend` is the
specification; `plan` builds the list of work.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_keys(
    acc, peak, total, q, positions, k_base, v_base, table, start, stop, floor, scale, kv_stride, window,
    HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys start..stop, start a multiple of KEYS. Unmasked: all rows see all of them.

    No row sees keys before `floor`, and what the pages hold of them is not looked at.
    """
    dims = tl.arange(0, HEAD_PADDED)
    offsets = tl.arange(0, KEYS)
    for first in range(start, stop, KEYS):
        keys = first + offsets
        if PAGE % KEYS == 0:  # the tile lies in one page
            page = tl.load(table + first // PAGE)
            slots = page.to(tl.int64) * PAGE + (first % PAGE + offsets)
        else:
            if MASKED:
                pages = tl.load(table + keys // PAGE, mask=(keys < stop) & (keys >= floor), other=0)
            else:
                pages = tl.load(table + keys // PAGE)
            slots = pages.to(tl.int64) * PAGE + keys % PAGE
        places = (slots * kv_stride)[:, None] + dims[None, :]
        if MASKED:
            there = keys < stop
            if WINDOWED:
                there = there & (keys >= floor)
            held = there[:, None] & (dims < HEAD)[None, :]
            k = tl.load(k_base + places, mask=held, other=0.0)
        elif HEAD == HEAD_PADDED:
            k = tl.load(k_base + places)
        else:
            k = tl.load(k_base + places, mask=(dims < HEAD)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            age = positions[:, None] - keys[None, :]
            visible = (age >= 0) & (keys < stop)[None, :]
            if WINDOWED:
                visible = visible & (age < window)
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        if MASKED:  # a weight of 0 does not undo a NaN
            v = tl.load(v_base + places, mask=held, other=0.0)
        elif HEAD == HEAD_PADDED:
            v = tl.load(v_base + places)
        else:
            v = tl.load(v_base + places, mask=(dims < HEAD)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["window", "table_stride"])
def attend_items(
    q_ptr, k_pages, v_pages, out_ptr, page_table, query_starts, context_lens,
    bounds, items, partial, partial_weight,
    scale, window, q_stride, out_stride, kv_stride, table_stride,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Each program does its items. Strides are elements per token (table_stride: entries per sequence).

    partial f32[slots, ROWS, HEAD] is normalised, partial_weight f32[slots, ROWS] its log2 of the sum of weights.
    """
    program = tl.program_id(0)
    dims = tl.arange(0, HEAD_PADDED)
    for index in range(tl.load(bounds + program), tl.load(bounds + program + 1)):
        item = items + index * 8
        sequence = tl.load(item)
        kv_head = tl.load(item + 1)
        start = tl.multiple_of(tl.load(item + 3), KEYS)
        stop = tl.load(item + 4)
        slot = tl.load(item + 5)
        query_start = tl.load(query_starts + sequence)
        tokens = tl.load(query_starts + sequence + 1) - query_start
        first_row = tl.load(item + 2)
        past = tl.load(context_lens + sequence) - tokens

        rows = first_row + tl.arange(0, ROWS)
        token = rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        real = (rows < tokens * GROUP)[:, None] & (dims < HEAD)[None, :]
        place = (query_start + token).to(tl.int64)
        q_place = (place * q_stride + head * HEAD)[:, None] + dims[None, :]
        q = tl.load(q_ptr + q_place, mask=real, other=0.0)
        positions = past + token

        acc = tl.zeros([ROWS, HEAD_PADDED], dtype=tl.float32)
        peak = tl.full([ROWS], -1.0e30, dtype=tl.float32)  # finite: a tile may hide all keys from a row
        total = tl.zeros([ROWS], dtype=tl.float32)
        table = page_table + sequence.to(tl.int64) * table_stride
        k_base = k_pages + kv_head * HEAD
        v_base = v_pages + kv_head * HEAD
        masked_from = start
        floor = 0
        if WINDOWED:
            floor = tl.maximum(0, past + first_row // GROUP - window + 1)
        else:
            seen_by_all = tl.minimum(stop, past + first_row // GROUP + 1)
            masked_from = start + tl.maximum(seen_by_all - start, 0) // KEYS * KEYS
            masked_from = tl.multiple_of(masked_from, KEYS)
            acc, peak, total = _attend_keys(
                acc, peak, total, q, positions, k_base, v_base, table, start, masked_from, 0, scale,
                kv_stride, window, HEAD, HEAD_PADDED, PAGE, KEYS, False, False,
            )  # fmt: skip
        acc, peak, total = _attend_keys(
            acc, peak, total, q, positions, k_base, v_base, table, masked_from, stop, floor, scale,
            kv_stride, window, HEAD, HEAD_PADDED, PAGE, KEYS, True, WINDOWED,
        )  # fmt: skip

        # A piece of a windowed span may hide all its keys from a row: weight 0.
        seen = total > 0.0
        result = acc / tl.where(seen, total, 1.0)[:, None]
        if slot < 0:
            out_place = (place * out_stride + head * HEAD)[:, None] + dims[None, :]
            tl.store(out_ptr + out_place, result.to(out_ptr.dtype.element_ty), mask=real)
        else:
            row = slot * ROWS + tl.arange(0, ROWS)
            tl.store(partial + row[:, None] * HEAD + dims[None, :], result, mask=real)
            weight = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), -1.0e30)
            tl.store(partial_weight + row, weight)


@triton.jit
def merge_items(
    out_ptr, query_starts, merges, merge_count, partial, partial_weight, out_stride,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add up the partial results of each span in pieces; a program takes one row at a time."""
    dims = tl.arange(0, HEAD_PADDED)
    inside = (dims < HEAD)[None, :]
    for index in range(tl.program_id(0), tl.load(merge_count) * ROWS, tl.num_programs(0)):
        merge = merges + index // ROWS * 8
        local = index % ROWS
        sequence = tl.load(merge)
        kv_head = tl.load(merge + 1)
        row = tl.load(merge + 2) + local
        first = tl.load(merge + 3)
        count = tl.load(merge + 4)
        query_start = tl.load(query_starts + sequence)
        tokens = tl.load(query_starts + sequence + 1) - query_start
        if row < tokens * GROUP:
            acc = tl.zeros([HEAD_PADDED], dtype=tl.float32)
            total = 0.0
            peak = -1.0e30
            for done in range(0, count, AT_ONCE):
                pieces = done + tl.arange(0, AT_ONCE)
                held = pieces < count
                place = (first + pieces) * ROWS + local
                weight = tl.load(partial_weight + place, mask=held, other=-1.0e30)
                value = tl.load(
                    partial + place[:, None] * HEAD + dims[None, :], mask=held[:, None] & inside, other=0.0
                )
                new_peak = tl.maximum(peak, tl.max(weight, 0))
                share = tl.where(held, tl.exp2(weight - new_peak), 0.0)
                fade = tl.exp2(peak - new_peak)
                total = total * fade + tl.sum(share, 0)
                acc = acc * fade + tl.sum(value * share[:, None], 0)
                peak = new_peak
            token = query_start + row // GROUP
            place = token.to(tl.int64) * out_stride + (kv_head * GROUP + row % GROUP) * HEAD
            tl.store(out_ptr + place + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD)
