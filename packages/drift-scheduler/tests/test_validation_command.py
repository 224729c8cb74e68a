"""bench/validate.py: its latencies, its marks and its document; the goodput searches themselves are goodput's tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drift_scheduler.plugins import load
from drift_scheduler.simulation.run import parse_choice

SCRIPT = Path(__file__).parents[3] / "bench" / "validate.py"


@pytest.fixture(scope="module")
def validate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_validate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_fitted_model_is_within_nine_percent_and_the_rooflines_error_is_stated(validate: Any) -> None:
    found = validate.latencies()
    assert found["fitted"]["worst"] < 0.09
    assert 0.01 < found["roofline"]["worst"] < 0.15
    text = validate.latency_section(found)
    assert f"`roofline`: worst {found['roofline']['worst']:.1%}" in text
    assert text.count("\n| 16 |") == 2


@pytest.mark.parametrize(
    ("gang", "rival", "published", "shown"),
    [
        (2.0, 1.0, 1.9, "2.00 (1.90)"),
        (3.0, 1.0, 1.9, "**3.00** (1.90)"),
        (1.0, 0.0, float("inf"), "never meets (never meets)"),
        (1.0, 0.0, 2.0, "**never meets** (2.00)"),
        (1.0, 0.5, None, "2.00"),
    ],
)
def test_ratios_more_than_a_quarter_apart_are_marked(
    validate: Any, gang: float, rival: float, published: float | None, shown: str
) -> None:
    assert validate.compare(gang, rival, published) == shown


def test_every_policy_it_compares_is_installed_and_every_workload_has_a_bound(validate: Any) -> None:
    registry = load(installed=False)
    for cell in validate.RATIOS:
        assert cell.workload in validate.TTFT
        for policy in ("gang", *cell.published, *validate.OTHERS):
            assert parse_choice(policy)[0] in registry.dispatch_policies


def test_the_what_if_table_charges_a_fixed_time_per_mixed_pass(validate: Any, tmp_path: Path) -> None:
    from drift_scheduler.cost.fitted import fitted
    from drift_scheduler.domain import DecodeShape, PrefillShape

    dear = fitted(str(validate.mixed_8b(tmp_path)))
    plain = fitted("", validate.CLUSTER, validate.SMALL)
    decode = DecodeShape(32, 32_768)
    for tokens in (224, 4064):
        chunk = PrefillShape.of([(tokens, 0)])
        assert dear.fused(chunk, decode, 108) - plain.fused(chunk, decode, 108) == pytest.approx(
            0.021, abs=0.002
        )
        assert dear.prefill(chunk, 108) == plain.prefill(chunk, 108)


def test_the_document_holds_every_cell_that_was_run(validate: Any) -> None:
    cell = validate.RATIOS[0]
    row = {"dispatch": "gang", "limited_by": "TTFT", "tbt_p99_s": 0.09, "bubble_ratio": 0.05, "hits": 0.5}
    result = {
        "settings": {"quick": True, "seeds": [0], "tolerance": 0.05, "requests": 60, "span": 2},
        "latencies": validate.latencies(),
        "goodput": {
            f"{cell.label}|gang": {**row, "rate": 3.0},
            f"{cell.label}|chunked-prefill": {
                **row,
                "rate": 1.0,
                "dispatch": "chunked-prefill:token_budget=256",
            },
        },
        "ablations": {
            validate.BIG: {"rate": 1.0, "runs": [{"p99": p, "bubble": 0.1} for p in (0.09, 0.1, 0.7)]}
        },
    }
    text = validate.document(result)
    assert f"| {cell.label} | 3.00 (3.06) | - | - | - |" in text
    assert "`chunked-prefill:token_budget=256` | 1.00" in text
    assert "| +10 (+10) | +610 (+672) |" in text
    assert "a smoke test, not a result" in text


def test_a_broken_run_goes_on_from_what_it_knew(validate: Any, tmp_path: Path) -> None:
    from collections.abc import Generator, Sequence

    from drift_scheduler.domain import SLO
    from drift_scheduler.goodput import Criterion, Outcome, PolicyGoodput, Trial
    from drift_scheduler.simulation.run import Scenario

    scenario = Scenario("sharegpt", "h200", "llama-3.1-8b", "gang", SLO(1, 0.1))
    asked: list[float | None] = []

    def search() -> Generator[Sequence[Trial], Sequence[Outcome], PolicyGoodput]:
        for rate in (1.0, 2.0):
            outcomes = yield [Trial(Scenario(**{**_fields(scenario), "rate": rate}), Criterion())]
            asked.append(outcomes[0].rate)
        outcomes = yield [Trial(Scenario(**{**_fields(scenario), "rate": 1.0}))]
        return PolicyGoodput("gang", "gang", (), report=outcomes[0].report)

    path = tmp_path / "known.jsonl"
    first = validate.Memory(str(path)).skip_known("cell|gang", search())
    assert next(first)[0].scenario.rate == 1.0
    assert first.send([Outcome(1.0, True)])[0].scenario.rate == 2.0
    first.close()

    second = validate.Memory(str(path)).skip_known("cell|gang", search())
    assert next(second)[0].scenario.rate == 2.0
    whole = second.send([Outcome(2.0, False, "TBT")])[0]
    assert whole.criterion is None
    with pytest.raises(StopIteration):
        second.send([Outcome(1.0, True, report={"a": 1})])

    third = validate.Memory(str(path)).skip_known("cell|gang", search())
    with pytest.raises(StopIteration) as done:
        next(third)
    assert done.value.value.report == {"a": 1}
    assert asked == [1.0, 1.0, 2.0, 1.0, 2.0]


def _fields(scenario: object) -> dict[str, Any]:
    from dataclasses import fields

    return {field.name: getattr(scenario, field.name) for field in fields(scenario)}  # type: ignore[arg-type]
