"""When requests reach a simulated engine: open loop at their own times, or a session's turns one after the other.

The requests of a session that carry a `think` time are a closed loop: the first arrives at its own time, each later one
`think` seconds after the previous one ended, however long that took, as a person or an agent waits for an answer before
asking on. The later ones' own `arrival` is ignored.

Open-loop requests are pulled one ahead and never kept. From the first closed session on, the rest of the workload is
read and kept, as any later line may belong to a session that goes on sooner. Knows nothing of devices.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from drift_scheduler.domain import Request


class Arrivals:
    """`next` is the request that arrives next as far as is known now; `None`: none before some turn ends.

    Raises ValueError where requests arrive at no time or not in order, or a session's not in order of its turns.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self.next: Request | None = None
        self._source: Iterator[Request] = iter(requests)
        self._latest: Request | None = None  # read so far
        self._due: list[tuple[float, int, Request]] = []  # a heap; closed loop only
        self._turns: dict[str, Request] = {}  # session -> its latest turn read
        self._after: dict[str, Request] = {}  # a turn's id -> the turn that waits for its end
        self._count = 0
        self.advance()

    def advance(self) -> None:
        """The next request has arrived: on to the following one."""
        if not self._turns:
            request = self._pull()
            if request is None or request.session is None or request.think is None:
                self.next = request
                return
            self._read_all(request)
        self.next = heapq.heappop(self._due)[2] if self._due else None

    def ended(self, request_ids: Sequence[str], now: float) -> None:
        """These requests ended; a turn that waited for one of them arrives after its think time."""
        if not self._after:
            return
        for request_id in request_ids:
            turn = self._after.pop(request_id, None)
            if turn is not None:
                assert turn.think is not None, "only turns with a think time wait"
                self._push(replace(turn, arrival=now + turn.think))
        if self._due and (self.next is None or self._due[0][0] < self.next.arrival):
            if self.next is not None:
                self._push(self.next)
            self.next = heapq.heappop(self._due)[2]

    def _pull(self) -> Request | None:
        request = next(self._source, None)
        if request is not None:
            if not math.isfinite(request.arrival):
                raise ValueError(f"request '{request.id}' arrives at {request.arrival} s")
            if self._latest is not None and request.arrival < self._latest.arrival:
                raise ValueError(
                    f"request '{request.id}' arrives at {request.arrival} s, before '{self._latest.id}' at "
                    f"{self._latest.arrival} s: a workload's arrivals must be in order"
                )
            self._latest = request
        return request

    def _read_all(self, request: Request | None) -> None:
        while request is not None:
            before = None
            if request.session is not None and request.think is not None:
                before = self._turns.get(request.session)
                self._turns[request.session] = request
            if before is None:
                self._push(request)
            elif before.turn >= request.turn:
                raise ValueError(
                    f"request '{request.id}' is turn {request.turn} of session '{request.session}' and comes after "
                    f"turn {before.turn}"
                )
            else:
                self._after[before.id] = request
            request = self._pull()

    def _push(self, request: Request) -> None:
        heapq.heappush(self._due, (request.arrival, self._count, request))
        self._count += 1
