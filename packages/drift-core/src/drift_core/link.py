"""Both ends of the Unix socket between gateway and engine: `EngineLink` (threads) and `EngineClient` (asyncio).

The gateway listens on a socket of mode 0600 in a folder of mode 0700, then starts the engine, which connects;
there is one connection. Either end learns from the socket's end, at once, that the other is gone. Nothing here
knows what a frame means to a model or to a client of the gateway.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

from drift_core.frames import (
    Answer,
    Call,
    Cancel,
    Failed,
    FrameError,
    FramesForGateway,
    FramesOfEngine,
    FrameSplitter,
    Join,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Starting,
    StepFrame,
    Submit,
    ToEngine,
    ToGateway,
    TokensItem,
    decode_to_engine,
    encode_frame,
)
from drift_core.progress import Columns, Progress
from drift_core.submission import Submission, Turns
from drift_scheduler.errors import DriftError

__all__ = ["EngineClient", "EngineFailed", "EngineGone", "EngineLink", "Progress", "Submission"]

log = logging.getLogger("drift.engine")

READ_BYTES: Final = 256 * 1024
MAX_BACKLOG_BYTES: Final = 64 * 1024 * 1024
"""Frames kept for a gateway that does not read; past it the gateway counts as gone."""

ITEMS_PER_LOOK: Final = 64
"""After so many items of tokens readers that are busy are looked at, whether they lag."""

LEAVING_S: Final = 5.0
"""How long a name may wait to be free; an engine that does not hang tells of a cancelled request's end with a step."""

EXIT_STATUS_ORPHANED: Final = 70

OnStep = Callable[[StepFrame, int], None]


class EngineGone(DriftError):
    """The engine process ended, or its socket did, with requests in it."""


class EngineFailed(DriftError):
    """The engine said in a `Failed` frame why it cannot start or go on; `usage` as there."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.usage = failed.usage


# ------------------------------------------------------------------------------------------ engine side


class EngineLink:
    """The engine's end. `send` never waits: what the socket does not take at once, a thread sends later.

    `inbox` gets every frame of the gateway on a reader thread. `closed` is called once, on such a thread, when
    the gateway is gone. With `exit_after`, the process is ended that many seconds later in case it has not ended
    itself (it may be loading weights, or stuck), so that no engine outlives its gateway.

    Raises OSError when nobody listens at `path`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inbox: Callable[[ToEngine], None],
        closed: Callable[[], None],
        exit_after: float | None = None,
    ) -> None:
        self._inbox = inbox
        self._closed = closed
        self._exit_after = exit_after
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0
        self._gone = False
        self._closing = False
        self._encode = FramesForGateway().encode
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(os.fspath(path))
        except OSError:
            self._socket.close()
            raise
        self._reader = threading.Thread(target=self._read, name="drift-link-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="drift-link-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def send(self, frame: ToGateway) -> None:
        """Hand a frame over; dropped when the gateway is gone. Raises FrameError on one that is too long."""
        with self._lock:
            data = memoryview(self._encode(frame))
            if self._gone or self._closing:
                return
            if not self._backlog:
                data = data[self._send_now(data) :]
            if data:
                self._backlog.append(data)
                self._backlog_bytes += len(data)
                if self._backlog_bytes > MAX_BACKLOG_BYTES:
                    self._gone = True
                    log.error("the gateway has %d bytes yet to read and counts as gone", self._backlog_bytes)
                self._changed.notify()

    def close(self, timeout: float = 5.0) -> None:
        """Send what is left, waiting at most `timeout` seconds for it, and close the socket."""
        with self._changed:
            self._changed.wait_for(lambda: self._gone or not self._backlog, timeout)
            self._closing = True
            self._changed.notify_all()
        self._shut_socket()
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout)
        self._writer.join(timeout)
        self._socket.close()

    def _send_now(self, data: memoryview) -> int:
        """Bytes the socket took without waiting. The lock is held."""
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self._gone = True  # the reader thread sees the end too, and reports it
            self._changed.notify_all()
            return len(data)

    def _write(self) -> None:
        """Body of the writer thread: wait for room while there is a backlog."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog or self._gone or self._closing)
                if self._gone or self._closing:
                    break
            select.select([], [self._socket], [], 1.0)
            with self._lock:
                while self._backlog and not self._gone:
                    head = self._backlog[0]
                    sent = self._send_now(head)
                    self._backlog_bytes -= sent
                    if sent < len(head):
                        self._backlog[0] = head[sent:]
                        break
                    self._backlog.popleft()
                if not self._backlog:
                    self._changed.notify_all()
        if self._gone:  # also ends the reader, which reports it
            self._shut_socket()

    def _shut_socket(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end closed it first

    def _read(self) -> None:
        """Body of the reader thread: frames to the inbox until the socket ends or speaks nonsense."""
        splitter = FrameSplitter()
        try:
            while data := self._socket.recv(READ_BYTES):
                for body in splitter.feed(data):
                    self._inbox(decode_to_engine(body))
        except OSError:
            self._shut_socket()
        except FrameError as error:
            log.error("the gateway speaks nonsense and counts as gone: %s", error)
            self._shut_socket()
        finally:
            self._end_reading()

    def _end_reading(self) -> None:
        with self._changed:
            self._gone = True
            orderly = self._closing
            self._changed.notify_all()
        if orderly:
            return
        if self._exit_after is not None:
            timer = threading.Timer(self._exit_after, os._exit, (EXIT_STATUS_ORPHANED,))
            timer.daemon = True
            timer.start()
        self._closed()


# ----------------------------------------------------------------------------------------- gateway side


class EngineClient:
    """The gateway's end, on an asyncio loop. Made by `listen`; then the engine is started with `path`.

    `on_step` sees StepFrames, and of how many steps each is the last: those that come together and tell of nothing but
    tokens are one to it. `on_starting` sees every start-up frame. `gone` is done once the socket has ended,
    its result a line that says how.
    """

    def __init__(
        self,
        on_starting: Callable[[Starting], None] | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[str] = loop.create_future()
        self._ready: asyncio.Future[Ready] = loop.create_future()
        self._on_starting = on_starting
        self._on_step = on_step
        self._directory = tempfile.TemporaryDirectory(prefix="drift-")
        self.path = Path(self._directory.name) / "engine.sock"
        self._server: asyncio.AbstractServer | None = None
        self._transport: asyncio.Transport | None = None
        self._in_flight: dict[str, tuple[Progress, Submission]] = {}
        self._leaving: dict[str, asyncio.Event] = {}  # forgotten before the engine told of their ends
        self._columns = Columns(self._progress)
        self._items = 0
        self._latest: StepFrame | None = None
        self._going_on: list[StepFrame] = []  # of those after the latest, which bring tokens alone
        self._came: float | None = None  # when the first step came whose tokens idle readers were not told of
        self._turns = Turns()
        self.pong: Pong | None = None
        """The latest answer to a `ping`."""
        self._calls = 0
        self._answers: dict[int, asyncio.Future[Answer]] = {}

    @classmethod
    async def listen(
        cls,
        on_starting: Callable[[Starting], None] | None = None,
        on_step: OnStep | None = None,
    ) -> EngineClient:
        """A client whose socket exists, so that an engine can connect."""
        client = cls(on_starting, on_step)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(client.path))
        client.path.chmod(0o600)
        loop = asyncio.get_running_loop()
        client._server = await loop.create_unix_server(lambda: _ClientProtocol(client), sock=listener)
        return client

    async def ready(self) -> Ready:
        """Wait until the engine takes requests. Raises EngineFailed or EngineGone when it never will."""
        return await asyncio.shield(self._ready)

    @property
    def in_flight(self) -> int:
        """Requests submitted that have not ended."""
        return len(self._in_flight)

    def in_flight_ids(self) -> list[str]:
        """Their ids."""
        return list(self._in_flight)

    async def free(self, request_ids: Iterable[str]) -> None:
        """Wait until the engine has ended what was called so and was cancelled a moment ago.

        Until then it knows the names, and what it tells under them is of the earlier requests.
        """
        leaving = [self._leaving[request_id] for request_id in request_ids if request_id in self._leaving]
        if leaving:
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVING_S):
                    for left in leaving:
                        await left.wait()

    def submit(self, frames: Sequence[Submit]) -> Submission:
        """Send requests that one reader will follow. Raises EngineGone, or FrameError on one too long.

        Raises ValueError on an id that is in flight, or is not `free` yet.
        """
        if self.gone.done() or self._transport is None:
            raise EngineGone("the engine is not running")
        for frame in frames:
            if frame.id in self._in_flight or frame.id in self._leaving:
                raise ValueError(f"request id '{frame.id}' is in flight already")
        data = b"".join(encode_frame(frame) for frame in frames)
        submission = Submission(
            self.forget, self._turns, [frame.id for frame in frames], min(frame.slo_tbt for frame in frames)
        )
        for progress in submission.requests:
            self._columns.forget(progress.id)
            self._in_flight[progress.id] = (progress, submission)
        self._transport.write(data)
        return submission

    def forget(self, request_id: str, cancel: bool) -> None:
        """Hear no more of a request, and `cancel` it in the engine."""
        if (found := self._in_flight.pop(request_id, None)) is None:
            return  # it ended
        found[0].leave()
        if cancel:
            self._leaving[request_id] = asyncio.Event()
            self._send(Cancel(request_id))

    def cancel(self, request_id: str, stop: bool = False) -> None:
        """Have the engine end a request, as STOP with `stop` and as CANCELLED without; its end is still reported."""
        self._send(Cancel(request_id, stop=stop))

    def ping(self, number: int) -> None:
        """Ask whether the engine's loop is alive; `pong` gets the answer."""
        self._send(Ping(number))

    async def ask(self, make: Callable[[int], Call | Join]) -> Answer:
        """Have the engine do what `make(call number)` says, between two of its steps. Raises EngineGone."""
        if self.gone.done() or self._transport is None:
            raise EngineGone("the engine is not running")
        self._calls += 1
        number = self._calls
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send(make(number))
            return await answer
        finally:
            self._answers.pop(number, None)

    def shut_down(self) -> None:
        """Ask the engine to end in order."""
        self._send(Shutdown())

    async def close(self) -> None:
        """Close the socket and remove it; requests in flight fail with EngineGone."""
        if self._server is not None:
            self._server.close()
        if self._transport is not None:
            self._transport.abort()
        self.end("the gateway closed the connection")
        self._directory.cleanup()
        await asyncio.sleep(0)

    def end(self, reason: str) -> None:
        """The engine is gone: every request in flight fails now."""
        if self.gone.done():
            return
        self.gone.set_result(reason)
        error = EngineGone(reason)
        if not self._ready.done():
            self._ready.set_exception(error)
        self._ready.exception()  # retrieved, whoever else waits for it
        for progress, submission in list(self._in_flight.values()):
            progress.leave()
            submission.fail(error)
        self._in_flight.clear()
        for left in self._leaving.values():
            left.set()
        self._leaving.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)

    def _send(self, frame: ToEngine) -> None:
        if self._transport is not None and not self.gone.done():
            self._transport.write(encode_frame(frame))

    def connected(self, transport: asyncio.Transport) -> bool:
        """An engine connected; `False` refuses a second one."""
        if self._transport is not None or self.gone.done():
            return False
        self._transport = transport
        if self._server is not None:
            self._server.close()
        return True

    def receive(self, frames: Iterable[ToGateway]) -> None:
        """Act on what the engine told, in order. Readers have their turns once all of it is known: while the process
        is behind, several steps come at once, and what each would cost apart from its tokens is saved."""
        for frame in frames:
            if isinstance(frame, StepFrame) and self._latest is not None and _goes_on(frame, self._latest):
                self._going_on.append(frame)
            else:
                self._go_on()
                self._act_on(frame)
        self._go_on()
        if self._came is not None:
            self._turns.look(self._came)
            self._came = None
        self._turns.give()

    def _act_on(self, frame: ToGateway) -> None:
        match frame:
            case StepFrame():
                self._deliver(frame)
                self._latest = frame
                if self._on_step is not None:
                    self._on_step(frame, 1)
            case Starting():
                if self._on_starting is not None:
                    self._on_starting(frame)
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(frame)
            case Pong():
                self.pong = frame
            case Answer():
                found = self._answers.get(frame.call)
                if found is not None and not found.done():
                    found.set_result(frame)
            case Failed():
                if not self._ready.done():
                    self._ready.set_exception(EngineFailed(frame))
                self.end(frame.message)

    def _go_on(self) -> None:
        """Deliver the steps that go on with what the latest brought, all at once."""
        frames = self._going_on
        if not frames:
            return
        self._going_on = []
        latest = self._latest = frames[-1]
        times, items = [frame.time for frame in frames], [frame.tokens[0] for frame in frames]
        if self._columns.add_all(items[0].ids, [item.token_ids for item in items], times):
            self._came_at(times[0], len(items))
        else:
            for item, at in zip(items, times, strict=True):
                self._deliver_tokens(item, at)
        for at in times:
            self._turns.step_is(at)
        if self._on_step is not None:
            self._on_step(latest, len(frames))

    def _deliver(self, frame: StepFrame) -> None:
        in_flight = self._in_flight
        for accepted in frame.accepted:
            if (found := in_flight.get(accepted.id)) is not None:
                found[0].accepted = accepted
                found[1].notify(urgent=True)
        for item in frame.tokens:
            self._deliver_tokens(item, frame.time)
        for finished in frame.finished:
            if (left := self._leaving.pop(finished.id, None)) is not None:
                left.set()
            elif (found := in_flight.pop(finished.id, None)) is not None:
                found[0].leave()
                found[0].finished = finished
                found[1].notify(urgent=True)
        if frame.tokens:
            self._turns.step_is(frame.time)

    def _deliver_tokens(self, item: TokensItem, now: float) -> None:
        if len(item.token_ids) != len(item.ids):
            raise FrameError(f"a step of {len(item.ids)} requests has {len(item.token_ids)} tokens")
        if item.first or not self._columns.add(item.ids, item.token_ids, now):
            self._deliver_one_by_one(item, now)
            return
        if item.logprobs:
            for request_id in item.logprobs:
                if (found := self._in_flight.get(request_id)) is not None:
                    self._add_logprob(found[0], item)
        self._came_at(now, 1)

    def _came_at(self, now: float, items: int) -> None:
        """So many items of tokens, the first at that time."""
        if self._came is None:
            self._came = now
        self._items += items
        if self._items >= ITEMS_PER_LOOK:
            self._items = 0
            for submission in {id(found[1]): found[1] for found in self._in_flight.values()}.values():
                submission.look_at_lag()

    def _deliver_one_by_one(self, item: TokensItem, now: float) -> None:
        """First tokens, or several of one request."""
        for request_id, token_id in zip(item.ids, item.token_ids, strict=True):
            if (found := self._in_flight.get(request_id)) is not None:
                found[0].add(token_id, now)
                self._add_logprob(found[0], item)
                found[1].notify(urgent=item.first)

    def _progress(self, request_id: str) -> Progress | None:
        found = self._in_flight.get(request_id)
        return None if found is None else found[0]

    @staticmethod
    def _add_logprob(progress: Progress, item: TokensItem) -> None:
        if item.logprobs is not None and (logprob := item.logprobs.get(progress.id)) is not None:
            progress.add_logprob(logprob)


def _goes_on(frame: StepFrame, latest: StepFrame) -> bool:
    """Whether it tells of nothing but one more token each for the same requests, on a device that is used the same."""
    tokens, before = frame.tokens, latest.tokens
    return (
        len(tokens) == len(before) == 1
        and tokens[0].ids is before[0].ids
        and not (tokens[0].first or tokens[0].logprobs)
        and len(tokens[0].token_ids) == len(tokens[0].ids)
        and not (frame.accepted or frame.finished or frame.others or latest.others)
        and frame.decode_requests == latest.decode_requests
        and frame.prefill_requests == latest.prefill_requests
        and frame.partition == latest.partition
        and frame.sharing == latest.sharing
    )


class _ClientProtocol(asyncio.Protocol):
    """Bytes of the engine's connection to frames for the client."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._splitter = FrameSplitter()
        self._decode = FramesOfEngine().decode
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it
        if self._client.connected(stream):
            self._transport = stream
        else:
            stream.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._client.receive(map(self._decode, self._splitter.feed(data)))
        except (FrameError, ValueError) as error:
            self._client.end(f"the engine sent nonsense: {error}")
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._client.end("the engine process ended" if exc is None else f"the engine is gone: {exc}")
