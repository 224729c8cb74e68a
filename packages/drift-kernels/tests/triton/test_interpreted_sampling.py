"""Argmax, filters and draws in the interpreter; the draw's chance is the reference's to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drift_kernels import reference
from drift_kernels.triton_ops.sampling import (
    MOST_PIECES,
    SamplingRows,
    launch_argmax,
    launch_mask,
    launch_sample,
)


def _argmax(logits: Tensor, num_sms: int = 3) -> list[int]:
    rows = len(logits)
    out = torch.full((rows,), -7)
    peaks = torch.full((rows * MOST_PIECES,), float("nan"))
    places = torch.full((rows * MOST_PIECES,), -9, dtype=torch.int32)
    launch_argmax(logits, out, peaks, places, num_sms)
    return out.tolist()


@pytest.mark.parametrize("vocab", [1, 100, 2048, 5001])
@pytest.mark.parametrize("num_sms", [1, 8])
def test_argmax(vocab: int, num_sms: int) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(3, vocab + 5)[:, :vocab]
    assert _argmax(logits, num_sms) == logits.argmax(-1).tolist()


def test_argmax_ties_nan_and_infinity() -> None:
    logits = torch.zeros(4, 5000)
    logits[0, [3000, 4000]] = 1.0
    logits[1] = float("-inf")
    logits[1, 4999] = -1e30
    logits[2, 10] = float("nan")
    logits[2, 4500] = 5.0
    logits[3, 4100] = float("inf")
    assert _argmax(logits) == [3000, 4999, 4500, 4100]


def _rows(
    settings: list[tuple[float, int, float, float]], draws: Tensor | None, seed: int = 0
) -> SamplingRows:
    temperature, top_k, top_p, min_p = map(torch.tensor, zip(*settings, strict=True))
    count = len(settings)
    return SamplingRows(
        temperature.float(), top_k.int(), top_p.float(), min_p.float(),
        torch.arange(count) * 0x123456789 + seed, torch.arange(count, dtype=torch.int32) * 7 + seed, draws,
    )  # fmt: skip


def _want(logits: Tensor, rows: SamplingRows, draws: Tensor) -> list[int]:
    return reference.sample(logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, draws).tolist()


def _sample(logits: Tensor, rows: SamplingRows, num_sms: int = 1) -> list[int]:
    out = torch.full((len(logits),), -7)
    launch_sample(logits, out, rows, num_sms)
    return out.tolist()


SETTINGS = [
    (0.0, 5, 0.5, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 1, 1.0, 0.0), (1.3, 20, 1.0, 0.0), (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.0, 0.0), (0.8, 50, 0.8, 0.0), (1.0, 0, 1.0, 0.1), (1.0, 40, 0.95, 0.02), (5.0, 10**6, 0.99, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("draw", [0.0, 0.77])
def test_filters(draw: float) -> None:
    torch.manual_seed(1)
    logits = 3 * torch.randn(len(SETTINGS), 4203)
    rows = _rows(SETTINGS, torch.full((len(SETTINGS),), draw))
    assert rows.draws is not None
    assert _sample(logits, rows, 2) == _want(logits, rows, rows.draws)


def test_what_a_filter_leaves_is_exactly_what_can_be_drawn() -> None:
    """Over a grid of draws, tokens come out with the shares of the reference."""
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.0, float("-inf"), -4.0]).repeat(12, 1)
    draws = (torch.arange(12) + 0.5) / 12
    for setting in [(1.0, 0, 1.0, 0.0), (1.0, 2, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (2.0, 4, 0.9, 0.3)]:
        rows = _rows([setting] * 12, draws)
        assert _sample(logits, rows) == _want(logits, rows, draws), setting


def test_ties_at_the_threshold_all_stay() -> None:
    logits = torch.zeros(10, 10)
    logits[:, 0] = 1.0
    rows = _rows(
        [(1.0, 2, 1.0, 0.0)] * 10, torch.tensor([0.1, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
    )
    assert rows.draws is not None
    got = _sample(logits, rows)
    assert got == _want(logits, rows, rows.draws)
    assert max(got) == 9, "the last of nine tied tokens"


def test_seeds_draw_as_the_reference_does() -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 4200)
    rows = _rows([(1.0, 0, 1.0, 0.0)] * 6, None, seed=-3)
    chances = reference.philox_uniform(rows.seeds, rows.positions)
    assert _sample(logits, rows) == _want(logits, rows, chances)


def test_a_row_draws_the_same_whatever_the_batch() -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, 5000)
    rows = _rows([(1.0, 0, 1.0, 0.0)] * 4, None)
    alone = SamplingRows(
        rows.temperature[2:3], rows.top_k[2:3], rows.top_p[2:3], rows.min_p[2:3], rows.seeds[2:3],
        rows.positions[2:3],
    )  # fmt: skip
    assert _sample(logits[2:3], alone) == _sample(logits, rows, 2)[2:3]


def test_rows_without_a_choice() -> None:
    """All -inf, one NaN among finite ones, infinity: a token of the vocabulary in any case."""
    logits = torch.full((3, 50), float("-inf"))
    logits[1] = float("nan")
    logits[1, 7] = 0.0
    logits[2] = 0.0
    logits[2, 9] = float("inf")
    rows = _rows([(1.0, 5, 0.9, 0.1)] * 3, torch.full((3,), 0.5))
    assert _sample(logits, rows) == [0, 7, 9]


@pytest.mark.parametrize("vocab", [1, 31, 32, 4097, 9000])
@pytest.mark.parametrize("num_sms", [1, 8])
def test_masks(vocab: int, num_sms: int) -> None:
    torch.manual_seed(vocab)
    memory = torch.randn(5, vocab + 3)
    logits = memory[:, :vocab]
    words = torch.randint(-(1 << 31), 1 << 31, (3, -(-vocab // 32) + 2)).int()
    words[0] = -1
    words[1, 0] = 1 << (vocab % 31)
    picked = torch.tensor([4, 0, 2], dtype=torch.int32)
    want = logits.clone()
    reference.mask_logits(want, picked, words)
    beside = memory[:, vocab:].clone()
    launch_mask(logits, picked, words, num_sms)
    assert torch.equal(logits, want)
    assert torch.equal(memory[:, vocab:], beside)
    assert torch.equal(want[4], logits[4])


def test_a_masked_row_stays_in_its_form_whatever_the_model_says() -> None:
    broken = torch.tensor([float("nan"), float("-inf"), float("inf"), float("nan"), 3.0])
    logits = broken.repeat(4, 1)
    words = torch.tensor([[0b00010], [0b01001], [0b10011], [0b00100]], dtype=torch.int32)
    picked = torch.arange(4, dtype=torch.int32)
    want = logits.clone()
    reference.mask_logits(want, picked, words)
    launch_mask(logits, picked, words, 2)
    assert torch.equal(logits, want)
    assert _argmax(logits) == [1, 0, 4, 2]
