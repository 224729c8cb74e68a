"""Messages written to a call without a task's being woken for each.

A task that awaits news, and then `context.write`, is resumed twice for each message, through every generator between
it and the news, which costs about as much as gRPC itself. Here the coroutine of `write` is run by hand until it waits
for gRPC, and finished when gRPC is. Knows nothing of what is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

Write = Callable[[Any], Awaitable[None]]
"""`grpc.aio.ServicerContext.write`."""


class DirectWriter:
    """Writes one message at a time with `write`, and tells `sent` when the next may come.

    `sent` hears `None`, or what the write failed with; never before `start` has returned.
    """

    __slots__ = ("_coroutine", "_loop", "_sent", "_write")

    def __init__(self, write: Write, sent: Callable[[BaseException | None], None]) -> None:
        self._write = cast(Callable[[Any], Coroutine[asyncio.Future[None], None, None]], write)
        self._sent = sent
        self._loop = asyncio.get_running_loop()
        self._coroutine: Coroutine[asyncio.Future[None], None, None] | None = None

    def start(self, message: Any) -> None:
        """Begin to write; the one before has been sent."""
        self._coroutine = coroutine = self._write(message)
        try:
            future = coroutine.send(None)
        except StopIteration:
            self._loop.call_soon(self._sent, None)
        except BaseException as error:
            self._loop.call_soon(self._sent, error)
        else:
            future._asyncio_future_blocking = False  # as a task says that it has seen what it awaits
            future.add_done_callback(self._go_on)

    def _go_on(self, done: asyncio.Future[None]) -> None:
        """What the write waited for is done, one way or the other: the coroutine sees which."""
        del done  # which has the error, whose traceback has this frame: a cycle
        assert self._coroutine is not None
        try:
            future = self._coroutine.send(None)
        except StopIteration:
            self._sent(None)
        except BaseException as error:
            self._sent(error)
        else:
            future._asyncio_future_blocking = False
            future.add_done_callback(self._go_on)
