"""The scheduler's own `View`: reads its state, changes none of it, and computes only what a policy asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drift_scheduler.domain import (
    DecodeStep,
    Device,
    FloatArray,
    LaneView,
    Partition,
    PrefillBatch,
    Sharing,
    Waiting,
)

if TYPE_CHECKING:
    from drift_scheduler.scheduler import Scheduler
    from drift_scheduler.tracked import Flight, Tracked

IDLE = LaneView()


class LiveView:
    """See `drift_scheduler.view.View` for what each property means."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._s = scheduler
        self.refresh()

    def refresh(self) -> None:
        """Forget what was computed for an earlier decision."""
        self._waiting: list[Waiting] = []
        self._cursor = 0
        self._newcomers = 0
        self._step: DecodeStep | None = None
        self._prefills: tuple[PrefillBatch, ...] | None = None

    @property
    def now(self) -> float:
        """Seconds on the executor's clock."""
        return self._s.now

    @property
    def device(self) -> Device:
        """Units, menu, layers and sharings."""
        return self._s.device

    @property
    def partition(self) -> Partition | None:
        """The partition under a busy lane."""
        flight = self._decode_flight or self._prefill_flight
        return None if flight is None else flight.gang.partition

    @property
    def sharing(self) -> Sharing | None:
        """The sharing under a busy lane."""
        flight = self._decode_flight or self._prefill_flight
        return None if flight is None else flight.gang.sharing

    @property
    def last_partition(self) -> Partition | None:
        """The partition of the latest gang."""
        gang = self._s.last_gang
        return None if gang is None else gang.partition

    @property
    def prefill_lane(self) -> LaneView:
        """What the prefill lane does."""
        return _lane(self._prefill_flight)

    @property
    def decode_lane(self) -> LaneView:
        """What the decode lane does."""
        return _lane(self._decode_flight)

    @property
    def prefills(self) -> tuple[PrefillBatch, ...]:
        """Batches under way, the active one last."""
        if self._prefills is None:
            self._prefills = tuple(batch.snapshot() for batch in self._s.batches)
        return self._prefills

    @property
    def num_waiting(self) -> int:
        """Requests that need prefill and are in no batch."""
        return len(self._s.queue)

    def waiting(self, limit: int) -> tuple[Waiting, ...]:
        """The first `limit` that may be prefilled now: pages and `max_running` permitting newcomers."""
        s = self._s
        room = 0 if s.blocked_at is not None else s.limits.max_running - s.running
        while len(self._waiting) < limit and self._cursor < len(s.queue):
            tracked = s.live[s.queue[self._cursor][1]]
            if not tracked.admitted:
                if self._newcomers >= room:
                    break
                self._newcomers += 1
            self._waiting.append(self.describe(tracked))
            self._cursor += 1
        return tuple(self._waiting[:limit])

    def find_waiting(self, request_ids: Sequence[str]) -> tuple[Waiting, ...]:
        """Those of the named requests that wait for prefill."""
        seen = {w.request.id: w for w in self._waiting}
        missing = [i for i in request_ids if i not in seen]
        for request_id in missing:
            tracked = self._s.live.get(request_id)
            if tracked is not None and tracked.batch is None and tracked.row < 0:
                seen[request_id] = self.describe(tracked)
        return tuple(seen[i] for i in request_ids if i in seen)

    def decode_step(self) -> DecodeStep | None:
        """The step over every decoding request."""
        s = self._s
        if s.decode_flight is not None or s.starved or not s.rows.n:
            return None
        if self._step is None:
            self._step = s.rows.step()
        return self._step

    @property
    def num_decoding(self) -> int:
        """Decoding requests."""
        return self._s.rows.n

    @property
    def tbt_target(self) -> float:
        """The tightest TBT target."""
        return self._s.rows.tightest

    def tbt_slack(self) -> FloatArray:
        """Seconds until each decoding request is late."""
        return self._s.rows.slack(self._s.now)

    @property
    def free_pages(self) -> int:
        """Unreferenced pages less the headroom."""
        return max(0, self._s.kv.free_pages - self._s.headroom)

    @property
    def total_pages(self) -> int:
        """Pages in all."""
        return self._s.kv.total_pages

    @property
    def max_running(self) -> int:
        """Most requests that may hold pages."""
        return self._s.limits.max_running

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return self._s.running

    @property
    def _decode_flight(self) -> Flight | None:
        return self._s.decode_flight

    @property
    def _prefill_flight(self) -> Flight | None:
        return self._s.prefill_flight

    def describe(self, tracked: Tracked) -> Waiting:
        """One that waits for prefill: what was said of it last where that still holds, as queues are looked at far more
        often than they change."""
        s = self._s
        if tracked.described is not None and _still_holds(tracked, tracked.described, s.kv_epoch):
            return tracked.described
        request = tracked.request
        deadline = request.arrival + request.slo.ttft
        if tracked.admitted:
            found = Waiting(request, tracked.computed, tracked.known, 0, deadline, True)
        else:
            cached, page = s.kv.lookup(request, tracked.known), s.kv.page_tokens
            pages = -(-(tracked.known + 1) // page) - cached // page
            found = Waiting(request, cached, tracked.known, pages, deadline, False)
        tracked.described, tracked.described_at = found, s.kv_epoch
        return found


def _still_holds(tracked: Tracked, said: Waiting, kv_epoch: int) -> bool:
    if said.admitted is not tracked.admitted or said.total != tracked.known:
        return False
    return said.computed == tracked.computed if said.admitted else tracked.described_at == kv_epoch


def _lane(flight: Flight | None) -> LaneView:
    if flight is None:
        return IDLE
    return LaneView(flight.work, flight.started, flight.started + flight.predicted)
