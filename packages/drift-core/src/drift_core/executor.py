"""Runs gangs on CPU cores: a prefill lane and a decode lane, threads pinned to disjoint cores of one process.

Knows nothing of policies, clients or why work was chosen. The engine's thread builds inputs and waits; lanes
compute and post what happened. Both phases share one set of weights and one KV cache.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drift_core.batches import Batch, BatchBuilder
from drift_core.kv import PagedKv, PoolPlan
from drift_core.lanes import Job, LaneThread, Pin
from drift_core.lanes_now import IDLE, LanesNow
from drift_core.model.decoder import Decoder, KvCache
from drift_core.profile import Grid, measure, warm_up
from drift_core.sampler import SamplerState, sample
from drift_core.sampling_params import SamplingParams
from drift_core.sequences import SequenceTable
from drift_scheduler.cost.table import CostTable
from drift_scheduler.domain import (
    DecodeDone,
    DecodeStep,
    Device,
    Event,
    FinishReason,
    Gang,
    Lane,
    LaneFailed,
    Partition,
    PrefillBlock,
    PrefillChunk,
    PrefillDone,
    Request,
    RequestArrived,
    RequestCancelled,
    Sharing,
)

if TYPE_CHECKING:
    from drift_core.structured import Matcher

_SEED_STRIDE = 1 << 40  # engines of different seeds give their requests different ones

Work = Callable[[], tuple[Event, ...]]

log = logging.getLogger("drift.executor")


@dataclass(slots=True, eq=False)
class _PrefillState:
    """A prefill batch between its blocks. `hidden` is the residual stream after `layer` layers."""

    chunks: tuple[PrefillChunk, ...]
    batch: Batch
    hidden: torch.Tensor | None = None
    layer: int = 0


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Tokens of one forward pass, one per request, on their way into an event."""

    ids: tuple[str, ...]
    tokens: list[int]
    stopped: list[bool]
    logprobs: list[Any] | None

    def part(self, start: int, stop: int) -> _Sampled:
        logprobs = None if self.logprobs is None else self.logprobs[start:stop]
        return _Sampled(self.ids[start:stop], self.tokens[start:stop], self.stopped[start:stop], logprobs)

    def stopped_ids(self) -> tuple[str, ...]:
        return tuple(compress(self.ids, self.stopped))

    def details(self) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {i: entry for i, entry in zip(self.ids, self.logprobs, strict=True) if entry is not None}

    def prefill_done(self, seconds: float) -> PrefillDone:
        return PrefillDone(seconds, self.tokens, self.stopped_ids(), self.details())

    def decode_done(self, seconds: float) -> DecodeDone:
        return DecodeDone(seconds, self.tokens, self.stopped_ids(), self.details())


class CpuExecutor:
    """Implements `drift_scheduler.protocols.Executor` over a decoder and its KV cache.

    `post` and `arrive` may be called from any thread, everything else from the engine's alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        kv: PagedKv,
        plan: PoolPlan,
        sequences: SequenceTable,
        device: Device,
        pin: Pin,
        seed: int = 0,
    ) -> None:
        self.kv = kv
        self.plan = plan
        self._decoder = decoder
        self._cache = cache
        self._sequences = sequences
        self._batches = BatchBuilder(decoder, sequences, kv)
        self._device = device
        self._pin = pin
        self._seed = seed
        self._arrivals = 0
        self._inbox: queue.SimpleQueue[tuple[Event, ...] | None] = queue.SimpleQueue()
        self._lanes = {lane: LaneThread(lane, pin) for lane in Lane}
        self._busy: set[Lane] = set()
        self._running: Gang | None = None
        self._sizes = dict.fromkeys(Lane, 0)
        self._prefills: dict[int, _PrefillState] = {}

    @property
    def device(self) -> Device:
        """Cores, menu and layers."""
        return self._device

    @property
    def dtype(self) -> str:
        """Of weights and KV."""
        return str(self._decoder.weights.dtype).removeprefix("torch.")

    @property
    def identity(self) -> tuple[object, ...]:
        """All that its times depend on, short of the processor."""
        return (self._decoder.config, self.dtype, self._decoder.ops.description, self._device)

    def now(self) -> float:
        """Seconds on the monotonic clock, which processes of one machine share."""
        return time.monotonic()

    # ------------------------------------------------------------------------------------- from outside

    def arrive(self, request: Request, sampling: SamplingParams, matcher: Matcher | None = None) -> None:
        """Queue a request with its prompt. Raises DriftError when its id is in use.

        `matcher`: of the form its output must have.
        """
        assert request.prompt is not None, f"request '{request.id}' has no prompt"
        model, self._arrivals = self._decoder.config, self._arrivals + 1
        fallback_seed = self._seed * _SEED_STRIDE + self._arrivals
        sampler = SamplerState(
            sampling, request.prompt, model.eos_token_ids, model.vocab_size, fallback_seed, matcher
        )
        self._sequences.add(request.id, request.prompt, sampler)
        self.post(RequestArrived(request))

    def post(self, event: Event) -> None:
        """Queue an event for the next `wait`."""
        self._inbox.put((event,))

    def shut_down(self) -> None:
        """Make `wait` return `None`."""
        self._inbox.put(None)

    # ---------------------------------------------------------------------------------- the engine's thread

    def wait(self, until: float | None) -> Sequence[Event] | None:
        """Block until events are there or the clock reaches `until`, then take all there are."""
        try:
            batch = self._inbox.get(timeout=None if until is None else max(until - self.now(), 0.0))
        except queue.Empty:
            return ()
        events: list[Event] = []
        while batch is not None:
            events += batch
            try:
                batch = self._inbox.get_nowait()
            except queue.Empty:
                self._note_idle(events)
                return events
        return None

    def submit(self, gang: Gang) -> None:
        """Start a gang: inputs are built here, lanes run them."""
        self._occupy(gang)
        prefill, decode, device = gang.prefill, gang.decode, self._device
        match gang.sharing:
            case Sharing.FUSED if prefill is not None and decode is not None:
                work = self._mixed_work(prefill, decode)
                self._start(Lane.PREFILL, device.all_prefill, work, tuple(Lane))
            case Sharing.TEMPORAL if prefill is not None and decode is not None:
                self._start(Lane.DECODE, device.all_decode, self._decode_work(decode))
                self._start(Lane.DECODE, device.all_decode, self._prefill_work(prefill), (Lane.PREFILL,))
            case _:
                if decode is not None:
                    self._start(Lane.DECODE, gang.partition, self._decode_work(decode))
                if prefill is not None:
                    self._start(Lane.PREFILL, gang.partition, self._prefill_work(prefill))

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop tokens and sampler of ended requests, and prefill batches of which nothing is left."""
        self._sequences.forget(request_ids)
        for batch_id, state in list(self._prefills.items()):
            if not any(chunk.request_id in self._sequences for chunk in state.chunks):
                del self._prefills[batch_id]

    def lanes_now(self) -> LanesNow:
        """What the lanes do, for people who watch."""
        running = self._running
        if not self._busy or running is None:
            return IDLE
        return LanesNow(
            running.partition,
            running.sharing,
            self._sizes[Lane.PREFILL] if Lane.PREFILL in self._busy else 0,
            self._sizes[Lane.DECODE] if Lane.DECODE in self._busy else 0,
        )

    def close(self) -> None:
        """Finish what runs and end the lanes."""
        for lane in self._lanes.values():
            lane.close()

    # -------------------------------------------------------------------------------- before serving

    def profile(self, grid: Grid, model: str, progress: Callable[[float], None]) -> CostTable:
        """Measure this executor's decoder on its cores and pages. Only while it serves nothing."""
        return measure(
            self._decoder, self._cache, self._device, self._pin, grid, model=model, progress=progress
        )

    def warm_up(self) -> None:
        """Run each lane once on the whole device, so that the first request finds everything in place."""
        warm_up(self._decoder, self._cache, self._device, self._lanes)

    # ------------------------------------------------------------------------------------------- lanes

    def _occupy(self, gang: Gang) -> None:
        lanes = {
            lane
            for lane, work in ((Lane.PREFILL, gang.prefill), (Lane.DECODE, gang.decode))
            if work is not None
        }
        assert lanes, "a gang without work"
        assert not lanes & self._busy, f"{gang} on a busy lane"
        assert not self._busy or (self._running is not None and gang.partition == self._running.partition), (
            f"{gang} while {self._running} is in force"
        )
        self._busy |= lanes
        self._running = gang
        if gang.prefill is not None:
            self._sizes[Lane.PREFILL] = len(gang.prefill.chunks)
        if gang.decode is not None:
            self._sizes[Lane.DECODE] = len(gang.decode.request_ids)

    def _note_idle(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case PrefillDone():
                    self._busy.discard(Lane.PREFILL)
                case DecodeDone():
                    self._busy.discard(Lane.DECODE)
                case LaneFailed(lane):
                    self._busy.discard(lane)
                case _:
                    pass

    def _start(
        self, lane: Lane, partition: Partition, work: Work, stands_for: tuple[Lane, ...] | None = None
    ) -> None:
        """Run `work` on a lane's thread and post its events; a fault fails the lanes the work stands for."""

        def run() -> None:
            self._inbox.put(work())

        def failed(error: Exception) -> None:
            log.error("the %s lane failed", lane.value, exc_info=error)
            message = f"the {lane.value} lane failed: {type(error).__name__}: {error}"
            self._inbox.put(tuple(LaneFailed(each, message) for each in stands_for or (lane,)))

        self._lanes[lane].start(Job(partition, run, failed))

    def _decode_work(self, step: DecodeStep) -> Work:
        batch = self._batches.decode(step.request_ids)

        def work() -> tuple[Event, ...]:
            started = time.perf_counter()
            hidden = self._run(self._decoder.embed(batch.token_ids), 0, self._device.num_layers, batch)
            sampled = self._sample(hidden, batch)
            self._batches.decoded(sampled.tokens)
            return (sampled.decode_done(time.perf_counter() - started),)

        return work

    def _prefill_work(self, block: PrefillBlock) -> Work:
        state = self._prefill_state(block)
        ends_model = block.layer_stop == self._device.num_layers
        if ends_model:
            del self._prefills[block.batch_id]

        def work() -> tuple[Event, ...]:
            started = time.perf_counter()
            batch, hidden = state.batch, state.hidden
            if hidden is None:
                hidden = self._decoder.embed(batch.token_ids)
            state.hidden = self._run(hidden, block.layer_start, block.layer_stop, batch)
            if not ends_model or not batch.sample_ids:
                return (PrefillDone(time.perf_counter() - started, tokens=()),)
            sampled = self._sample(state.hidden[batch.sample_rows], batch)
            return (sampled.prefill_done(time.perf_counter() - started),)

        return work

    def _mixed_work(self, block: PrefillBlock, step: DecodeStep) -> Work:
        assert block.layers == self._device.num_layers, "a fused gang runs whole chunks"
        batch = self._batches.mixed(block.chunks, step.request_ids)
        firsts = len(batch.sample_ids) - len(step.request_ids)

        def work() -> tuple[Event, ...]:
            started = time.perf_counter()
            hidden = self._run(self._decoder.embed(batch.token_ids), 0, self._device.num_layers, batch)
            sampled = self._sample(hidden[batch.sample_rows], batch)
            self._batches.decoded(sampled.tokens[firsts:])
            seconds = time.perf_counter() - started
            return (
                sampled.part(0, firsts).prefill_done(seconds),
                sampled.part(firsts, len(sampled.ids)).decode_done(seconds),
            )

        return work

    def _prefill_state(self, block: PrefillBlock) -> _PrefillState:
        """The batch between its blocks, cut to the chunks this block still lists."""
        state = self._prefills.get(block.batch_id)
        if state is None:
            assert block.layer_start == 0, f"batch {block.batch_id} starts at layer {block.layer_start}"
            state = _PrefillState(block.chunks, self._batches.prefill(block.chunks))
            self._prefills[block.batch_id] = state
        elif len(block.chunks) < len(state.chunks):
            state = self._without_dropped(state, block.chunks)
            self._prefills[block.batch_id] = state
        assert block.layer_start == state.layer, f"{block} follows layer {state.layer}"
        state.layer = block.layer_stop
        return state

    def _without_dropped(self, state: _PrefillState, chunks: tuple[PrefillChunk, ...]) -> _PrefillState:
        kept = {chunk.request_id for chunk in chunks}
        rows = np.concatenate([np.full(chunk.tokens, chunk.request_id in kept) for chunk in state.chunks])
        assert state.hidden is not None, "a batch lost requests before its first block"
        hidden = state.hidden[torch.from_numpy(rows)]
        return _PrefillState(chunks, self._batches.prefill(chunks), hidden, state.layer)

    def _run(self, hidden: torch.Tensor, start: int, stop: int, batch: Batch) -> torch.Tensor:
        return self._decoder.run_layers(hidden, start, stop, self._cache, batch.inputs)

    def _sample(self, rows: torch.Tensor, batch: Batch) -> _Sampled:
        """The next token of each row, noted with its request."""
        result = sample(self._decoder.logits(rows), [state.sampler for state in batch.states])
        for state, token in zip(batch.states, result.token_ids, strict=True):
            state.tokens.append(token)
        for row, why in result.faults:
            self.post(RequestCancelled(batch.sample_ids[row], FinishReason.FAILED, why))
        return _Sampled(batch.sample_ids, result.token_ids, result.stopped, result.logprobs)
