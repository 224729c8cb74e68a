"""Requests in flight as their reader sees them, and whose turn it is to be read when there is more than can be sent.

Every engine step brings news for many readers at once. Those that wait are let go a few at a time, the most urgent
first: whose first token or end is there, then by the oldest token not yet sent plus a quarter of the request's TBT
target. Between two of these the event loop gets to everything else, so that new calls are let in however many streams
there are. Whoever is not let go before the next step finds more tokens when it is: under load there are fewer, larger
messages, and nothing queues but tokens. This module knows no sockets and no frames but the items it keeps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, Final, Protocol

from drift_core.frames import AcceptedItem, FinishedItem, TokenLogprob
from drift_scheduler.errors import DriftError

TURNS_AT_ONCE: Final = 2
"""Readers let go in one pass of the event loop. gRPC needs several passes to take one new call, so short ones let calls
in under load: at 12 a pass, refusals waited seconds behind 1600 messages a second on a busy machine, at 2 a pass 6 ms
(p50), for 3% more time per message."""

SHARE_OF_TBT: Final = 0.25
"""Of a request's TBT target, what its tokens may wait for others' before they are the more urgent ones."""

MAX_LAG_TOKENS: Final = 4096
"""Tokens kept for a client that does not read; past it the requests are cancelled."""

MAX_STUCK_S: Final = 10.0
"""How long one message may take to be sent while tokens wait behind it; past it the requests are cancelled."""

DEMOTED_LAG_TOKENS: Final = 512
"""A reader that fell this far behind has to wait for those that keep up, DEMOTION_S at most."""

DEMOTION_S: Final = 1.0

GIVEN_UP_S: Final = 30.0
"""How long a reader whose requests were cancelled may still take to hear of it."""


class Progress:
    """What one request has to tell: tokens in order that were not taken yet, and the times of all it ever had.

    `accepted` and `finished` are set once and stay. `logprobs` are those of the tokens not taken yet. Both lists stay
    the same objects: whoever delivers keeps their `append`.
    """

    __slots__ = ("accepted", "finished", "id", "logprobs", "times", "token_ids")

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.accepted: AcceptedItem | None = None
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self.logprobs: list[TokenLogprob | None] | None = None
        self.finished: FinishedItem | None = None

    def take(self) -> tuple[list[int], list[float], list[TokenLogprob | None] | None]:
        """Token ids, times and log probabilities that came since the last call."""
        token_ids = self.token_ids.copy()
        if not token_ids:
            return token_ids, [], None
        self.token_ids.clear()
        logprobs, self.logprobs = self.logprobs, None
        return token_ids, self.times[-len(token_ids) :], logprobs

    def add_logprob(self, logprob: TokenLogprob) -> None:
        """Put it beside the token id appended last; earlier ones that came without have `None`."""
        if self.logprobs is None:
            self.logprobs = []
        self.logprobs.extend([None] * (len(self.token_ids) - 1 - len(self.logprobs)))
        self.logprobs.append(logprob)


class Forget(Protocol):
    """`EngineClient.forget`."""

    def __call__(self, request_id: str, cancel: bool) -> None: ...


class Submission:
    """Requests submitted together, read by one task: `await changed()`, then look at each `Progress`.

    However late the reader is, there is one set of tokens per request to take, not a queue of messages. `tbt`: the
    requests' target, seconds.
    """

    def __init__(self, forget: Forget, turns: Turns, request_ids: Sequence[str], tbt: float) -> None:
        self.requests = tuple(Progress(request_id) for request_id in request_ids)
        self.lagging = False
        """Whether the reader fell too far behind, so that the requests were cancelled."""
        self._forget = forget
        self._turns = turns
        self._patience = SHARE_OF_TBT * tbt
        self._error: BaseException | None = None
        self._news = False
        self._urgent = False
        self.queued = False
        """Whether it waits for its reader's turn, with the news it has and all that is to come."""
        self.told = False
        """Whether more tokens need not be told of each time: it is queued, or busy and knows of some already."""
        self._left = False
        self._waiter: asyncio.Future[None] | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._busy_since = 0.0
        self._pass_on: Callable[[], bool] | None = None
        self._passing_on = False

    def short_cut(self, pass_on: Callable[[], bool]) -> None:
        """From now on `pass_on` is called, in the reader's turn, for news of nothing but tokens after the first ones.

        It takes them and says that it did; then `passed_on` is to be called once there is room for more. Where it
        declines, and for all other news, the reader is let go from `changed` as ever, but never while something is
        being passed on.
        """
        self._pass_on = pass_on

    def passed_on(self, error: BaseException | None = None) -> None:
        """What `pass_on` took has been sent, or could not be: then `changed` raises that."""
        self._passing_on = False
        if error is not None and self._error is None:
            self._error = error
        if self._error is not None:
            self.let_go()
        elif self._news and self._waiter is not None:
            self._queue()
            self._turns.soon()

    async def changed(self) -> None:
        """Wait for news of any of the requests, and for this reader's turn. Raises what `fail` was given."""
        if self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            if self._news:  # it came while the reader was busy
                self._queue()
                self._turns.soon()
            if self._reader is None:
                self._reader = asyncio.current_task()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = self._urgent = self.told = False
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Cancel those that have not ended, and hear no more of any."""
        self._left = True
        self._drop()

    def notify(self, urgent: bool = False) -> None:
        """There is news; `urgent`: other than tokens after the first. `Turns.give` lets the reader go."""
        self._news = self.told = True
        self._urgent = self._urgent or urgent
        if self._waiter is None or self._passing_on:
            self._look_at_lag()
        elif not self.queued:
            self._queue()

    def fail(self, error: DriftError) -> None:
        """There will be no more news."""
        self._error = error
        self.let_go()

    def let_go(self) -> None:
        """It is the reader's turn."""
        self.queued = self.told = False
        waiter = self._waiter
        if waiter is None or self._passing_on or waiter.done():
            return
        self._busy_since = time.monotonic()
        if self._pass_on is not None and not self._urgent and not self.lagging and self._error is None:
            self._news = False
            self._passing_on = self._pass_on()
            if self._passing_on:
                return
        waiter.set_result(None)

    def _drop(self) -> None:
        for request in self.requests:
            self._forget(request.id, cancel=request.finished is None)

    def _queue(self) -> None:
        self.queued = True
        self._turns.add(0.0 if self._urgent else self._due(), self)

    def _due(self) -> float:
        """When the oldest token not taken becomes late; with none there is news of another kind."""
        due = 0.0
        for request in self.requests:
            if (behind := len(request.token_ids)) > 0:
                oldest = request.times[-behind] + self._patience
                if behind > DEMOTED_LAG_TOKENS:
                    oldest += DEMOTION_S
                due = oldest if due == 0.0 else min(due, oldest)
        return due

    def _look_at_lag(self) -> None:
        """The reader is busy, with sending if it is alive: past a bound, end what it reads."""
        requests = self.requests
        behind = len(requests[0].token_ids)
        if len(requests) > 1:
            behind = max(len(request.token_ids) for request in requests)
        if self._left or not behind:
            return
        stuck = self._busy_since and time.monotonic() - self._busy_since > MAX_STUCK_S
        if behind <= MAX_LAG_TOKENS and not stuck:
            return
        self.lagging = True
        self._drop()
        if self._reader is not None:
            asyncio.get_running_loop().call_later(GIVEN_UP_S, self._give_up, self._reader)

    def _give_up(self, reader: asyncio.Task[Any]) -> None:
        """The reader did not even come to hear why it was ended."""
        if not self._left and (self._waiter is None or self._passing_on):
            reader.cancel()


class Turns:
    """Readers with news, most urgent first, let go `at_once` per pass of the event loop."""

    def __init__(self, at_once: int = TURNS_AT_ONCE) -> None:
        self._at_once = at_once
        self._waiting: list[tuple[float, int, Submission]] = []
        self._count = 0
        self._scheduled = False

    def add(self, due: float, submission: Submission) -> None:
        """Let it go in its turn; `due` orders."""
        self._count += 1
        heappush(self._waiting, (due, self._count, submission))

    def give(self) -> None:
        """Let the first of them go now, unless others were let go in this pass already."""
        if not self._scheduled:
            self._pass()

    def soon(self) -> None:
        """Let the first of them go in the next pass."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        self._scheduled = False
        waiting = self._waiting
        for _ in range(min(self._at_once, len(waiting))):
            heappop(waiting)[2].let_go()
        if waiting:
            self.soon()
