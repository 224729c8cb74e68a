"""The online cost model: learns what the wrapped model gets wrong, stays within bounds, and is deterministic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.cost import FACTORIES
from drift_scheduler.cost.online import ENOUGH, OnlineCost
from drift_scheduler.cost.roofline import roofline
from drift_scheduler.domain import DecodeShape, Lane, Observation, Partition, PrefillShape, Sharing
from drift_scheduler.errors import OptionError

LAYERS = 32
PROMPT = PrefillShape.of([(1000, 0)])
BATCH = DecodeShape(32, 32_000)
SPLIT = Partition(76, 32)


def model(rate: float = 0.05, ceiling: float = 2.0) -> OnlineCost:
    return OnlineCost(roofline("a100-80gb", "llama-3.1-8b"), LAYERS, rate, ceiling)


def decode_seen(costs: OnlineCost, ratio: float, batch: DecodeShape = BATCH) -> Observation:
    solo = costs.inner.decode(batch, 108)
    return Observation(
        Lane.DECODE, Partition(0, 108), Sharing.EXCLUSIVE, None, batch, LAYERS, False, solo, ratio * solo
    )


def overlapped_decode(costs: OnlineCost, ratio: float) -> Observation:
    solo = costs.inner.decode(BATCH, 32)
    return Observation(Lane.DECODE, SPLIT, Sharing.SPATIAL, PROMPT, BATCH, LAYERS, True, solo, ratio * solo)


def test_a_constant_error_is_corrected_and_unseen_work_borrows_from_what_is_nearest() -> None:
    costs, plain = model(), roofline("a100-80gb", "llama-3.1-8b")
    for _ in range(ENOUGH):
        costs.observe(decode_seen(costs, 1.3))
    assert costs.decode(BATCH, 108) == pytest.approx(1.3 * plain.decode(BATCH, 108))
    assert costs.decode(DecodeShape(1, 10), 16) == pytest.approx(1.3 * plain.decode(DecodeShape(1, 10), 16))
    assert costs.prefill(PROMPT, 108) == plain.prefill(PROMPT, 108)


def test_the_nearest_cell_wins_over_the_general_one() -> None:
    costs = model()
    small = DecodeShape(1, 1000)
    for _ in range(4 * ENOUGH):
        costs.observe(decode_seen(costs, 1.5, small))
        costs.observe(decode_seen(costs, 0.9))
    assert costs.factor("decode", 108, 1) == pytest.approx(1.5)
    assert costs.factor("decode", 108, 32) == pytest.approx(0.9)


def test_sliced_prefill_is_compared_layer_by_layer() -> None:
    costs = model()
    block = 1.2 * costs.inner.prefill(PROMPT, 108) * 8 / LAYERS
    seen = Observation(
        Lane.PREFILL, Partition(108, 0), Sharing.EXCLUSIVE, PROMPT, None, 8, False, block, block
    )
    for _ in range(ENOUGH):
        costs.observe(seen)
    assert costs.factor("prefill", 108, 1000) == pytest.approx(1.2)


def test_mixed_passes_are_learned_apart() -> None:
    costs = model()
    took = 1.4 * costs.inner.fused(PROMPT, BATCH, 108)
    seen = Observation(
        Lane.DECODE, Partition(0, 108), Sharing.FUSED, PROMPT, BATCH, LAYERS, False, took, took
    )
    for _ in range(ENOUGH):
        costs.observe(seen)
    assert costs.fused(PROMPT, BATCH, 108) == pytest.approx(took)
    assert costs.decode(BATCH, 108) == costs.inner.decode(BATCH, 108)


def test_contention_teaches_the_guard_and_not_the_solo_prediction() -> None:
    costs = model()
    before = costs.slowdown(PROMPT, BATCH, SPLIT)[1]
    for _ in range(40):
        costs.observe(overlapped_decode(costs, 1.1))
    assert costs.decode(BATCH, 32) == costs.inner.decode(BATCH, 32)
    assert costs.slowdown(PROMPT, BATCH, SPLIT)[1] == pytest.approx(1.1)
    assert before > 1.1


def test_work_that_is_faster_beside_another_lane_than_predicted_alone_was_overestimated() -> None:
    costs = model()
    for _ in range(40):
        costs.observe(overlapped_decode(costs, 0.8))
    assert costs.factor("decode", 32, 32) == pytest.approx(0.8, rel=0.02)


@given(st.lists(st.floats(1e-9, 1e9), max_size=60), st.floats(0.01, 1.0), st.floats(1.01, 10.0))
@settings(max_examples=50, deadline=None)
def test_no_observation_moves_a_prediction_out_of_bounds(
    ratios: list[float], rate: float, ceiling: float
) -> None:
    costs, again = model(rate, ceiling), model(rate, ceiling)
    plain = costs.inner.decode(BATCH, 108)
    for ratio in ratios:
        costs.observe(decode_seen(costs, ratio))
        again.observe(decode_seen(again, ratio))
        assert 1 / ceiling - 1e-9 <= costs.decode(BATCH, 108) / plain <= ceiling + 1e-9
    assert costs.decode(BATCH, 108) == again.decode(BATCH, 108)


@pytest.mark.parametrize("measured", [0.0, -1.0, math.nan, math.inf])
def test_nonsense_is_left_out(measured: float) -> None:
    costs = model()
    for _ in range(2 * ENOUGH):
        costs.observe(decode_seen(costs, measured))
    assert costs.decode(BATCH, 108) == costs.inner.decode(BATCH, 108)


def test_it_wraps_the_fitted_model_where_a_table_exists_and_refuses_bad_options() -> None:
    online = FACTORIES["online"]
    assert type(online(device="8xa100-80gb", model="llama-3.1-70b").inner).__name__ == "FittedCost"  # type: ignore[attr-defined]
    assert type(online(device="h200", model="llama-3.1-8b").inner).__name__ == "RooflineCost"  # type: ignore[attr-defined]
    for options, culprit in (
        ({"base": "tea"}, "base"),
        ({"rate": 0.0}, "rate"),
        ({"ceiling": 1.0}, "ceiling"),
    ):
        with pytest.raises(OptionError, match=culprit):
            online(device="h200", model="llama-3.1-8b", **options)
