# mypy: ignore-errors
"""The next token of each row of logits on the device; `drift_kernels.reference.sample` is the specification.

Triton's language, not Python's, so there is nothing here for a type checker. No row is sorted: the filters need one
threshold each, and a search that halves the range between two logits that occur finds it exactly, in about ten passes
over a row that fits in L2. NaN counts as the lowest logit.
"""

import triton
import triton.language as tl


@triton.jit
def _logits(row, columns, vocab):
    """Logits of a tile in fp32; -inf beyond the vocabulary and for NaN."""
    value = tl.load(row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit(do_not_specialize=["rows"])
def mask_rows(logits, picked, words, rows, vocab, stride, words_stride, BLOCK: tl.constexpr):
    """Forbid tokens of rows picked[rows] in place, by bits; what stays is made finite. Programs take pieces in turn."""
    pieces = tl.cdiv(vocab, BLOCK)
    for index in range(tl.program_id(0), rows * pieces, tl.num_programs(0)):
        which = index // pieces
        columns = index % pieces * BLOCK + tl.arange(0, BLOCK)
        held = columns < vocab
        word = tl.load(words + which * words_stride + columns // 32, mask=held, other=0)
        allowed = ((word >> (columns % 32)) & 1) != 0
        place = logits + tl.load(picked + which).to(tl.int64) * stride + columns
        value = tl.load(place, mask=held & allowed, other=0.0)
        value = tl.where(value == value, value, 0.0)
        value = tl.minimum(tl.maximum(value, -1.0e30), 1.0e30)
        tl.store(place, tl.where(allowed, value, float("-inf")), mask=held)


@triton.jit(do_not_specialize=["rows"])
def argmax_pieces(
    logits, peaks, places, rows, vocab, stride, PIECES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest logit of each of PIECES parts of a row, and where; the lowest token wins a tie."""
    width = tl.cdiv(tl.cdiv(vocab, PIECES), BLOCK) * BLOCK
    for index in range(tl.program_id(0), rows * PIECES, tl.num_programs(0)):
        row = logits + tl.cast(index // PIECES, tl.int64) * stride
        start = index % PIECES * width
        peak = float("-inf")
        place = tl.minimum(start, vocab - 1)
        for first in range(start, tl.minimum(start + width, vocab), BLOCK):
            columns = first + tl.arange(0, BLOCK)
            value = _logits(row, columns, vocab)
            top = tl.max(value, 0)
            if top > peak:
                peak = top
                place = first + tl.argmax(value, 0)
        tl.store(peaks + index, peak)
        tl.store(places + index, place)


@triton.jit(do_not_specialize=["rows"])
def argmax_merge(peaks, places, out, rows, PIECES: tl.constexpr, PADDED: tl.constexpr):
    """out[rows]: the place of the largest of each row's pieces."""
    pieces = tl.arange(0, PADDED)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        held = pieces < PIECES
        value = tl.load(peaks + row * PIECES + pieces, mask=held, other=float("-inf"))
        best = tl.argmax(value, 0)
        tl.store(out + row, tl.load(places + row * PIECES + best).to(tl.int64))


@triton.jit
def _summary(row, vocab, peak, slope, floor, BLOCK: tl.constexpr):
    """(tokens, weight, lowest) of the log weights at or above floor. A log weight is base 2, 0 at the peak."""
    count = 0.0
    weight = 0.0
    lowest = 0.0
    for first in range(0, vocab, BLOCK):
        level = (_logits(row, first + tl.arange(0, BLOCK), vocab) - peak) * slope
        kept = (level >= floor) & (level > float("-inf"))
        count += tl.sum(tl.where(kept, 1.0, 0.0), 0)
        weight += tl.sum(tl.where(kept, tl.exp2(level), 0.0), 0)
        lowest = tl.minimum(lowest, tl.min(tl.where(kept, level, 0.0), 0))
    return count, weight, lowest


@triton.jit
def _threshold(row, vocab, peak, slope, low, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The highest level that occurs with at least `wanted` tokens (COUNT) or weight at or above it.

    low: a level that occurs and has them.
    """
    high = 0.0
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        total = 0.0
        above = high
        below = low
        for first in range(0, vocab, BLOCK):
            level = (_logits(row, first + tl.arange(0, BLOCK), vocab) - peak) * slope
            kept = level >= middle
            share = tl.where(kept, 1.0, 0.0) if COUNT else tl.where(kept, tl.exp2(level), 0.0)
            total += tl.sum(share, 0)
            above = tl.minimum(above, tl.min(tl.where(kept, level, high), 0))
            below = tl.maximum(below, tl.max(tl.where(kept, low, level), 0))
        enough = total >= wanted
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
    return low


@triton.jit
def _draw(row, vocab, peak, slope, floor, target, BLOCK: tl.constexpr):
    """The first token whose running weight, in token order, exceeds target."""
    before = 0.0
    token = -1
    last = 0
    for first in range(0, vocab, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        level = (_logits(row, columns, vocab) - peak) * slope
        kept = (level >= floor) & (level > float("-inf"))
        weight = tl.where(kept, tl.exp2(level), 0.0)
        mass = tl.sum(weight, 0)
        if (token < 0) & (mass > 0.0):
            last = tl.max(tl.where(kept, columns, 0), 0)
            if before + mass > target:
                past = (before + tl.cumsum(weight, 0) > target) & kept
                token = tl.minimum(tl.min(tl.where(past, columns, vocab), 0), last)
        before += mass
    return tl.where(token < 0, last, token)


@triton.jit(do_not_specialize=["rows"])
def sample_rows(
    logits, out, temperatures, top_ks, top_ps, min_ps, seeds, positions, draws, rows, vocab, stride,
    DRAWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row at a time: temperature, min-p, top-k, top-p of what is left, one draw.

    temperature 0: the largest logit. top_k 0, top_p 1, min_p 0: no filter. DRAWN: draws[rows] in [0, 1) are given;
    else Philox makes them of seed and position.
    """
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = logits + tl.cast(index, tl.int64) * stride
        peak = float("-inf")
        token = 0
        for first in range(0, vocab, BLOCK):
            value = _logits(row, first + tl.arange(0, BLOCK), vocab)
            top = tl.max(value, 0)
            if top > peak:
                peak = top
                token = first + tl.argmax(value, 0)
        temperature = tl.load(temperatures + index)
        if (temperature > 0.0) & (peak > float("-inf")) & (peak < float("inf")):
            slope = 1.4426950408889634 / temperature
            min_p = tl.load(min_ps + index)
            floor = tl.where(min_p > 0.0, tl.log2(tl.maximum(min_p, 1.0e-37)), float("-inf"))
            count, weight, lowest = _summary(row, vocab, peak, slope, floor, BLOCK)
            top_k = tl.load(top_ks + index).to(tl.float32)
            if (top_k > 0.0) & (top_k < count):
                floor = _threshold(row, vocab, peak, slope, lowest, top_k, True, BLOCK)
                count, weight, lowest = _summary(row, vocab, peak, slope, floor, BLOCK)
            top_p = tl.load(top_ps + index)
            if top_p < 1.0:
                floor = _threshold(row, vocab, peak, slope, lowest, top_p * weight, False, BLOCK)
                count, weight, lowest = _summary(row, vocab, peak, slope, floor, BLOCK)
            if DRAWN:
                chance = tl.load(draws + index)
            else:
                chance = tl.rand(tl.load(seeds + index), tl.load(positions + index))
            token = _draw(row, vocab, peak, slope, floor, chance * weight, BLOCK)
        tl.store(out + index, tl.cast(token, tl.int64))
