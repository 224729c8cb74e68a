"""What operators do to a running engine, over its socket: policies, prefixes, decision logs, the heartbeat."""

from __future__ import annotations

import asyncio
import stat
import threading
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drift_core.engine import engine_config
from drift_core.engine_process import serve_socket
from drift_core.frames import FlushPrefixes, Pong, SetPolicy, StartTrace, StepFrame, StopTrace, Submit
from drift_core.link import EngineClient, EngineGone, Submission
from drift_core.sampling_params import SamplingParams
from drift_scheduler import plugins
from drift_scheduler.log_reader import open_log
from drift_scheduler.replay import replay

PATIENCE_S = 60.0


def with_engine(body: Callable[[EngineClient, list[StepFrame]], Awaitable[None]]) -> None:
    """Run a coroutine with a client of a simulated engine of 2 ms steps, which a thread serves."""
    settings = engine_config(
        model="demo", device="simulated", simulate="step_ms=2:token_us=50", profile="none", max_running=8
    )

    async def run() -> None:
        steps: list[StepFrame] = []
        client = await EngineClient.listen(on_step=lambda frame, _: steps.append(frame))
        thread = threading.Thread(target=serve_socket, args=(settings, str(client.path)), daemon=True)
        thread.start()
        try:
            await asyncio.wait_for(client.ready(), PATIENCE_S)
            await asyncio.wait_for(body(client, steps), PATIENCE_S)
        finally:
            client.shut_down()
            await asyncio.to_thread(thread.join, PATIENCE_S)
            await client.close()

    asyncio.run(run())


def submit(request_id: str, prompt: list[int], tokens: int) -> Submit:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens)
    return Submit(request_id, prompt, params, 2.0, 0.1, None, "default", 0, "", time.monotonic())


async def ended(submission: Submission) -> None:
    while any(request.finished is None for request in submission.requests):
        await submission.changed()


async def running(submission: Submission) -> None:
    while not all(request.token_ids for request in submission.requests):
        await submission.changed()


def test_policies_change_between_steps_and_requests_go_on() -> None:
    async def body(client: EngineClient, steps: list[StepFrame]) -> None:
        submission = client.submit([submit(f"r{k}", [5, 6, 7 + k], 150) for k in range(4)])
        await running(submission)
        later = client.submit([submit("late", [1] * 200, 20)])
        answer = await client.ask(lambda call: SetPolicy(call, "chunked-prefill"))
        assert (answer.error, answer.dispatch, answer.partition) == ("", "chunked-prefill", "tightest-decode")
        await ended(later)
        answer = await client.ask(lambda call: SetPolicy(call, partition="static:prefill_units=1"))
        assert answer.error == "" or "static" in answer.error
        await ended(submission)
        assert {request.finished.reason for request in submission.requests if request.finished} == {"length"}
        assert all(len(request.token_ids) == 150 for request in submission.requests)

    with_engine(body)


def test_an_unknown_policy_changes_nothing_and_is_told_what_there_is() -> None:
    async def body(client: EngineClient, steps: list[StepFrame]) -> None:
        answer = await client.ask(lambda call: SetPolicy(call, "edf", "tightest-decode"))
        assert "no dispatch policy 'edf'; installed: " in answer.error
        assert "chunked-prefill" in answer.error
        answer = await client.ask(lambda call: SetPolicy(call, "decode-first", "widest"))
        assert "partition policy 'widest'" in answer.error
        answer = await client.ask(lambda call: SetPolicy(call, "gang:no_such_option=1"))
        assert "no_such_option" in answer.error
        answer = await client.ask(SetPolicy)
        assert (answer.error, answer.dispatch, answer.partition) == ("", "drift", "tightest-decode")

    with_engine(body)


def test_cached_prefixes_are_forgotten_save_those_in_use() -> None:
    async def body(client: EngineClient, steps: list[StepFrame]) -> None:
        prompt = list(range(1, 101))
        for name, cached in (("a", 0), ("b", 96)):
            submission = client.submit([submit(name, prompt, 2)])
            await ended(submission)
            assert submission.requests[0].finished is not None
            assert submission.requests[0].finished.cached_tokens == cached
        answer = await client.ask(FlushPrefixes)
        assert (answer.error, answer.pages) == ("", 6)
        assert (await client.ask(FlushPrefixes)).pages == 0
        submission = client.submit([submit("c", prompt, 2)])
        await ended(submission)
        assert submission.requests[0].finished is not None
        assert submission.requests[0].finished.cached_tokens == 0

    with_engine(body)


def test_a_decision_log_begun_under_load_can_be_replayed(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"

    async def body(client: EngineClient, steps: list[StepFrame]) -> None:
        before = client.submit([submit("before", [9, 8, 7], 400)])
        await running(before)
        await client.ask(lambda call: SetPolicy(call, "decode-first"))
        answer = await client.ask(lambda call: StartTrace(call, str(path)))
        assert (answer.error, answer.path) == ("", str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "already" in (await client.ask(lambda call: StartTrace(call, str(path)))).error
        await ended(client.submit([submit(f"r{k}", [1, 2, k] * 30, 10 + k) for k in range(6)]))
        answer = await client.ask(StopTrace)
        assert answer.path == str(path)
        assert answer.steps > 10
        assert answer.steps == sum(1 for _ in open_log(path).steps())
        assert "no decision log" in (await client.ask(StopTrace)).error
        assert "exists" in (await client.ask(lambda call: StartTrace(call, str(path)))).error.lower()
        await ended(before)

    with_engine(body)
    log = open_log(path)
    assert log.config["dispatch"] == "decode-first"
    report: dict[str, Any] = replay([str(path)], ["gang"], None, plugins.load())
    assert report["logs"]


def test_the_loop_answers_pings_and_says_how_long_its_lanes_have_been_at_it() -> None:
    async def body(client: EngineClient, steps: list[StepFrame]) -> None:
        async def pong(number: int) -> Pong:
            client.ping(number)
            while client.pong is None or client.pong.number != number:
                await asyncio.sleep(0.002)
            return client.pong

        idle = await pong(1)
        assert (idle.busy, idle.predicted) == (0.0, 0.0)
        for attempt in count(2):  # on a busy machine the answer may come after the 150 ms of a prefill
            steps.clear()
            submission = client.submit([submit(f"r{attempt}", [attempt] * 3000, 2)])
            while not any(frame.prefill_requests for frame in steps):
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.02)
            at_work = await pong(attempt)
            await ended(submission)
            if at_work.busy > 0.015:
                break
        assert at_work.predicted == pytest.approx(0.15, rel=0.2)

    with_engine(body)


def test_a_call_to_an_engine_that_is_gone_ends() -> None:
    async def run() -> None:
        client = await EngineClient.listen()
        _, writer = await asyncio.open_unix_connection(client.path)
        async with asyncio.timeout(PATIENCE_S):
            while True:  # until the connection is noticed
                asking = asyncio.ensure_future(client.ask(FlushPrefixes))
                await asyncio.sleep(0.01)
                if not asking.done():
                    break
                assert isinstance(asking.exception(), EngineGone)
            writer.close()
            with pytest.raises(EngineGone):
                await asking
            with pytest.raises(EngineGone):
                await client.ask(FlushPrefixes)
        await client.close()

    asyncio.run(run())


def test_admission_is_told_when_targets_are_lost_for_certain() -> None:
    async def body(client: EngineClient, steps: list[StepFrame]) -> None:
        calm = client.submit([msgspec.structs.replace(submit("calm", list(range(20)), 4), slo_ttft=600.0)])
        await ended(calm)
        assert {step.load.overload_s for step in steps if step.load is not None} == {0.0}
        frames = [submit(f"r{i}", list(range(i, i + 200)), 4) for i in range(40)]
        prompts = [msgspec.structs.replace(frame, slo_ttft=0.05) for frame in frames]
        await ended(client.submit(prompts))
        said = [step.load.overload_s for step in steps if step.load is not None]
        assert max(said) > 0.0
        assert said[-1] == 0.0

    with_engine(body)
