"""Distributions, the metrics observer on a hand-made run, and the report's fixed keys."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    DecodeStep,
    Device,
    Event,
    Finished,
    FinishReason,
    Gang,
    Lane,
    LaneFailed,
    Observation,
    Output,
    Partition,
    PrefillBlock,
    PrefillChunk,
    PrefillDone,
    Request,
    RequestArrived,
    RequestTiming,
    Sharing,
    Step,
    StepRecord,
    Tokens,
)
from drift_scheduler.metrics import EXACT, Distribution, Metrics, attains
from drift_scheduler.report import build_report, print_report, to_json
from drift_scheduler.simulation.kv import CountingKv

SPLIT = Partition(6, 4)
DEVICE = Device(10, (Partition(10, 0), SPLIT, Partition(0, 10)), num_layers=4)
CHAT = SLO(1.0, 0.1, name="chat")
BATCH = SLO(10.0, 1.0, name="batch")


# ------------------------------------------------------------------------------------- distributions


def nearest_rank(values: list[float], q: float) -> float:
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.floats(0, 1))
def test_few_values_are_exact(values: list[float], q: float) -> None:
    found = Distribution()
    for value in values[::2]:
        found.add(value)
    found.extend(np.array(values[1::2]))
    assert found.quantile(q) == nearest_rank(values, q)
    assert found.maximum == max(values)
    assert found.total == pytest.approx(sum(values))


def test_many_values_are_within_one_percent_in_bounded_memory() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(-4, 1.5, size=3 * EXACT)
    found = Distribution()
    for piece in np.array_split(values, 97):
        found.extend(piece)
    found.add(float(values[0]))
    values = np.append(values, values[0])
    for q in (0.01, 0.5, 0.9, 0.99, 0.999):
        assert found.quantile(q) == pytest.approx(nearest_rank(values.tolist(), q), rel=0.0101)
    assert found.quantile(1.0) == pytest.approx(values.max(), rel=0.0101)
    assert found.summary()["max"] == values.max()
    assert found.summary()["mean"] == pytest.approx(values.mean())
    assert found._values.nbytes == 0


def test_values_off_the_scale_do_not_break_it() -> None:
    found = Distribution()
    found.extend(np.concatenate([np.zeros(EXACT), np.full(EXACT, 1e12)]))
    assert (found.quantile(0.25) or 0) < 1e-6
    assert found.summary()["max"] == 1e12


def test_no_values_have_no_quantiles() -> None:
    assert Distribution().quantile(0.5) is None
    assert Distribution().summary() == dict.fromkeys(("mean", "p50", "p90", "p99", "max"))


# ---------------------------------------------------------------------------------------- the observer


def timing(first: float, end: float, tokens: int, *, late: int = 0, cached: int = 0) -> RequestTiming:
    return RequestTiming(
        arrival=0.0,
        finished=end,
        scheduled=0.1,
        first_token=first,
        prompt_tokens=100,
        output_tokens=tokens,
        cached_tokens=cached,
        preemptions=1,
        late_tokens=late,
    )


def tokens(now: float, *gaps: float, first: bool = False) -> Tokens:
    return Tokens(now, tuple(str(i) for i in range(len(gaps))), None, np.array(gaps), first)


class Run:
    """Feeds hand-made steps to an observer."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.index = metrics, 0

    def step(
        self,
        now: float,
        *events: Event,
        gang: Gang | None = None,
        outputs: tuple[Output, ...] = (),
        seen: tuple[Observation, ...] = (),
    ) -> None:
        made = Step(gang=gang, outputs=outputs, observations=seen)
        self.metrics.on_step(StepRecord(self.index, now, events, made, 1e-4))
        self.index += 1


BLOCK = PrefillBlock(0, (PrefillChunk("0", 0, 100),), 0, 4)
DECODE = DecodeStep(("0",), 100)


def arrival(name: str) -> RequestArrived:
    return RequestArrived(Request(name, 0.0, 100, 10, CHAT))


def test_the_devices_time_is_accounted_for_to_the_last_second() -> None:
    metrics = Metrics(DEVICE)
    run = Run(metrics)
    run.step(2.0, arrival("0"), gang=Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, BLOCK))  # arrived at 0
    run.step(3.0, PrefillDone(1.0), gang=Gang(Sharing.SPATIAL, SPLIT, BLOCK, DECODE))
    run.step(4.0, DecodeDone(1.0))  # the decode lane idles: a bubble of 4 units
    run.step(6.0, PrefillDone(3.0), gang=Gang(Sharing.TEMPORAL, DEVICE.all_decode, BLOCK, DECODE))
    run.step(6.5, DecodeDone(0.5))
    run.step(7.0, PrefillDone(0.5), gang=Gang(Sharing.FUSED, DEVICE.all_decode, BLOCK, DECODE))
    run.step(
        8.0, DecodeDone(1.0), PrefillDone(1.0), gang=Gang(Sharing.EXCLUSIVE, DEVICE.all_decode, None, DECODE)
    )
    run.step(9.0, LaneFailed(Lane.DECODE, "broken"))
    run.step(10.0)
    assert metrics.duration == 10.0
    assert metrics.lanes.sharing == {
        "spatial": 3.0,
        "temporal": 1.0,
        "fused": 1.0,
        "streams": 0.0,
        "exclusive_prefill": 1.0,
        "exclusive_decode": 1.0,
        "idle": 1.0,
    }
    assert metrics.lanes.prefill_busy == pytest.approx(1 + 3 + 1 + 1)
    assert metrics.lanes.decode_busy == pytest.approx(1 + 0.5 + 1 + 1)
    assert metrics.bubble_ratio == pytest.approx(2 * 4 / (7 * 10))


def finish(slo: SLO, when: RequestTiming, reason: FinishReason = FinishReason.STOP) -> Finished:
    return Finished(when.finished, "0", reason, when, slo)


def sample_run() -> Metrics:
    metrics = Metrics(DEVICE, CountingKv(10))
    run = Run(metrics)
    run.step(
        0.0, arrival("0"), arrival("1"), arrival("2"), gang=Gang(Sharing.EXCLUSIVE, DEVICE.all_prefill, BLOCK)
    )
    seen = Observation(Lane.PREFILL, SPLIT, Sharing.SPATIAL, BLOCK.shape(), None, 4, False, 0.4, 0.5)
    run.step(0.5, PrefillDone(0.5), outputs=(tokens(0.5, 0.5, 0.5, first=True),), seen=(seen,))
    run.step(0.6, DecodeDone(0.1), outputs=(tokens(0.6, 0.1, 0.05),))
    run.step(
        1.0,
        DecodeDone(0.4),
        outputs=(
            tokens(1.0, 0.4),
            finish(CHAT, timing(0.5, 1.0, 3, late=1)),
            finish(BATCH, timing(0.5, 1.0, 2, cached=64)),
            finish(BATCH, RequestTiming(0.0, 0.2, prompt_tokens=9), FinishReason.REJECTED),
        ),
    )
    return metrics


def test_the_report_has_every_key_that_tools_rely_on() -> None:
    report = build_report(sample_run(), {"seed": 1})
    assert json.loads(to_json(report)) == report
    assert report["schema"] == "drift.report/1"
    assert report["requests"] == {"offered": 3, "finished": 2, "rejected": 1, "cancelled": 0, "failed": 0}
    assert report["duration_s"] == 1.0
    assert report["throughput"] == {
        "requests_per_s": 2.0,
        "output_tokens_per_s": 5.0,
        "total_tokens_per_s": 205.0,
    }
    for key in ("ttft_s", "tbt_s", "tpot_s", "e2e_s", "queue_s"):
        assert set(report[key]) == {"mean", "p50", "p90", "p99", "max"}
    assert report["tbt_s"]["max"] == 0.4
    assert report["tbt_s"]["p50"] == 0.1
    assert report["ttft_s"]["p99"] == 0.5
    assert report["tpot_s"]["max"] == 0.5
    assert report["queue_s"]["mean"] == pytest.approx(0.1)
    assert report["kv"] == {"prefix_hit_ratio": 0.32, "peak_utilisation": 0.0, "preemptions": 2}
    assert set(report["lanes"]) == {"prefill_busy", "decode_busy", "bubble_ratio"}
    assert report["scheduler"]["steps"] == 4
    assert report["scheduler"]["step_us"] == {"p50": pytest.approx(100), "p99": pytest.approx(100)}
    assert report["cost_model"]["error"] == {"prefill": pytest.approx(0.2), "decode": None}


def test_attainment_is_per_class_and_a_lost_request_attains_nothing() -> None:
    slo = build_report(sample_run(), {})["slo"]
    assert slo["classes"]["chat"] == {
        "ttft_s": 1.0,
        "tbt_s": 0.1,
        "requests": 1,
        "ttft_attainment": 1.0,
        "tbt_attainment": 0.5,
        "attainment": 0.0,
        "met": False,
    }
    batch = slo["classes"]["batch"]
    assert (batch["requests"], batch["ttft_attainment"], batch["attainment"]) == (2, 0.5, 0.5)
    assert slo["met"] is False
    assert slo["attainment"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("when", "slo", "met"),
    [
        (timing(1.0, 2.0, 10), CHAT, True),
        (timing(1.01, 2.0, 10), CHAT, False),
        (timing(0.5, 2.0, 101, late=1), CHAT, True),
        (timing(0.5, 2.0, 100, late=1), CHAT, False),
        (timing(0.5, 2.0, 1), SLO(1, 1, e2e=1.5), False),
        (RequestTiming(0, 1), CHAT, False),
    ],
)
def test_a_request_attains_its_own_targets(when: RequestTiming, slo: SLO, met: bool) -> None:
    assert attains(when, slo) is met


def test_an_empty_run_reports_nothing_rather_than_failing() -> None:
    report = build_report(Metrics(DEVICE), {})
    assert report["requests"]["offered"] == 0
    assert report["ttft_s"]["p99"] is None
    to_json(report)


def test_the_table_for_people_names_targets_and_classes() -> None:
    from rich.console import Console

    console = Console(width=120, force_terminal=False)
    with console.capture() as captured:
        print_report(build_report(sample_run(), {}), console)
    text = captured.get()
    assert "2 of 3 requests finished in 1.0 s (1 rejected)" in text
    assert "NOT met" in text
    assert "class chat" in text
    assert "TTFT" in text
