"""The messages of one call, of which tasks that write them may be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Messages(Generic[T]):
    """The messages of one call. A write that was begun is finished, though the task that began it be cancelled: gRPC
    takes no second one beside it, and a call in which one was tried never ends.

    Any number of tasks may write; they do one after another.
    """

    def __init__(self, write: Callable[[T], Awaitable[None]]) -> None:
        self._write = write
        self._turn = asyncio.Lock()
        self._latest: asyncio.Future[None] | None = None

    async def write(self, response: T) -> None:
        """Once the one before is out."""
        async with self._turn:
            if self._latest is not None:
                await asyncio.shield(self._latest)
            self._latest = asyncio.ensure_future(self._write(response))
            self._latest.add_done_callback(_seen)
            await asyncio.shield(self._latest)


def _seen(done: asyncio.Future[None]) -> None:
    """Its error is whoever's that waits for it, if anybody still does."""
    if not done.cancelled():
        done.exception()
