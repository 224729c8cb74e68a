"""Engines that crash, fail to start or never come; servers that stop: what clients see, and what is left over."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine
from gateway_under_test import (
    PATIENCE_S,
    QUICK,
    FakeProcess,
    UnderTest,
    narrow_client,
    run_with_gateway,
)

from drift_core.frames import Failed, Submit
from drift_core.link import EngineFailed, EngineGone, EngineLink
from drift_core.sampling_params import SamplingParams
from drift_gateway import client as api
from drift_gateway.event_loop import new_event_loop
from drift_gateway.heartbeat import DEFAULT_HANG_TIMEOUT
from drift_gateway.refusal import Refusal
from drift_gateway.server import Address, Gateway
from drift_gateway.supervisor import (
    Backoff,
    ChildProcess,
    EngineProcess,
    Quarantine,
    State,
    Supervisor,
    fingerprint_of,
)
from drift_gateway.v1 import info_pb2
from drift_scheduler.errors import DriftError


async def until_ready(under: UnderTest) -> None:
    async def ready() -> None:
        while under.supervisor.state is not State.READY or under.supervisor.served is None:
            await asyncio.sleep(0.005)

    await asyncio.wait_for(ready(), PATIENCE_S)


def test_a_crash_ends_every_stream_as_unavailable_and_the_engine_comes_back() -> None:
    async def body(under: UnderTest) -> None:
        streams = [
            asyncio.ensure_future(under.client.generate(token_ids=[1], max_tokens=4000).complete())
            for _ in range(5)
        ]
        await under.until(lambda engine: len(engine.submits()) == 5)
        crashed = time.monotonic()
        await asyncio.to_thread(under.engine.crash)
        for stream in streams:
            with pytest.raises(api.Unavailable, match="try again"):
                await asyncio.wait_for(stream, PATIENCE_S)
        assert time.monotonic() - crashed < DEFAULT_HANG_TIMEOUT, (
            "by the socket's end, not for want of answers"
        )
        while len(under.engines) < 2:
            await asyncio.sleep(0.005)
        await until_ready(under)
        assert len((await under.client.generate(token_ids=[2], max_tokens=3).complete()).token_ids) == 3
        info = await under.client.server_info()
        assert (info.readiness, info.engine_restarts) == (info_pb2.READINESS_READY, 1)

    run_with_gateway(body, step_seconds=0.005)


def test_a_request_that_was_inside_at_two_crashes_is_quarantined() -> None:
    async def body(under: UnderTest) -> None:
        for crash in range(2):
            await until_ready(under)
            stream = asyncio.ensure_future(
                under.client.generate(token_ids=[6, 6], max_tokens=4000).complete()
            )
            await under.until(lambda engine: len(engine.submits()) == 1)
            await asyncio.to_thread(under.engine.crash)
            with pytest.raises(api.Unavailable):
                await stream
            while len(under.engines) < crash + 2:
                await asyncio.sleep(0.005)
        await until_ready(under)
        with pytest.raises(api.NeverFits, match="quarantined"):
            await under.client.generate(token_ids=[6, 6], max_tokens=4000).complete()
        assert under.engine.received == []
        await under.client.generate(token_ids=[6, 7], max_tokens=3).complete()

    run_with_gateway(body, step_seconds=0.005)


def submit_of(prompt: list[int], **sampling: float) -> Submit:
    return Submit("a", prompt, SamplingParams(**sampling), 1.0, 0.1, None, "default", 0, "", 0.0)


def test_a_request_that_ran_to_its_end_is_no_suspect_any_more() -> None:
    quarantine = Quarantine()
    one, other = fingerprint_of(submit_of([1])), fingerprint_of(submit_of([1], temperature=0.5))
    assert one != other
    quarantine.blame([one, one, other], engine=7)
    quarantine.check(one)
    quarantine.acquit(one)
    quarantine.blame([one, other], engine=8)
    quarantine.check(one)
    with pytest.raises(Refusal, match="quarantined"):
        quarantine.check(other)


def test_while_starting_requests_are_unavailable_and_info_says_how_far_it_is() -> None:
    async def run() -> None:
        connecting = asyncio.Event()

        async def spawn(path: Path) -> EngineProcess:
            await connecting.wait()
            return FakeProcess(await asyncio.to_thread(FakeEngine, path))

        supervisor = Supervisor(spawn)
        gateway = Gateway(supervisor)
        await gateway.open(Address("127.0.0.1", 0))
        starting = asyncio.ensure_future(supervisor.start())
        async with api.AsyncDriftClient(f"127.0.0.1:{gateway.port}") as client:
            with pytest.raises(api.Unavailable, match="starting"):
                await client.generate(token_ids=[1]).complete()
            info = await client.server_info()
            assert info.readiness == info_pb2.READINESS_STARTING
            assert not info.HasField("model")
            with pytest.raises(api.Unavailable, match=r"not ready after 0\.3 s: starting"):
                await client.wait_ready(0.3)
            connecting.set()
            await asyncio.wait_for(starting, PATIENCE_S)
            assert (await client.wait_ready(PATIENCE_S)).model.name == "fake"
        await gateway.close(0.0)

    asyncio.run(run())


class DeadProcess:
    """A process that has ended already."""

    async def wait(self) -> str:
        return "exit status 1; it said: no such thing"

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


def test_an_engine_that_says_why_it_cannot_start() -> None:
    async def run() -> None:
        async def spawn(path: Path) -> EngineProcess:
            link = await asyncio.to_thread(EngineLink, path, lambda frame: None, lambda: None)
            link.send(Failed("no model directory '/x'"))
            await asyncio.to_thread(link.close)
            return DeadProcess()

        supervisor = Supervisor(spawn)
        with pytest.raises(EngineFailed, match="no model directory '/x'"):
            await asyncio.wait_for(supervisor.start(), PATIENCE_S)

    asyncio.run(run())


def test_an_engine_that_ends_before_it_connects() -> None:
    async def run() -> None:
        async def spawn(path: Path) -> EngineProcess:
            return DeadProcess()

        with pytest.raises(EngineGone, match="while starting: exit status 1; it said: no such thing"):
            await asyncio.wait_for(Supervisor(spawn).start(), PATIENCE_S)

    asyncio.run(run())


def test_restarts_are_given_up_after_so_many_in_a_row() -> None:
    async def run() -> None:
        spawned = 0

        async def spawn(path: Path) -> EngineProcess:
            nonlocal spawned
            spawned += 1
            if spawned > 1:
                return DeadProcess()
            engine = await asyncio.to_thread(FakeEngine, path)
            asyncio.get_running_loop().call_later(0.1, engine.crash)
            return FakeProcess(engine)

        supervisor = Supervisor(spawn, backoff=QUICK)
        await asyncio.wait_for(supervisor.start(), PATIENCE_S)
        with pytest.raises(DriftError, match=r"crashed 4 times in a row.*no such thing"):
            await asyncio.wait_for(supervisor.keep_running(), PATIENCE_S)
        assert spawned == 1 + QUICK.attempts
        await supervisor.stop()

    asyncio.run(run())


def test_an_engine_process_that_cannot_be_started_is_tried_again() -> None:
    async def run() -> None:
        engines: list[FakeEngine] = []
        refusals = [OSError(errno.EAGAIN, "Resource temporarily unavailable")]
        paths: list[Path] = []

        async def spawn(path: Path) -> EngineProcess:
            paths.append(path)
            if engines and refusals:
                raise refusals.pop()
            engines.append(await asyncio.to_thread(FakeEngine, path))
            return FakeProcess(engines[-1])

        supervisor = Supervisor(spawn, backoff=QUICK)
        first = await asyncio.wait_for(supervisor.start(), PATIENCE_S)
        keeping = asyncio.ensure_future(supervisor.keep_running())
        await asyncio.to_thread(engines[0].crash)
        async with asyncio.timeout(PATIENCE_S):
            while supervisor.served in (None, first):
                assert not keeping.done(), keeping.exception()
                await asyncio.sleep(0.005)
        assert [path.parent.exists() for path in paths] == [False, False, True]
        keeping.cancel()
        await supervisor.stop()

    asyncio.run(run())


def test_that_no_engine_process_can_be_started_is_said() -> None:
    async def run() -> None:
        async def spawn(path: Path) -> EngineProcess:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        with pytest.raises(EngineGone, match="no engine process can be started: Cannot allocate memory"):
            await Supervisor(spawn).start()

    asyncio.run(run())


def test_a_process_that_ends_before_it_is_told_what_to_do_has_just_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = asyncio.create_subprocess_exec

    async def start_and_end(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*command, **options)
        process.kill()
        await process.wait()
        assert process.stdin is not None
        async with asyncio.timeout(PATIENCE_S):
            while not process.stdin.is_closing():
                await asyncio.sleep(0.005)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_end)

    async def run() -> None:
        child = await ChildProcess.spawn_module("drift_gateway", (), b"configuration")
        assert await asyncio.wait_for(child.wait(), PATIENCE_S) == "signal 9"

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


def test_pauses_between_restarts_double_up_to_a_bound() -> None:
    backoff = Backoff(first=0.5, longest=3.0)
    assert [backoff.pause(attempt) for attempt in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_stopping_lets_streams_finish_within_the_grace_time() -> None:
    async def body(under: UnderTest) -> None:
        stream = asyncio.ensure_future(under.client.generate(token_ids=[1], max_tokens=50).complete())
        await under.until(lambda engine: len(engine.submits()) == 1)
        closing = asyncio.ensure_future(under.gateway.close(grace=PATIENCE_S))
        await asyncio.sleep(0)
        with pytest.raises(api.Unavailable, match="stopping"):
            await under.client.generate(token_ids=[1]).complete()
        completion = await stream
        assert (completion.finish_reason, len(completion.token_ids)) == ("length", 50)
        await closing

    run_with_gateway(body, step_seconds=0.01)


def test_stopping_lets_clients_read_what_the_engine_is_done_with() -> None:
    async def body(under: UnderTest) -> None:
        open_at_the_end: list[list[str]] = []
        stop = under.gateway._server.stop

        async def noting(grace: float | None) -> None:
            open_at_the_end.append(under.supervisor.request_ids())
            await stop(grace)

        under.gateway._server.stop = noting  # type: ignore[method-assign]
        async with narrow_client(under.target) as client:
            unread = client.generate(token_ids=[1], max_tokens=3000)
            await under.until(lambda engine: len(engine.submits()) == 1)
            served = under.supervisor.serving()
            async with asyncio.timeout(PATIENCE_S):
                while served.client.in_flight:
                    await asyncio.sleep(0.005)
            assert under.supervisor.request_ids(), "it has room for all that it does not read"
            closing = asyncio.ensure_future(under.gateway.close(grace=PATIENCE_S))
            for _ in range(100):
                await asyncio.sleep(0.001)
            completion = await unread.complete()
            assert (completion.finish_reason, len(completion.token_ids)) == ("length", 3000)
            await closing
            assert open_at_the_end == [[]]

    run_with_gateway(body, step_seconds=0.0)


def test_stopping_cancels_what_is_left_after_the_grace_time() -> None:
    async def body(under: UnderTest) -> None:
        stream = asyncio.ensure_future(under.client.generate(token_ids=[1], max_tokens=4000).complete())
        await under.until(lambda engine: len(engine.submits()) == 1)
        await under.gateway.close(grace=0.05)
        completion = await stream
        assert completion.finish_reason == "cancelled"
        assert 0 < len(completion.token_ids) < 4000
        engine = under.engine
        assert engine.ended.is_set()
        assert not engine.path.exists()

    run_with_gateway(body, step_seconds=0.005)


def test_a_real_engine_process_that_is_killed_is_replaced_and_none_is_left() -> None:
    """The engine is a process; SIGKILL takes it in the middle of a stream."""
    script = Path(__file__).parent.parent / "tools" / "fake_engine.py"

    async def run() -> None:
        async def spawn(path: Path) -> EngineProcess:
            return ChildProcess(
                await asyncio.create_subprocess_exec(
                    sys.executable,
                    str(script),
                    os.fspath(path),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                )
            )

        supervisor = Supervisor(spawn, backoff=QUICK)
        gateway = Gateway(supervisor)
        await gateway.open(Address("127.0.0.1", 0))
        first = await asyncio.wait_for(supervisor.start(), PATIENCE_S)
        keeping = asyncio.ensure_future(supervisor.keep_running())
        async with api.AsyncDriftClient(f"127.0.0.1:{gateway.port}") as client:
            events = aiter(client.generate(token_ids=[1], max_tokens=4000))
            for _ in range(5):
                await anext(events)
            os.kill(first.ready.pid, signal.SIGKILL)
            killed = time.monotonic()
            with pytest.raises(api.Unavailable):
                async for _ in events:
                    pass
            assert time.monotonic() - killed < DEFAULT_HANG_TIMEOUT
            while supervisor.served is None or supervisor.served is first:
                await asyncio.sleep(0.01)
            second = supervisor.served
            assert len((await client.generate(token_ids=[1], max_tokens=4).complete()).token_ids) == 4
        keeping.cancel()
        await gateway.close(0.0)
        for served in (first, second):
            with pytest.raises(ProcessLookupError):
                os.kill(served.ready.pid, 0)
            assert not served.client.path.exists()

    asyncio.run(run())


def test_a_call_to_nobody_is_unavailable() -> None:
    async def run() -> None:
        async with api.AsyncDriftClient("127.0.0.1:1") as client:
            with pytest.raises(api.Unavailable) as raised:
                await client.server_info(timeout=5)
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


CLIENT = """
import sys
from drift_gateway.client import DriftClient
for event in DriftClient(sys.argv[1]).generate(token_ids=[1], max_tokens=4000):
    print(event, flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_process_that_dies_or_hangs_is_noticed_and_its_request_cancelled(
    how: signal.Signals,
) -> None:
    """A killed one at once; a stopped one when it answers no ping (about 9 s)."""

    async def body(under: UnderTest) -> None:
        command = [sys.executable, "-c", CLIENT, under.target]
        client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            assert client.stdout is not None
            for _ in range(2):
                await client.stdout.readline()
            client.send_signal(how)
            await under.until(lambda engine: bool(engine.cancels()))
        finally:
            with contextlib.suppress(ProcessLookupError):
                client.kill()
            await client.wait()

    run_with_gateway(body, step_seconds=0.01)
