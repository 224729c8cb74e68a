"""Launches the choice of the next token; logits and results stay on the device.

Rows do not influence each other, and a row's draw is a function of its seed and position alone, whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from drift_kernels.triton_ops import device_sampling
from drift_kernels.triton_ops.tiles import padded_head

_PROGRAMS_PER_SM = 2
_ARGMAX_BLOCK = 2048
_SAMPLE_BLOCK = 4096
_MASK_BLOCK = 4096
MOST_PIECES = 64


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """One entry per row of logits, on the device. `temperature` 0: the largest logit, filters unused."""

    temperature: Tensor  # float32[R]
    top_k: Tensor  # int32[R], 0: off
    top_p: Tensor  # float32[R], 1: off
    min_p: Tensor  # float32[R], 0: off
    seeds: Tensor  # int64[R]
    positions: Tensor  # int32[R]: how many tokens the row has generated
    draws: Tensor | None = None  # float32[R] in [0, 1) instead of seeds and positions


def launch_mask(logits: Tensor, picked: Tensor, words: Tensor, num_sms: int) -> None:
    """Forbid tokens of float32 logits[R, V] in place, as `drift_kernels.reference.mask_logits` says.

    picked: int32[N], rows. words: int32[N, W], one line of bits for each.
    """
    count, vocab = len(picked), logits.shape[1]
    assert words.shape[1] * 32 >= vocab, f"{words.shape[1]} words of bits for {vocab} tokens"
    programs = min(count * -(-vocab // _MASK_BLOCK), num_sms * _PROGRAMS_PER_SM)
    device_sampling.mask_rows[(programs,)](
        logits, picked, words, count, vocab, logits.stride(0), words.stride(0), BLOCK=_MASK_BLOCK, num_warps=8
    )


def argmax_pieces(rows: int, vocab: int, num_sms: int) -> int:
    """Parts that a row is read in, so that few rows still use all multiprocessors."""
    return max(1, min(MOST_PIECES, -(-num_sms * _PROGRAMS_PER_SM // rows), -(-vocab // _ARGMAX_BLOCK)))


def launch_argmax(logits: Tensor, out: Tensor, peaks: Tensor, places: Tensor, num_sms: int) -> None:
    """out int64[R] = the lowest token among the largest of logits[R, V]. NaN counts as the lowest logit.

    Scratch: peaks float32 and places int32 of at least R * MOST_PIECES elements, of this lane alone.
    """
    rows, vocab = logits.shape
    pieces = argmax_pieces(rows, vocab, num_sms)
    programs = num_sms * _PROGRAMS_PER_SM
    device_sampling.argmax_pieces[(min(rows * pieces, programs),)](
        logits, peaks, places, rows, vocab, logits.stride(0), PIECES=pieces, BLOCK=_ARGMAX_BLOCK, num_warps=8
    )
    device_sampling.argmax_merge[(min(rows, programs),)](
        peaks, places, out, rows, PIECES=pieces, PADDED=max(2, padded_head(pieces)), num_warps=1
    )


def launch_sample(logits: Tensor, out: Tensor, rows: SamplingRows, num_sms: int) -> None:
    """out int64[R]: one token per row of logits[R, V], as `drift_kernels.reference.sample` says."""
    count, vocab = logits.shape
    device_sampling.sample_rows[(min(count, num_sms * _PROGRAMS_PER_SM),)](
        logits, out, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.positions,
        rows.temperature if rows.draws is None else rows.draws, count, vocab, logits.stride(0),
        DRAWN=rows.draws is not None, BLOCK=_SAMPLE_BLOCK, num_warps=8,
    )  # fmt: skip
