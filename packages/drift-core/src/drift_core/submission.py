"""Requests in flight as their reader sees them, and whose turn it is to be read when there is more than can be sent.

Every engine step brings news for many readers at once. Those that wait are let go a few at a time, the most urgent
first: whose first token or end is there, then by the oldest token not yet sent plus a quarter of the request's TBT
target. Between two of these the event loop gets to everything else, so that new calls are let in however many streams
there are. Whoever is not let go before the next step finds more tokens when it is: under load there are fewer, larger
messages, and nothing queues but tokens. While the process is behind (`Turns.hold`), tokens are kept until one more step
would make the oldest wait for more than that quarter, so that it gets ahead of its work instead of sending each token
as late as it can just manage. What is to be done for each message is little, as there are tens of thousands a second:
readers that are done with all their tokens have nothing to tell one from another but their targets, and go from one
state to the next together. This module knows no sockets and no frames.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Any, Final, Protocol

from drift_core.progress import Progress
from drift_scheduler.errors import DriftError

TURNS_AT_ONCE: Final = 12
"""Readers let go in one pass of the event loop. gRPC needs several passes to take one new call, so short ones let calls
in under load: `bench/rejections.py` under streams shows how long refusals wait. More at once take less time each, as
the processor does the same things one after another: at 12 a message takes a tenth less than at 6, and 99% of refusals
beside 256 streams are there within 11 to 20 ms instead of 11 to 17; at 32 within 19 to 31."""

SHARE_OF_TBT: Final = 0.25
"""Of a request's TBT target, what its tokens may wait for others' before they are the more urgent ones."""

LONGEST_HOLD_S: Final = 0.05
"""Tokens are kept no longer than this, whatever the target."""

BEHIND_S: Final = 0.05
"""With readers in the queue for so long without a break, the process is behind."""

HOLD_EASES_S: Final = 30.0
"""From full to none at all, once the process is behind no more."""

MAX_LAG_TOKENS: Final = 4096
"""Tokens kept for a client that does not read; past it the requests are cancelled."""

MAX_STUCK_S: Final = 10.0
"""How long one message may take to be sent while tokens wait behind it; past it the requests are cancelled."""

DEMOTED_LAG_TOKENS: Final = 512
"""A reader that fell this far behind has to wait for those that keep up, DEMOTION_S at most."""

DEMOTION_S: Final = 1.0

GIVEN_UP_S: Final = 30.0
"""How long a reader whose requests were cancelled may still take to hear of it."""

TOO_SLOW: Final = "the client reads too slowly; its tokens were piling up"
"""What the task of a reader that takes longer is cancelled with, so that it can tell this from its client's leaving."""


def _nothing(_: Any) -> None:
    """Nobody listens any more."""


class Forget(Protocol):
    """`EngineClient.forget`."""

    def __call__(self, request_id: str, cancel: bool) -> None: ...


class Submission:
    """Requests submitted together, read by one task: `await changed()`, then look at each `Progress`.

    However late the reader is, there is one set of tokens per request to take, not a queue of messages. `tbt`: the
    requests' target, seconds.
    """

    __slots__ = (
        "__weakref__",
        "_busy_since",
        "_dropped",
        "_error",
        "_forget",
        "_left",
        "_news",
        "_passing_on",
        "_reader",
        "_take",
        "_turns",
        "_urgent",
        "_waiter",
        "held_until",
        "lagging",
        "only",
        "pass_on",
        "patience",
        "queued",
        "requests",
    )

    def __init__(self, forget: Forget, turns: Turns, request_ids: Sequence[str], tbt: float) -> None:
        self.requests = tuple(Progress(request_id) for request_id in request_ids)
        self.only = self.requests[0] if len(self.requests) == 1 else None
        """The one request, if it is one."""
        self.lagging = False
        """Whether the reader fell too far behind, so that the requests were cancelled."""
        self._forget = forget
        self._turns = turns
        self.patience = SHARE_OF_TBT * tbt
        """What its tokens may wait for others', in seconds."""
        self._error: BaseException | None = None
        self._news = False
        self._urgent = False
        self.queued = False
        """Whether it waits for its reader's turn, with the news it has and all that is to come."""
        self.held_until = 0.0
        """Until when its tokens are held for more to come, if they are."""
        self._left = False
        self._dropped = False
        self._waiter: asyncio.Future[None] | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._busy_since = 0.0
        self._take: Callable[[], Any] | None = None
        self.pass_on: Callable[[Any], None] = _nothing
        """Send what `let_go` gave."""
        self._passing_on = False

    def short_cut(self, take: Callable[[], Any], pass_on: Callable[[Any], None]) -> None:
        """From now on `take` is called, in the reader's turn, for news of nothing but tokens after the first ones.

        What it makes of them is given to `pass_on`, after which `passed_on` is to be called once there is room for
        more. Where it declines, by `None`, and for all other news, the reader is let go from `changed` as ever, but
        never while something is being passed on.
        """
        self._take, self.pass_on = take, pass_on

    def passed_on(self, error: BaseException | None = None) -> None:
        """What `pass_on` was given has been sent, or could not be: then `changed` raises that."""
        self._passing_on = False
        if error is not None and self._error is None and not self._left:
            self._error = error
        if self._error is not None:
            self.let_go(time.monotonic())
        elif self.look():
            self._turns.soon()

    async def changed(self) -> None:
        """Wait for news of any of the requests, and for this reader's turn. Raises what `fail` was given."""
        if self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            if self.look():
                self._turns.soon()
            if self._reader is None:
                self._reader = asyncio.current_task()
            try:
                await self._waiter
            finally:
                self._waiter = None
                self._turns.idle.pop(self, None)
        self._news = self._urgent = False
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Cancel those that have not ended, and hear no more of any."""
        self._left = True
        self._take, self.pass_on = None, _nothing  # which refer to this, with all its tokens' times
        self._error = None  # whose traceback does, too
        self._drop()

    def notify(self, urgent: bool = False) -> None:
        """There is news; `urgent`: other than tokens after the first. `Turns.give` lets the reader go."""
        self._news = True
        self._urgent = self._urgent or urgent
        if self._waiter is None or self._passing_on:
            self._look_at_lag()
        elif not self.queued:
            self._turns.idle.pop(self, None)
            self._queue_or_hold(self._oldest())

    def look(self) -> bool:
        """Tokens may have come that it was not told of. Whether it waits for its turn now."""
        if self._waiter is None or self._passing_on or self.queued:
            return False
        only = self.only
        oldest = self._oldest() if only is None else only.oldest
        if oldest is None and not self._news:
            self._turns.idle[self] = None
            return False
        return self._queue_or_hold(oldest)

    def look_at_lag(self) -> None:
        """Tokens may have come while the reader was busy."""
        for request in self.requests:
            request.let_rows_go()
        if self._waiter is None or self._passing_on:
            self._look_at_lag()

    def held_no_more(self, until: float) -> bool:
        """What was held until then is kept no longer. Whether its turn is what it waits for now."""
        if self.held_until != until:
            return False
        self.held_until = 0.0
        if self._waiter is None or self._passing_on or self.queued:
            return False
        self.queued = True
        return True

    def fail(self, error: DriftError) -> None:
        """There will be no more news."""
        self._error = error
        self.let_go(time.monotonic())

    def let_go(self, now: float) -> Any:
        """It is the reader's turn. What is to be passed on without waking it, or `None`."""
        self.queued = False
        waiter = self._waiter
        if waiter is None or self._passing_on or waiter.done():
            return None
        self._busy_since = now
        self.held_until = 0.0
        if self._take is not None and not self._urgent and not self.lagging and self._error is None:
            self._news = False
            try:
                taken = self._take()
            except Exception as error:  # the reader's, who is to hear of it; others have their turns
                self._error, taken = error, None
            if taken is not None:
                self._passing_on = True
                return taken
        waiter.set_result(None)
        return None

    def _drop(self) -> None:
        if self._dropped:
            return  # their names may be others' by now
        self._dropped = True
        for request in self.requests:
            self._forget(request.id, cancel=request.finished is None)

    def _queue_or_hold(self, oldest: float | None) -> bool:
        """Wait for the reader's turn, or for more tokens first: whether it is the former."""
        turns = self._turns
        if (
            turns.hold
            and oldest is not None
            and not self._urgent
            and turns.held((self,), oldest, self.patience)
        ):
            return False
        self.queued = True
        turns.add(0.0 if self._urgent or oldest is None else self._due(oldest), (self,))
        return True

    def _oldest(self) -> float | None:
        """The time of the oldest token not taken; with none there is news of another kind, if any."""
        only = self.only
        if only is not None:
            return only.oldest
        return min((at for request in self.requests if (at := request.oldest) is not None), default=None)

    def _behind(self) -> int:
        """Tokens not taken, of the request that has most of them."""
        return self.only.behind if self.only is not None else max(each.behind for each in self.requests)

    def _due(self, oldest: float) -> float:
        """When the oldest token not taken becomes late."""
        if self._behind() > DEMOTED_LAG_TOKENS:
            oldest += DEMOTION_S
        return oldest + self.patience

    def _look_at_lag(self) -> None:
        """The reader is busy, with sending if it is alive: past a bound, end what it reads."""
        behind = self._behind()
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
            reader.cancel(TOO_SLOW)


class Turns:
    """Readers with news, most urgent first, let go `at_once` per pass of the event loop.

    `hold`, 0 to 1: how much of a quarter of their target tokens are kept for others to come.
    """

    def __init__(self, at_once: int = TURNS_AT_ONCE) -> None:
        self.hold = 0.0
        self.idle: dict[Submission, None] = {}
        """Readers that wait and have no news."""
        self._at_once = at_once
        self._waiting: list[tuple[float, int, deque[Submission]]] = []  # a heap, by when they are due
        self._count = 0
        self._scheduled = False
        self._waiting_since = 0.0
        self._step = 0.0  # when the latest step's news came
        self._soon = 0.0  # when the second step from now will probably have come
        # A heap, by until when they are held; some of them are held no more, or anew.
        self._held: list[tuple[float, int, float, Iterable[Submission]]] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, due: float, submissions: Iterable[Submission]) -> None:
        """Let them go in their turn; `due` orders."""
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._count += 1
        heappush(self._waiting, (due, self._count, deque(submissions)))

    def held(self, submissions: Iterable[Submission], oldest: float, patience: float) -> bool:
        """Whether their tokens, of which the first is of that time, can wait for the next step's; if so they are
        released in time, should no step come."""
        until = oldest + self.hold * min(patience, LONGEST_HOLD_S)
        if until <= self._soon:
            return False
        for submission in submissions:
            submission.held_until = until
        self._count += 1
        heappush(self._held, (until, self._count, oldest + patience, submissions))
        if self._timer is None:
            self._set_timer(until)
        return True

    def look(self, at: float) -> None:
        """Tokens of a step of this time came: queue those that waited for some, or for what is held to be enough."""
        self._let_held_go(self._soon)
        idle, self.idle = self.idle, {}
        came: dict[float, list[Submission]] = {}
        for submission in idle:
            only = submission.only
            if only is None or only.block is None:
                submission.look()
            elif (alike := came.get(submission.patience)) is not None:
                alike.append(submission)
            else:
                came[submission.patience] = [submission]
        for patience, alike in came.items():
            if not self.hold or not self.held(alike, at, patience):
                for submission in alike:
                    submission.queued = True
                self.add(at + patience, alike)

    def step_is(self, at: float) -> None:
        """The tokens of a step of this time are in: see whether the process keeps up."""
        if self._waiting and time.monotonic() - self._waiting_since > BEHIND_S:
            self.hold = 1.0
        elif self.hold:
            self.hold = max(0.0, self.hold - (at - self._step) / HOLD_EASES_S)
        self._soon, self._step = at + 2 * (at - self._step), at

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
        now = time.monotonic()
        # All messages are made, and then all are sent: what does the one is at hand while it is done.
        ready = [(submission, submission.let_go(now)) for submission in self._first()]
        for submission, taken in ready:
            if taken is not None:
                submission.pass_on(taken)
        if self._waiting:
            self.soon()

    def _first(self) -> list[Submission]:
        """Those whose turn it is, who wait no longer."""
        waiting = self._waiting
        first: list[Submission] = []
        while waiting and len(first) < self._at_once:
            alike = waiting[0][2]
            first.append(alike.popleft())
            if not alike:
                heappop(waiting)
        return first

    def _set_timer(self, until: float) -> None:
        delay = max(0.0, until - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._release)

    def _release(self) -> None:
        self._timer = None
        now = time.monotonic()
        self._let_held_go(now)
        if self._held:
            self._set_timer(max(now + 0.001, self._held[0][0]))
        if self._waiting:
            self.soon()

    def _let_held_go(self, by: float) -> None:
        """Queue those whose tokens are held until then at most. Only these are looked at: hundreds may be held."""
        held = self._held
        while held and held[0][0] <= by:
            until, _, due, submissions = heappop(held)
            if ready := [submission for submission in submissions if submission.held_no_more(until)]:
                self.add(due, ready)
