"""Runs gangs on one GPU: a prefill and a decode lane on streams of a partition, or both on the whole device.

The engine's thread does everything: it fills buffers, launches, and looks at events; it never waits for the
device. Decode steps and mixed passes are graphs, captured per place and bucket. A prefill block is launched a
few layers at a time between looks at the decode lane, so that a finished step is seen within one such launch.
Between `submit`s the next decode step's rows are prepared while the device runs this one, and `meanwhile` is
called, by which the scheduler decides ahead. What is *not* overlapped: taking in the tokens, and the launch.

Knows nothing of policies, clients or why work was chosen.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from drift_core.batches import PageTables as LanePages
from drift_core.cuda import estimates, measure
from drift_core.cuda.cells import chosen_on_host
from drift_core.cuda.choosing import Sampled
from drift_core.cuda.device import Accelerator, Partitions, Place, Stream
from drift_core.cuda.kernels import Kernels
from drift_core.cuda.lanes import REHEARSED_TOKENS, DecodeLane, PrefillLane
from drift_core.cuda.notes import Plain
from drift_core.cuda.order import Mark, Order
from drift_core.cuda.passes import Model
from drift_core.kv import PagedKv, PoolPlan
from drift_core.lanes_now import IDLE, LanesNow
from drift_core.model.config import ModelConfig
from drift_core.model.decoder import Decoder, KvCache
from drift_core.profile import Grid
from drift_core.sampler import SamplerState, sample
from drift_core.sampling_params import SamplingParams
from drift_core.sequences import SequenceTable
from drift_scheduler.cost.hardware import DeviceSpec
from drift_scheduler.cost.table import CostTable
from drift_scheduler.domain import (
    DecodeDone,
    Device,
    Event,
    FinishReason,
    Gang,
    Lane,
    LaneFailed,
    Partition,
    PrefillDone,
    Request,
    RequestArrived,
    RequestCancelled,
    Sharing,
)

if TYPE_CHECKING:
    from drift_core.structured import Matcher

log = logging.getLogger("drift.executor")

LAYERS_PER_LAUNCH = 2
"""Prefill layers launched between two looks at the decode lane."""

MIXED_TOKENS = 512
"""Mixed passes of up to so many tokens are captured at start-up."""

SETTLED_AT_ONCE = 16
"""Pages of finished KV published for reuse between two looks at the device, of a few microseconds each."""

SPIN_SECONDS = 20e-6
NAP_SECONDS = 50e-6

_SEED_STRIDE = 1 << 40


@dataclass(slots=True, eq=False)
class _Running:
    """Work a lane was given: launches still to make, and what its end means."""

    lane: Lane
    stands_for: tuple[Lane, ...]
    stream: Stream
    mark: Mark
    launches: deque[Callable[[], None]]
    done: Callable[[float], tuple[Event, ...]]
    launched: bool = False


@dataclass(slots=True)
class HostTimes:
    """Host seconds by what they were spent on, for `bench/host_step.py` and reports. Off unless `clock` is set."""

    clock: Callable[[], float] | None = None
    spent: dict[str, list[float]] = field(default_factory=dict)

    def start(self) -> float:
        """A reading, 0 when off."""
        return self.clock() if self.clock is not None else 0.0

    def stop(self, name: str, started: float) -> None:
        """Note the time since."""
        if self.clock is not None:
            self.spent.setdefault(name, []).append(self.clock() - started)


class CudaExecutor:
    """Implements `drift_scheduler.protocols.Executor`, and what the engine needs beyond it.

    `post`, `arrive` and `shut_down` may be called from any thread, everything else from the engine's alone. A fault of
    the device itself ends `wait` with CudaError: nothing on it can be trusted then.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        partitions: Partitions,
        decoder: Decoder,
        cache: KvCache,
        kernels: Kernels,
        kv: LanePages,
        plan: PoolPlan,
        sequences: SequenceTable,
        device: Device,
        *,
        max_running: int,
        prefill_tokens: int,
        seed: int = 0,
    ) -> None:
        """cache: one page more than `plan` has, for rows that pad a bucket. prefill_tokens: room to begin with."""
        assert cache.num_pages == plan.num_pages + 1, "the cache lacks its spare page"
        self._kv, self.plan = kv, plan
        self._decoder, self._prefill_tokens = decoder, prefill_tokens
        self.accelerator = accelerator
        self.times = HostTimes()
        self._partitions, self._device, self._sequences, self._seed = partitions, device, sequences, seed
        self._model = Model(decoder, cache, kernels, plan.max_context)
        self._dtype = str(decoder.weights.dtype).removeprefix("torch.")
        self.order = Order(accelerator)
        self._streams: dict[Place, Stream] = {}
        self._units: dict[Place, int] = {}
        # What `_decode_stream` has looked up.
        self._decode_on: dict[Partition | None, tuple[Stream, int]] = {}
        self._make_streams()
        self.decode = DecodeLane(accelerator, self._model, kv, sequences, max_running, prefill_tokens)
        self.prefill = PrefillLane(accelerator, self._model, kv, sequences, self.decode, prefill_tokens)
        self._arrivals = 0
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._running: dict[Lane, _Running] = {}
        self._gang: Gang | None = None
        self._decode_units = 0
        self._usual_units: dict[
            bool, int
        ] = {}  # of the latest decode step with a prefill beside it, and without
        self._over = False
        self._failures: list[Event] = []
        self._formed: set[str] = set()  # requests whose output has a form
        self._masks: list[Matcher] = []  # of the step under way, still to be worked out
        self._settle = kv.settle if isinstance(kv, PagedKv) else None
        self.meanwhile: Callable[[], bool] | None = None
        """Called while the device works; says whether it did anything."""
        self.planned: Callable[[], Gang | None] | None = None
        """What `meanwhile` has made likely to be submitted next, if it has."""
        self._plain: Plain | None = None  # the rows of the step under way, once they are looked through
        self._notes = self.decode.notes

    # ------------------------------------------------------------------------------------- facts

    @property
    def kv(self) -> PagedKv:
        """The pool that the scheduler manages."""
        assert isinstance(self._kv, PagedKv), "made-up pages are nobody's to manage"
        return self._kv

    @property
    def model_config(self) -> ModelConfig:
        """Of the model it runs."""
        return self._model.config

    @property
    def kernels_description(self) -> str:
        """Which kernels."""
        return self._model.kernels.description

    @property
    def device(self) -> Device:
        """Multiprocessors, menu and layers."""
        return self._device

    @property
    def dtype(self) -> str:
        """Of weights and KV."""
        return self._dtype

    @property
    def identity(self) -> tuple[object, ...]:
        """All that its times depend on."""
        return (self._model.config, self._dtype, self._model.kernels.description, self._device)

    def now(self) -> float:
        """Seconds on the device's clock, which is the host's monotonic one."""
        return self.accelerator.now()

    def place(self, lane: Lane, partition: Partition | None) -> Place:
        """Where a lane runs under a partition; the whole device when the other lane has none of it."""
        if partition is not None and Place(lane, partition) in self._streams:
            return Place(lane, partition)
        return Place(lane, None)

    def stream(self, place: Place) -> tuple[Stream, int]:
        """A place's stream and its multiprocessors."""
        return self._streams[place], self._units[place]

    def _decode_stream(self, partition: Partition | None) -> tuple[Stream, int]:
        """Where decode steps run under a partition: asked for every step, and hashing places takes its time."""
        found = self._decode_on.get(partition)
        if found is None:
            found = self._decode_on[partition] = self.stream(self.place(Lane.DECODE, partition))
        return found

    def _make_streams(self) -> None:
        for split in self._device.splits():
            handles = self._partitions.streams(split)
            realised = self._partitions.realised(split)
            for lane, handle, units in zip((Lane.PREFILL, Lane.DECODE), handles, realised, strict=True):
                place = Place(lane, split)
                self._streams[place], self._units[place] = self.accelerator.stream(place, handle), units
        whole = self._partitions.streams(self._device.unpartitioned)
        for lane, handle in zip((Lane.PREFILL, Lane.DECODE), whole, strict=True):
            place = Place(lane, None)
            self._streams[place] = self.accelerator.stream(place, handle)
            self._units[place] = self._device.total_units

    # ------------------------------------------------------------------------------------- from outside

    def arrive(self, request: Request, sampling: SamplingParams, matcher: Matcher | None = None) -> None:
        """Queue a request with its prompt. Raises DriftError when its id is in use.

        `matcher`: of the form its output must have.
        """
        assert request.prompt is not None, f"request '{request.id}' has no prompt"
        model, self._arrivals = self._model.config, self._arrivals + 1
        seed = sampling.seed if sampling.seed is not None else self._seed * _SEED_STRIDE + self._arrivals
        state = SamplerState(sampling, request.prompt, model.eos_token_ids, model.vocab_size, seed, matcher)
        self._sequences.add(request.id, request.prompt, state)
        self.decode.cells.admit(request.id, state, seed)
        if matcher is not None:
            self._formed.add(request.id)
        self.post(RequestArrived(request))

    def post(self, event: Event) -> None:
        """Queue an event for the next `wait`."""
        self._inbox.put(event)

    def shut_down(self) -> None:
        """Make `wait` return `None`."""
        self._inbox.put(None)

    # ---------------------------------------------------------------------------------- the engine's thread

    def submit(self, gang: Gang) -> None:
        """Start a gang: decode first, then as much prefill as one launch takes; the rest follows in `wait`."""
        started = self.times.start()
        self._check(gang)
        self._gang = gang
        prefill, decode = gang.prefill, gang.decode
        if gang.sharing is Sharing.FUSED and prefill is not None and decode is not None:
            self._attempt(lambda: self._start_mixed(gang), (Lane.PREFILL, Lane.DECODE))
        else:
            if decode is not None:
                self._attempt(lambda: self._start_decode(gang), (Lane.DECODE,))
                self.times.stop("launch decode", started)
            self._notes.settle()
            if prefill is not None:
                self._attempt(lambda: self._start_prefill(gang), (Lane.PREFILL,))
                self._launch_on()
        self.times.stop("submit", started)

    def wait(self, until: float | None) -> Sequence[Event] | None:
        """Look at events until there are some or the clock reaches `until`; `None` says shut down."""
        idle_since: float | None = None
        self._notes.settle()
        while True:
            events = self._news()
            if self._over:
                self._over = False
                return None
            if events:
                return events
            if until is not None and self.now() >= until:
                return ()
            masked, launched = self._mask_on(), self._launch_on()
            if masked or launched:
                idle_since = None
            elif self._running:
                self._prepare_next()
                now = self.now()
                idle_since = now if idle_since is None else idle_since
                self.accelerator.pause(0.0 if now - idle_since < SPIN_SECONDS else NAP_SECONDS)
            else:
                self._block(until)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop what is kept of ended requests."""
        self._sequences.forget(request_ids)
        if self._formed:
            self._formed.difference_update(request_ids)
        self.decode.forget(request_ids)
        self.prefill.forget(self._sequences)

    def lanes_now(self) -> LanesNow:
        """What the lanes do, for people who watch."""
        gang = self._gang
        if not self._running or gang is None:
            return IDLE
        busy = {lane for running in self._running.values() for lane in running.stands_for}
        return LanesNow(
            gang.partition,
            gang.sharing,
            self.prefill.requests if Lane.PREFILL in busy else 0,
            len(self.decode.rows) if Lane.DECODE in busy else 0,
        )

    def close(self) -> None:
        """Let what runs end, then give the partitions back."""
        with self.accelerator.rare("the end"):
            self.accelerator.synchronize()
        self._running.clear()
        self._partitions.close()

    # ------------------------------------------------------------------------------------- events

    def _news(self) -> list[Event]:
        events: list[Event] = []
        for running in tuple(self._running.values()):
            if running.launched and self.order.reached(running.mark):
                started = self.times.start()
                del self._running[running.lane]
                done = running.done(self.order.seconds(running.mark))
                events += self._failures  # before the tokens, which mean nothing then
                self._failures.clear()
                events += done
                self.times.stop("take tokens", started)
        while not self._inbox.empty():
            event = self._inbox.get_nowait()
            if event is None:
                self._over = True
                break
            events.append(event)
        return events

    def _block(self, until: float | None) -> None:
        """Nothing runs: sleep until somebody posts something."""
        try:
            event = self._inbox.get(timeout=None if until is None else max(until - self.now(), 0.0))
        except queue.Empty:
            assert until is not None
            self.accelerator.pause(max(until - self.now(), 0.0))
            return
        if event is None:
            self._over = True
        else:
            self._inbox.put(event)

    def _prepare_next(self) -> None:
        """The likeliest next step is this one's requests again, and those that have been prefilled meanwhile.

        Decided ahead before it is prepared, as what is decided says on how many multiprocessors and with which pages.
        """
        running = self._running.get(Lane.DECODE)
        decoding = running is not None and running.launched and self._decode_units
        started = self.times.start()
        if decoding and (self._plain is None or self._plain.states is not self.decode.states):
            self._plain = Plain.of(self.decode.states)
            self.times.stop("prepare", started)
        elif self.meanwhile is not None and self.meanwhile():
            self.times.stop("decide ahead", started)
        elif decoding and self.decode.prepare(self._likely_units()):
            self.times.stop("prepare", started)
        elif self._masks:
            self._masks.pop().allowed()
            self.times.stop("masks", started)
        elif self._settle is not None and self._settle(SETTLED_AT_ONCE):
            self.times.stop("settle", started)

    def _likely_units(self) -> int:
        """Multiprocessors that the next decode step will most likely run on."""
        gang = self.planned() if self.planned is not None else None
        if gang is not None and gang.decode is not None:
            partition = None if gang.sharing is Sharing.FUSED else gang.partition
            return self._decode_stream(partition)[1]
        return self._usual_units.get(Lane.PREFILL in self._running, self._decode_units)

    # ------------------------------------------------------------------------------------- launching

    def _check(self, gang: Gang) -> None:
        assert gang.prefill is not None or gang.decode is not None, "a gang without work"
        if not self._running:
            return
        lanes = {
            lane
            for lane, work in ((Lane.PREFILL, gang.prefill), (Lane.DECODE, gang.decode))
            if work is not None
        }
        busy = {lane for running in self._running.values() for lane in running.stands_for}
        assert not lanes & busy, f"{gang} on a busy lane"
        assert self._gang is not None, "work that no gang began"
        assert gang.partition == self._gang.partition, f"{gang} while {self._gang} is in force"

    def _attempt(self, start: Callable[[], None], lanes: tuple[Lane, ...]) -> None:
        """Launch; whatever it raises fails the lanes, and what was launched already runs before what comes next."""
        try:
            start()
        except Exception as error:
            log.error("the %s lane failed", lanes[-1].value, exc_info=error)
            message = f"the {lanes[-1].value} lane failed: {type(error).__name__}: {error}"
            self.decode.rows.reset()
            for lane in lanes:
                running = self._running.pop(lane, None)
                if running is not None:
                    self.order.end(running.mark)
                    self.order.finished(running.mark)
                self.post(LaneFailed(lane, message))

    def _run(
        self,
        lane: Lane,
        stream: Stream,
        launches: Sequence[Callable[[], None]],
        done: Callable[[float], tuple[Event, ...]],
        stands_for: tuple[Lane, ...] = (),
    ) -> _Running:
        mark = self.order.begin(lane, stream)
        running = _Running(lane, stands_for or (lane,), stream, mark, deque(launches), done)
        self._running[lane] = running
        return running

    def _launch_on(self) -> bool:
        """One more launch of a prefill; whether there was one."""
        running = self._running.get(Lane.PREFILL)
        if running is None or running.launched:
            return False
        started = self.times.start()
        self._attempt(lambda: self._launch_next(running), running.stands_for)
        self.times.stop("launch prefill", started)
        return True

    def _mask_on(self) -> bool:
        """One more mask of a decode step whose forms allow what nobody has worked out yet; whether there was one."""
        running = self._running.get(Lane.DECODE)
        if running is None or running.launched:
            return False
        started = self.times.start()
        self._attempt(lambda: self._mask_next(running), running.stands_for)
        self.times.stop("masks", started)
        return True

    def _mask_next(self, running: _Running) -> None:
        masks = self.decode.masks
        if not masks.complete:
            masks.fill_next()
        if masks.complete:
            self._launch_next(running)

    def _launch_next(self, running: _Running) -> None:
        if running.launches:
            running.launches.popleft()()
        if not running.launches:
            self.order.end(running.mark)
            running.launched = True

    def _start_decode(self, gang: Gang) -> None:
        step = gang.decode
        assert step is not None
        stream, units = self._decode_stream(gang.partition)
        lane = self.decode
        launches = lane.step(step.request_ids, stream, units, self.order)

        def done(seconds: float) -> tuple[Event, ...]:
            return (self._decode_event(self._tokens(lane.sampled()), seconds),)

        running = self._run(Lane.DECODE, stream, launches, done)
        self._launch_next(running)
        lane.rows.done()
        self._decode_units = units
        self._usual_units[gang.prefill is not None or Lane.PREFILL in self._running] = units
        self._note_masks()

    def _start_mixed(self, gang: Gang) -> None:
        block, step = gang.prefill, gang.decode
        assert block is not None
        assert step is not None
        assert block.layers == self._device.num_layers, "a fused gang runs whole chunks"
        stream, units = self.stream(Place(Lane.DECODE, None))
        lane = self.decode
        self._notes.settle()
        launches = lane.mixed(block.chunks, step.request_ids, stream, units, self.order)
        decodes = len(step.request_ids)

        def done(seconds: float) -> tuple[Event, ...]:
            found = self._tokens(lane.sampled())
            return (
                self._prefill_event(found.part(decodes, len(found.ids)), seconds),
                self._decode_event(found.part(0, decodes), seconds),
            )

        running = self._run(Lane.DECODE, stream, launches, done, (Lane.PREFILL, Lane.DECODE))
        self._launch_next(running)
        lane.rows.done()
        self._decode_units = 0
        self._note_masks()

    def _note_masks(self) -> None:
        """What forms allow whose tokens are chosen on the host is worked out while the device runs all the same."""
        if self._formed:
            samplers = [state.sampler for state in self.decode.states]
            matchers = (sampler.matcher for sampler in samplers if chosen_on_host(sampler))
            self._masks = [matcher for matcher in matchers if matcher is not None]

    def _start_prefill(self, gang: Gang) -> None:
        block = gang.prefill
        assert block is not None
        in_turn = gang.sharing is Sharing.TEMPORAL
        place = Place(Lane.DECODE, None) if in_turn else self.place(Lane.PREFILL, gang.partition)
        stream, units = self.stream(place)
        lane = self.prefill
        self.decode.rows.forget_rows([chunk.request_id for chunk in block.chunks])
        launches = lane.block(block, stream, units, LAYERS_PER_LAUNCH)
        ends = block.layer_stop == self._device.num_layers and any(chunk.last for chunk in block.chunks)

        def done(seconds: float) -> tuple[Event, ...]:
            if not ends:
                return (PrefillDone(seconds, tokens=()),)
            found = self._tokens(lane.sampled())
            self.decode.expect(
                [i for i, stopped in zip(found.ids, found.stopped, strict=True) if not stopped]
            )
            return (self._prefill_event(found, seconds),)

        self._run(Lane.PREFILL, stream, launches, done)

    # ------------------------------------------------------------------------------------- tokens

    def _tokens(self, chosen: Sampled) -> _Found:
        """The tokens of a pass, those of some rows chosen here, each noted with its request."""
        tokens = chosen.tokens
        details: list[Any] | None = None
        stopped = [False] * len(tokens)
        host = chosen.host_rows
        if host:
            states = [chosen.states[row].sampler for row in host]
            assert chosen.logits is not None
            result = sample(chosen.logits[np.array(host)], states)
            if result.logprobs is not None:
                details = [None] * len(tokens)
            for index, why in result.faults:
                self._fail(chosen.ids[host[index]], why)
            for index, row in enumerate(host):
                tokens[row], stopped[row] = result.token_ids[index], result.stopped[index]
                if details is not None and result.logprobs is not None:
                    details[row] = result.logprobs[index]
        self._note(chosen, stopped)
        return _Found(chosen.ids, tokens, stopped, details)

    def _note(self, chosen: Sampled, stopped: list[bool]) -> None:
        """Each token with its request, at once or soon; `sample` has recorded those chosen on the host."""
        plain = self._plain
        if plain is not None and plain.usable and plain.states is chosen.states:
            plain.stop(chosen.tokens, stopped)
            self._notes.put_off(plain, chosen.tokens)
            return
        by_host = set(chosen.host_rows)
        for row, (state, token) in enumerate(zip(chosen.states, chosen.tokens, strict=True)):
            state.tokens.append(token)
            sampler = state.sampler
            if row in by_host:
                continue
            if not sampler.plain:
                stopped[row] = sampler.record(token)
                if sampler.matcher is not None and sampler.matcher.fault is not None:
                    self._fail(chosen.ids[row], sampler.matcher.fault)
                continue
            sampler.generated += 1  # what `record` does for a plain request, without the call
            if token in sampler.stop_ids:
                stopped[row] = True

    def _fail(self, request_id: str, why: str) -> None:
        self._failures.append(RequestCancelled(request_id, FinishReason.FAILED, why))

    def _prefill_event(self, found: _Found, seconds: float) -> PrefillDone:
        return PrefillDone(seconds, found.tokens, found.stopped_ids(), found.named_details())

    def _decode_event(self, found: _Found, seconds: float) -> DecodeDone:
        return DecodeDone(seconds, found.tokens, found.stopped_ids(), found.named_details())

    # ------------------------------------------------------------------------------- before serving

    def twin(self, kv: LanePages, sequences: SequenceTable) -> CudaExecutor:
        """Another executor over the same weights, cache and partitions, for measurements; not to be closed."""
        made = CudaExecutor(
            self.accelerator, self._partitions, self._decoder, self._model.cache, self._model.kernels, kv,
            self.plan, sequences, self._device, max_running=self.decode.max_running,
            prefill_tokens=self._prefill_tokens, seed=self._seed,
        )  # fmt: skip
        made._streams, made._units = self._streams, self._units
        return made

    def described(self) -> DeviceSpec:
        """What the device is expected to do, where nothing was measured."""
        return estimates.described(self.accelerator)

    def plan_grid(self, *, max_running: int, full: bool) -> Grid:
        """What to measure of this device."""
        return measure.plan_grid(
            self._device, max_context=self.plan.max_context, max_running=max_running, full=full
        )

    def profile(
        self, grid: Grid, model: str, progress: Callable[[float], None], journal: Path | None = None
    ) -> CostTable:
        """Measure a cost table. Only while nothing is served."""
        return measure.measure(self, grid, model=model, progress=progress, journal=journal)

    def warm_up(
        self, progress: Callable[[float], None] = lambda fraction: None, mixed_tokens: int = MIXED_TOKENS
    ) -> None:
        """Compile kernels and capture the common graphs; from then on nothing is allocated.

        `mixed_tokens`: mixed passes of up to so many are captured now, others when they first come.
        """
        places = [place for place in self._streams if place.lane is Lane.DECODE]
        wanted = [(place, extent) for place in places for extent in self.decode.common_extents()]
        whole = Place(Lane.DECODE, None)
        wanted += [(whole, extent) for extent in self.decode.mixed_extents(mixed_tokens)]
        for index, (place, extent) in enumerate(wanted):
            stream, units = self.stream(place)
            self.decode.graph(stream, extent, units)
            self.accelerator.synchronize()  # the next capture writes the same host blocks
            progress((index + 1) / (len(wanted) + 1))
        for place in [place for place in self._streams if place.lane is Lane.PREFILL]:
            stream, units = self.stream(place)
            for tokens in REHEARSED_TOKENS:
                self.prefill.rehearse(stream, units, min(tokens, self._prefill_tokens))
                self.accelerator.synchronize()
        self.decode.rehearse(*self.stream(whole))
        self.accelerator.synchronize()
        log.info("%d graphs captured in %.1f s", len(self.decode.graphs), self.decode.graphs.capture_seconds)
        self.accelerator.begin_service()
        progress(1.0)


@dataclass(frozen=True, slots=True)
class _Found:
    """Tokens of one pass on their way into an event."""

    ids: tuple[str, ...]
    tokens: list[int]
    stopped: list[bool]
    details: list[Any] | None

    def part(self, start: int, stop: int) -> _Found:
        details = None if self.details is None else self.details[start:stop]
        return _Found(self.ids[start:stop], self.tokens[start:stop], self.stopped[start:stop], details)

    def stopped_ids(self) -> tuple[str, ...]:
        return tuple(compress(self.ids, self.stopped))

    def named_details(self) -> dict[str, Any] | None:
        if self.details is None:
            return None
        return {i: entry for i, entry in zip(self.ids, self.details, strict=True) if entry is not None}
