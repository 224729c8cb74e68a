"""Cost models: the published A100 latencies, fitting, interpolation, tables as files, the contention guard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.cost import FACTORIES
from drift_scheduler.cost.fitted import FittedCost, fitted, non_negative
from drift_scheduler.cost.guard import CEILING, CONTENTION, RETRY, SETTLED, WINDOW, ContentionGuard
from drift_scheduler.cost.hardware import device_spec, model_spec
from drift_scheduler.cost.launch import Launched
from drift_scheduler.cost.online import ENOUGH, OnlineCost
from drift_scheduler.cost.roofline import RooflineCost, roofline
from drift_scheduler.cost.table import (
    CostTable,
    DecodeRow,
    PrefillRow,
    built_in_table,
    read_table,
    write_table,
)
from drift_scheduler.dispatch.prompts import Fronts, new_batch, seconds_alone
from drift_scheduler.domain import (
    SLO,
    DecodeShape,
    Lane,
    Observation,
    Partition,
    PrefillChunk,
    PrefillShape,
    Request,
    Sharing,
    Waiting,
)
from drift_scheduler.errors import DriftError

DEVICE = "8xa100-80gb"
K = 1024

# As published (arXiv 2504.14489), ms by SM count:
# 70B decode 32x1K, 32x4K, prefill 4K, 2K with 32K reused; 8B decode 32x1K, prefill 4K.
PUBLISHED = {
    16: (55.6, 80.0, 2042, 1775, 11.9, 272),
    32: (34.1, 46.8, 1054, 908, 8.1, 143),
    48: (31.1, 38.9, 751, 671, 7.6, 107),
    64: (26.5, 33.1, 599, 508, 6.7, 92),
    80: (26.0, 31.5, 516, 464, 6.6, 82),
    108: (25.3, 29.1, 445, 403, 6.5, 73),
}


def deviations(kind: str) -> list[float]:
    """Relative errors of a kind of cost model on every published cell."""
    big = FACTORIES[kind](device=DEVICE, model="llama-3.1-70b")
    small = FACTORIES[kind](device=DEVICE, model="llama-3.1-8b")
    errors = []
    for units, (d1, d4, p4, p2, d8, p8) in PUBLISHED.items():
        predicted = (
            (d1, big.decode(DecodeShape(32, 32 * K), units)),
            (d4, big.decode(DecodeShape(32, 128 * K), units)),
            (p4, big.prefill(PrefillShape.of([(4 * K, 0)]), units)),
            (p2, big.prefill(PrefillShape.of([(2 * K, 32 * K)]), units)),
            (d8, small.decode(DecodeShape(32, 32 * K), units)),
            (p8, small.prefill(PrefillShape.of([(4 * K, 0)]), units)),
        )
        errors += [abs(1e3 * seconds / ms - 1) for ms, seconds in predicted]
    return errors


def test_the_fitted_model_reproduces_every_published_a100_latency_within_9_percent() -> None:
    assert max(deviations("fitted")) < 0.09


def test_the_roofline_model_is_within_12_percent_of_them_and_4_percent_on_average() -> None:
    errors = deviations("roofline")
    assert max(errors) < 0.12
    assert sum(errors) / len(errors) < 0.04


def test_the_published_mixed_steps_are_reproduced() -> None:
    costs = fitted("", DEVICE, "llama-3.1-70b")
    decode = DecodeShape(32, 32 * K)
    assert costs.fused(PrefillShape.of([(4 * K - 32, 0)]), decode, 108) == pytest.approx(0.505, rel=0.02)
    assert costs.fused(PrefillShape.of([(256 - 32, 0)]), decode, 108) == pytest.approx(0.100, rel=0.02)


def test_deviations_name_the_worst_row() -> None:
    rows = tuple(DecodeRow(units=1, batch=b, context_tokens=0, seconds=0.01 * b) for b in (1, 2, 4))
    off = DecodeRow(units=1, batch=8, context_tokens=0, seconds=0.16)
    costs = FittedCost(small_table(decode=(*rows, off)))
    found = costs.deviations()["decode"]
    assert found.rows == 4
    assert 0.05 < found.worst < 1
    assert found.row in range(4)


def test_coefficients_of_units_between_measured_ones_go_linearly_with_one_over_units() -> None:
    def seconds(units: int) -> float:
        return 0.6 / units + 0.004  # scales, plus a fixed part

    rows = tuple(DecodeRow(units=u, batch=1, context_tokens=0, seconds=seconds(u)) for u in (2, 8))
    costs = FittedCost(small_table(total=8, decode=rows))
    one = DecodeShape(1, 0)
    assert costs.decode(one, 4) == pytest.approx(seconds(4))
    assert costs.decode(one, 1) == pytest.approx(2 * seconds(2))  # below: in proportion
    assert costs.decode(one, 9) == costs.decode(one, 8)  # above: no faster
    with pytest.raises(ValueError, match="0 units"):
        costs.decode(one, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_non_negative_least_squares_is_no_worse_than_any_non_negative_try(seed: int) -> None:
    rng = np.random.default_rng(seed)
    terms, values = rng.normal(size=(8, 3)), rng.normal(size=8)
    x = np.array(non_negative(terms, values))
    assert (x >= 0).all()
    best = np.linalg.norm(terms @ x - values)
    for other in rng.exponential(size=(200, 3)) * (rng.random((200, 3)) < 0.5):
        assert best <= np.linalg.norm(terms @ other - values) + 1e-9
    for nudge in rng.normal(size=(100, 3)) * 1e-3:
        assert best <= np.linalg.norm(terms @ np.maximum(0, x + nudge) - values) + 1e-9


@pytest.mark.parametrize("costs", [fitted("", DEVICE, "llama-3.1-70b"), roofline("h200", "llama-3.1-8b")])
def test_predictions_are_plain_floats_that_grow_with_work_and_shrink_with_units(
    costs: FittedCost | RooflineCost,
) -> None:
    small, large = PrefillShape.of([(512, 0)]), PrefillShape.of([(512, 0), (2048, 4096)])
    few, many = DecodeShape(4, 4 * K), DecodeShape(64, 128 * K)
    for units in (16, 40, 76, 108):
        assert 0 < costs.prefill(small, units) < costs.prefill(large, units)
        assert 0 < costs.decode(few, units) < costs.decode(many, units)
        assert costs.fused(large, many, units) > costs.decode(many, units)
        # one pass instead of two reads the weights once
        if isinstance(costs, RooflineCost):
            assert costs.fused(large, many, units) < costs.prefill(large, units) + costs.decode(many, units)
    assert costs.prefill(large, 92) < costs.prefill(large, 44)
    assert costs.decode(many, 92) < costs.decode(many, 44)
    assert type(costs.prefill(small, 76)) is float
    assert type(costs.decode(few, 33)) is float


def test_the_roofline_stays_above_the_floors_of_an_h200() -> None:
    costs = roofline("h200", "llama-3.1-8b")
    for batch, context, floor_ms in ((1, K, 3.4), (64, 2 * K, 6.9), (128, 2 * K, 10.5)):
        assert floor_ms < 1e3 * costs.decode(DecodeShape(batch, batch * context), 132) < 2 * floor_ms
    tokens_per_s = 4 * K / costs.prefill(PrefillShape.of([(4 * K, 0)]), 132)
    assert 30e3 < tokens_per_s < 61.6e3


# ------------------------------------------------------------------------------------------ tables


def small_table(
    total: int = 2, decode: tuple[DecodeRow, ...] = (), prefill: tuple[PrefillRow, ...] = ()
) -> CostTable:
    return CostTable(
        device="d",
        model="m",
        num_layers=4,
        total_units=total,
        menu=((total, 0), (1, 1), (0, total)),
        prefill=prefill
        or (
            PrefillRow(units=1, requests=1, new=8, reused=0, new_squared=64, new_times_reused=0, seconds=0.1),
        ),
        decode=decode or (DecodeRow(units=1, batch=1, context_tokens=8, seconds=0.01),),
    )


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    table = built_in_table("8xa100-80gb--llama-3.1-70b")
    write_table(table, tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == table
    assert (tmp_path / "t.json").read_text().count("\n") > len(table.prefill)  # a row a line


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("prefill", 0, "seconds"), -1, "field prefill[0].seconds"),
        (("decode", 0, "batch"), "x", "field decode[0].batch"),
        (("decode", 0, "units"), 3, "decode[0]: field units: 3 of a device of 2"),
        (("prefill", 0, "new_squared"), 5, "prefill[0]: field new_squared: 5"),
        (("prefill", 0, "new_times_reused"), 5, "prefill[0]: field new_times_reused"),
        (("menu", 1), [2, 1], "menu[1]: 2+1 units of 2"),
        (("schema",), "drift.cost/9", "field schema"),
        (("decode",), [], "field decode"),
        (("typo",), 1, "unknown field `typo`"),
    ],
)
def test_a_bad_table_is_one_line_with_file_and_row(
    tmp_path: Path, path: tuple[str | int, ...], value: object, message: str
) -> None:
    file = tmp_path / "table.json"
    write_table(small_table(), file)
    content = json.loads(file.read_text())
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(DriftError) as caught:
        read_table(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"decode": NaN}', "\x00\xff"])
def test_a_table_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(DriftError, match=r"table\.json"):
        read_table(file)
    with pytest.raises(DriftError, match="No such file"):
        read_table(tmp_path / "none.json")


def test_a_missing_built_in_table_says_what_there_is() -> None:
    with pytest.raises(DriftError, match=r"model 'demo' on device 'cpu'.*8xa100-80gb--llama-3\.1-8b"):
        fitted("", "cpu", "demo")


# ------------------------------------------------------------------------------------- contention guard

PREFILL, DECODE, SPLIT = PrefillShape.of([(2 * K, 0)]), DecodeShape(32, 32 * K), Partition(76, 32)


def seen(lane: Lane, measured: float, overlapped: bool = True, both: bool = True) -> Observation:
    return Observation(
        lane,
        SPLIT,
        Sharing.SPATIAL,
        PREFILL if both or lane is Lane.PREFILL else None,
        DECODE if both or lane is Lane.DECODE else None,
        40,
        overlapped,
        0.0,
        measured,
    )


@pytest.mark.parametrize("both", [True, False])
def test_the_guard_starts_from_its_prior_and_ends_at_the_worst_it_saw(both: bool) -> None:
    costs = fitted("", DEVICE, "llama-3.1-70b", slowdown_prefill=1.1, slowdown_decode=1.3)
    assert costs.slowdown(PREFILL, DECODE, SPLIT) == (1.1, 1.3)
    solo = costs.decode(DECODE, 32)
    costs.observe(seen(Lane.DECODE, 1.5 * solo, both=both))
    assert costs.slowdown(PREFILL, DECODE, SPLIT) == (1.1, pytest.approx(1.5))
    half = 0.5 * costs.prefill(PREFILL, 76)  # 40 of 80 layers
    for i in range(SETTLED):
        costs.observe(seen(Lane.PREFILL, (1.0 + 0.002 * i) * half, both=both))
    assert costs.slowdown(PREFILL, DECODE, SPLIT)[0] == pytest.approx(1.0 + 0.002 * (SETTLED - 1))
    costs.observe(seen(Lane.DECODE, 1000 * solo, both=both))
    assert costs.slowdown(PREFILL, DECODE, SPLIT)[1] == CEILING
    assert costs.slowdown(PREFILL, DECODE, Partition(60, 48)) == (1.1, 1.3)  # another split, another cell


def test_the_guard_learns_only_from_lanes_that_ran_side_by_side() -> None:
    costs = roofline("a100-80gb", "llama-3.1-8b")
    costs.observe(seen(Lane.DECODE, 9.0, overlapped=False))
    assert not costs.guard.cells()["decode"]
    with pytest.raises(ValueError, match="between 1 and 100"):
        ContentionGuard(0.5, 1.0)


def test_the_guard_forgets_accidents_and_keeps_contention() -> None:
    costs = fitted("", DEVICE, "llama-3.1-70b", slowdown_prefill=1.1, slowdown_decode=1.1)
    solo = costs.decode(DECODE, 32)
    costs.observe(seen(Lane.DECODE, 3.0 * solo))
    costs.observe(seen(Lane.DECODE, 1.4 * solo))
    for _ in range(WINDOW - 3):
        costs.observe(seen(Lane.DECODE, solo))
    assert costs.slowdown(PREFILL, DECODE, SPLIT)[1] == pytest.approx(3.0)
    for _ in range(WINDOW + 2):
        costs.observe(seen(Lane.DECODE, solo))
    assert costs.slowdown(PREFILL, DECODE, SPLIT)[1] == CONTENTION
    milder = fitted("", DEVICE, "llama-3.1-70b", slowdown_prefill=1.1, slowdown_decode=1.1)
    for ratio in [1.4] + [1.0] * 3 * WINDOW:
        milder.observe(seen(Lane.DECODE, ratio * solo))
    assert milder.slowdown(PREFILL, DECODE, SPLIT)[1] == pytest.approx(1.4)


def test_a_cell_that_an_accident_made_everyone_avoid_gets_another_chance() -> None:
    guard = ContentionGuard(1.1, 1.1)
    elsewhere = Partition(60, 48)
    for ratio in [1.0] * SETTLED + [4.0]:
        guard.record_decode(ratio, PREFILL, DECODE, SPLIT)
    assert guard.worst(PREFILL, DECODE, SPLIT)[1] == 4.0
    for _ in range(2 * RETRY):
        guard.record_decode(1.0, PREFILL, DECODE, elsewhere)
    assert guard.worst(PREFILL, DECODE, SPLIT)[1] == CONTENTION
    assert guard.worst(PREFILL, DECODE, elsewhere)[1] == 1.0


@pytest.mark.parametrize("sharing", [Sharing.EXCLUSIVE, Sharing.TEMPORAL, Sharing.FUSED])
def test_the_guard_knows_how_late_undivided_work_was_of_late(sharing: Sharing) -> None:
    costs = roofline("a100-80gb", "llama-3.1-8b")
    whole = Partition(0, 108)

    def work(ratio: float) -> Observation:
        fused = sharing is Sharing.FUSED
        solo = costs.fused(PREFILL, DECODE, 108) if fused else costs.decode(DECODE, 108)
        prefill = PREFILL if fused else None
        return Observation(Lane.DECODE, whole, sharing, prefill, DECODE, 32, False, solo, ratio * solo)

    assert costs.slowdown(PREFILL, DECODE, whole) == (1.0, 1.0)
    costs.observe(work(1.005))
    assert costs.slowdown(PREFILL, DECODE, whole) == (1.0, 1.0)
    costs.observe(work(1.7))
    assert costs.slowdown(PREFILL, DECODE, whole) == (1.0, pytest.approx(1.7))
    assert costs.slowdown(PREFILL, DECODE, Partition(108, 0)) == (1.0, pytest.approx(1.7))
    for _ in range(2 * WINDOW):
        costs.observe(work(0.9))
    assert costs.slowdown(PREFILL, DECODE, whole) == (1.0, 1.0)


class Bare:
    """A third party's model, which prices prompts one by one."""

    def prefill(self, work: PrefillShape, units: int) -> float:
        return (work.new_tokens + 0.5 * work.reused_tokens + 1e-3 * work.new_squared) / units

    def observe(self, observation: Observation) -> None:
        return


def _taught(costs: OnlineCost) -> OnlineCost:
    for tokens, ratio in ((100, 1.3), (3000, 0.8), (40_000, 1.1)):
        shape = PrefillShape.of([(tokens, 0)])
        seconds = costs.prefill(shape, 132)
        for _ in range(ENOUGH):
            costs.observe(
                Observation(
                    Lane.PREFILL,
                    Partition(132, 0),
                    Sharing.EXCLUSIVE,
                    shape,
                    None,
                    32,
                    False,
                    seconds,
                    seconds * ratio,
                )
            )
    return costs


@pytest.mark.parametrize(
    "name", ["roofline", "fitted", "launched", "online", "online within launched", "bare"]
)
@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(st.tuples(st.integers(1, 200_000), st.integers(0, 200_000)), max_size=40))
def test_prompts_priced_at_once_cost_what_they_cost_one_by_one(
    name: str, prompts: list[tuple[int, int]]
) -> None:
    device, model = device_spec("h200"), model_spec("llama-3.1-8b")
    costs: Any = {
        "roofline": lambda: roofline("h200", "llama-3.1-8b"),
        "fitted": lambda: fitted(f"{DEVICE}--llama-3.1-8b"),
        "launched": lambda: Launched(RooflineCost(device, model), device, 32),
        "online": lambda: _taught(OnlineCost(RooflineCost(device, model), 32)),
        "online within launched": lambda: Launched(
            _taught(OnlineCost(RooflineCost(device, model), 32)), device, 32
        ),
        "bare": lambda: Launched(Bare(), device, 32),  # type: ignore[arg-type]
    }[name]()
    assert hasattr(costs, "prefill_each") == (name != "bare")
    waiting = [
        Waiting(Request(f"r{i}", 0.0, new + reused, 1, SLO(1.0, 1.0)), reused, new + reused, 0, 1.0, False)
        for i, (new, reused) in enumerate(prompts)
    ]
    alone = [costs.prefill(PrefillShape.of([pair]), 100) for pair in prompts]
    assert seconds_alone(costs, waiting, 100) == alone


@settings(max_examples=100, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), min_size=1, max_size=8),
    share=st.floats(0, 1.2),
)
def test_the_front_of_a_batch_has_the_shape_of_its_chunks(
    chunks: list[tuple[int, int]], share: float
) -> None:
    batch = new_batch(tuple(PrefillChunk(f"r{i}", r, r + n) for i, (n, r) in enumerate(chunks)))
    tokens = max(1, round(share * batch.shape.new_tokens))
    fronts = Fronts(batch)
    front = fronts.chunks(tokens)
    assert fronts.shape(tokens) == PrefillShape.of([(c.tokens, c.start) for c in front])
    assert sum(c.tokens for c in front) == min(tokens, batch.shape.new_tokens)
    for cut, whole in zip(front, batch.chunks, strict=False):
        assert (cut.request_id, cut.start, cut.last) == (
            whole.request_id,
            whole.start,
            cut.stop == whole.stop,
        )
    assert all(cut.last for cut in front[:-1])
