"""Health, reflection, server info, load and the timeline."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_under_test import UnderTest, ready_in, run_with_gateway
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from drift_core.frames import FinishedItem, LoadItem, StepFrame, TokensItem, pack_ids
from drift_gateway import client as api
from drift_gateway.observe.splits_used import SplitsUsed
from drift_gateway.observe.timeline import Stretch, Timeline, Use
from drift_gateway.server import GENERATION, INFO
from drift_gateway.v1 import info_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_server_info_tells_what_is_served(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        info = await under.client.server_info()
        assert info.readiness == pb.READINESS_READY
        assert info.version
        assert (info.model.name, info.model.vocab_size, info.model.max_context_tokens) == ("fake", 300, 4096)
        assert info.model.has_tokenizer
        assert info.model.has_chat_template
        assert (info.device.name, info.device.units) == ("fake", 2)
        menu = [(entry.prefill_units, entry.decode_units) for entry in info.device.partition_menu]
        assert menu == [(1, 1), (2, 0), (0, 2)]
        assert (info.policies.dispatch, info.policies.partition) == ("gang", "tightest-decode")
        assert (info.kv_pool.page_tokens, info.kv_pool.total_pages, info.kv_pool.total_tokens) == (
            16,
            1000,
            16000,
        )
        assert (info.slo_defaults.ttft_ms, info.slo_defaults.tbt_ms) == (2000.0, 100.0)
        assert not info.HasField("start_up")

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_a_model_without_tokenizer_says_so() -> None:
    async def body(under: UnderTest) -> None:
        assert not (await under.client.server_info()).model.has_tokenizer

    run_with_gateway(body)


def test_health_follows_the_engine() -> None:
    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)

            async def status(service: str) -> int:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                found: int = answer.status
                return found

            assert [await status(name) for name in ("", GENERATION, INFO)] == [SERVING] * 3
            with pytest.raises(grpc.aio.AioRpcError):
                await status("no.such.Service")
            watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service=GENERATION)))
            assert (await anext(watch)).status == SERVING
            await asyncio.to_thread(under.engine.crash)
            assert (await anext(watch)).status == NOT_SERVING
            assert (await anext(watch)).status == SERVING

    run_with_gateway(body)


def test_reflection_lists_every_service_and_describes_ours() -> None:
    async def body(under: UnderTest) -> None:
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=GENERATION),
        ]
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            listing, file = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
        names = {service.name for service in listing.list_services_response.service}
        assert {GENERATION, INFO, "grpc.health.v1.Health"} <= names
        assert file.file_descriptor_response.file_descriptor_proto

    run_with_gateway(body)


def test_load_counts_what_is_in_flight() -> None:
    async def body(under: UnderTest) -> None:
        async def load() -> pb.Load:
            async for message in under.client.watch_stats(0.02):
                return message.load
            raise AssertionError("no stats")

        running = asyncio.ensure_future(under.client.generate(token_ids=[1], n=2, max_tokens=3).completions())
        await under.until(lambda engine: len(engine.submits()) == 2)
        before = await load()
        assert (before.in_flight, before.max_in_flight) == (2, 77)
        assert not before.HasField("running")
        under.engine.step(5)
        await running
        after = await load()
        assert (after.in_flight, after.tokens_generated, after.requests_finished) == (0, 6, 2)
        assert (after.waiting, after.running, after.free_pages) == (0, 0, 1000)

    run_with_gateway(body, max_in_flight=77, paused=True)


def test_the_timeline_of_a_run_has_no_gaps() -> None:
    async def body(under: UnderTest) -> None:
        stretches: list[pb.Stretch] = []

        async def watch() -> None:
            async for message in under.client.watch_stats(0.02):
                stretches.extend(message.stretches)

        def used() -> list[pb.Sharing]:
            return [stretch.sharing for stretch in stretches]

        watching = asyncio.ensure_future(watch())
        while not stretches:
            await asyncio.sleep(0.002)
        await under.client.generate(token_ids=[1], max_tokens=50).complete()
        while pb.SHARING_SPATIAL not in used() or used()[-1] != pb.SHARING_IDLE:
            await asyncio.sleep(0.002)
        watching.cancel()
        assert all(a.stop_us == b.start_us for a, b in pairwise(stretches))
        busy = next(stretch for stretch in stretches if stretch.sharing == pb.SHARING_SPATIAL)
        assert (busy.partition.prefill_units, busy.partition.decode_units, busy.decode_requests) == (1, 1, 1)

    run_with_gateway(body, step_seconds=0.005)


def test_the_interval_of_stats_is_bounded() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.InvalidRequest, match="interval_ms: 5 is not from 20 to 60000"):
            async for _ in under.client.watch_stats(0.005):
                pass

    run_with_gateway(body)


def test_watchers_are_told_of_the_end() -> None:
    async def body(under: UnderTest) -> None:
        messages = aiter(under.client.watch_stats(60.0))
        await anext(messages)
        closing = asyncio.ensure_future(under.gateway.close(0.0))
        assert [message async for message in messages]
        await closing

    run_with_gateway(body)


def frame(time: float, prefill: int = 0, decode: int = 0) -> StepFrame:
    partition = (1, 1) if prefill or decode else None
    sharing = "spatial" if partition else None
    return StepFrame(
        time, partition=partition, sharing=sharing, prefill_requests=prefill, decode_requests=decode
    )


def test_steps_that_change_nothing_make_one_stretch() -> None:
    timeline = Timeline()
    watcher = timeline.watch()
    for step in (frame(1.0, 1), frame(1.5, 1), frame(2.0, 1, 4), frame(3.0)):
        timeline.step(step)
    stretches, dropped = watcher.take(5.0)
    assert stretches == [
        Stretch(1.0, 2.0, Use((1, 1), "spatial", 1, 0)),
        Stretch(2.0, 3.0, Use((1, 1), "spatial", 1, 4)),
        Stretch(3.0, 5.0, Use()),
    ]
    assert dropped == 0
    assert watcher.take(5.0) == ([], 0)


@given(
    st.lists(st.tuples(st.floats(0.001, 1.0), st.integers(0, 2), st.integers(0, 2)), max_size=50),
    st.integers(1, 8),
)
def test_watchers_see_every_moment_once(steps: list[tuple[float, int, int]], every: int) -> None:
    timeline = Timeline()
    watcher = timeline.watch()
    now, seen = 0.0, []
    for index, (pause, prefill, decode) in enumerate(steps):
        now += pause
        timeline.step(frame(now, prefill, decode))
        if index % every == 0:
            seen += watcher.take(now)[0]
    seen += watcher.take(now + 1.0)[0]
    assert all(a.stop == b.start for a, b in pairwise(seen))
    if steps:
        assert (seen[0].start, seen[-1].stop) == (steps[0][0], now + 1.0)


def test_what_is_no_longer_kept_is_counted() -> None:
    timeline = Timeline(kept=3)
    watcher = timeline.watch()
    for step in range(11):
        timeline.step(frame(float(step), decode=step % 2))
    stretches, dropped = watcher.take(10.0)
    assert (len(stretches), dropped) == (3, 7)


def test_an_engine_that_is_gone_uses_nothing() -> None:
    timeline = Timeline()
    watcher = timeline.watch()
    timeline.step(
        StepFrame(
            1.0,
            tokens=[TokensItem(["a", "b"], pack_ids([1, 2]))],
            finished=[FinishedItem("a", "stop")],
            decode_requests=1,
            load=LoadItem(1, 2, 3),
        )
    )
    assert timeline.load == LoadItem(1, 2, 3)
    timeline.engine_gone(2.0)
    assert timeline.load is None
    assert [stretch.use for stretch in watcher.take(3.0)[0]] == [Use(None, None, 0, 1), Use()]
    assert (timeline.tokens_generated, timeline.requests_finished) == (2, 1)


def test_of_steps_told_of_together_each_counts() -> None:
    timeline, splits = Timeline(), SplitsUsed()
    splits.watch(["a"])
    begun = StepFrame(1.0, tokens=[TokensItem(["a"], pack_ids([1]), True)], partition=(1, 3))
    few = StepFrame(2.0, tokens=[TokensItem(["a"], pack_ids([2]))], partition=(2, 2))
    many = StepFrame(5.0, tokens=[TokensItem(["a"], pack_ids([3]))], partition=(2, 2))
    end = StepFrame(6.0, finished=[FinishedItem("a", "stop", output_tokens=5)])
    for frame, steps in ((begun, 1), (few, 1), (many, 3), (end, 1)):
        timeline.step(frame, steps)
        splits.step(frame, steps)
    assert timeline.tokens_generated == 1 + 1 + 3
    assert splits.of("a") == (2, 2)
