"""Both ends of the socket, joined: what is sent arrives, nobody blocks, and each notices the other's end."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from drift_core import link as link_module
from drift_core import submission as submission_module
from drift_core.frames import (
    AcceptedItem,
    Cancel,
    Failed,
    FinishedItem,
    Others,
    Ping,
    Ready,
    Shutdown,
    Starting,
    StepFrame,
    Submit,
    ToEngine,
    TokenLogprob,
    TokensItem,
    encode_frame,
    pack_ids,
)
from drift_core.link import (
    ITEMS_PER_LOOK,
    EngineClient,
    EngineFailed,
    EngineGone,
    EngineLink,
    OnStep,
    Submission,
)
from drift_core.sampling_params import SamplingParams

WAIT = 20.0
READY = Ready("demo", "/models/demo", 7, 4096, 2048, 4, "float32", "cpu", 2, [(1, 1)], "gang", "static", 16, 100,
              1600, 64, 2.0, 0.1)  # fmt: skip


def submit(request_id: str, prompt: list[int] | None = None) -> Submit:
    return Submit(request_id, prompt or [1], SamplingParams(), 1.0, 0.1, None, "default", 0, "", 0.0)


class Engine:
    """An engine's end whose inbox is kept; the test says what it sends."""

    def __init__(self, path: Path) -> None:
        self.frames: list[ToEngine] = []
        self.arrived = threading.Condition()
        self.closed = threading.Event()
        self.link = EngineLink(path, self._inbox, self.closed.set)

    def _inbox(self, frame: ToEngine) -> None:
        with self.arrived:
            self.frames.append(frame)
            self.arrived.notify_all()

    async def until(self, count: int) -> list[ToEngine]:
        def wait() -> bool:
            with self.arrived:
                return self.arrived.wait_for(lambda: len(self.frames) >= count, WAIT)

        assert await asyncio.to_thread(wait), f"only {self.frames} arrived"
        return self.frames


@asynccontextmanager
async def connected(on_step: OnStep | None = None) -> AsyncIterator[tuple[EngineClient, Engine]]:
    """Both ends, connected, the engine ready."""
    client = await EngineClient.listen(on_step=on_step)
    engine = await asyncio.to_thread(Engine, client.path)
    engine.link.send(READY)
    try:
        assert await asyncio.wait_for(client.ready(), WAIT) == READY
        yield client, engine
    finally:
        await client.close()
        await asyncio.to_thread(engine.link.close)


def joined(body: Callable[[EngineClient, Engine], Awaitable[None]]) -> None:
    """Run `body` with both ends connected and the engine ready."""

    async def run() -> None:
        async with connected() as (client, engine):
            await body(client, engine)

    asyncio.run(run())


async def news(submission: Submission) -> None:
    await asyncio.wait_for(submission.changed(), WAIT)


def test_socket_and_folder_are_private_and_removed() -> None:
    async def run() -> None:
        client = await EngineClient.listen()
        assert stat.S_IMODE(client.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(client.path.parent.stat().st_mode) == 0o700
        await client.close()
        assert not client.path.parent.exists()

    asyncio.run(run())


def test_requests_arrive_and_their_tokens_come_back_in_order() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        both = [submit("a#0"), submit("a#1", [5] * 100_000)]
        submission = client.submit(both)
        assert await engine.until(2) == both
        engine.link.send(StepFrame(1.0, accepted=[AcceptedItem("a#0", 3)]))
        engine.link.send(StepFrame(2.0, tokens=[TokensItem(["a#1", "a#0"], pack_ids([7, 8]), True)]))
        engine.link.send(
            StepFrame(
                3.0, tokens=[TokensItem(["a#0"], pack_ids([9]))], finished=[FinishedItem("a#0", "length")]
            )
        )
        first, second = submission.requests
        while first.finished is None:
            await news(submission)
        assert first.accepted == AcceptedItem("a#0", 3)
        token_ids, times, logprobs = first.take()
        assert (token_ids, list(times), logprobs) == ([8, 9], [2.0, 3.0], None)
        assert second.take()[0] == [7]
        assert first.take()[0] == []
        assert client.in_flight_ids() == ["a#1"]

    joined(body)


def test_log_probabilities_stay_beside_their_tokens() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        submission = client.submit([submit("a#0")])
        logprob = TokenLogprob(-1.0, [(8, -1.0)])
        engine.link.send(StepFrame(1.0, tokens=[TokensItem(["a#0"], pack_ids([7]))]))
        engine.link.send(StepFrame(2.0, tokens=[TokensItem(["a#0"], pack_ids([8]), False, {"a#0": logprob})]))
        engine.link.send(StepFrame(3.0, finished=[FinishedItem("a#0", "stop")]))
        while submission.requests[0].finished is None:
            await news(submission)
        assert submission.requests[0].take()[2] == [None, logprob]

    joined(body)


def test_an_id_that_is_used_again_gets_its_tokens() -> None:
    """The engine's steps name the same ids all along, and mean another request by one of them."""

    async def body(client: EngineClient, engine: Engine) -> None:
        before, other = client.submit([submit("a#0")]), client.submit([submit("b#0")])
        engine.link.send(StepFrame(1.0, tokens=[TokensItem(["a#0", "b#0"], pack_ids([1, 2]), True)]))
        engine.link.send(StepFrame(2.0, tokens=[TokensItem(["a#0", "b#0"], pack_ids([3, 4]))]))
        while before.requests[0].behind < 2:
            await news(other)
        before.cancel()
        engine.link.send(StepFrame(2.5, finished=[FinishedItem("a#0", "cancelled")]))
        await asyncio.wait_for(client.free(["a#0"]), WAIT)
        after = client.submit([submit("a#0")])
        engine.link.send(StepFrame(3.0, tokens=[TokensItem(["a#0"], pack_ids([5]), True)]))
        engine.link.send(StepFrame(4.0, tokens=[TokensItem(["a#0", "b#0"], pack_ids([6, 7]))]))
        engine.link.send(
            StepFrame(5.0, finished=[FinishedItem("a#0", "length"), FinishedItem("b#0", "length")])
        )
        while after.requests[0].finished is None:
            await news(after)
        assert before.requests[0].take()[0] == [1, 3]
        assert after.requests[0].take()[:2] == ([5, 6], [3.0, 4.0])
        assert other.requests[0].take()[:2] == ([2, 4, 7], [1.0, 2.0, 4.0])

    joined(body)


def test_a_step_with_too_few_tokens_is_nonsense() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        submission = client.submit([submit("a#0"), submit("a#1")])
        engine.link.send(StepFrame(1.0, tokens=[TokensItem(["a#0", "a#1"], pack_ids([7]))]))
        with pytest.raises(EngineGone, match="nonsense"):
            await news(submission)

    joined(body)


def test_cancel_reaches_the_engine_and_ends_the_news() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        submission = client.submit([submit("a#0"), submit("a#1")])
        client.cancel("a#1", stop=True)
        submission.cancel()
        frames = await engine.until(5)
        assert frames[2:] == [Cancel("a#1", stop=True), Cancel("a#0"), Cancel("a#1")]
        assert client.in_flight == 0
        engine.link.send(StepFrame(1.0, tokens=[TokensItem(["a#0"], pack_ids([1]))]))  # too late, no fault

    joined(body)


def test_what_is_told_late_of_a_cancelled_request_is_not_told_of_the_next_of_its_name() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        client.submit([submit("a#0")]).cancel()
        with pytest.raises(ValueError, match="'a#0' is in flight"):
            client.submit([submit("a#0")])
        free = asyncio.ensure_future(client.free(["a#0", "b#0"]))
        engine.link.send(StepFrame(1.0, tokens=[TokensItem(["a#0"], pack_ids([1]), True)]))
        engine.link.send(StepFrame(2.0, finished=[FinishedItem("a#0", "cancelled")]))
        await asyncio.wait_for(free, WAIT)
        after = client.submit([submit("a#0")])
        engine.link.send(StepFrame(3.0, tokens=[TokensItem(["a#0"], pack_ids([5]), True)]))
        engine.link.send(StepFrame(4.0, finished=[FinishedItem("a#0", "length")]))
        while after.requests[0].finished is None:
            await news(after)
        assert after.requests[0].finished.reason == "length"
        assert after.requests[0].take()[:2] == ([5], [3.0])

    joined(body)


def test_a_request_is_cancelled_once_and_nobody_else_of_its_name() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        before = client.submit([submit("a#0")])
        before.cancel()
        engine.link.send(StepFrame(1.0, finished=[FinishedItem("a#0", "cancelled")]))
        await asyncio.wait_for(client.free(["a#0"]), WAIT)
        client.submit([submit("a#0")])
        before.cancel()
        client.ping(1)
        assert (await engine.until(4))[1:] == [Cancel("a#0"), submit("a#0"), Ping(1)]
        assert client.in_flight_ids() == ["a#0"]

    joined(body)


def test_the_end_of_the_engine_frees_all_names() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        client.submit([submit("a#0")]).cancel()
        free = asyncio.ensure_future(client.free(["a#0"]))
        await engine.until(2)
        await asyncio.to_thread(engine.link.close)
        await asyncio.wait_for(free, WAIT)
        assert client.gone.done()

    joined(body)


def test_an_id_in_flight_is_refused() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        client.submit([submit("a#0")])
        with pytest.raises(ValueError, match="'a#0' is in flight"):
            client.submit([submit("b#0"), submit("a#0")])
        assert client.in_flight_ids() == ["a#0"]

    joined(body)


def test_the_end_of_the_engine_fails_every_request() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        one, other = client.submit([submit("a#0")]), client.submit([submit("b#0")])
        await engine.until(2)
        await asyncio.to_thread(engine.link.close)
        for submission in (one, other):
            with pytest.raises(EngineGone):
                await news(submission)
        with pytest.raises(EngineGone):
            client.submit([submit("c#0")])
        assert engine.closed.is_set() is False  # it closed the socket itself

    joined(body)


def test_an_engine_that_speaks_nonsense_is_gone() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        submission = client.submit([submit("a#0")])
        engine.link.send(Shutdown())  # type: ignore[arg-type]
        with pytest.raises(EngineGone, match="nonsense"):
            await news(submission)

    joined(body)


def test_the_end_of_the_gateway_is_told_to_the_engine_once() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        await client.close()
        assert await asyncio.to_thread(engine.closed.wait, WAIT)
        engine.link.send(StepFrame(1.0))  # dropped

    joined(body)


def test_a_gateway_that_speaks_nonsense_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        assert client._transport is not None
        client._transport.write(encode_frame(READY))
        assert await asyncio.to_thread(engine.closed.wait, WAIT)
        assert any("the gateway speaks nonsense" in line for line in caplog.messages)

    joined(body)


def test_start_up_is_told_and_its_failure_raised() -> None:
    async def run() -> None:
        phases: list[Starting] = []
        client = await EngineClient.listen(on_starting=phases.append)
        engine = await asyncio.to_thread(Engine, client.path)
        engine.link.send(Starting("load weights", 0.5))
        engine.link.send(Failed("no model directory '/x'"))
        with pytest.raises(EngineFailed, match="no model directory '/x'") as raised:
            await asyncio.wait_for(client.ready(), WAIT)
        assert raised.value.usage
        assert phases == [Starting("load weights", 0.5)]
        await client.close()
        await asyncio.to_thread(engine.link.close)

    asyncio.run(run())


def test_send_never_waits_for_a_gateway_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames pile up without blocking, all arrive once it reads again."""

    async def body(client: EngineClient, engine: Engine) -> None:
        submission = client.submit([submit("a#0")])
        assert client._transport is not None
        client._transport.pause_reading()
        await engine.until(1)
        tokens = TokensItem(["a#0"] * 1000, pack_ids(range(1000)))
        for step in range(200):  # several MB, far more than the socket holds
            engine.link.send(StepFrame(float(step), tokens=[tokens]))
        engine.link.send(StepFrame(200.0, finished=[FinishedItem("a#0", "length")]))
        assert engine.link._backlog_bytes > 0
        client._transport.resume_reading()
        while submission.requests[0].finished is None:
            await news(submission)
        assert submission.requests[0].take()[0] == list(range(1000)) * 200

    monkeypatch.setattr(submission_module, "MAX_LAG_TOKENS", 10_000_000)
    joined(body)


def test_past_its_bound_the_backlog_counts_the_gateway_as_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        assert client._transport is not None
        client._transport.pause_reading()
        for _ in range(100):
            engine.link.send(Failed("x" * 50_000))
        assert await asyncio.to_thread(engine.closed.wait, WAIT)
        assert any("bytes yet to read and counts as gone" in line for line in caplog.messages)

    monkeypatch.setattr(link_module, "MAX_BACKLOG_BYTES", 1_000_000)
    joined(body)


def test_a_reader_that_lags_too_far_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        submission = client.submit([submit("a#0")])
        for step in range(101 + ITEMS_PER_LOOK):
            engine.link.send(StepFrame(float(step), tokens=[TokensItem(["a#0"], pack_ids([step]))]))
        assert (await engine.until(2))[1] == Cancel("a#0")
        await news(submission)
        assert submission.lagging

    monkeypatch.setattr(submission_module, "MAX_LAG_TOKENS", 100)
    joined(body)


def test_a_second_engine_is_turned_away() -> None:
    async def body(client: EngineClient, engine: Engine) -> None:
        try:
            second = await asyncio.to_thread(Engine, client.path)
        except OSError:
            return  # nobody listens any more
        assert await asyncio.to_thread(second.closed.wait, WAIT)
        await asyncio.to_thread(second.link.close)

    joined(body)


def test_a_stuck_engine_process_ends_with_its_gateway() -> None:
    """Its main thread never looks at the socket; the link ends the process all the same."""
    source = textwrap.dedent(
        """
        import sys, time
        from drift_core.frames import Starting
        from drift_core.link import EngineLink
        link = EngineLink(sys.argv[1], lambda frame: None, lambda: None, exit_after=0.1)
        link.send(Starting("stuck"))
        time.sleep(600)
        """
    )

    async def run() -> None:
        connected = asyncio.Event()
        client = await EngineClient.listen(on_starting=lambda frame: connected.set())
        process = subprocess.Popen([sys.executable, "-c", source, os.fspath(client.path)])
        try:
            await asyncio.wait_for(connected.wait(), 60)
            await client.close()
            status = await asyncio.to_thread(process.wait, WAIT)
            assert status == link_module.EXIT_STATUS_ORPHANED
        finally:
            process.kill()
            process.wait()

    asyncio.run(run())


def told_of(reads: list[list[StepFrame]]) -> tuple[list[tuple[float, int]], list[int]]:
    """The times of the frames that `on_step` saw, each with its steps, and the tokens that "a#0" got, when frames come
    in such reads."""
    told: list[tuple[float, int]] = []

    async def run() -> list[int]:
        async with connected(lambda frame, steps: told.append((frame.time, steps))) as (client, _):
            submission = client.submit([submit("a#0")])
            for frames in reads:
                client.receive(frames)
            return submission.requests[0].take()[0]

    return told, asyncio.run(run())


def test_steps_that_come_together_and_go_on_alike_are_told_of_once() -> None:
    ids = ["a#0"]

    def step(now: float, batch: int = 1) -> StepFrame:
        return StepFrame(now, tokens=[TokensItem(ids, pack_ids([int(now)]))], decode_requests=batch)

    first = StepFrame(1.0, tokens=[TokensItem(["a#0"], pack_ids([1]), True)], decode_requests=1)
    rest = [step(2.0), step(3.0), step(4.0), step(5.0), step(6.0, 2), step(7.0, 2)]
    end = StepFrame(8.0, finished=[FinishedItem("a#0", "length")])
    frames = [first, *rest, end]
    tokens = [1, 2, 3, 4, 5, 6, 7]
    each = [(float(now), 1) for now in range(1, 9)]
    assert told_of([[frame] for frame in frames]) == (each, tokens)
    # The second has other requests than the first, for all that is known; the batch changes at the sixth.
    together = [(1.0, 1), (2.0, 1), (5.0, 3), (6.0, 1), (7.0, 1), (8.0, 1)]
    assert told_of([frames]) == (together, tokens)
    assert told_of([frames[:4], frames[4:]]) == (
        [(1.0, 1), (2.0, 1), (4.0, 2), (5.0, 1), (6.0, 1), (7.0, 1), (8.0, 1)],
        tokens,
    )


def test_however_many_steps_come_together_each_request_has_the_same_tokens_and_times() -> None:
    names = [f"{k}#0" for k in range(7)]

    def steps(chance: random.Random) -> list[StepFrame]:
        """Requests come and go every few dozen steps; in between the list of their ids is one and the same."""
        frames, ids = [], names[:3]
        for step in range(1500):
            if chance.random() < 0.03:
                ids = chance.sample(names, chance.randrange(1, 8))
            items = [TokensItem(ids, pack_ids(chance.randrange(3000) for _ in ids))]
            frames.append(StepFrame(step * 0.01, tokens=items, decode_requests=len(ids)))
        return frames

    async def told(frames: list[StepFrame], together: Callable[[], int]) -> list[Any]:
        async with connected() as (client, _):
            submissions = [client.submit([submit(name)]) for name in names]
            taken: list[list[Any]] = [[] for _ in names]
            while frames:
                count = together()
                read, frames = frames[:count], frames[count:]
                client.receive(read)
                for submission, found in zip(submissions, taken, strict=True):
                    if len(frames) % 7 == 0:
                        token_ids, times, _ = submission.requests[0].take()
                        found += zip(token_ids, times, strict=True)
            for submission, found in zip(submissions, taken, strict=True):
                found += zip(*submission.requests[0].take()[:2], strict=True)
                assert list(submission.requests[0].times) == [at for _, at in found]
            return taken

    for seed in range(3):
        chance = random.Random(seed)
        frames = steps(chance)
        one_by_one = asyncio.run(told(frames, lambda: 1))
        assert asyncio.run(told(frames, lambda: chance.randrange(1, 40))) == one_by_one  # noqa: B023
        assert asyncio.run(told(frames, lambda: 400)) == one_by_one
        assert sum(map(len, one_by_one)) == sum(len(frame.tokens[0].ids) for frame in frames)


def test_steps_are_told_of_one_by_one_where_other_gateways_have_a_part_in_them() -> None:
    ids, others = ["a#0"], Others(tokens=3)
    frames = [
        StepFrame(float(now), tokens=[TokensItem(ids, pack_ids([now]))], others=others) for now in range(4)
    ]
    assert told_of([frames]) == ([(float(now), 1) for now in range(4)], [0, 1, 2, 3])
