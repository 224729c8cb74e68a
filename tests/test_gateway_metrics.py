"""Metrics, the HTTP port they are on, and the statistics by SLO class."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from gateway_under_test import UnderTest, run_with_gateway
from prometheus_client.parser import text_string_to_metric_families

from drift_gateway import client as api
from drift_gateway.http_port import HttpPort
from drift_gateway.http_routes import add_operations
from drift_gateway.metrics import METRICS
from drift_gateway.server import Address
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
