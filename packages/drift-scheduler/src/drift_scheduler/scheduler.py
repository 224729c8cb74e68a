"""The gang scheduler: what happened goes in, the next gang and the news for clients come out.

`Scheduler.step(now, events)` is a pure state machine. It has no clock, threads, I/O or torch; it does not know whether
its executor simulates, pins cores or drives a GPU. It alone changes request state; policies decide from a `View`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from drift_scheduler.dispatch.exclusive import Alternate
from drift_scheduler.domain import (
    Accepted,
    DecodeDone,
    DecodeStep,
    Device,
    Event,
    Finished,
    FinishReason,
    FloatArray,
    Gang,
    Lane,
    LaneFailed,
    Observation,
    Output,
    PrefillBlock,
    PrefillChunk,
    PrefillDone,
    Request,
    RequestArrived,
    RequestCancelled,
    RequestTiming,
    Sharing,
    Step,
    Tokens,
    Waiting,
)
from drift_scheduler.errors import DriftError
from drift_scheduler.foresight import NEAR, ForeseenView, Plan, lane_seconds, next_end
from drift_scheduler.legality import (
    CheckedPartitions,
    IllegalGangError,
    PartitionFaultError,
    check_gang,
    menu_fault,
)
from drift_scheduler.lifecycle import Signal, State, advance
from drift_scheduler.live_view import LiveView
from drift_scheduler.pages_ahead import PagesAhead
from drift_scheduler.protocols import CostModel, DispatchPolicy, KvPool, PartitionPolicy
from drift_scheduler.rows import DecodeRows
from drift_scheduler.tracked import Batch, Flight, QueueKey, Tracked
from drift_scheduler.view import View


def refuse(device: Device, dispatch: DispatchPolicy) -> None:
    """Raise DriftError where the policy says, by its optional `refuses(device)`, that it cannot run there."""
    ask = getattr(dispatch, "refuses", None)
    reason = ask(device) if ask is not None else None
    if reason:
        raise DriftError(reason)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the scheduler.

    `max_running`: requests that hold KV pages at once. `max_waiting`: queued requests beyond which arrivals are
    rejected. `max_context_tokens`: prompt and output of one request (`None`: what the pool holds).
    `max_preemptions`: after this many a request comes back only with pages for its whole length, and is never
    chosen again. `max_policy_faults`: after this many the fallback policy stays. `choose_seconds`: a decision
    that takes longer counts as a fault (needs a stopwatch).
    """

    max_running: int = 256
    max_waiting: int = 100_000
    max_context_tokens: int | None = None
    max_preemptions: int = 3
    max_policy_faults: int = 100
    choose_seconds: float = 0.05


class Scheduler:
    """Feed events, get steps. Raises DriftError for a device that could serve nothing, or that `dispatch` refuses.

    `costs` predicts, `dispatch` decides, `partitions` splits; `stopwatch` (a monotonic clock in seconds) is only
    used to notice a policy that is too slow, and may be left out.
    """

    def __init__(
        self,
        device: Device,
        kv: KvPool,
        dispatch: DispatchPolicy,
        partitions: PartitionPolicy,
        costs: CostModel,
        limits: Limits | None = None,
        stopwatch: Callable[[], float] | None = None,
    ) -> None:
        if (fault := menu_fault(device)) is not None:
            raise DriftError(f"menu of device '{device.name}': {fault}")
        self.device = device
        self.kv = kv
        self.costs = costs
        self.limits = limits or Limits()
        self.rows = DecodeRows()
        self.queue: list[tuple[QueueKey, str]] = []
        self.live: dict[str, Tracked] = {}
        self.batches: list[Batch] = []
        self.running = 0
        self.now = 0.0
        self.prefill_flight: Flight | None = None
        self.decode_flight: Flight | None = None
        self.last_gang: Gang | None = None
        self.blocked_at: int | None = None
        self.starved = False
        self.kv_epoch = 0  # counts what may lengthen a cached prefix: prompts computed, pages given back
        self.preemptions = 0
        self.policy_faults = 0
        self.steps = 0
        refuse(device, dispatch)
        self._block_seconds = float(getattr(costs, "block_seconds", 0.0))
        self._switch_seconds = float(getattr(costs, "switch_seconds", 0.0))
        self._dispatch = dispatch
        self._partitions = CheckedPartitions(partitions)
        self._fallback: DispatchPolicy = Alternate()
        self._inherited: tuple[Flight | None, Flight | None] = (None, None)
        self._stopwatch = stopwatch
        self.view = LiveView(self)
        self._plan: Plan | None = None
        self._planned_at = -1  # the step after which planning ahead was tried
        self._ahead = PagesAhead(self)
        self._gang: Gang | None = None  # of the step under way, and whether it was decided ahead
        self._decided_ahead = False
        self._puts_off = False  # whether what no launch needs waits for `complete`
        self._late: list[Callable[[], None]] = []  # what waits, in order
        self._lessons: list[Observation] = []  # what the cost model is still to be shown
        self._carried: list[str] = []  # faults between two steps, for the next to tell
        self.plans = 0  # decisions made ahead, and how many of them held
        self.plans_used = 0
        self._arrivals = 0
        self.endings = 0  # requests that were cancelled while a lane works on them
        self._batch_ids = 0
        self._clear_news()

    # ------------------------------------------------------------------------------------ the step

    def step(self, now: float, events: Sequence[Event]) -> Step:
        """Take in what happened and decide what to launch. `now` never decreases; times in seconds."""
        self.begin(now, events)
        return self.complete()

    def begin(self, now: float, events: Sequence[Event]) -> Gang | None:
        """The first half of a step: what to launch. `complete`, to be called next, says the rest.

        Where a decision made ahead holds, the device need not wait for what its launch does not depend on: giving
        pages back, news for clients, lessons for the cost model.
        """
        self.now = now
        self.steps += 1
        self._clear_news()
        plan = self._plan
        if plan is not None and not plan.fits(now, events):
            plan = None
        if plan is None:
            self._drop_plan()
        self._plan = None
        self._learn()
        self._puts_off = plan is not None
        for event in events:
            self._handle(event)
        if not self._puts_off:
            self._learn()
        if self.decode_flight is None:
            self._grow_pages()
        self._unblock()
        held = self.plans_used
        self._gang = self._decide(plan)
        self._decided_ahead = self.plans_used > held
        self._ahead.withdraw()
        return self._gang

    def complete(self) -> Step:
        """The second half: what was put off, and all that the step has to say."""
        if self._puts_off:
            self._catch_up()
            self._unblock()
        self.rows.look_at_limits()
        return Step(
            gang=self._gang,
            outputs=tuple(self._outputs),
            ended=tuple(self._ended),
            faults=tuple(self._faults),
            observations=tuple(self._observations),
            ahead=self._decided_ahead,
        )

    def _later(self, task: Callable[[], None]) -> None:
        """Do it now, or in `complete` where it may wait. In order either way."""
        if self._puts_off:
            self._late.append(task)
        else:
            task()

    def _catch_up(self) -> None:
        """Do what was put off; nothing more is in this step."""
        self._puts_off = False
        late, self._late = self._late, []
        for task in late:
            task()

    def _clear_news(self) -> None:
        self._outputs: list[Output] = []
        self._ended: list[str] = []
        self._faults, self._carried = self._carried, []
        self._observations: list[Observation] = []

    def _handle(self, event: Event) -> None:
        match event:
            case DecodeDone():
                self._decode_done(event)
            case PrefillDone():
                self._prefill_done(event)
            case RequestArrived():
                self._arrive(event.request)
            case RequestCancelled():
                self._cancel(event.request_id, event.reason, event.message)
            case LaneFailed():
                self._lane_failed(event)

    def plan_ahead(self, near: float = NEAR) -> bool:
        """Ask the policy now what is to follow once the lane that ends next does; whether that was done.

        For whoever has time while the device works. The next `step` launches it where what happened is what was
        expected (see `foresight`), which saves the device a wait for the decision. Once after each step, and only
        policies that say so (`ahead`) are asked. `near`: by what share of the predicted time the lane may end earlier
        or later for the plan to hold.
        """
        if self._planned_at == self.steps or not getattr(self._dispatch, "ahead", False):
            return False
        self._planned_at = self.steps
        self._faults = self._carried
        self._learn()
        if self.policy_faults >= self.limits.max_policy_faults:
            return False
        self._ahead.grow()
        try:
            end = next_end(self)
            if end is None:
                return False
            view = ForeseenView(self, end)
            if not view.holds or not (view.num_waiting or view.prefills or view.num_decoding):
                return False
            gang = self._consult(self._dispatch, view)
            if gang is not None:
                check_gang(view, gang)
        except Exception:  # of a third party's; it will raise when asked in earnest, too, and that counts
            return True
        self.plans += 1
        self._plan = Plan(gang, end.lanes, view.now, near * end.seconds + end.unsure, self.preemptions)
        if gang is not None and gang.prefill is not None and gang.prefill.batch_id < 0:
            self._ahead.reserve(gang.prefill, view)
        return True

    @property
    def planned(self) -> Gang | None:
        """What will most likely be launched next, in as far as that was decided ahead."""
        return None if self._plan is None else self._plan.gang

    def _drop_plan(self) -> None:
        self._plan = None
        self._ahead.withdraw()

    # ------------------------------------------------------------------------- changes between steps

    def set_policies(
        self, dispatch: DispatchPolicy | None = None, partitions: PartitionPolicy | None = None
    ) -> None:
        """Decide by other policies from the next step on; `None` keeps what is there. Requests go on as they are.

        Raises DriftError, with nothing changed, where the dispatch policy refuses the device.
        """
        self._drop_plan()
        if dispatch is not None:
            refuse(self.device, dispatch)
            self._dispatch = dispatch
            self._inherited = (self.prefill_flight, self.decode_flight)
            self.policy_faults = 0  # those were its predecessor's
        if partitions is not None:
            self._partitions = CheckedPartitions(partitions)

    def forget_prefixes(self) -> int:
        """Empty the KV pool of cached prefixes that no request uses; how many pages those were.

        Raises DriftError where the pool cannot do that.
        """
        flush = getattr(self.kv, "flush", None)
        if flush is None:
            raise DriftError(f"a KV pool of type {type(self.kv).__name__} keeps its cached prefixes")
        self._drop_plan()
        self.kv_epoch += 1  # what look-ups found may be gone
        return int(flush())

    # ------------------------------------------------------------------------------ coming and going

    def _arrive(self, request: Request) -> None:
        refusal = self._refusal(request)
        if refusal is not None:
            timing = RequestTiming(request.arrival, self.now, prompt_tokens=request.prompt_tokens)
            self._outputs.append(
                Finished(self.now, request.id, FinishReason.REJECTED, timing, request.slo, refusal)
            )
            self._ended.append(request.id)
            return
        self._arrivals += 1
        tracked = Tracked(request, (1, request.priority, request.arrival, self._arrivals))
        self.live[request.id] = tracked
        self._enqueue(tracked)
        position = bisect_left(self.queue, (tracked.key, request.id))
        self._outputs.append(Accepted(self.now, request.id, request.prompt_tokens, position))

    def _refusal(self, request: Request) -> str | None:
        if request.id in self.live:
            raise ValueError(f"request id '{request.id}' is already in use")
        if request.prompt_tokens < 1:
            return "the prompt has no tokens"
        if request.max_output_tokens < 1:
            return f"max_output_tokens is {request.max_output_tokens}, need at least 1"
        want = request.prompt_tokens + request.max_output_tokens
        pool = self.kv.total_pages * self.kv.page_tokens
        context = self.limits.max_context_tokens
        for limit, what in ((context, "the context"), (pool, "the KV pool")):
            if limit is not None and want > limit:
                return (
                    f"prompt of {request.prompt_tokens} tokens with up to {request.max_output_tokens} of output "
                    f"never fits {what} of {limit} tokens"
                )
        if len(self.queue) >= self.limits.max_waiting:
            return f"the queue is full: {len(self.queue)} requests waiting"
        return None

    def _cancel(self, request_id: str, reason: FinishReason, message: str) -> None:
        tracked = self.live.get(request_id)
        if tracked is None or tracked.ending:  # it ended while the cancellation was on its way
            return
        self._announce_end(tracked, reason, message)
        if self._in_flight(tracked):
            tracked.ending = True  # its lane still writes its pages; they go when the lane is done
            self.endings += 1
        else:
            self._drop(tracked)

    def _in_flight(self, tracked: Tracked) -> bool:
        if tracked.row >= 0:
            return self.decode_flight is not None and tracked.row < self.decode_flight.rows
        flight = self.prefill_flight
        return flight is not None and tracked.batch is not None and flight.batch is tracked.batch

    def _announce_end(self, tracked: Tracked, reason: FinishReason, message: str = "") -> None:
        if tracked.row >= 0:
            known = int(self.rows.context[tracked.row])
            tbt_max, late = float(self.rows.tbt_max[tracked.row]), int(self.rows.late[tracked.row])
        else:
            known, tbt_max, late = tracked.known, tracked.tbt_max, tracked.late
        request = tracked.request
        timing = RequestTiming(
            arrival=request.arrival,
            finished=self.now,
            scheduled=tracked.scheduled_at,
            first_token=tracked.first_token_at,
            prompt_tokens=request.prompt_tokens,
            output_tokens=known - request.prompt_tokens,
            cached_tokens=tracked.cached,
            recomputed_tokens=tracked.recomputed,
            preemptions=tracked.preemptions,
            tbt_max=tbt_max,
            late_tokens=late,
        )
        self._outputs.append(Finished(self.now, request.id, reason, timing, request.slo, message))

    def _drop(self, tracked: Tracked) -> None:
        """Take an ended request out of wherever it stands and give its pages back."""
        request_id = tracked.request.id
        self.endings -= tracked.ending
        if tracked.row >= 0:
            self.rows.remove(tracked.row)
            tracked.computed = tracked.known - 1
        elif tracked.batch is not None:
            self._leave_batch(tracked)
        elif tracked.state is State.WAITING:
            self._dequeue(tracked)
        tracked.state = advance(tracked.state, Signal.END)
        if tracked.admitted:
            self.running -= 1
            self._later(partial(self._release, tracked))
        del self.live[request_id]
        self._ended.append(request_id)

    def _finish(self, tracked: Tracked, reason: FinishReason, message: str = "") -> None:
        self._drop(tracked)  # what it had to count is with the request then
        self._later(partial(self._announce_end, tracked, reason, message))

    def _release(self, tracked: Tracked) -> None:
        self.kv.commit(tracked.request.id, tracked.computed)
        self.kv.release(tracked.request.id)
        self.kv_epoch += 1
        tracked.capacity = 0

    def _leave_batch(self, tracked: Tracked) -> None:
        batch = tracked.batch
        assert batch is not None
        tracked.batch = None
        stay = [i for i, other in enumerate(batch.tracked) if other is not tracked]
        if stay:
            batch.set_members(tuple(batch.chunks[i] for i in stay), tuple(batch.tracked[i] for i in stay))
        else:
            self.batches.remove(batch)

    # --------------------------------------------------------------------------------- lanes finish

    def _decode_done(self, event: DecodeDone) -> None:
        flight = self.decode_flight
        assert flight is not None, "a decode step ended that never began"
        assert isinstance(flight.work, DecodeStep)
        self._later(partial(self._observe, flight, Lane.DECODE, event.seconds))
        self.decode_flight = None
        rows, n = self.rows, flight.rows
        rows.advance(n)
        ended = [self.live[request_id] for request_id in event.stopped]
        reasons = dict.fromkeys(event.stopped, FinishReason.STOP)
        grown = self._ahead.grown()
        if grown:
            self._later(partial(self._commit_grown, grown))
        for row in rows.at_limit(n):
            tracked = rows.tracked[row]
            if tracked.request.id not in reasons:
                reasons[tracked.request.id] = FinishReason.LENGTH
                ended.append(tracked)
        gone = [t for t in rows.tracked[:n] if t.ending] if self.endings else []
        if ended or gone:  # what they had to wait for is with their rows
            gaps = rows.note_times(n, self.now)
            self._later(partial(self._tell_tokens, flight.work.request_ids, event, gaps, gone))
        else:
            self._later(partial(self._tell_all, flight.work.request_ids, event))
        for tracked in gone:
            self._drop(tracked)
        for tracked in ended:
            if not tracked.ending:
                self._finish(tracked, reasons[tracked.request.id])

    def _tell_all(self, ids: tuple[str, ...], event: DecodeDone) -> None:
        """The first rows got a token, and go on."""
        gaps = self.rows.note_times(len(ids), self.now)
        self._tell_tokens(ids, event, gaps, [])

    def _tell_tokens(
        self, ids: tuple[str, ...], event: DecodeDone, gaps: FloatArray, gone: list[Tracked]
    ) -> None:
        tokens = event.tokens
        if gone:
            left = {t.request.id for t in gone}
            stay = [i for i, request_id in enumerate(ids) if request_id not in left]
            ids = tuple(ids[i] for i in stay)
            gaps = gaps[stay]
            tokens = None if tokens is None else [tokens[i] for i in stay]
        if ids:
            self._outputs.append(Tokens(self.now, ids, tokens, gaps, False, event.details))

    def _prefill_done(self, event: PrefillDone) -> None:
        flight = self.prefill_flight
        assert flight is not None, "a prefill block ended that never began"
        assert flight.batch is not None
        assert isinstance(flight.work, PrefillBlock)
        self._later(partial(self._observe, flight, Lane.PREFILL, event.seconds))
        self.prefill_flight = None
        batch = flight.batch
        batch.next_layer = flight.work.layer_stop
        if batch.next_layer < self.device.num_layers:
            for tracked in [t for t in batch.tracked if t.ending]:
                self._drop(tracked)
            return
        self.batches.remove(batch)
        self._merge(batch, event)
        self._later(self._count_epoch)

    def _count_epoch(self) -> None:
        self.kv_epoch += 1

    def _merge(self, batch: Batch, event: PrefillDone) -> None:
        """The last layer is done: requests whose prompt is complete get a token and join the decode rows."""
        firsts: list[tuple[Tracked, int | None]] = []
        laters: list[tuple[Tracked, int | None]] = []
        sampled = iter(event.tokens) if event.tokens is not None else None
        for chunk, tracked in zip(batch.chunks, batch.tracked, strict=True):
            token = next(sampled) if chunk.last and sampled is not None else None
            tracked.batch = None
            tracked.computed = chunk.stop
            self._later(partial(self.kv.commit, chunk.request_id, chunk.stop))
            if tracked.ending:
                self._drop(tracked)
            elif chunk.last:
                tracked.state = advance(tracked.state, Signal.PREFILLED)
                (laters if tracked.first_token_at is not None else firsts).append((tracked, token))
            else:
                tracked.state = advance(tracked.state, Signal.PART)
                self._enqueue(tracked)
        stopped = set(event.stopped)
        for group, first in ((firsts, True), (laters, False)):
            if group:
                self._tell_prefill_tokens(group, first, event)
                for tracked, _ in group:
                    self._join(tracked, tracked.request.id in stopped)

    def _tell_prefill_tokens(
        self, group: list[tuple[Tracked, int | None]], first: bool, event: PrefillDone
    ) -> None:
        gaps = np.array([self.now - t.last_token_at for t, _ in group])
        for (tracked, _), gap in zip(group, gaps.tolist(), strict=True):
            tracked.known += 1
            tracked.last_token_at = self.now
            if first:
                tracked.first_token_at = self.now
            else:
                tracked.tbt_max = max(tracked.tbt_max, gap)
                tracked.late += gap > tracked.request.slo.tbt
        ids = tuple(t.request.id for t, _ in group)
        tokens = None if event.tokens is None else [token for _, token in group if token is not None]
        told = Tokens(self.now, ids, tokens, gaps, first, event.details)
        self._later(partial(self._outputs.append, told))

    def _join(self, tracked: Tracked, stopped: bool) -> None:
        request = tracked.request
        limit = request.prompt_tokens + request.max_output_tokens
        if stopped:
            self._finish(tracked, FinishReason.STOP)
        elif tracked.known >= limit:
            self._finish(tracked, FinishReason.LENGTH)
        else:
            self.rows.add(tracked, capacity=tracked.capacity, limit=limit, last_token=self.now)

    def _lane_failed(self, event: LaneFailed) -> None:
        if event.lane is Lane.DECODE:
            flight, self.decode_flight = self.decode_flight, None
            self._ahead.grown()  # they end
            victims = self.rows.tracked[: flight.rows] if flight is not None else []
        else:
            flight, self.prefill_flight = self.prefill_flight, None
            victims = list(flight.batch.tracked) if flight is not None and flight.batch is not None else []
        for tracked in list(victims):
            if tracked.ending:
                self._drop(tracked)
            else:
                self._finish(tracked, FinishReason.FAILED, event.message)

    def _observe(self, flight: Flight, lane: Lane, seconds: float) -> None:
        gang, work = flight.gang, flight.work
        prefill, decode = flight.beside_prefill, flight.beside_decode
        layers = self.device.num_layers
        if isinstance(work, PrefillBlock):
            prefill, layers = work.shape(), work.layers
        else:
            decode = work.shape()
        seen = Observation(
            lane,
            gang.partition,
            gang.sharing,
            prefill,
            decode,
            layers,
            flight.overlapped,
            flight.predicted,
            seconds,
        )
        self._observations.append(seen)
        self._lessons.append(seen)

    def _learn(self) -> None:
        """Show the cost model what it has not seen yet. Nothing is decided from it where a plan is followed, so that it
        can wait until the device works again."""
        if not self._lessons:
            return
        lessons, self._lessons = self._lessons, []
        for seen in lessons:
            try:
                self.costs.observe(seen)
            except Exception as error:  # a third party's model may raise anything; service goes on
                self._fault(f"cost model: observe raised {type(error).__name__}: {error}")

    # -------------------------------------------------------------------------------- pages and queue

    def _enqueue(self, tracked: Tracked) -> None:
        _, priority, arrival, number = tracked.key
        tracked.key = (0 if tracked.admitted else 1, priority, arrival, number)
        insort(self.queue, (tracked.key, tracked.request.id))

    def _dequeue(self, tracked: Tracked) -> None:
        entry = (tracked.key, tracked.request.id)
        at = bisect_left(self.queue, entry)
        assert self.queue[at] == entry, f"'{tracked.request.id}' is not in the queue"
        del self.queue[at]

    def _grow_pages(self) -> None:
        """Cover the next position of every decoding request, preempting where pages run out."""
        rows = self.rows
        self.starved = False
        short = rows.short_of_pages()
        if not short:
            return
        contexts = rows.context[short]
        grown = 0
        grow: Callable[[list[str], list[int]], int] | None = getattr(self.kv, "grow", None)
        if grow is not None:
            grown = grow(rows.names(short), contexts.tolist())
            page = self.kv.page_tokens
            rows.capacity[short[:grown]] = -(-contexts[:grown] // page) * page
            if grown == len(short):
                return
        if self._puts_off:  # a plan does not go before those who decode
            self._ahead.withdraw()
            self._catch_up()
        needy = [rows.tracked[row] for row in short[grown:]]
        for tracked, context in zip(needy, contexts[grown:].tolist(), strict=True):
            request_id = tracked.request.id
            while tracked.row >= 0:
                self.kv.commit(request_id, context - 1)
                if self.kv.extend(request_id, context):
                    rows.capacity[tracked.row] = self.rounded(context)
                    break
                victim = self._victim()
                if self._in_flight(victim):  # it gives way at the end of its block; decode waits that long
                    self.starved = True
                    return
                self._preempt(victim)

    def _commit_grown(self, grown: list[Tracked]) -> None:
        """The step for which they had pages beforehand is done; who left since has committed more."""
        for tracked in grown:
            if tracked.row >= 0:
                self.kv.commit(tracked.request.id, int(self.rows.context[tracked.row]) - 1)

    def _victim(self) -> Tracked:
        """Lowest priority first, youngest among equals; never one that was preempted often enough already."""
        limit = self.limits.max_preemptions
        holders = [t for t in self.live.values() if t.admitted and not t.ending]
        return max((t for t in holders if t.preemptions < limit), key=lambda t: t.key[1:])

    def _preempt(self, tracked: Tracked) -> None:
        """Take a request's pages; it computes them again when its turn comes."""
        if tracked.row >= 0:
            self.rows.remove(tracked.row)
            tracked.computed = tracked.known - 1
        elif tracked.batch is not None:
            self._leave_batch(tracked)
        else:
            self._dequeue(tracked)
        tracked.state = advance(tracked.state, Signal.PREEMPT)
        if tracked.admitted:
            self.running -= 1
            self._release(tracked)
        tracked.computed = 0
        tracked.preemptions += 1
        self.preemptions += 1
        self._enqueue(tracked)

    def _admit(self, tracked: Tracked) -> bool:
        """Reserve pages for everything known (its whole length once preempted too often), or change nothing."""
        request, reserve = tracked.request, self.positions_for(tracked)
        cached = self._ahead.claim(request.id)
        if cached is None:
            if self._puts_off:  # what others give back may be what it needs
                self._catch_up()
            cached = self.kv.admit(request, tracked.known, reserve)
            if cached is None:
                return False
            if self.rows.n and self.kv.free_pages < self.headroom:
                self.kv.release(request.id)
                return False
        if tracked.preemptions:
            tracked.recomputed += tracked.known - 1 - cached
        else:
            tracked.cached = cached
        tracked.computed = cached
        tracked.capacity = self.rounded(reserve)
        if tracked.scheduled_at is None:
            tracked.scheduled_at = self.now
        self.running += 1
        return True

    def positions_for(self, tracked: Tracked) -> int:
        """Positions that a request's pages must cover for it to be admitted."""
        request = tracked.request
        if tracked.preemptions >= self.limits.max_preemptions:
            return request.prompt_tokens + request.max_output_tokens
        return tracked.known + 1

    @property
    def headroom(self) -> int:
        """Pages an admission must leave so that decoding requests do not run out at once: one each."""
        return self.rows.n

    def rounded(self, tokens: int) -> int:
        """Positions of the pages that cover so many."""
        page = self.kv.page_tokens
        return -(-tokens // page) * page

    def _unblock(self) -> None:
        if self.blocked_at is not None:
            idle = not self.rows.n and not self.batches
            if idle or self.kv.free_pages > self.blocked_at:
                self.blocked_at = None

    # -------------------------------------------------------------------------------------- deciding

    def _decide(self, plan: Plan | None = None) -> Gang | None:
        if self.prefill_flight is not None and self.decode_flight is not None:
            return None
        if not (self.queue or self.batches or self.rows.n):
            return None
        holds, gang = self._as_planned(plan)
        if not holds:
            gang = self._ask()
        if gang is None:
            return None
        applied = self._apply(gang)
        if applied is None:  # no pages for the proposed prompts: ask again without them
            gang = self._ask()
            applied = None if gang is None else self._apply(gang)
        if applied is not None:
            self._launch(applied)
        return applied

    def _as_planned(self, plan: Plan | None) -> tuple[bool, Gang | None]:
        """Whether a plan may be followed, and what it says now: a decode step is over whoever decodes by now.

        That it is legal was seen when it was made, of a state that differs from this one by who has stopped early.
        """
        if plan is None or plan.preemptions != self.preemptions:
            return False, None
        self.view.refresh()
        gang = plan.gang
        if gang is not None:
            step = None if gang.decode is None else self.view.decode_step()
            if step is None and gang.decode is not None:
                return False, None
            gang = Gang(gang.sharing, gang.partition, gang.prefill, step)
        elif self._stalled():
            return False, None
        self.plans_used += 1
        return True, gang

    def _ask(self) -> Gang | None:
        if self._puts_off:
            self._ahead.withdraw()
            self._catch_up()
            self._unblock()
        self._learn()
        self.view.refresh()
        gang: Gang | None = None
        if self.policy_faults < self.limits.max_policy_faults:
            gang = self._choose(self._dispatch)
            if gang is not None or not self._stalled():
                return gang
        return self._choose(self._fallback)

    def _choose(self, policy: DispatchPolicy) -> Gang | None:
        """The policy's legal gang, or `None` with the fault noted."""
        name = type(policy).__name__
        faults = len(self._faults)
        try:
            gang = self._consult(policy, self.view)
            if gang is not None:
                check_gang(self.view, gang)
        except IllegalGangError as error:
            gang = None
            if not self._beside_inherited():
                self._fault(f"{name} proposed {error}")
        except PartitionFaultError as error:
            gang = None
            self._fault(str(error))
        except Exception as error:  # a third party's policy may raise anything; service goes on
            gang = None
            self._fault(f"{name} raised {type(error).__name__}: {error}")
        if gang is None and self._idle and len(self._faults) == faults and policy is not self._fallback:
            self._fault(f"{name} left an idle device idle with work to do")
        return gang

    def _consult(self, policy: DispatchPolicy, view: View) -> Gang | None:
        """What the policy answers; a fault is noted where that took too long."""
        if self._stopwatch is None:
            return policy.choose(view, self.costs, self._partitions)
        begun = self._stopwatch()
        try:
            return policy.choose(view, self.costs, self._partitions)
        finally:
            took, allowed = self._stopwatch() - begun, self.limits.choose_seconds
            if took > allowed:
                self._fault(f"{type(policy).__name__} took {took * 1e3:.1f} ms, allowed {allowed * 1e3:.1f}")

    @property
    def _idle(self) -> bool:
        """Whether doing nothing now would wait for an event that never comes."""
        return self.prefill_flight is None and self.decode_flight is None

    def _stalled(self) -> bool:
        """Whether nothing would happen, or a fault was just noted."""
        return bool(self._faults) or self._idle

    def _beside_inherited(self) -> bool:
        """Whether a lane still does what an earlier policy began: what fits badly beside that is no fault."""
        flights = (self.prefill_flight, self.decode_flight)
        return any(
            now is not None and now is then for now, then in zip(flights, self._inherited, strict=True)
        )

    def _fault(self, message: str) -> None:
        self.policy_faults += 1
        self._faults.append(message)

    def _apply(self, gang: Gang) -> Gang | None:
        """Admit a new batch's requests; `None` when none of them got pages."""
        block = gang.prefill
        if block is None or block.batch_id >= 0:
            return gang
        chunks: list[PrefillChunk] = []
        members: list[Tracked] = []
        for chunk in block.chunks:
            tracked = self.live[chunk.request_id]
            if not tracked.admitted:
                if self.running >= self.limits.max_running or not self._admit(tracked):
                    self.blocked_at = self.kv.free_pages
                    break
                if tracked.computed != chunk.start:  # an earlier admission evicted some of its cached prefix
                    chunk = PrefillChunk(chunk.request_id, tracked.computed, chunk.stop, chunk.last)
            self._dequeue(tracked)
            tracked.state = advance(tracked.state, Signal.ADMIT)
            chunks.append(chunk)
            members.append(tracked)
        if not chunks:
            return None
        shape = block.shape() if chunks == list(block.chunks) else None
        batch = Batch(self._batch_ids, tuple(chunks), tuple(members), shape)
        self._batch_ids += 1
        for tracked in members:
            tracked.batch = batch
        self.batches.append(batch)
        layers = block.layer_start, block.layer_stop
        prefill = PrefillBlock.shaped(batch.batch_id, batch.chunks, *layers, batch.shape)
        return Gang(gang.sharing, gang.partition, prefill, gang.decode)

    def _launch(self, gang: Gang) -> None:
        prefill = decode = None
        if gang.prefill is not None:
            batch = next(b for b in self.batches if b.batch_id == gang.prefill.batch_id)
            self.batches.remove(batch)
            self.batches.append(batch)  # the active batch is the last
            prefill = self.prefill_flight = Flight(gang.prefill, gang, self.now, 0.0, batch=batch)
        if gang.decode is not None:
            decode = self.decode_flight = Flight(gang.decode, gang, self.now, 0.0, rows=self.rows.n)
        switched = self.last_gang is not None and self.last_gang.partition != gang.partition
        self.last_gang = gang
        self._later(partial(self._foretell, gang, prefill, decode, switched=switched))

    def _foretell(self, gang: Gang, prefill: Flight | None, decode: Flight | None, *, switched: bool) -> None:
        """Note how long the lanes will take, and beside what."""
        try:
            delay = self._switch_seconds if switched else 0.0
            t_prefill, t_decode = lane_seconds(gang, self.device, self.costs, delay, self._block_seconds)
        except Exception as error:  # a third party's model may raise anything; service goes on
            t_prefill = t_decode = 0.0
            self._fault(f"cost model raised {type(error).__name__}: {error}")
        if prefill is not None:
            prefill.predicted = t_prefill
        if decode is not None:
            decode.predicted = t_decode
        self._note_overlap()

    def _note_overlap(self) -> None:
        prefill, decode = self.prefill_flight, self.decode_flight
        if prefill is None or decode is None or prefill.gang.sharing is Sharing.TEMPORAL:
            return
        prefill.overlapped = decode.overlapped = prefill.gang.sharing is not Sharing.FUSED
        if prefill.beside_decode is None:
            prefill.beside_decode = decode.gang.decode.shape() if decode.gang.decode is not None else None
        if decode.beside_prefill is None:
            decode.beside_prefill = prefill.gang.prefill.shape() if prefill.gang.prefill is not None else None

    # ------------------------------------------------------------------------------------- questions

    def first_waiting(self, limit: int) -> tuple[Waiting, ...]:
        """The first `limit` of the queue, whether or not there are pages and places for them."""
        self.view.refresh()
        return self.view.find_waiting([request_id for _, request_id in self.queue[:limit]])
