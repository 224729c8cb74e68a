"""What the scheduler will look like when the lane that ends next does, as far as can be told before.

So a policy can be asked while the device runs and answer before the device waits for it. Expected is that the
prediction holds, that nobody's output stops before its limit, and that nobody comes or goes. What then happens is
compared with it (`Plan.fits`); where it is something else, the policy is asked again. Changes nothing of the scheduler.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from drift_scheduler.domain import (
    DecodeDone,
    DecodeShape,
    DecodeStep,
    Device,
    Event,
    FloatArray,
    Gang,
    Lane,
    Nudged,
    PrefillBatch,
    PrefillBlock,
    PrefillDone,
    PrefillShape,
    Sharing,
    Waiting,
)
from drift_scheduler.live_view import LiveView

if TYPE_CHECKING:
    from drift_scheduler.protocols import CostModel
    from drift_scheduler.scheduler import Scheduler
    from drift_scheduler.tracked import Flight, QueueKey, Tracked

NEAR = 0.1
"""By what share of the predicted time work usually may end earlier or later for a plan to hold."""

_ENDS = {DecodeDone: Lane.DECODE, PrefillDone: Lane.PREFILL}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy wants launched once `ends` have ended, at about `at` (seconds, give or take `within`).

    `preemptions`: how many there had been when it was made.
    """

    gang: Gang | None
    ends: frozenset[Lane]
    at: float
    within: float
    preemptions: int = 0

    def fits(self, now: float, events: Sequence[Event]) -> bool:
        """Whether what happened is what was expected; outputs may have stopped early."""
        if abs(now - self.at) > self.within:
            return False
        ended = [_ENDS.get(type(event)) for event in events if not isinstance(event, Nudged)]
        return len(ended) == len(self.ends) and self.ends.issuperset(ended)


@dataclass(frozen=True, slots=True)
class End:
    """Lanes that end next: at about `at`, having worked for about `seconds`; what contention may do to that is
    `unsure`, either way."""

    lanes: frozenset[Lane]
    at: float
    seconds: float
    unsure: float = 0.0


def next_end(s: Scheduler) -> End | None:
    """`None` where nothing runs, or the next end decides nothing. Raises what the cost model raises."""
    decode, prefill = s.decode_flight, s.prefill_flight
    if decode is None or prefill is None:
        if decode is not None:
            return _end(s, decode, Lane.DECODE)
        return None if prefill is None else _end(s, prefill, Lane.PREFILL)
    if decode.gang.sharing is Sharing.TEMPORAL:
        return None  # the prefill of the same gang follows, whatever the decode brings
    ends = _end(s, decode, Lane.DECODE), _end(s, prefill, Lane.PREFILL)
    if decode.gang.sharing is Sharing.FUSED:
        return replace(ends[0], lanes=frozenset(Lane))
    return min(ends, key=lambda end: end.at)


def _end(s: Scheduler, flight: Flight, lane: Lane) -> End:
    lanes, seconds, unsure = frozenset({lane}), flight.predicted, 0.0
    if flight.gang.sharing is Sharing.TEMPORAL and lane is Lane.PREFILL:
        return End(lanes, s.now + seconds, seconds)  # it began when the decode ended, which is now
    if flight.overlapped:
        work = flight.work.shape()
        prefill = work if isinstance(work, PrefillShape) else flight.beside_prefill
        decode = work if isinstance(work, DecodeShape) else flight.beside_decode
        if prefill is not None and decode is not None:
            slow = s.costs.slowdown(prefill, decode, flight.gang.partition)
            unsure = seconds * (slow[lane is Lane.DECODE] - 1.0) / 2
    return End(lanes, flight.started + seconds + unsure, seconds, unsure)


def lane_seconds(
    gang: Gang, device: Device, costs: CostModel, delay: float, block_seconds: float
) -> tuple[float, float]:
    """Seconds until each lane of the gang, (prefill, decode), is done, as the cost model sees it (solo).

    `delay`: before either begins. `block_seconds`: launching a prefill block.
    """
    total, prefill, decode = device.total_units, gang.prefill, gang.decode
    if gang.sharing is Sharing.FUSED and prefill is not None and decode is not None:
        both = costs.fused(prefill.shape(), decode.shape(), total)
        return both, both
    spatial = gang.sharing is Sharing.SPATIAL
    t_prefill = t_decode = 0.0
    if prefill is not None:
        units = gang.partition.prefill if spatial else total
        t_prefill = costs.prefill(prefill.shape(), units) * prefill.layers / device.num_layers
        t_prefill += delay + block_seconds
    if decode is not None:
        units = gang.partition.decode if spatial else total
        t_decode = costs.decode(decode.shape(), units) + delay
    return t_prefill, t_decode


class ForeseenView(LiveView):
    """The scheduler's own view, but for what will have changed."""

    def __init__(self, s: Scheduler, end: End) -> None:
        super().__init__(s)
        ends = end.lanes
        self._now = max(end.at, s.now)
        self._busy_decode = None if Lane.DECODE in ends else s.decode_flight
        self._busy_prefill = None if Lane.PREFILL in ends else s.prefill_flight
        rows = s.rows
        stepped = s.decode_flight.rows if Lane.DECODE in ends and s.decode_flight is not None else 0
        self._context = rows.context[: rows.n].copy()
        self._context[:stepped] += 1
        self._slack = rows.slack(self._now)
        self._slack[:stepped] = rows.tbt[:stepped]
        stays = self._context < rows.limit[: rows.n]
        stays[stepped:] = True
        self._left = [] if stays.all() else np.flatnonzero(~stays).tolist()
        self._stays = stays
        self._joining: list[Tracked] = []
        self.ends_prompts = False
        """Whether a prefill will be through all layers."""
        self._ended_early = 0  # whose first token is their last
        self._partway: list[tuple[QueueKey, Tracked, Waiting]] = []
        self._batches: tuple[PrefillBatch, ...] | None = None
        if Lane.PREFILL in ends and s.prefill_flight is not None:
            self._end_block(s.prefill_flight)
        self._seen: list[Waiting] = []
        self._coming: Iterator[Waiting] | None = None
        self._room = 0

    @property
    def holds(self) -> bool:
        """Whether it can be told: nobody is on the way out, and there are pages for the step to come."""
        if self._s.endings or self._s.starved:
            return False
        return bool(self._growth() <= self._s.kv.free_pages)

    @property
    def has_headroom(self) -> bool:
        """Whether, as pages are now, all who decode then could take another one after the step to come."""
        return bool(self._s.kv.free_pages >= self._growth() + self.num_decoding)

    def _growth(self) -> int:
        """Pages that the next step's positions need beyond those that are held."""
        if self._busy_decode is not None:
            return 0
        rows = self._s.rows
        return int(np.count_nonzero(self._stays & (self._context > rows.capacity[: rows.n])))

    def _end_block(self, flight: Flight) -> None:
        """The batch is a block further, or through."""
        batch, block, s = flight.batch, flight.work, self._s
        assert batch is not None
        assert isinstance(block, PrefillBlock)
        under_way = tuple(each.snapshot() for each in s.batches)
        if block.layer_stop < s.device.num_layers:
            self._batches = tuple(
                replace(each, next_layer=block.layer_stop) if each.batch_id == batch.batch_id else each
                for each in under_way
            )
            return
        self._batches = tuple(each for each in under_way if each.batch_id != batch.batch_id)
        self.ends_prompts = True
        for chunk, tracked in zip(batch.chunks, batch.tracked, strict=True):
            request = tracked.request
            if not chunk.last:
                deadline = request.arrival + request.slo.ttft
                self._partway.append(
                    (
                        (0, *tracked.key[1:]),
                        tracked,
                        Waiting(request, chunk.stop, tracked.known, 0, deadline, True),
                    )
                )
            elif tracked.known + 1 < request.prompt_tokens + request.max_output_tokens:
                self._joining.append(tracked)
            else:
                self._ended_early += 1

    # ------------------------------------------------------------------------------------- the device

    @property
    def now(self) -> float:
        """When the lane is expected to end."""
        return self._now

    @property
    def _decode_flight(self) -> Flight | None:
        return self._busy_decode

    @property
    def _prefill_flight(self) -> Flight | None:
        return self._busy_prefill

    @property
    def prefills(self) -> tuple[PrefillBatch, ...]:
        """Batches that will be under way."""
        return super().prefills if self._batches is None else self._batches

    # ------------------------------------------------------------------------------------- the queue

    @property
    def num_waiting(self) -> int:
        """Requests that will need prefill."""
        return len(self._s.queue) + len(self._partway)

    def waiting(self, limit: int) -> tuple[Waiting, ...]:
        """The first `limit` that may be prefilled then."""
        if self._coming is None:
            self._coming = self._queue()
            self._room = self._newcomers_fit()
        while len(self._seen) < limit:
            waiting = next(self._coming, None)
            if waiting is None or (not waiting.admitted and self._room <= 0):
                break
            self._room -= not waiting.admitted
            self._seen.append(waiting)
        return tuple(self._seen[:limit])

    def find_waiting(self, request_ids: Sequence[str]) -> tuple[Waiting, ...]:
        """Those of the named requests that will be waiting."""
        found = {waiting.request.id: waiting for waiting in super().find_waiting(request_ids)}
        found |= {waiting.request.id: waiting for _, _, waiting in self._partway}
        return tuple(found[i] for i in request_ids if i in found)

    def _queue(self) -> Iterator[Waiting]:
        s = self._s
        describe = self.describe
        if not self._partway:
            return (describe(s.live[request_id]) for _, request_id in s.queue)
        partway = {tracked.request.id: waiting for _, tracked, waiting in self._partway}
        queue = list(s.queue)
        for key, tracked, _ in self._partway:
            insort(queue, (key, tracked.request.id))
        return (partway.get(i) or describe(s.live[i]) for _, i in queue)

    def _newcomers_fit(self) -> int:
        s = self._s
        idle = not self.num_decoding and not self.prefills
        if s.blocked_at is not None and not (idle or self._left or self._ended_early):
            return 0
        return s.limits.max_running - self.num_running

    # ------------------------------------------------------------------------------------ decoding

    @cached_property
    def _next_step(self) -> DecodeStep | None:
        rows = self._s.rows
        ids, context = rows.step().request_ids if rows.n else (), int(self._context.sum())
        if self._left:
            ids = tuple(name for name, stays in zip(ids, self._stays.tolist(), strict=True) if stays)
            context = int(self._context[self._stays].sum())
        if self._joining:
            ids += tuple(tracked.request.id for tracked in self._joining)
            context += sum(tracked.known + 1 for tracked in self._joining)
        return DecodeStep(ids, context) if ids else None

    def decode_step(self) -> DecodeStep | None:
        """The step over everyone who will be decoding."""
        return None if self._busy_decode is not None else self._next_step

    @property
    def num_decoding(self) -> int:
        """Decoding requests then."""
        return self._s.rows.n - len(self._left) + len(self._joining)

    @cached_property
    def tbt_target(self) -> float:
        """The tightest TBT target among them."""
        rows = self._s.rows
        tightest = rows.tightest
        if self._left:
            tightest = float(rows.tbt[: rows.n][self._stays].min(initial=float("inf")))
        return min([tightest, *(tracked.request.slo.tbt for tracked in self._joining)])

    def tbt_slack(self) -> FloatArray:
        """Seconds each will have until its next token is late."""
        slack = self._slack[self._stays] if self._left else self._slack
        if self._joining:
            slack = np.append(slack, [tracked.request.slo.tbt for tracked in self._joining])
        return slack

    # --------------------------------------------------------------------------------------- pages

    @property
    def free_pages(self) -> int:
        """Unreferenced pages less the headroom; those that leave are taken to share none."""
        s = self._s
        given_back = int(s.rows.capacity[self._left].sum()) // s.kv.page_tokens if self._left else 0
        return max(0, s.kv.free_pages + given_back - self._growth() - self.num_decoding)

    @property
    def num_running(self) -> int:
        """Requests that will hold pages."""
        return self._s.running - len(self._left) - self._ended_early
