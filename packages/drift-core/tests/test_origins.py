"""Several gateways on one engine, over its sockets: ids, whose steps are whose, who comes and who goes."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from drift_core.engine import engine_config
from drift_core.engine_process import serve_socket
from drift_core.frames import Answer, Failed, FinishedItem, Join, Others, SetPolicy, StepFrame, Submit
from drift_core.link import EngineClient, Submission
from drift_core.origins import IdInUseError, Origins
from drift_core.sampling_params import SamplingParams
from drift_scheduler.domain import SLO, Request
from drift_scheduler.tracked import Tracked

PATIENCE_S = 60.0


class Seen(list[StepFrame]):
    """The frames that a gateway was told of."""

    def add(self, frame: StepFrame, steps: int) -> None:
        self.append(frame)

    def others(self) -> list[Others]:
        return [frame.others for frame in self if frame.others is not None]

    def others_ended(self, count: int) -> bool:
        """Whether so many requests of others have ended."""
        return sum(len(each.finished) for each in self.others()) == count


Body = Callable[[EngineClient, list[EngineClient], list[Seen]], Awaitable[None]]


@asynccontextmanager
async def joined(first: EngineClient, seen: Seen) -> Any:
    client = await EngineClient.listen(on_step=seen.add)
    try:
        answer = await first.ask(lambda call: Join(call, str(client.path)))
        assert answer.error == ""
        await asyncio.wait_for(client.ready(), PATIENCE_S)
        yield client
    finally:
        await client.close()


def with_gateways(body: Body, count: int = 2) -> None:
    """Run a coroutine with the client that started a simulated engine of 2 ms steps, and some that joined it.

    `body` gets their frames too, those of the first client first.
    """
    settings = engine_config(
        model="demo", device="simulated", simulate="step_ms=2:token_us=50", profile="none", max_running=8
    )

    async def run() -> None:
        seen = [Seen() for _ in range(count + 1)]
        first = await EngineClient.listen(on_step=seen[0].add)
        thread = threading.Thread(target=serve_socket, args=(settings, str(first.path)), daemon=True)
        thread.start()
        try:
            await asyncio.wait_for(first.ready(), PATIENCE_S)
            async with AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(joined(first, each)) for each in seen[1:]]
                await asyncio.wait_for(body(first, clients, seen), PATIENCE_S)
        finally:
            first.shut_down()
            await asyncio.to_thread(thread.join, PATIENCE_S)
            await first.close()

    asyncio.run(run())


def submit(request_id: str, prompt: list[int], tokens: int) -> Submit:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens, logprobs=1)
    return Submit(request_id, prompt, params, 2.0, 0.1, None, "default", 0, "", time.monotonic())


async def ended(submission: Submission) -> None:
    while any(request.finished is None for request in submission.requests):
        await submission.changed()


async def running(submission: Submission) -> None:
    while not all(request.times for request in submission.requests):
        await submission.changed()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_each_gateway_gets_its_own_requests_and_hears_of_the_others() -> None:
    async def body(first: EngineClient, clients: list[EngineClient], seen: list[Seen]) -> None:
        a = clients[0].submit([submit(f"a{k}#0", [5, 6, k], 40 + k) for k in range(3)])
        b = clients[1].submit([submit(f"b{k}#0", [7, 8, k], 30 + k) for k in range(3)])
        await asyncio.gather(ended(a), ended(b))
        assert [len(request.token_ids) for request in a.requests] == [40, 41, 42]
        assert [len(request.token_ids) for request in b.requests] == [30, 31, 32]
        assert all(request.accepted is not None for request in (*a.requests, *b.requests))
        for frames, ends in ((seen[0], 6), (seen[1], 3), (seen[2], 3)):
            await until(functools.partial(frames.others_ended, ends))
        for frames, own, tokens in ((seen[1], "a", 93), (seen[2], "b", 123), (seen[0], "", 216)):
            told = {finished.id[0] for frame in frames for finished in frame.finished}
            assert told == set(own)
            others = frames.others()
            assert sum(each.tokens for each in others) == tokens
            accepted = [item for each in others for item in each.accepted]
            first_tokens = [request_id for each in others for request_id in each.first]
            gone = [item.id for each in others for item in each.finished]
            assert sorted(item.id for item in accepted) == sorted(first_tokens) == sorted(gone)
            assert len(set(gone)) == (6 if not own else 3)
            assert all(request_id.count("#") == 2 for request_id in gone)
            assert {item.prompt_tokens for item in accepted} == {3}
            least = {"a": {40, 41, 42}, "b": {30, 31, 32}}  # they ignore the end of text
            theirs = set[int]().union(*(tokens for name, tokens in least.items() if name != own))
            assert {item.min_tokens for item in accepted} == theirs

    with_gateways(body)


def test_an_id_that_another_gateway_has_in_flight_is_refused() -> None:
    async def body(first: EngineClient, clients: list[EngineClient], seen: list[Seen]) -> None:
        a = clients[0].submit([submit("same#0", [5, 6], 2000)])
        await running(a)
        again = clients[1].submit([submit("same#0", [5, 6], 3)])
        await ended(again)
        (refused,) = again.requests
        assert refused.finished is not None
        assert (refused.finished.reason, refused.finished.id_in_use) == ("rejected", True)
        assert "'same#0' is in flight" in refused.finished.message
        clients[0].cancel("same#0")
        await ended(a)
        once_more = clients[1].submit([submit("same#0", [5, 6], 3)])
        await ended(once_more)
        assert len(once_more.requests[0].token_ids) == 3

    with_gateways(body)


def test_a_gateway_that_goes_takes_its_own_requests_along_and_no_others() -> None:
    async def body(first: EngineClient, clients: list[EngineClient], seen: list[Seen]) -> None:
        lost = clients[0].submit([submit(f"lost{k}#0", [5, 6, k], 3000) for k in range(3)])
        kept = clients[1].submit([submit("kept#0", [9, 9], 400)])
        await asyncio.gather(running(lost), running(kept))
        await clients[0].close()
        await ended(kept)
        assert len(kept.requests[0].token_ids) == 400
        await until(lambda: seen[0].others_ended(4))
        ends = [item for each in seen[0].others() for item in each.finished]
        assert [item.reason for item in ends if "lost" in item.id] == ["cancelled"] * 3
        load = seen[0][-1].load
        assert load is not None
        assert (load.waiting, load.running) == (0, 0)

    with_gateways(body)


def test_one_that_comes_later_is_told_of_what_is_there_and_of_policies_in_force() -> None:
    async def body(first: EngineClient, clients: list[EngineClient], seen: list[Seen]) -> None:
        (early,) = clients
        answer = await first.ask(lambda call: SetPolicy(call, "chunked-prefill"))
        assert answer.error == ""
        submission = early.submit([submit(f"r{k}#0", [5, 6, k], 3000) for k in range(2)])
        await running(submission)
        frames = Seen()
        async with joined(first, frames) as late:
            assert (await late.ready()).dispatch == "chunked-prefill"
            await until(lambda: bool(frames))
            others = frames[0].others
            assert others is not None
            assert len(others.accepted) == len(others.first) == 2
            early.shut_down()  # of its own connection, not of the engine
            await asyncio.wait_for(early.gone, PATIENCE_S)
            own = late.submit([submit("own#0", [1], 5)])
            await ended(own)
            assert len(own.requests[0].token_ids) == 5
        assert not first.gone.done()

    with_gateways(body, count=1)


def test_nobody_listens_where_one_is_to_join() -> None:
    async def body(first: EngineClient, clients: list[EngineClient], seen: list[Seen]) -> None:
        answer = await first.ask(lambda call: Join(call, "/no/such.sock"))
        assert "no gateway listens at /no/such.sock" in answer.error

    with_gateways(body, count=0)


def test_ids_are_free_before_it_is_told_that_their_requests_ended() -> None:
    """Whoever hears of an end may use the name while the step is still being told to others."""
    origins = Origins(lambda frame: None)
    other = origins.new()
    other.send = lambda frame: None
    for origins_of in (origins.first, other):  # alone, and with another gateway
        assert origins.enter(origins_of, "x#0")
        ended = StepFrame(1.0, finished=[FinishedItem(origins_of.inside("x#0"), "length")])
        for _ in origins.share(ended, {}):
            if not origins_of.requests:
                assert origins.enter(origins_of, "x#0")
        assert origins_of.requests == {origins_of.inside("x#0")}
        origins.end(origins_of.inside("x#0"))
        origins.join(other, Failed("a greeting"))


def test_one_that_comes_later_is_not_told_of_what_will_never_end_for_it() -> None:
    """A cancelled request's end is told at once, while its lane still works on it."""

    def tracked(request_id: str) -> Tracked:
        return Tracked(Request(request_id, 0.0, 5, 9, SLO(1.0, 0.1)), (1, 0, 0.0, 1))

    told: list[Any] = []
    origins = Origins(lambda frame: None)
    live = {request_id: tracked(request_id) for request_id in ("runs#0", "ends#0")}
    for request_id in live:
        assert origins.enter(origins.first, request_id)
    end = FinishedItem("ends#0", "cancelled")
    for origin, frame in origins.share(StepFrame(1.0, finished=[end]), live):
        origin.send(frame)
    late = origins.new()
    late.send = told.append
    assert origins.join(late, Failed("a greeting"))
    for origin, frame in origins.share(StepFrame(2.0), live):
        origin.send(frame)
    assert [other.id for other in told[1].others.accepted] == ["runs#0"]


def test_ids_are_free_again_when_requests_end() -> None:
    sent: list[Any] = []
    origins = Origins(sent.append)
    other = origins.new()
    other.send = sent.append
    assert origins.join(other, Failed("a greeting"))
    assert isinstance(sent[0], Failed)
    assert origins.enter(origins.first, "x#0")
    assert not origins.enter(origins.first, "x#0")
    with pytest.raises(IdInUseError):
        origins.enter(other, "x#0")
    origins.end("x#0")
    assert origins.enter(other, "x#0")
    assert origins.leave(other) == ["1#x#0"]
    assert not origins.join(other, Answer(1))
