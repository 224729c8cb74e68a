"""An event loop that hears of all that gRPC has done.

A thread of grpc.aio's puts whatever gRPC has done into a queue and writes a byte into a pair of sockets. The loop is
called back while there are bytes to read; gRPC's callback reads one of them, however many there are, and empties the
queue. With more than one thing done per round of the loop bytes pile up. After 278 of them (on Linux) the sockets are
full, and the thread waits with each thing until the loop has read one more byte: from then on the loop hears of one
thing a round, and new calls wait inside gRPC behind hundreds of messages that were sent. In a gateway that streamed to
512 clients and used all of a processor they waited for seconds, and a quarter of its tokens per second was lost.

So here all bytes but one are read before gRPC's callback is. It is known by its class, so that a release of gRPC which
does this otherwise is left alone; a test looks whether the one in use is known.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVarTuple, Unpack

import uvloop

_Ts = TypeVarTuple("_Ts")

QUEUE_OF_GRPC: Final = "PollerCompletionQueue"
MOST_BYTES: Final = 4096

_TURN: Final = threading.Lock()
"""Loops of several threads watch the same sockets: whoever leaves a byte is the one to read it."""


class EventLoop(uvloop.Loop):
    """uvloop's, with that mended. `mended` counts the readers of gRPC's that it was given."""

    mended = 0

    def add_reader(self, fd: Any, callback: Callable[[Unpack[_Ts]], Any], *args: *_Ts) -> None:
        """As `asyncio.AbstractEventLoop.add_reader`."""
        if isinstance(fd, socket.socket) and _is_grpcs(callback):
            self.mended += 1
            super().add_reader(fd, _read_all_but_one, fd, callback, *args)
        else:
            super().add_reader(fd, callback, *args)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """For `asyncio.Runner`, in every process that has many calls at once."""
    return EventLoop()


def _is_grpcs(callback: Callable[..., object]) -> bool:
    method = getattr(callback, "func", callback)  # a partial, since each loop is told apart
    return type(getattr(method, "__self__", None)).__name__ == QUEUE_OF_GRPC


def _read_all_but_one(wakeups: socket.socket, callback: Callable[..., object], *args: Any) -> None:
    with _TURN:
        try:
            count = len(wakeups.recv(MOST_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return  # another loop has read them, and emptied the queue
        if count > 1:
            wakeups.recv(count - 1)
        callback(*args)
