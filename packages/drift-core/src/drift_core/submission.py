"""Requests in flight as their reader sees them, and whose turn it is to be read when there is more than can be sent.

Every engine step brings news for many readers at once. Those that wait are let go a few at a time, the most urgent
first: whose first token or end is there, then by the oldest token not yet sent plus a quarter of the request's TBT
target. Between two of these the event loop gets to everything else, so that new calls are let in however many streams
there are. Whoever is not let go before the next step finds more tokens when it is: under load there are fewer, larger
messages, and nothing queues but tokens. While the process is behind (`Turns.hold`), tokens are kept until one more step
would make the oldest wait for more than that quarter, so that it gets ahead of its work instead of sending each token
as late as it can just manage. This module knows no sockets and no frames but the items it keeps.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from drift_core.frames import AcceptedItem, FinishedItem, TokenIds, TokenLogprob
from drift_scheduler.errors import DriftError

TURNS_AT_ONCE: Final = 12
"""Readers let go in one pass of the event loop. gRPC needs several passes to take one new call, so short ones let calls
in under load: `bench/rejections.py` under streams shows how long refusals wait. More at once take less time each, as
the processor does the same things one after another: at 12 a message takes a tenth less than at 6, and 99% of refusals
beside 256 streams are there within 11 to 20 ms instead of 11 to 17; at 32 within 19 to 31."""

SHARE_OF_TBT: Final = 0.25
"""Of a request's TBT target, what its tokens may wait for others' before they are the more urgent ones."""

MAX_ROWS: Final = 128
"""Steps whose tokens are kept together; who is later than that gets its own for itself."""

ROWS_BETWEEN: Final = 16
"""Room for so many is left between two places, a line of the processor's cache: were they a power of two of lines
apart, the tokens of a step would fall on a few sets of it and push one another out."""

SHARED_ROWS: Final = 16
"""Times of so many steps are not copied for each request, but kept once for all."""

FIRST_ROWS: Final = 8
"""Steps that there is room for at first, and then four times as many: under load each step may begin anew."""

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


if TYPE_CHECKING:
    Times = array[float]
else:
    Times = array  # has no parameters before Python 3.12


class Stretch:
    """Steps one after another in which the same requests got a token each; `places` says where each one's is.

    `token_ids` (places, `width`) int32, as it lies in memory: what a reader takes is side by side, one or two lines of
    the cache and not one for each token. `first`: how many steps were there before. `micros` are the times in whole
    microseconds since `base`: small numbers are added in half the time. `next`: the stretch that follows, in which some
    requests are others, or none are.
    """

    __slots__ = (
        "__weakref__",
        "_columns",
        "base",
        "first",
        "micros",
        "next",
        "places",
        "rows",
        "times",
        "token_ids",
        "width",
    )

    def __init__(self, places: dict[str, int], first: int, base: int) -> None:
        self.places, self.first, self.base = places, first, base
        self.rows = 0
        self._make_room(FIRST_ROWS)
        self.times: Times = array("d")
        self.micros: list[int] = []
        self.next: Stretch | None = None

    def add(self, token_ids: TokenIds, now: float) -> None:
        """One more step."""
        row = self.rows
        if row == self.width - ROWS_BETWEEN:
            kept = self._columns
            self._make_room(4 * row)
            self._columns[:, :row] = kept[:, :row]
        self._columns[:, row] = token_ids
        self.times.append(now)
        self.micros.append(int(now * 1e6) - self.base)
        self.rows = row + 1

    def _make_room(self, rows: int) -> None:
        self.width = rows + ROWS_BETWEEN
        self._columns = np.empty((len(self.places), self.width), np.int32)
        self.token_ids = self._columns.reshape(-1).data  # cut in a third of the time


class Columns:
    """Tokens of requests that get one each at every step.

    A step's token ids are written down in one go, and its time is kept once: whoever reads takes what is its own when
    it is its turn. Telling hundreds of requests of a token one by one would take longer than all else that a step
    brings. Where a request comes or goes a new stretch begins, and the others find their way into it when they
    read: each holds the stretch that it reads, and so those that follow, and what all have read is gone.

    `find` gives a request in flight by its id.
    """

    def __init__(self, find: Callable[[str], Progress | None]) -> None:
        self._find = find
        self._ids: list[str] | None = None
        self._latest = Stretch({}, 0, 0)
        self.steps = 0
        """That it was ever told of."""

    def add(self, ids: list[str], token_ids: TokenIds, now: float) -> bool:
        """One step's tokens; `False` if a request is there twice, and nothing was done."""
        latest = self._latest
        if (ids is not self._ids and ids != self._ids) or latest.rows >= MAX_ROWS:
            begun = self._begin(ids, int(now * 1e6))
            if begun is None:
                return False
            latest = begun
        latest.add(token_ids, now)
        self.steps += 1
        return True

    def forget(self, request_id: str) -> None:
        """Another request of this id will come."""
        if self._latest.places.pop(request_id, None) is not None:
            self._ids = None

    def _begin(self, ids: list[str], micros: int) -> Stretch | None:
        """A stretch of these requests: those that were not in the one before join, and those that no longer are leave.

        `None` if one is there twice.
        """
        latest = self._latest
        places = dict(zip(ids, range(len(ids)), strict=True))
        if len(places) < len(ids):
            return None
        for request_id in latest.places.keys() - places.keys():
            if (gone := self._find(request_id)) is not None:
                gone.leave()
        begun = Stretch(places, self.steps, micros)
        for request_id in places.keys() - latest.places.keys():
            if (come := self._find(request_id)) is not None:
                come.join(self, begun)
        latest.next = self._latest = begun
        self._ids = ids
        return begun


class Progress:
    """What one request has to tell: tokens in order that were not taken yet, and the times of all it ever had.

    `accepted` and `finished` are set once and stay. `logprobs` are those of the tokens not taken yet. `times` is
    complete when `take` has just been called, and once `finished` is set. Some tokens may still be in `Columns`.
    """

    __slots__ = (
        "_columns",
        "_own_micros",
        "_own_times",
        "_pieces",
        "_place",
        "_row",
        "_stretch",
        "_timed",
        "accepted",
        "finished",
        "id",
        "logprobs",
        "micros",
        "token_ids",
    )

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.accepted: AcceptedItem | None = None
        self.token_ids: list[int] = []
        self._own_times: Times = array("d")  # which others do not have
        self._pieces = [self._own_times]
        self.micros: list[int] = []
        """The times of the tokens that `take` gave last, in whole microseconds."""
        self._own_micros: list[int] = []  # of `token_ids`
        self.logprobs: list[TokenLogprob | None] | None = None
        self.finished: FinishedItem | None = None
        self._columns: Columns | None = None
        self._stretch: Stretch | None = None  # what is read; it is in all that follow, too
        self._place = 0
        self._row = 0  # of the stretch, the first that was not read
        self._timed = 0  # times of the stretch that were kept

    @property
    def times(self) -> Times:
        """Of its tokens, seconds on the engine's clock. In pieces, as long as nobody asks: most belong to all who had
        a token at the same steps, and copies for each would be most of what the gateway keeps."""
        own = self._pieces[0]
        if len(self._pieces) > 1:
            for piece in self._pieces[1:]:
                own.extend(piece)
            self._own_times, self._pieces = own, [own]
        return own

    @property
    def behind(self) -> int:
        """Tokens not taken yet."""
        return len(self.token_ids) + self._behind_columns()

    @property
    def oldest(self) -> float | None:
        """The time of the first token not taken yet."""
        if self.token_ids:
            return self.times[-len(self.token_ids)]
        stretch = self._stretch
        if stretch is None:
            return None
        if self._row < stretch.rows:
            return stretch.times[self._row]
        if stretch.next is None:
            return None
        return self._go_on(stretch, stretch.next).times[0]

    def add(self, token_id: int, now: float) -> None:
        """One more token."""
        self.settle()
        self.token_ids.append(token_id)
        self.times.append(now)
        self._own_micros.append(int(now * 1e6))

    def take(self) -> tuple[list[int], list[float], list[TokenLogprob | None] | None]:
        """Token ids, times and log probabilities that came since the last call."""
        self.settle()
        token_ids, self.token_ids = self.token_ids, []
        self.micros, self._own_micros = self._own_micros, []
        if not token_ids:
            return token_ids, [], None
        logprobs, self.logprobs = self.logprobs, None
        return token_ids, self.times[-len(token_ids) :].tolist(), logprobs

    def take_offsets(self, begun: int) -> tuple[list[int], list[int]]:
        """As `take`, token ids, and when they came: microseconds after `begun`, which are never less than 0.

        Most messages are made of these, so what they do not need is not done.
        """
        stretch = self._stretch
        if stretch is None or self.token_ids:
            token_ids, _, _ = self.take()
            offsets = [at - begun for at in self.micros]
        else:
            token_ids, offsets = self._read(stretch, begun)
            if stretch.next is not None:
                self._read_on(stretch, begun, token_ids, offsets)
        if offsets and offsets[0] < 0:
            offsets = [max(offset, 0) for offset in offsets]
        return token_ids, offsets

    def add_logprob(self, logprob: TokenLogprob) -> None:
        """Put it beside the token that came last; earlier ones that came without have `None`."""
        self.settle()
        if self.logprobs is None:
            self.logprobs = []
        self.logprobs.extend([None] * (len(self.token_ids) - 1 - len(self.logprobs)))
        self.logprobs.append(logprob)

    def join(self, columns: Columns, stretch: Stretch) -> None:
        """Tokens come that way, from the beginning of a stretch on."""
        self.leave()
        self._columns, self._stretch, self._place = columns, stretch, stretch.places[self.id]
        self._row = self._timed = 0

    def settle(self) -> None:
        """Take what is in the columns."""
        stretch = self._stretch
        while stretch is not None:
            token_ids, micros = self._read(stretch, 0)
            self.token_ids += token_ids
            self._own_micros += micros
            if stretch.next is None:
                self._keep_times(stretch)
                self._timed = self._row
                break
            stretch = self._go_on(stretch, stretch.next)

    def leave(self) -> None:
        """Tokens do not come by columns any more."""
        self.settle()
        self._columns = self._stretch = None

    def let_rows_go(self) -> None:
        """Take what is in the columns if they are kept for this one's sake."""
        if self._behind_columns() > MAX_ROWS:
            self.settle()

    def _behind_columns(self) -> int:
        """Tokens not taken out of columns: whoever is in them has one at every step."""
        columns, stretch = self._columns, self._stretch
        return 0 if columns is None or stretch is None else columns.steps - stretch.first - self._row

    def _read(self, stretch: Stretch, begun: int) -> tuple[list[int], list[int]]:
        """What it has not read of a stretch: token ids, and microseconds after `begun`."""
        row, stop, since = self._row, stretch.rows, stretch.base - begun
        self._row = stop
        first, micros = self._place * stretch.width, stretch.micros
        token_ids = stretch.token_ids[first + row : first + stop].tolist()
        return token_ids, [at + since for at in (micros[row:] if row else micros)]

    def _read_on(self, stretch: Stretch, begun: int, token_ids: list[int], offsets: list[int]) -> None:
        """Add what it has not read of the stretches that follow."""
        while stretch.next is not None:
            stretch = self._go_on(stretch, stretch.next)
            more_ids, more_offsets = self._read(stretch, begun)
            token_ids += more_ids
            offsets += more_offsets

    def _go_on(self, stretch: Stretch, after: Stretch) -> Stretch:
        """All of a stretch was read: go to the one after it."""
        self._keep_times(stretch)
        self._stretch, self._place = after, after.places[self.id]
        self._row = self._timed = 0
        return after

    def _keep_times(self, stretch: Stretch) -> None:
        """Times of a stretch that were not kept yet."""
        if not self._timed and stretch.next is not None and stretch.rows >= SHARED_ROWS:
            self._pieces.append(stretch.times)
            return
        times = stretch.times[self._timed :]
        if self._pieces[-1] is self._own_times:
            self._own_times.extend(times)
        else:
            self._own_times = times
            self._pieces.append(times)


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
        "_error",
        "_forget",
        "_left",
        "_longest_hold",
        "_news",
        "_only",
        "_passing_on",
        "_patience",
        "_reader",
        "_take",
        "_turns",
        "_urgent",
        "_waiter",
        "held_until",
        "lagging",
        "pass_on",
        "queued",
        "requests",
    )

    def __init__(self, forget: Forget, turns: Turns, request_ids: Sequence[str], tbt: float) -> None:
        self.requests = tuple(Progress(request_id) for request_id in request_ids)
        self._only = self.requests[0] if len(self.requests) == 1 else None
        self.lagging = False
        """Whether the reader fell too far behind, so that the requests were cancelled."""
        self._forget = forget
        self._turns = turns
        self._patience = SHARE_OF_TBT * tbt
        self._longest_hold = min(self._patience, LONGEST_HOLD_S)
        self._error: BaseException | None = None
        self._news = False
        self._urgent = False
        self.queued = False
        """Whether it waits for its reader's turn, with the news it has and all that is to come."""
        self.held_until = 0.0
        """Until when its tokens are held for more to come, if they are."""
        self._left = False
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
        if error is not None and self._error is None:
            self._error = error
        if self._error is not None:
            self.let_go()
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
        self._news = self._urgent = False
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Cancel those that have not ended, and hear no more of any."""
        self._left = True
        self._take, self.pass_on = None, _nothing  # which refer to this, with all its tokens' times
        self._drop()

    def notify(self, urgent: bool = False) -> None:
        """There is news; `urgent`: other than tokens after the first. `Turns.give` lets the reader go."""
        self._news = True
        self._urgent = self._urgent or urgent
        if self._waiter is None or self._passing_on:
            self._look_at_lag()
        elif not self.queued:
            self._queue_or_hold(self._oldest())

    def look(self) -> bool:
        """It had no news; tokens may have come. Whether it waits for its turn now."""
        if self._waiter is None or self._passing_on or self.queued:
            return False
        only = self._only
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

    def release(self, oldest: float) -> None:
        """What was held is kept no longer; `oldest`: the time of the first token of it."""
        if self._waiter is not None and not self._passing_on and not self.queued:
            self._queue(oldest)

    def fail(self, error: DriftError) -> None:
        """There will be no more news."""
        self._error = error
        self.let_go()

    def let_go(self) -> Any:
        """It is the reader's turn. What is to be passed on without waking it, or `None`."""
        self.queued = False
        waiter = self._waiter
        if waiter is None or self._passing_on or waiter.done():
            return None
        self._busy_since = time.monotonic()
        self.held_until = 0.0
        if self._take is not None and not self._urgent and not self.lagging and self._error is None:
            self._news = False
            taken = self._take()
            if taken is not None:
                self._passing_on = True
                return taken
        waiter.set_result(None)
        return None

    def _drop(self) -> None:
        for request in self.requests:
            self._forget(request.id, cancel=request.finished is None)

    def _queue_or_hold(self, oldest: float | None) -> bool:
        """Wait for the reader's turn, or for more tokens first: whether it is the former."""
        turns = self._turns
        if turns.hold and oldest is not None and not self._urgent:
            until = oldest + turns.hold * self._longest_hold
            if turns.hold_until(until, oldest, self):
                return False
        self._queue(oldest)
        return True

    def _queue(self, oldest: float | None) -> None:
        self.queued = True
        self._turns.add(0.0 if self._urgent or oldest is None else self._due(oldest), self)

    def _oldest(self) -> float | None:
        """The time of the oldest token not taken; with none there is news of another kind, if any."""
        only = self._only
        if only is not None:
            return only.oldest
        return min((at for request in self.requests if (at := request.oldest) is not None), default=None)

    def _behind(self) -> int:
        """Tokens not taken, of the request that has most of them."""
        return self._only.behind if self._only is not None else max(each.behind for each in self.requests)

    def _due(self, oldest: float) -> float:
        """When the oldest token not taken becomes late."""
        if self._behind() > DEMOTED_LAG_TOKENS:
            oldest += DEMOTION_S
        return oldest + self._patience

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
            reader.cancel()


class Turns:
    """Readers with news, most urgent first, let go `at_once` per pass of the event loop.

    `hold`, 0 to 1: how much of a quarter of their target tokens are kept for others to come.
    """

    def __init__(self, at_once: int = TURNS_AT_ONCE) -> None:
        self.hold = 0.0
        self.idle: dict[Submission, None] = {}
        """Readers that wait, and neither have a turn to come nor tokens that are held."""
        self._at_once = at_once
        self._waiting: list[tuple[float, int, Submission]] = []
        self._count = 0
        self._scheduled = False
        self._waiting_since = 0.0
        self._step = 0.0  # when the latest step's news came
        self._soon = 0.0  # when the second step from now will probably have come
        self._held: list[tuple[float, int, float, Submission]] = []  # a heap; some are held no more, or anew
        self._timer: asyncio.TimerHandle | None = None

    def add(self, due: float, submission: Submission) -> None:
        """Let it go in its turn; `due` orders."""
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._count += 1
        heappush(self._waiting, (due, self._count, submission))

    def hold_until(self, until: float, oldest: float, submission: Submission) -> bool:
        """Whether its tokens can wait for the next step's; if so it is released by then, should no step come."""
        if until <= self._soon:
            return False
        if submission.held_until != until:
            submission.held_until = until
            self._count += 1
            heappush(self._held, (until, self._count, oldest, submission))
            if self._timer is None:
                self._set_timer(until)
        return True

    def look(self) -> None:
        """Tokens came: queue those that waited for some, or for what is held to be enough."""
        self._let_held_go(self._soon)
        idle, self.idle = self.idle, {}
        for submission in idle:
            submission.look()

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
        waiting = self._waiting
        ready = []
        try:  # all messages are made, and then all are sent: what does the one is at hand while it is done
            for _ in range(min(self._at_once, len(waiting))):
                submission = heappop(waiting)[2]
                if (taken := submission.let_go()) is not None:
                    ready.append((submission, taken))
        finally:
            for submission, taken in ready:
                submission.pass_on(taken)
        if waiting:
            self.soon()

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
            until, _, oldest, submission = heappop(held)
            if submission.held_until == until:
                submission.held_until = 0.0
                submission.release(oldest)
