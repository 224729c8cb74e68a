"""The gateway's event loop hears of all that gRPC has done, in one round."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
from collections import deque
from collections.abc import Callable

import grpc
import pytest
import uvloop

from drift_gateway.event_loop import EventLoop, new_event_loop

EVENTS = 1200
PATIENCE_S = 60.0


class PollerCompletionQueue:
    """What grpc.aio does: a thread queues and writes a byte, and whoever reads one empties the queue."""

    def __init__(self) -> None:
        self.reading, self._writing = socket.socketpair()
        self.reading.setblocking(False)
        self._queue: deque[int] = deque()
        self.heard: list[int] = []
        self.rounds = 0
        self.empty_handed = 0

    def happen(self, count: int) -> None:
        """`count` things are done, as fast as there is room for their bytes."""
        for number in range(count):
            self._queue.append(number)
            self._writing.send(b"1")

    def handle_events(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.rounds += 1
        try:
            self.reading.recv(1)
        except BlockingIOError:
            self.empty_handed += 1
            return
        while self._queue:
            self.heard.append(self._queue.popleft())

    def close(self) -> None:
        self.reading.close()
        self._writing.close()


class Other(PollerCompletionQueue):
    """Somebody else's, who wants to be called for each byte."""


def rounds_to_hear(loop: asyncio.AbstractEventLoop, queue: PollerCompletionQueue, partial: bool) -> int:
    """Rounds that the loop takes to hear of all, which happen while it is busy with something else."""
    callback: Callable[[], None] = queue.handle_events
    if partial:
        callback = functools.partial(queue.handle_events, loop)

    async def body() -> None:
        asyncio.get_running_loop().add_reader(queue.reading, callback)
        thread = threading.Thread(target=queue.happen, args=(EVENTS,))
        thread.start()
        thread.join(0.2)  # the loop is busy meanwhile: there is room for some hundreds
        while len(queue.heard) < EVENTS:
            await asyncio.sleep(0)
            thread.join(0.001)  # and busy in each round
        thread.join()
        while queue.reading.recv(1, socket.MSG_PEEK):
            await asyncio.sleep(0)

    async def bounded() -> None:
        with contextlib.suppress(BlockingIOError):  # no byte is left
            await asyncio.wait_for(body(), PATIENCE_S)
        asyncio.get_running_loop().remove_reader(queue.reading)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(bounded())
    queue.close()
    assert queue.heard == list(range(EVENTS))
    return queue.rounds


@pytest.mark.parametrize("partial", [False, True])
def test_what_was_done_is_heard_of_in_few_rounds(partial: bool) -> None:
    loop = EventLoop()
    assert rounds_to_hear(loop, PollerCompletionQueue(), partial) < EVENTS / 4
    assert loop.mended == 1


def test_without_it_each_thing_takes_a_round() -> None:
    """That there is something to mend: should this fail, so may the test above."""
    assert rounds_to_hear(uvloop.new_event_loop(), PollerCompletionQueue(), False) > EVENTS / 2


def test_readers_of_others_are_called_as_ever() -> None:
    loop = EventLoop()
    assert rounds_to_hear(loop, Other(), False) > EVENTS / 2
    assert loop.mended == 0


def test_loops_of_two_threads_lose_nothing() -> None:
    """Both watch the same sockets, as a client's and a server's loop in one process do."""
    queue = PollerCompletionQueue()
    over = threading.Event()

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(queue.reading, queue.handle_events)
        while not over.is_set():
            await asyncio.sleep(0.001)
        loop.remove_reader(queue.reading)

    def run() -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(asyncio.wait_for(watch(), PATIENCE_S))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            told = len(queue.heard)
            queue.happen(17)
            waiting = threading.Event()
            for _ in range(int(PATIENCE_S * 1000)):
                if len(queue.heard) == told + 17:
                    break
                waiting.wait(0.001)
            assert len(queue.heard) == told + 17, "what is in the queue waits, with no byte to tell of it"
    finally:
        over.set()
        for thread in threads:
            thread.join()
    queue.close()
    assert queue.empty_handed == 0


def test_the_grpc_in_use_is_known() -> None:
    """A release that wakes the loop otherwise would go unnoticed, and be left as it is."""

    async def body() -> int:
        server = grpc.aio.server()
        server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await server.stop(0)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, EventLoop)
        return loop.mended

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        assert runner.run(body()) == 1
