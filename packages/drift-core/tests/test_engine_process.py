"""The engine behind its socket, as the gateway runs it: a spawned process, frames both ways."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drift_core.engine import EngineConfig, engine_config
from drift_core.engine_process import run_engine
from drift_core.frames import Ready, Starting, StepFrame, Submit
from drift_core.link import EngineClient, EngineFailed, Submission
from drift_core.sampling_params import SamplingParams

PATIENCE_S = 120.0
Body = Callable[[EngineClient, Ready], Coroutine[Any, Any, None]]


def config(**fields: Any) -> EngineConfig:
    settings = {
        "model": "demo",
        "profile": "none",
        "kv_memory_bytes": 32 << 20,
        "max_context": 256,
        "max_running": 8,
    }
    return engine_config(**(settings | fields))


@asynccontextmanager
async def engine(
    settings: EngineConfig, starting: list[Starting], steps: list[StepFrame]
) -> AsyncIterator[tuple[EngineClient, Any]]:
    client = await EngineClient.listen(starting.append, lambda frame, _: steps.append(frame))
    process = multiprocessing.get_context("spawn").Process(
        target=run_engine, args=(msgspec.to_builtins(settings), str(client.path))
    )
    process.start()
    try:
        yield client, process
    finally:
        client.shut_down()
        await asyncio.to_thread(process.join, PATIENCE_S)
        await client.close()
        assert process.exitcode is not None, "the engine outlives its gateway"


def submit(request_id: str, prompt: list[int], **sampling: Any) -> Submit:
    params = SamplingParams(**({"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | sampling))
    return Submit(request_id, prompt, params, 2.0, 0.1, None, "default", 0, "", time.monotonic())


async def ended(submission: Submission) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while any(request.finished is None for request in submission.requests):
            await submission.changed()


def test_requests_are_served_cancelled_and_refused_over_the_socket() -> None:
    starting: list[Starting] = []
    steps: list[StepFrame] = []

    async def body() -> None:
        async with engine(config(), starting, steps) as (client, process):
            ready = await asyncio.wait_for(client.ready(), PATIENCE_S)
            assert ready.pid == process.pid
            assert (ready.max_context, ready.dispatch) == (256, "drift")
            assert Path(ready.directory).name == "demo_model"
            submission = client.submit(
                [
                    submit("a", [5, 6, 7], logprobs=1),
                    submit("b", [9] * 40),
                    submit("bad", [10**6]),
                    submit("long", [3] * 256),
                ]
            )
            await ended(submission)
            a, b, bad, long = submission.requests
            assert (len(a.token_ids), len(b.token_ids)) == (8, 8)
            assert a.accepted is not None
            assert a.logprobs is not None
            assert len(a.logprobs) == 8
            assert a.finished is not None
            assert (a.finished.reason, a.finished.output_tokens, a.finished.prompt_tokens) == ("length", 8, 3)
            for refused, message in ((bad, "token id 1000000"), (long, "context")):
                assert refused.finished is not None
                assert refused.finished.reason == "rejected"
                assert message in refused.finished.message
            endless = client.submit([submit("c", [4], max_tokens=200), submit("d", [4, 5], max_tokens=200)])
            while not all(request.token_ids for request in endless.requests):
                await asyncio.wait_for(endless.changed(), PATIENCE_S)
            client.forget("c", cancel=True)
            client.cancel("d", stop=True)
            while endless.requests[1].finished is None:
                await asyncio.wait_for(endless.changed(), PATIENCE_S)
            assert endless.requests[1].finished.reason == "stop"
            async with asyncio.timeout(PATIENCE_S):
                while steps[-1].partition is not None:
                    await asyncio.sleep(0.01)
        assert process.exitcode == 0

    asyncio.run(body())
    phases = list(dict.fromkeys(frame.phase for frame in starting))
    assert phases == ["load weights", "allocate KV", "warm up"]
    assert any(frame.prefill_requests for frame in steps)
    assert any(frame.decode_requests and frame.sharing for frame in steps)
    last = steps[-1]
    assert (last.sharing, last.prefill_requests, last.decode_requests) == (None, 0, 0)
    assert last.load is not None
    assert (last.load.waiting, last.load.running) == (0, 0)


def test_a_refusal_says_no_lane_idle_that_works() -> None:
    """What a frame tells of the lanes holds until the next one, which may be long after."""
    steps: list[StepFrame] = []
    settings = config(device="simulated", simulate="step_ms=50", kv_memory_bytes=None, profile="short")

    async def body() -> None:
        async with engine(settings, [], steps) as (client, _):
            await asyncio.wait_for(client.ready(), PATIENCE_S)
            running = client.submit([submit("a", [5], max_tokens=200)])
            while running.requests[0].behind < 3:
                await asyncio.wait_for(running.changed(), PATIENCE_S)
            await ended(client.submit([submit("bad", [10**6])]))
            running.cancel()

    asyncio.run(body())
    (refusal,) = [frame for frame in steps if any(item.id == "bad" for item in frame.finished)]
    before = steps[steps.index(refusal) - 1]
    assert (refusal.decode_requests, refusal.load) == (1, None)
    assert refusal.partition is not None
    assert (refusal.partition, refusal.sharing) == (before.partition, before.sharing)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"model": "nowhere"}, "no model directory 'nowhere'"), ({"dispatch": "x"}, "installed: ")],
)
def test_a_start_that_fails_says_why_and_exits_with_2(fields: dict[str, Any], message: str) -> None:
    async def body() -> None:
        async with engine(config(**fields), [], []) as (client, process):
            with pytest.raises(EngineFailed, match=message) as caught:
                await asyncio.wait_for(client.ready(), PATIENCE_S)
            assert caught.value.usage
        assert process.exitcode == 2

    asyncio.run(body())


def test_an_engine_ends_when_its_gateway_is_gone() -> None:
    async def body() -> None:
        async with engine(config(), [], []) as (client, process):
            await asyncio.wait_for(client.ready(), PATIENCE_S)
            await client.close()
            await asyncio.to_thread(process.join, PATIENCE_S)
            assert process.exitcode == 0

    asyncio.run(body())
