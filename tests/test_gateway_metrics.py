"""Metrics, the HTTP port they are on, and the statistics by SLO class."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest
from gateway_under_test import UnderTest, run_with_gateway
from hypothesis import assume, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from drift_core.frames import FinishedItem, StepFrame, Submit, TokensItem, pack_ids
from drift_core.sampling_params import SamplingParams
from drift_gateway import client as api
from drift_gateway.commands import serve_operations
from drift_gateway.http.metrics import METRICS, table
from drift_gateway.http.operations import add_operations
from drift_gateway.http.port import HttpPort
from drift_gateway.observe import service_stats
from drift_gateway.observe.service_stats import MAX_CLASSES, EndedOutput, ServiceStats
from drift_gateway.server import Address
from drift_scheduler.domain import SLO
from drift_scheduler.errors import DriftError

Get = Callable[[str], Awaitable[tuple[int, str]]]


def run_with_pages(body: Callable[[UnderTest, Get], Awaitable[None]], **options: object) -> None:
    """Run a test's coroutine with a gateway, and a function that GETs a path of its HTTP port."""

    async def with_pages(under: UnderTest) -> None:
        port = HttpPort()
        add_operations(port, under.supervisor)
        await port.open(Address("127.0.0.1", 0))
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port.port}") as session:

                async def get(path: str) -> tuple[int, str]:
                    async with session.get(path) as answer:
                        return answer.status, await answer.text()

                await body(under, get)
        finally:
            await port.close()

    run_with_gateway(with_pages, **options)


async def metrics_of(get: Get) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    status, text = await get("/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def vllm(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return "vllm:" + name, frozenset({"model_name": "fake", "engine": "0", **labels}.items())


def drift(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return "drift_" + name, frozenset(labels.items())


def test_metrics_count_what_was_served() -> None:
    async def body(under: UnderTest, get: Get) -> None:
        slo = api.SLO(ttft=60.0, tbt=1e-9, name="chat")
        await under.client.generate(token_ids=[1, 2, 3], max_tokens=5, slo=slo).complete()
        found = await metrics_of(get)
        assert found[vllm("generation_tokens_total")] == 5
        assert found[vllm("prompt_tokens_total")] == 3
        assert found[vllm("prefix_cache_hits_total")] == 1
        assert found[vllm("request_success_total", finished_reason="length")] == 1
        assert found[vllm("request_success_total", finished_reason="abort")] == 0
        assert found[vllm("time_to_first_token_seconds_count")] == 1
        assert found[vllm("inter_token_latency_seconds_count")] == 4
        assert found[vllm("request_generation_tokens_bucket", le="16.0")] == 1
        assert found[vllm("request_generation_tokens_bucket", le="4.0")] == 0
        assert found[vllm("num_requests_running")] == 0
        assert found[vllm("kv_cache_usage_perc")] == pytest.approx(0.0, abs=0.01)
        assert found[drift("slo_attained_total", **{"class": "chat", "metric": "ttft"})] == 1
        assert found[drift("slo_attained_total", **{"class": "chat", "metric": "tbt"})] == 0
        assert found[drift("slo_outputs_total", **{"class": "chat", "metric": "tbt"})] == 1
        assert found[drift("partition_units", lane="decode")] == 0, "idle now"
        assert found[drift("sharing_seconds_total", mode="spatial")] > 0
        assert found[drift("sharing_seconds_total", mode="idle")] > 0
        assert found[drift("engine_ready")] == 1
        assert found[drift("waiting_prefill_tokens")] == 0

    run_with_pages(body, step_seconds=0.002)


def test_every_metric_of_the_list_is_there() -> None:
    async def body(under: UnderTest, get: Get) -> None:
        await under.client.generate(token_ids=[1], max_tokens=3).complete()
        _, text = await get("/metrics")
        served = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
        assert {metric.name for metric in METRICS} <= served
        assert len({metric.name for metric in METRICS}) == len(METRICS)

    run_with_pages(body)


def test_health_lives_while_the_process_does_and_ready_follows_the_engine() -> None:
    async def body(under: UnderTest, get: Get) -> None:
        assert (await get("/health"))[0] == 200
        assert (await get("/ready"))[0] == 200
        under.supervisor.stop_accepting()
        assert (await get("/health"))[0] == 200
        assert (await get("/ready"))[0] == 503
        assert (await get("/nothing"))[0] == 404

    run_with_pages(body)


def test_a_page_of_another_site_cannot_read_the_port_by_a_name_of_its_own() -> None:
    async def body(under: UnderTest) -> None:
        port = HttpPort()
        add_operations(port, under.supervisor)
        await port.open(Address("127.0.0.1", 0))
        url = f"http://127.0.0.1:{port.port}/metrics"
        async with aiohttp.ClientSession() as session:
            for host, status in (
                ("evil.example", 403),
                ("localhost", 200),
                ("127.0.0.1:80", 200),
                ("[::1]:80", 200),
            ):
                async with session.get(url, headers={"Host": host}) as answer:
                    assert answer.status == status, host
                    assert answer.headers["X-Content-Type-Options"] == "nosniff"
        with pytest.raises(DriftError, match="cannot serve HTTP"):
            await HttpPort().open(Address("127.0.0.1", port.port))
        await port.close()

    run_with_gateway(body)


# ------------------------------------------------------------------------------- statistics by class


USUAL = SLO(1.0, 0.1)


def output(
    stats: ServiceStats,
    number: int,
    times: Sequence[float],
    *,
    slo: SLO = USUAL,
    reason: str = "length",
    arrival: float = 0.0,
) -> EndedOutput:
    """One output submitted, told of and ended, at the time of its last token."""
    frame = Submit(
        f"r#{number}", [1, 2, 3], SamplingParams(), slo.ttft, slo.tbt, slo.e2e, slo.name, 0, "", arrival
    )
    known: list[float] = []
    stats.submitted(frame, SimpleNamespace(times=known))
    for place, at in enumerate(times):
        known.append(at)
        stats.step(StepFrame(at, tokens=[TokensItem([frame.id], pack_ids([5]), first=not place)]))
    end = times[-1] if times else arrival
    item = FinishedItem(frame.id, reason, arrival=arrival, scheduled=arrival, finished=end, prompt_tokens=3)
    stats.step(StepFrame(end, finished=[item]))
    ended = stats.forget(frame.id)
    assert ended is not None
    return ended


def test_an_output_that_a_stop_string_ended_is_told_of_up_to_there() -> None:
    """The engine makes tokens until it has heard of it."""
    stats, times = ServiceStats(), [0.5, 0.6, 0.7, 2.0]
    frame = Submit("r#0", [1, 2, 3], SamplingParams(), 1.0, 0.2, 1.0, "c", 0, "", 0.0)
    stats.submitted(frame, SimpleNamespace(times=times))
    item = FinishedItem("r#0", "length", arrival=0.0, scheduled=0.25, finished=2.0, prompt_tokens=3)
    stats.step(StepFrame(2.0, finished=[item]))
    ended = stats.forget("r#0", stopped_after=3)
    assert ended is not None
    assert (ended.reason, ended.output_tokens, ended.first_token, ended.last_token) == ("stop", 3, 0.5, 0.7)
    assert ended.tbt_max == pytest.approx(0.1)
    assert ended.met == {"ttft": True, "tbt": True, "e2e": True}
    assert (ended.scheduled, ended.finished) == (0.25, 2.0)


def test_a_class_counts_what_ended_in_the_last_minute() -> None:
    stats = ServiceStats()
    for number in range(10):
        start = float(number)
        output(
            stats,
            number,
            [start + 0.5, start + 0.55, start + 0.6],
            slo=SLO(0.6, 0.06, None, "a"),
            arrival=start,
        )
    output(stats, 10, [20.9, 21.2], slo=SLO(0.6, 0.06, None, "a"), arrival=20.0)
    (report,) = stats.classes(22.0)
    assert (report.name, report.finished, report.ttft_target, report.tbt_target) == ("a", 11, 0.6, 0.06)
    assert report.ttft_attainment == report.tbt_attainment == 10 / 11
    assert report.ttft_p50 == pytest.approx(0.5, rel=0.04)
    assert report.ttft_p99 == pytest.approx(0.9, rel=0.04)
    assert report.tbt_p50 == pytest.approx(0.05, rel=0.04)
    assert report.tbt_p99 == pytest.approx(0.3, rel=0.04)
    assert report.goodput == pytest.approx(10 / 22)
    (later,) = stats.classes(79.0)
    assert (later.finished, later.ttft_attainment) == (1, 0.0), "the first ten are more than a minute ago"
    assert stats.classes(200.0) == []


def test_what_had_no_target_or_was_not_served_does_not_count() -> None:
    stats = ServiceStats()
    output(stats, 0, [0.1], slo=SLO(float("inf"), float("inf"), None, "free"))
    output(stats, 1, [0.1, 0.2], reason="cancelled")
    failed = output(stats, 2, [], reason="failed", slo=SLO(1.0, 0.1, 5.0, "hurt"))
    rejected = output(stats, 3, [], reason="rejected")
    assert (failed.met, rejected.met) == ({"ttft": False, "e2e": False}, {})
    free, hurt = stats.classes(1.0)
    assert (free.name, free.finished, free.ttft_attainment, free.tbt_attainment) == ("free", 1, None, None)
    assert (free.ttft_target, free.tbt_p50, free.goodput) == (None, None, 1.0)
    assert (hurt.name, hurt.finished, hurt.ttft_attainment, hurt.goodput) == ("hurt", 1, 0.0, 0.0)
    assert stats.by_target == {("hurt", "ttft"): [0, 1], ("hurt", "e2e"): [0, 1]}
    assert stats.ended_by_reason["cancelled"] == 1
    assert stats.waiting_prefill_tokens == 0


def test_names_of_classes_from_clients_take_bounded_memory() -> None:
    stats = ServiceStats()
    for number in range(500):
        output(stats, number, [0.5], slo=SLO(1.0, 0.1, None, f"class-{number}"))
    assert len({name for name, _ in stats.by_target}) <= MAX_CLASSES
    assert len(stats.classes(1.0)) <= MAX_CLASSES
    assert sum(report.finished for report in stats.classes(1.0)) == 500
    output(stats, 1000, [300.0], slo=SLO(1.0, 0.1, None, "new"), arrival=299.5)
    assert [report.name for report in stats.classes(300.0)] == ["new"], "old ones made room"


@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=200))
def test_quantiles_are_within_four_percent_of_the_true_ones(seconds: list[float]) -> None:
    stats = ServiceStats()
    for number, value in enumerate(seconds):
        output(stats, number, [value], arrival=0.0, slo=SLO(1.0, 0.1))
        stats._windows["default"].latest = 0
    times = np.sort(np.array(seconds))
    slots = [slot for slot in stats._windows["default"]._slots if slot.finished]
    counts = np.sum([slot.ttft for slot in slots], axis=0)
    kept = sum(slot.finished for slot in slots)
    assume(kept == len(seconds))  # all within one minute
    for fraction in (0.5, 0.99):
        found = service_stats._quantile(counts, fraction)
        assert found == pytest.approx(service_stats.nearest_rank(times, fraction), rel=0.04)


def test_clients_see_the_classes() -> None:
    async def body(under: UnderTest) -> None:
        await under.client.generate(
            token_ids=[1], max_tokens=5, slo=api.SLO(ttft=60.0, name="chat")
        ).complete()
        async for message in under.client.watch_stats(0.02):
            if message.classes:
                break
        (found,) = message.classes
        assert (getattr(found, "class"), found.finished, found.ttft_attainment) == ("chat", 1, 1.0)
        assert found.ttft_target_ms == 60_000.0
        assert found.HasField("tbt_p99_ms")
        assert (message.load.prompt_tokens, message.load.cached_tokens, message.load.total_pages) == (
            1,
            1,
            1000,
        )
        assert message.load.waiting_prefill_tokens == 0

    run_with_gateway(body)


# ------------------------------------------------------------------------------------------- the page

PAGE = Path(__file__).parent.parent / "docs" / "operations.md"


def test_the_page_for_operators_lists_the_metrics_there_are() -> None:
    told = PAGE.read_text(encoding="utf-8").partition("<!-- metrics -->\n")[2]
    assert told.partition("<!-- end of metrics -->")[0] == table(), (
        "python -m drift_gateway.http.metrics writes it"
    )


def test_the_page_for_operators_knows_every_option_they_have() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in (*serve_operations.OPTIONS, "http", "grace"):
        assert f"`--{name.replace('_', '-')} " in page, name
