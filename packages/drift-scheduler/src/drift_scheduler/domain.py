"""The values everything else speaks in: requests, work, gangs, events, outputs.

Frozen data only. This module knows nothing of queues, clocks, devices or policies; all times are float
seconds on whatever clock the executor keeps, all sizes are tokens, pages or units as their names say.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Sharing(Enum):
    """How a gang shares the device."""

    __hash__ = object.__hash__  # members are one of a kind; Enum's own takes ten times as long, in every step

    SPATIAL = "spatial"  # both lanes at once, each on its part of a partition
    TEMPORAL = "temporal"  # decode, then some prefill layers, each on the whole device
    FUSED = "fused"  # one mixed forward pass over decode tokens and a prefill chunk
    EXCLUSIVE = "exclusive"  # one phase alone on the whole device
    STREAMS = "streams"  # both lanes at once, each free to take any unit: two streams and no partition


DIVIDING = frozenset(Sharing) - {Sharing.STREAMS}
"""The sharings that decide who runs where and when. Streams leave that to the hardware; few executors offer them."""


class Lane(Enum):
    """One of the two concurrent execution paths."""

    __hash__ = object.__hash__

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(Enum):
    """Why a request ended. Every accepted request ends exactly once, with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    FAILED = "failed"


class Partition(NamedTuple):
    """Units (SMs or CPU cores) of each lane; zero for a lane means that it does not run."""

    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill}+{self.decode}"


@dataclass(frozen=True, slots=True)
class SLO:
    """Latency targets in seconds: first token, gap between tokens, and optionally the whole request."""

    ttft: float
    tbt: float
    e2e: float | None = None
    name: str = "default"


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One generation to be served.

    `priority`: lower is handled earlier (vLLM's convention). `prompt`: token ids, `None` in simulation.
    `prefix_keys`: one key per full run of `key_tokens` prompt positions, each naming its run *and everything
    before it*, so two requests share a prefix exactly as far as their leading keys agree; used by the
    counting KV, while the real KV derives its own from `prompt` and `salt`. `output_tokens`: the true output
    length where a trace knows it; executors that simulate use it, policies never see it.
    `reuse_tokens`: leading prompt tokens that later requests are likely to bring again; what lies behind them is
    evicted from the prefix cache first. `session`, `turn`: of a conversation. `think`: seconds from the previous
    turn's end to this arrival, which closes the loop in simulation; a session's first turn carries one too, unused.
    """

    id: str
    arrival: float
    prompt_tokens: int
    max_output_tokens: int
    slo: SLO
    priority: int = 0
    prompt: Sequence[int] | None = None
    salt: str = ""
    prefix_keys: Sequence[Hashable] = ()
    key_tokens: int = 16
    output_tokens: int | None = None
    session: str | None = None
    turn: int = 0
    think: float | None = None
    reuse_tokens: int | None = None


# --------------------------------------------------------------------------------------------- work


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """What a prefill costs depends on: sums over the batch of new tokens n and reused tokens r."""

    requests: int
    new_tokens: int
    reused_tokens: int
    new_squared: int
    new_times_reused: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> PrefillShape:
        """The shape of a batch of `(new, reused)` token counts."""
        requests = new = reused = squared = cross = 0
        for n, r in pairs:
            requests += 1
            new += n
            reused += r
            squared += n * n
            cross += n * r
        return cls(requests, new, reused, squared, cross)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What a decode step costs depends on: its batch and the KV positions it reads in all."""

    batch: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Positions `[start, stop)` of one request; KV of `[0, start)` is already there."""

    request_id: str
    start: int
    stop: int
    last: bool = True
    """Whether `stop` is the end of the known tokens, so that finishing it yields a token."""

    @property
    def tokens(self) -> int:
        """Positions to compute."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class PrefillBlock:
    """A token range x layer range `[layer_start, layer_stop)` of one prefill batch.

    Blocks of one batch run in layer order. A later block may list fewer chunks than an earlier one (a
    cancelled request drops out); never more. `batch_id` is -1 in a policy's proposal for a new batch; the
    scheduler numbers it.
    """

    batch_id: int
    chunks: tuple[PrefillChunk, ...]
    layer_start: int
    layer_stop: int
    _shape: PrefillShape | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def shaped(
        cls,
        batch_id: int,
        chunks: tuple[PrefillChunk, ...],
        layer_start: int,
        layer_stop: int,
        shape: PrefillShape,
    ) -> PrefillBlock:
        """A block whose chunks' `shape` is known already."""
        block = cls(batch_id, chunks, layer_start, layer_stop)
        object.__setattr__(block, "_shape", shape)
        return block

    @property
    def layers(self) -> int:
        """Layers in this block."""
        return self.layer_stop - self.layer_start

    def shape(self) -> PrefillShape:
        """Token sums of the block, for cost models; worked out once."""
        shape = self._shape
        if shape is None:
            shape = PrefillShape.of([(c.stop - c.start, c.start) for c in self.chunks])
            object.__setattr__(self, "_shape", shape)
        return shape


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token for each listed request. `context_tokens`: KV positions read in all, this step's included."""

    request_ids: tuple[str, ...]
    context_tokens: int
    _shape: DecodeShape | None = field(default=None, init=False, repr=False, compare=False)

    def shape(self) -> DecodeShape:
        """Sums of the step, for cost models; worked out once."""
        shape = self._shape
        if shape is None:
            shape = DecodeShape(len(self.request_ids), self.context_tokens)
            object.__setattr__(self, "_shape", shape)
        return shape


@dataclass(frozen=True, slots=True)
class Gang:
    """The work launched together under one sharing.

    A spatial gang's partition gives both lanes units; while one lane is busy, a further spatial gang may carry
    work for the other lane alone, under the partition in force. An exclusive gang carries one phase on
    `Device.all_prefill` or `Device.all_decode`. Temporal and fused gangs carry both phases on the whole device
    (`Device.all_decode`): both run in sequence, or in one pass, and no other gang starts until both are done.
    A streams gang carries either phase or both under `Device.unpartitioned`, beside whatever else runs so.
    """

    sharing: Sharing
    partition: Partition
    prefill: PrefillBlock | None = None
    decode: DecodeStep | None = None


@dataclass(frozen=True)
class Device:
    """What an executor offers: units in all, the menu of partitions, layers of the model, sharings it runs.

    `repartition_while_busy`: whether a partition may change under a busy lane. `name` is for people. `system`: a
    simulated cluster laid out as the system of that name, whose units may be whole accelerators; empty otherwise.
    """

    total_units: int
    menu: tuple[Partition, ...]
    num_layers: int
    sharings: frozenset[Sharing] = DIVIDING
    repartition_while_busy: bool = False
    name: str = "device"
    system: str = ""

    @cached_property
    def all_prefill(self) -> Partition:
        """The whole device for prefill."""
        return Partition(self.total_units, 0)

    @cached_property
    def all_decode(self) -> Partition:
        """The whole device for decode."""
        return Partition(0, self.total_units)

    @cached_property
    def unpartitioned(self) -> Partition:
        """Every unit for both lanes at once: what streams run on. Not on the menu, as nothing is divided."""
        return Partition(self.total_units, self.total_units)

    def splits(self) -> tuple[Partition, ...]:
        """Menu entries on which both lanes run, fewest decode units first."""
        return self._splits

    @cached_property
    def _splits(self) -> tuple[Partition, ...]:
        both = [p for p in self.menu if p.prefill and p.decode]
        return tuple(sorted(both, key=lambda p: (p.decode, -p.prefill)))


# ------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client's request reached the engine."""

    request: Request


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """The client went away, or what it had so far was enough (`FinishReason.STOP`: a stop string), or it cannot go on
    (`FinishReason.FAILED`); `message` says why."""

    request_id: str
    reason: FinishReason = FinishReason.CANCELLED
    message: str = ""


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prefill lane finished its block after `seconds` of lane time.

    `tokens`: sampled token ids, one per chunk with `last` when the block ended the model's last layer, in
    chunk order; `None` where no tokens exist (simulation). `stopped`: ids of requests whose token was a stop token.
    `details`: opaque per-request extras (logprobs), handed through to the output.
    """

    seconds: float
    tokens: Sequence[int] | None = None
    stopped: tuple[str, ...] = ()
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class DecodeDone:
    """The decode lane finished its step after `seconds` of lane time; `tokens` in the step's order."""

    seconds: float
    tokens: Sequence[int] | None = None
    stopped: tuple[str, ...] = ()
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class LaneFailed:
    """A lane's work raised; every request in it ends as FAILED with `message`.

    A temporal or fused gang that fails before either phase is done fails in both lanes: one event each.
    """

    lane: Lane
    message: str


@dataclass(frozen=True, slots=True)
class Nudged:
    """Nothing happened; somebody wants the executor's `wait` to return. Decision logs leave it out."""


Event = RequestArrived | RequestCancelled | PrefillDone | DecodeDone | LaneFailed | Nudged


# ------------------------------------------------------------------------------------------ outputs


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is queued; `queue_position` counts requests ahead of it."""

    time: float
    request_id: str
    prompt_tokens: int
    queue_position: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """One new token for each listed request.

    `gaps[i]`: seconds since that request's previous token, for a first token since its arrival.
    `first`: whether these are first tokens (all or none).
    """

    time: float
    request_ids: tuple[str, ...]
    token_ids: Sequence[int] | None
    gaps: FloatArray
    first: bool
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """How a request fared, in seconds on the executor's clock; `None` where it never got that far."""

    arrival: float
    finished: float
    scheduled: float | None = None
    first_token: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    tbt_max: float = 0.0
    late_tokens: int = 0
    """Tokens whose gap exceeded the request's TBT target."""

    @property
    def ttft(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def queue(self) -> float | None:
        """Arrival to the start of prefill."""
        return None if self.scheduled is None else self.scheduled - self.arrival

    @property
    def e2e(self) -> float:
        """Arrival to the end."""
        return self.finished - self.arrival

    @property
    def tpot(self) -> float | None:
        """Mean gap between this request's tokens; `None` with fewer than two."""
        if self.first_token is None or self.output_tokens < 2:
            return None
        return (self.finished - self.first_token) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request; nothing about it follows. `message` says why where the reason alone does not."""

    time: float
    request_id: str
    reason: FinishReason
    timing: RequestTiming
    slo: SLO
    message: str = ""


Output = Accepted | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Step:
    """What one call of `Scheduler.step` decided: work for the device, news for clients, when to be woken.

    `ended`: requests whose executor-side state can go (after the gang is submitted). `faults`: what a policy
    did wrong in this step, one line each; the built-in fallback decided instead. `ahead`: the decision was made before
    this step's events came.
    """

    gang: Gang | None = None
    outputs: tuple[Output, ...] = ()
    wake_at: float | None = None
    ended: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    observations: tuple[Observation, ...] = ()
    ahead: bool = False


# ---------------------------------------------------------------------------------------- read-only views


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that still needs prefill and is in no batch: newly arrived, preempted, or part-way in chunks.

    `computed`: leading positions whose KV is there (cached pages for one not yet admitted). `total`: positions
    to have before its next token (the prompt, and after a preemption the tokens generated so far).
    `pages`: further pages that admitting it takes at most; 0 once it holds them.
    """

    request: Request
    computed: int
    total: int
    pages: int
    deadline: float
    admitted: bool

    @property
    def uncomputed(self) -> int:
        """Positions still to compute."""
        return self.total - self.computed


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """A prefill batch under way: its next block starts at `next_layer`. At most two exist, the last is active."""

    batch_id: int
    chunks: tuple[PrefillChunk, ...]
    next_layer: int
    deadline: float
    shape: PrefillShape


@dataclass(frozen=True, slots=True)
class LaneView:
    """What a lane is doing: `None` work means idle; `expected_end` is the cost model's estimate."""

    work: PrefillBlock | DecodeStep | None = None
    started: float = 0.0
    expected_end: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether work is running on it."""
        return self.work is not None


@dataclass(frozen=True, slots=True)
class Observation:
    """Predicted against measured lane time of one finished piece of work, for models that learn online."""

    lane: Lane
    partition: Partition
    sharing: Sharing
    prefill: PrefillShape | None
    decode: DecodeShape | None
    layers: int
    overlapped: bool
    predicted: float
    measured: float

    def with_measured(self, seconds: float) -> Observation:
        """The same work, which took another time. (`dataclasses.replace` takes three times as long, twice a step.)"""
        return Observation(
            self.lane,
            self.partition,
            self.sharing,
            self.prefill,
            self.decode,
            self.layers,
            self.overlapped,
            self.predicted,
            seconds,
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as observers and decision logs see it."""

    index: int
    now: float
    events: tuple[Event, ...]
    step: Step
    step_seconds: float | None = None
