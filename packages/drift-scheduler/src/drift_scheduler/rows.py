"""The decoding requests as parallel arrays, so that a step costs the same for 16 requests as for 512.

One row a request, dense in `[0, n)`, in joining order but for removals (the last row fills the gap). Knows nothing
of pages or policies; the scheduler removes rows only while no decode step runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from drift_scheduler.domain import DecodeStep, FloatArray, IntArray

if TYPE_CHECKING:
    from drift_scheduler.tracked import Tracked


class DecodeRows:
    """Counters of every decoding request; all arrays are indexed by row.

    `context`: known tokens, whose last one is not in the KV cache yet: the positions the next step reads.
    `capacity`: positions the pages held cover. `limit`: known tokens at which the request ends. Times in seconds.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.n = 0
        self.tracked: list[Tracked] = []
        self._lay_out(np.zeros((4, capacity), np.int64), np.zeros((3, capacity)))
        self._to_limit = 0  # no row gets to its limit in fewer tokens than that; nothing is known at 0
        self._names: list[str] = []
        self._ids: tuple[str, ...] | None = ()
        self._tightest: float | None = None

    def add(self, tracked: Tracked, *, capacity: int, limit: int, last_token: float) -> None:
        """Append a request as the last row."""
        if self.n == len(self.context):
            self._grow()
        row = self.n
        self.tracked.append(tracked)
        self._names.append(tracked.request.id)
        self.context[row] = tracked.known
        self.capacity[row] = capacity
        self.limit[row] = limit
        self.tbt[row] = tracked.request.slo.tbt
        self.last_token[row] = last_token
        self.tbt_max[row] = tracked.tbt_max
        self.late[row] = tracked.late
        tracked.row = row
        self.n += 1
        self._to_limit = min(self._to_limit, limit - tracked.known)
        self._changed()

    def remove(self, row: int) -> Tracked:
        """Take a row out, writing its counters back to the request; the last row takes its place."""
        gone = self.tracked[row]
        gone.known = int(self.context[row])
        gone.capacity = int(self.capacity[row])
        gone.tbt_max = float(self.tbt_max[row])
        gone.late = int(self.late[row])
        gone.last_token_at = float(self.last_token[row])
        gone.row = -1
        last = self.n - 1
        if row != last:
            moved = self.tracked[last]
            self._counts[:, row] = self._counts[:, last]
            self._times[:, row] = self._times[:, last]
            self.tracked[row] = moved
            self._names[row] = self._names[last]
            moved.row = row
        self.tracked.pop()
        self._names.pop()
        self.n = last
        self._changed()
        return gone

    def advance(self, n: int) -> None:
        """Rows `[0, n)` got a token."""
        context = self.context[:n]  # `self.context[:n] += 1` would copy the result once more
        context += 1
        self._to_limit -= 1

    def note_times(self, n: int, now: float) -> FloatArray:
        """That was at `now`; returns their gaps in seconds. After `advance`, and before any of them goes."""
        last, longest, late = self.last_token[:n], self.tbt_max[:n], self.late[:n]
        gaps: FloatArray = now - last
        last.fill(now)
        np.maximum(longest, gaps, out=longest)
        late += gaps > self.tbt[:n]
        return gaps

    def at_limit(self, n: int) -> list[int]:
        """Rows of `[0, n)` that reached their length limit."""
        if self._to_limit > 0:
            return []
        self._to_limit = 0
        reached: list[int] = (self.limit[:n] <= self.context[:n]).nonzero()[0].tolist()
        return reached

    def look_at_limits(self) -> None:
        """Work out how far the next limit is, for `at_limit` to be quick until then."""
        n = self.n
        if n and not self._to_limit:
            self._to_limit = max(0, int((self.limit[:n] - self.context[:n]).min()))

    def short_of_pages(self) -> list[int]:
        """Rows whose next position no page covers yet."""
        short: list[int] = (self.context[: self.n] > self.capacity[: self.n]).nonzero()[0].tolist()
        return short

    def short_after(self, n: int) -> list[int]:
        """Rows of `[0, n)` that go on once they have another token, and whose next position no page covers then."""
        after = self.context[:n] + 1
        short: list[int] = ((after > self.capacity[:n]) & (after < self.limit[:n])).nonzero()[0].tolist()
        return short

    def names(self, rows: list[int]) -> list[str]:
        """The requests in these rows."""
        names = self._names
        return [names[row] for row in rows]

    def step(self) -> DecodeStep:
        """One token for every row."""
        if self._ids is None:
            self._ids = tuple(self._names)
        return DecodeStep(self._ids, int(self.context[: self.n].sum()))

    @property
    def tightest(self) -> float:
        """The smallest TBT target, infinity without rows."""
        if self._tightest is None:
            self._tightest = float(self.tbt[: self.n].min()) if self.n else float("inf")
        return self._tightest

    def slack(self, now: float) -> FloatArray:
        """Seconds each row has until its next token is late."""
        slack: FloatArray = self.last_token[: self.n] + self.tbt[: self.n] - now
        return slack

    def _changed(self) -> None:
        self._ids = None
        self._tightest = None

    def _lay_out(self, counts: IntArray, times: FloatArray) -> None:
        """Name the rows of two tables, which are moved by columns."""
        self._counts, self._times = counts, times
        self.context, self.capacity, self.limit, self.late = counts
        self.tbt, self.last_token, self.tbt_max = times

    def _grow(self) -> None:
        room = ((0, 0), (0, len(self.context)))
        self._lay_out(np.pad(self._counts, room), np.pad(self._times, room))
