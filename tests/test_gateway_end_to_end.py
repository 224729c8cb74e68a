"""The whole way with the embedded model: client, gateway, engine process, CPU lanes, and back."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing

import pytest
import uvloop

from drift_gateway import client as api

PATIENCE_S = 120.0
PROSE = (
    "The for statement is used to iterate over the elements of a sequence such as a string, tuple or list. "
)
FLAGS = "--model demo --device cpu --dtype float32 --profile none --kv-memory 64MB"


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """The address of a `drift serve` with the embedded model, shared by the tests here."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "drift_gateway", "serve", "--listen", address, *FLAGS.split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with api.DriftClient(address) as client:
            client.wait_ready(PATIENCE_S)
        yield address
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def run(target: str, body: Callable[[api.AsyncDriftClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with api.AsyncDriftClient(target) as client:
            await asyncio.wait_for(body(client), PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def idle(client: api.AsyncDriftClient, pages: int) -> None:
    """Until no request holds a page."""
    while (await client.load()).free_pages < pages:
        await asyncio.sleep(0.01)


def test_concurrent_requests_of_all_kinds_are_served_and_leave_nothing_behind(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        info = await client.server_info()
        pages = info.kv_pool.total_pages
        long, short = PROSE * 40, PROSE[:40]
        answers = await asyncio.gather(
            client.generate(long, max_tokens=24, temperature=0.0, ignore_eos=True).completions(),
            client.generate(short, max_tokens=48, n=3, seed=5, ignore_eos=True).completions(),
            client.generate(messages=[{"role": "user", "content": short}], max_tokens=16).completions(),
            client.generate(short, max_tokens=32, temperature=0.0, logprobs=3, ignore_eos=True).completions(),
            client.generate(token_ids=[5, 6, 7], max_tokens=1).completions(),
        )
        assert [len(completion.token_ids) for completion in answers[0]] == [24]
        assert [len(completion.token_ids) for completion in answers[1]] == [48] * 3
        assert len({completion.token_ids for completion in answers[1]}) == 3
        logprobs = answers[3][0].logprobs
        assert len(logprobs) == 32
        assert all(len(entry.top) == 3 and entry.logprob == entry.top[0].logprob for entry in logprobs)
        for completion in (completion for answer in answers for completion in answer):
            timing = completion.timing
            assert timing.ttft is not None
            assert timing.e2e is not None
            assert 0 < timing.ttft <= timing.e2e
        again = await client.generate(long, max_tokens=24, temperature=0.0, ignore_eos=True).complete()
        assert again.usage.cached_tokens > 0.8 * again.usage.prompt_tokens, "the prefix is reused"
        assert again.token_ids == answers[0][0].token_ids
        await idle(client, pages)

    run(target, body)


async def accepted_and_end(generation: api.AsyncGeneration) -> tuple[api.Accepted, api.Finished]:
    events = [event async for event in generation]
    assert isinstance(events[0], api.Accepted)
    assert isinstance(events[-1], api.Finished)
    return events[0], events[-1]


def test_accepted_knows_the_cache_and_salts_keep_it_apart(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        prompt = "Salted: " + PROSE * 10
        for salt, expected in (("a", False), ("a", True), ("b", False), (None, False), (None, True)):
            accepted, end = await accepted_and_end(client.generate(prompt, max_tokens=4, cache_salt=salt))
            assert accepted.cached_tokens == end.usage.cached_tokens
            assert (end.usage.cached_tokens > 0.8 * end.usage.prompt_tokens) == expected

    run(target, body)


def test_the_proof_has_the_prediction_and_the_split(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        generation = client.generate(PROSE, max_tokens=12, ignore_eos=True)
        accepted, end = await accepted_and_end(generation)
        assert accepted.predicted_ttft is not None, "the cost model knows from the start"
        assert end.timing.predicted_ttft == accepted.predicted_ttft > 0
        units = (await client.server_info()).device.units
        assert end.timing.prefill_units == 0, "decode had the device to itself"
        assert end.timing.decode_units == units

    run(target, body)


def test_a_demoted_request_is_served(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        slo = api.SLO(ttft=1e-5, on_infeasible="demote")
        accepted, end = await accepted_and_end(client.generate(PROSE, max_tokens=5, ignore_eos=True, slo=slo))
        assert accepted.demoted
        assert (end.reason, end.usage.output_tokens, end.timing.slo.ttft) == ("length", 5, None)

    run(target, body)


def test_a_dropped_stream_frees_its_pages(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        pages = (await client.server_info()).kv_pool.total_pages
        generation = client.generate(PROSE * 20, max_tokens=1500, ignore_eos=True)
        events = aiter(generation)
        for _ in range(4):
            await anext(events)
        assert (await client.load()).free_pages < pages
        generation.cancel()
        await idle(client, pages)

    run(target, body)


def test_streamed_text_is_what_the_offline_engine_writes(target: str) -> None:
    from drift_core import LLM, SamplingParams

    prompts = ["A list is", PROSE]
    with LLM("demo", device="cpu", dtype="float32", profile="none", kv_memory_bytes=64_000_000) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    expected = [output.outputs[0] for output in outputs]

    async def body(client: api.AsyncDriftClient) -> None:
        got = await asyncio.gather(
            *(
                client.generate(prompt, temperature=0.0, max_tokens=40, ignore_eos=True).complete()
                for prompt in prompts
            )
        )
        assert [list(completion.token_ids) for completion in got] == [
            list(output.token_ids) for output in expected
        ]
        assert [completion.text for completion in got] == [output.text for output in expected]

    run(target, body)


def test_a_stop_string_cuts_the_text_of_the_real_model(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        options = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
        whole = await client.generate(PROSE, **options).complete()
        stop = whole.text[len(whole.text) // 2 :][:4]
        cut = await client.generate(PROSE, stop=[stop], **options).complete()
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert (cut.finish_reason, cut.stop_string) == ("stop", stop)

    run(target, body)


def test_a_name_may_be_used_again_after_a_stop_string_or_a_cancellation(target: str) -> None:
    """The engine may still work on what was called so before."""

    async def body(client: api.AsyncDriftClient) -> None:
        for turn in range(12):
            generation = client.generate(
                PROSE, request_id="again", temperature=0.0, stop=[" "], max_tokens=400
            )
            assert (await generation.complete()).finish_reason == "stop"
            endless = client.generate(token_ids=[5 + turn], request_id="again", ignore_eos=True)
            async for event in endless:
                if isinstance(event, api.TokenDelta):
                    break
            endless.cancel()
            while (await client.load()).in_flight:  # the server has heard of it
                await asyncio.sleep(0.001)

    run(target, body)


@pytest.mark.slow
def test_the_demo_finishes_every_request() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "drift_gateway", "demo"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for heading in ("TTFT s", "TBT", "partition over time", "every request finished"):
        assert heading in done.stdout
    if len(os.sched_getaffinity(0)) > 1:
        assert "spatial" in done.stdout, "both lanes ran at once"
