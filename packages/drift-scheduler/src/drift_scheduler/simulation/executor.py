"""An executor whose device is a cost model and whose clock jumps from event to event.

Knows what work costs (the *truth*, which need not be what the scheduler believes) and when requests arrive and
stop; knows nothing of policies or pages. Arrivals are pulled one ahead, so memory grows with requests alive, never
with the trace. The same inputs and seed give the same events.

Lanes are fluid: work is solo seconds, and while both lanes run side by side each advances at 1 / its slowdown factor,
worked out anew whenever either lane starts or ends. The host is one thread: while it launches a prefill's kernels, what
ends meanwhile is noticed only afterwards. It is also the referee: more units in use than the device has,
a partition changed under a busy lane, or blocks of a batch out of layer order are AssertionErrors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from drift_scheduler.domain import (
    DecodeDone,
    DecodeStep,
    Device,
    Event,
    Gang,
    Lane,
    LaneFailed,
    Partition,
    PrefillBlock,
    PrefillDone,
    Request,
    RequestArrived,
    Sharing,
)
from drift_scheduler.protocols import CostModel
from drift_scheduler.simulation.arrivals import Arrivals

Failure = Callable[[Lane, PrefillBlock | DecodeStep], str | None]
"""Asked when work is launched; a message makes it fail at its end (for tests)."""

SIDE_BY_SIDE = frozenset({Sharing.SPATIAL, Sharing.STREAMS})

PATIENCE = 10_000
"""Wake-ups in a row with nothing running and nothing to come, after which the executor shuts down."""


@dataclass(frozen=True, slots=True)
class Overheads:
    """What the truth's solo times leave out, seconds: launching a prefill block or a decode step, and changing
    the partition. `noise` is the standard deviation of the logarithm of a duration's random factor.

    `launch_layer_seconds`: the host's time to launch one layer of a prefill or a fused pass, kernel by kernel; no layer
    runs faster, and no event is noticed meanwhile. A decode step is one captured graph and costs the host nothing.
    `polling`: whether the host looks at events while a prefill block runs; without, it waits for the block's end.
    """

    block_seconds: float = 0.0
    step_seconds: float = 0.0
    switch_seconds: float = 0.0
    noise: float = 0.0
    launch_layer_seconds: float = 0.0
    polling: bool = True


class _Work:
    """What runs on a lane. `left`: solo seconds to go; `rate`: solo seconds per second; `end` at that rate."""

    __slots__ = ("end", "failure", "gang", "left", "rate", "started", "work")

    def __init__(
        self, work: PrefillBlock | DecodeStep, gang: Gang, started: float, left: float, failure: str | None
    ) -> None:
        self.work = work
        self.gang = gang
        self.started = started
        self.left = left
        self.rate = 1.0
        self.end = started + left
        self.failure = failure


class SimulatedExecutor:
    """Implements `drift_scheduler.protocols.Executor` on virtual time.

    `requests`: in order of arrival, consumed lazily unless sessions wait for their turns (see `arrivals`).
    `interruptions`: further `(time, event)` pairs in order of time (cancellations). The simulation ends when no more
    arrivals are to come and nothing runs.
    """

    def __init__(
        self,
        device: Device,
        truth: CostModel,
        requests: Iterable[Request],
        *,
        overheads: Overheads | None = None,
        seed: int = 0,
        interruptions: Iterable[tuple[float, Event]] = (),
        fail: Failure | None = None,
    ) -> None:
        self._device = device
        self._truth = truth
        self._interruptions: Iterator[tuple[float, Event]] = iter(interruptions)
        self._overheads = overheads or Overheads()
        self._random = random.Random(seed)
        self._fail = fail
        self._now = 0.0
        self._prefill: _Work | None = None
        self._decode: _Work | None = None
        self._queued_prefill: _Work | None = None  # the second half of a temporal gang
        self._partition: Partition | None = None
        self._next_layer: dict[int, tuple[int, frozenset[str]]] = {}  # batch -> (layer, ids) to come
        self._lengths = _Lengths()
        self._arrivals = Arrivals(requests)
        self._next_interruption = next(self._interruptions, None)
        self._idle_wakes = 0
        self._host_free = 0.0  # when the host has launched everything it was given

    @property
    def device(self) -> Device:
        """What it offers."""
        return self._device

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def submit(self, gang: Gang) -> None:
        """Start the gang. AssertionError where it breaks a rule of the device."""
        self._check(gang)
        delay = self._switch_delay(gang)
        match gang.sharing:
            case Sharing.FUSED:
                self._start_fused(gang, delay)
            case Sharing.TEMPORAL:
                self._start_temporal(gang, delay)
            case _:
                self._start_lanes(gang, delay)
        if gang.prefill is not None:
            self._advance_batch(gang.prefill)
            self._host_free = self._now + gang.prefill.layers * self._overheads.launch_layer_seconds

    def wait(self, until: float | None) -> Sequence[Event] | None:
        """Jump to the next event, or to `until` if that comes first, and return what happens there (maybe nothing)."""
        due = self.due
        if due is None:
            if until is None or self._idle_wakes >= PATIENCE:
                return None
            self._idle_wakes += 1
            self._now = max(self._now, until)
            return ()
        self._idle_wakes = 0
        if until is not None and until < due:
            self._advance(max(self._now, until))
            return ()
        self._advance(max(self._now, due))
        return self._events_now()

    @property
    def due(self) -> float | None:
        """When something is noticed next; `None` when nothing runs or is to come."""
        due = self._next_time()
        if due is None:
            return None
        due = max(due, self._host_free)
        if not self._overheads.polling and self._prefill is not None:
            due = max(due, self._prefill.end)
        return due

    def elapse(self, now: float) -> list[Event]:
        """Set the clock to `now`; everything that happened until then. For those who have a clock of their own."""
        events = list[Event]()
        while (due := self.due) is not None and due <= now:
            self._advance(max(self._now, due))
            events += self._events_now()
        self._advance(max(self._now, now))
        return events

    def forget(self, request_ids: Sequence[str]) -> None:
        """These requests ended."""
        self._lengths.forget(request_ids)
        self._arrivals.ended(request_ids, self._now)

    # ---------------------------------------------------------------------------------------- launching

    def _start_lanes(self, gang: Gang, delay: float) -> None:
        spatial = gang.sharing is Sharing.SPATIAL
        if gang.decode is not None:
            units = gang.partition.decode if spatial else self._device.total_units
            self._decode = self._work(gang, gang.decode, delay + self._decode_seconds(gang.decode, units))
        if gang.prefill is not None:
            units = gang.partition.prefill if spatial else self._device.total_units
            self._prefill = self._work(gang, gang.prefill, delay + self._prefill_seconds(gang.prefill, units))
        self._contend()

    def _start_temporal(self, gang: Gang, delay: float) -> None:
        assert gang.decode is not None
        assert gang.prefill is not None
        total = self._device.total_units
        self._decode = self._work(gang, gang.decode, delay + self._decode_seconds(gang.decode, total))
        self._queued_prefill = self._work(gang, gang.prefill, self._prefill_seconds(gang.prefill, total))

    def _start_fused(self, gang: Gang, delay: float) -> None:
        assert gang.decode is not None
        assert gang.prefill is not None
        block = gang.prefill
        seconds = self._truth.fused(block.shape(), gang.decode.shape(), self._device.total_units)
        seconds = max(seconds, block.layers * self._overheads.launch_layer_seconds)
        seconds = delay + self._noisy(seconds + self._overheads.step_seconds + self._overheads.block_seconds)
        self._decode = self._work(gang, gang.decode, seconds)
        self._prefill = self._work(gang, block, seconds)

    def _work(self, gang: Gang, work: PrefillBlock | DecodeStep, seconds: float) -> _Work:
        failure = None
        if self._fail is not None:
            failure = self._fail(Lane.PREFILL if isinstance(work, PrefillBlock) else Lane.DECODE, work)
        return _Work(work, gang, self._now, seconds, failure)

    def _prefill_seconds(self, block: PrefillBlock, units: int) -> float:
        per_layer = self._truth.prefill(block.shape(), units) / self._device.num_layers
        per_layer = max(per_layer, self._overheads.launch_layer_seconds)
        return self._noisy(per_layer * block.layers + self._overheads.block_seconds)

    def _decode_seconds(self, step: DecodeStep, units: int) -> float:
        return self._noisy(self._truth.decode(step.shape(), units) + self._overheads.step_seconds)

    def _noisy(self, seconds: float) -> float:
        noise = self._overheads.noise
        return seconds * self._random.lognormvariate(0.0, noise) if noise else seconds

    def _switch_delay(self, gang: Gang) -> float:
        changed = self._partition is not None and gang.partition != self._partition
        self._partition = gang.partition
        return self._overheads.switch_seconds if changed else 0.0

    # ------------------------------------------------------------------------------------------- time

    def _next_time(self) -> float | None:
        due: float | None = None
        if self._decode is not None:
            due = self._decode.end
        if self._prefill is not None and (due is None or self._prefill.end < due):
            due = self._prefill.end
        request = self._arrivals.next
        if request is not None and (due is None or request.arrival < due):
            due = request.arrival
        if self._next_interruption is not None and (due is None or self._next_interruption[0] < due):
            due = self._next_interruption[0]
        return due

    def _advance(self, now: float) -> None:
        elapsed = now - self._now
        self._now = now
        for work in (self._prefill, self._decode):
            if work is not None:
                work.left -= elapsed * work.rate

    def _contend(self) -> None:
        """Set both lanes' rates for who runs now; called whenever a lane starts or ends."""
        prefill, decode = self._prefill, self._decode
        if prefill is None or decode is None or prefill.gang.sharing not in SIDE_BY_SIDE:
            for work in (prefill, decode):
                if work is not None and work.rate != 1.0:
                    self._set_rate(work, 1.0)
            return
        block, step, partition = prefill.work, decode.work, decode.gang.partition
        assert isinstance(block, PrefillBlock)
        assert isinstance(step, DecodeStep)
        slow_prefill, slow_decode = self._truth.slowdown(block.shape(), step.shape(), partition)
        assert slow_prefill >= 1.0, f"prefill slowdown {slow_prefill} below 1 on {partition}"
        assert slow_decode >= 1.0, f"decode slowdown {slow_decode} below 1 on {partition}"
        self._set_rate(prefill, slow_prefill)
        self._set_rate(decode, slow_decode)

    def _set_rate(self, work: _Work, factor: float) -> None:
        work.rate = 1.0 / factor
        work.end = self._now + max(0.0, work.left) * factor

    def _events_now(self) -> list[Event]:
        """Everything due at this instant: decode, prefill, interruptions, arrivals."""
        now, events = self._now, list[Event]()
        decode, prefill = self._decode, self._prefill
        if decode is not None and decode.end <= now:
            self._decode = None
            events.append(self._decode_done(decode))
            if self._queued_prefill is not None:
                prefill, self._queued_prefill = self._queued_prefill, None
                prefill.started, prefill.end = now, now + prefill.left
                self._prefill = prefill
        if prefill is not None and prefill.end <= now:
            self._prefill = None
            events.append(self._prefill_done(prefill))
        if events:
            self._contend()
        while self._next_interruption is not None and self._next_interruption[0] <= now:
            events.append(self._next_interruption[1])
            self._next_interruption = next(self._interruptions, None)
        while (request := self._arrivals.next) is not None and request.arrival <= now:
            self._arrivals.advance()
            self._lengths.add(request)
            events.append(RequestArrived(request))
        return events

    def _decode_done(self, done: _Work) -> Event:
        if done.failure is not None:
            return LaneFailed(Lane.DECODE, done.failure)
        assert isinstance(done.work, DecodeStep)
        seconds = min(self._now, done.end) - done.started
        return DecodeDone(seconds, stopped=self._lengths.decoded(done.work.request_ids))

    def _prefill_done(self, done: _Work) -> Event:
        block = done.work
        assert isinstance(block, PrefillBlock)
        if done.failure is not None:
            self._next_layer.pop(block.batch_id, None)
            return LaneFailed(Lane.PREFILL, done.failure)
        stopped: tuple[str, ...] = ()
        if block.layer_stop == self._device.num_layers:
            stopped = self._lengths.prefilled([chunk.request_id for chunk in block.chunks if chunk.last])
        return PrefillDone(min(self._now, done.end) - done.started, stopped=stopped)

    # ---------------------------------------------------------------------------------------- referee

    def _check(self, gang: Gang) -> None:
        assert gang.prefill is not None or gang.decode is not None, "a gang without work"
        assert gang.prefill is None or (self._prefill is None and self._queued_prefill is None), (
            "prefill for a busy prefill lane"
        )
        assert gang.decode is None or self._decode is None, "decode for a busy decode lane"
        units = 0 if self._all_streams(gang) else self._units_in_use(gang)
        assert units <= self._device.total_units, (
            f"{gang.sharing.value} gang on {gang.partition} with {self._busy()} running needs "
            f"{units} units of {self._device.total_units}"
        )
        if self._prefill is not None or self._decode is not None:
            assert gang.partition == self._partition or self._device.repartition_while_busy, (
                f"partition {gang.partition} under a lane busy on {self._partition}"
            )
        if gang.prefill is not None:
            self._check_layers(gang.prefill)

    def _all_streams(self, gang: Gang) -> bool:
        """Whether no partition is in force: then every unit serves whoever asks."""
        if gang.sharing is not Sharing.STREAMS:
            return False
        running = [work.gang for work in (self._prefill, self._decode) if work is not None]
        return all(other.sharing is Sharing.STREAMS for other in running)

    def _units_in_use(self, gang: Gang) -> int:
        """Units that would be busy at once; a temporal or fused gang, and each half of it, takes them all."""
        units = 0
        if self._prefill is not None:
            units += self._lane_units(self._prefill.gang, Lane.PREFILL)
        if self._decode is not None:
            units += self._lane_units(self._decode.gang, Lane.DECODE)
        if gang.sharing in (Sharing.TEMPORAL, Sharing.FUSED):
            return units + self._device.total_units
        if gang.prefill is not None:
            units += self._lane_units(gang, Lane.PREFILL)
        if gang.decode is not None:
            units += self._lane_units(gang, Lane.DECODE)
        return units

    def _lane_units(self, gang: Gang, lane: Lane) -> int:
        if gang.sharing is not Sharing.SPATIAL:
            return self._device.total_units
        units = gang.partition.prefill if lane is Lane.PREFILL else gang.partition.decode
        assert units > 0, f"work for a lane without units on {gang.partition}"
        return units

    def _busy(self) -> str:
        names = [name for name, work in (("prefill", self._prefill), ("decode", self._decode)) if work]
        return " and ".join(names) or "nothing"

    def _check_layers(self, block: PrefillBlock) -> None:
        assert 0 <= block.layer_start < block.layer_stop <= self._device.num_layers, (
            f"block of layers [{block.layer_start}, {block.layer_stop}) of {self._device.num_layers}"
        )
        expected, ids = self._next_layer.get(block.batch_id, (0, None))
        assert block.layer_start == expected, (
            f"batch {block.batch_id} continues at layer {block.layer_start} instead of {expected}"
        )
        new = ids is not None and {chunk.request_id for chunk in block.chunks} - ids
        assert not new, f"requests {sorted(new or ())} joined batch {block.batch_id} at layer {expected}"

    def _advance_batch(self, block: PrefillBlock) -> None:
        if block.layer_stop == self._device.num_layers:
            self._next_layer.pop(block.batch_id, None)
            return
        ids = frozenset(chunk.request_id for chunk in block.chunks)
        self._next_layer[block.batch_id] = (block.layer_stop, ids)
        if len(self._next_layer) > 64:  # batches whose requests all left never finish
            self._next_layer.pop(min(self._next_layer))


class _Lengths:
    """When requests reach their true length, counted per step and not per request.

    Decoding requests all get one token a step, so a member's remaining tokens name the step at which it stops: joining
    and leaving cost work, a step over the same members costs a comparison and a dictionary look-up. Requests
    whose length is unknown, or cut by their own limit, are never reported: the scheduler ends those.
    """

    def __init__(self) -> None:
        self._remaining: dict[str, int] = {}  # tokens still to come of known requests that are not members
        self._stops: dict[str, int] = {}  # members: the step number at which they stop
        self._due: dict[int, list[str]] = {}  # step number -> members that stop there, some of them stale
        self._members: tuple[str, ...] = ()
        self._step = 0

    def add(self, request: Request) -> None:
        """A request arrived."""
        length = request.output_tokens
        if length is not None and length < request.max_output_tokens:
            self._remaining[request.id] = max(1, length)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Requests ended."""
        for request_id in request_ids:
            self._remaining.pop(request_id, None)
            self._stops.pop(request_id, None)

    def prefilled(self, request_ids: Sequence[str]) -> tuple[str, ...]:
        """Each got a token from a prefill; the ids of those that stop with it."""
        stopped = []
        for request_id in request_ids:
            if request_id in self._stops:  # preempted since the last decode step: no longer a member
                self._remaining[request_id] = self._stops.pop(request_id) - self._step
                self._members = tuple(member for member in self._members if member != request_id)
            left = self._remaining.get(request_id)
            if left is None:
                continue
            self._remaining[request_id] = left - 1
            if left == 1:
                stopped.append(request_id)
        return tuple(stopped)

    def decoded(self, request_ids: tuple[str, ...]) -> tuple[str, ...]:
        """Each got a token from a decode step; the ids of those that stop with it, in the step's order of joining."""
        if request_ids is not self._members and request_ids != self._members:
            self._change_members(request_ids)
        self._step += 1
        due = self._due.pop(self._step, None)
        if due is None:
            return ()
        # Who left keeps an old entry here, and has a second one after coming back with the same step to go.
        stopped = dict.fromkeys(i for i in due if self._stops.get(i) == self._step)
        for request_id in stopped:
            del self._stops[request_id]
        return tuple(stopped)

    def _change_members(self, request_ids: tuple[str, ...]) -> None:
        before, after = set(self._members), set(request_ids)
        for request_id in self._members:
            if request_id not in after and request_id in self._stops:
                self._remaining[request_id] = self._stops.pop(request_id) - self._step
        for request_id in request_ids:
            left = self._remaining.pop(request_id, None) if request_id not in before else None
            if left is not None:
                self._stops[request_id] = self._step + left
                self._due.setdefault(self._step + left, []).append(request_id)
        self._members = request_ids
