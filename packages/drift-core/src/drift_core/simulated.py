"""An engine without a model: the simulator's cost model run in real time behind the engine's real process and link.

`drift serve --device simulated --simulate h200/llama-3.1-8b` takes as long as that device is estimated to take with
that model; `--simulate step_ms=10` takes ten milliseconds per decode step. The scheduler, the policies, the KV
pages, their reuse and the tokenizer are the real ones; tokens are drawn by `token_ids` and mean nothing, though an
output in a form has it. Loads no torch. Knows nothing of sockets.
"""

from __future__ import annotations

import math
import queue
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from drift_core.frames import TokenLogprob
from drift_core.kv import PagedKv, PoolPlan, plan_pool
from drift_core.lanes_now import IDLE, LanesNow
from drift_core.sampling_params import SamplingParams
from drift_core.simulated_forms import FormedTokens
from drift_scheduler.cost.contention import Contended
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.hardware import device_spec, kv_tokens, model_spec, simulated_device
from drift_scheduler.cost.launch import Launched, innermost
from drift_scheduler.cost.roofline import RooflineCost
from drift_scheduler.cost.table import table_name
from drift_scheduler.domain import (
    DecodeDone,
    DecodeShape,
    Device,
    Event,
    FinishReason,
    Gang,
    Observation,
    Partition,
    PrefillBlock,
    PrefillDone,
    PrefillShape,
    Request,
    RequestArrived,
    RequestCancelled,
    Sharing,
)
from drift_scheduler.errors import DriftError, OptionError
from drift_scheduler.protocols import CostModel
from drift_scheduler.simulation.executor import Overheads, SimulatedExecutor

if TYPE_CHECKING:
    from drift_core.engine import Setup
    from drift_core.profile import Grid
    from drift_core.structured import Matcher
    from drift_scheduler.cost.table import CostTable

DEFAULT: Final = "h200/llama-3.1-8b"

FIXED_UNITS: Final = 8
FIXED_LAYERS: Final = 8
FIXED_CONTEXT: Final = 32768
FIXED_BYTES_PER_TOKEN: Final = 1024
FIXED_POOL_TOKENS: Final = 1 << 20

_MULTIPLIER: Final = 6364136223846793005  # Knuth's MMIX
_INCREMENT: Final = 1442695040888963407
_MASK: Final = (1 << 64) - 1

_NUMBERS: Final = range(1 << 31)
"""Drawing from these gives the numbers themselves."""

_BLOCK: Final = 64
"""Tokens drawn at once: one of a block costs a tenth of one alone."""

SETTLED_AT_ONCE: Final = 32
"""Pages published for reuse between two looks at the clock."""


# ----------------------------------------------------------------------------------------------- tokens


def token_ids(prompt: Sequence[int], seed: int | None, choices: Sequence[int]) -> Iterator[int]:
    """The tokens that a simulated engine generates after `prompt`, without end: drawn from `choices`, the same again
    for the same prompt and seed, whatever runs beside. A client can check with it what it received.
    """
    content = array("q", prompt).tobytes() + (seed or 0).to_bytes(16, "little", signed=True)
    state = int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
    return chain.from_iterable(_blocks(state, choices))


def _blocks(state: int, choices: Sequence[int]) -> Iterator[list[int]]:
    """Blocks of draws, x' = ax + c modulo 2^64, whose k-th is a^k x + c (a^k - 1) / (a - 1)."""
    factors, summands = _jumps()
    while True:
        states = factors * np.uint64(state) + summands
        yield [choices[draw] for draw in ((states >> np.uint64(33)) % np.uint64(len(choices))).tolist()]
        state = int(states[-1])


@cache
def _jumps() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Of 1 to `_BLOCK` draws: what the state is multiplied by, and what is added."""
    factor, summand = 1, 0
    jumps = []
    for _ in range(_BLOCK):
        factor, summand = factor * _MULTIPLIER & _MASK, (summand * _MULTIPLIER + _INCREMENT) & _MASK
        jumps.append((factor, summand))
    factors, summands = np.array(jumps, np.uint64).T
    return factors, summands


def token_choices(vocab_size: int, eos_token_ids: Sequence[int]) -> list[int]:
    """What `token_ids` draws from: all but the tokens that end a text, so that outputs have the length asked for."""
    ends = set(eos_token_ids)
    return [token for token in range(vocab_size) if token not in ends]


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request: `tokens` holds the prompt and everything generated so far."""

    tokens: array[int]
    source: Iterator[int]
    stops: frozenset[int]
    earliest_stop: int  # tokens, prompt included, before which no stop token ends it
    logprobs: int | None  # how many of the likeliest tokens are told of, if any are
    formed: FormedTokens | None  # the source, where the output has a form
    special: bool  # whether there is more to look at than the tokens

    def stopped_by(self, token: int) -> bool:
        """Whether its latest token ends the output."""
        if self.formed is not None and self.formed.ended:
            return True
        return token in self.stops and len(self.tokens) > self.earliest_stop


@dataclass(frozen=True, slots=True)
class _Members:
    """Requests that get a token together. `special`: those with more to look at than the token, and their places."""

    ids: tuple[str, ...]
    sources: list[Iterator[int]]
    appends: list[Callable[[int], None]]
    special: list[tuple[int, _Sequence]]


_Drawn = tuple[list[int], tuple[str, ...], dict[str, TokenLogprob] | None]
_NOBODY: Final = _Members((), [], [], [])


class SimulatedTokens:
    """The tokens of every request the executor knows, by id."""

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = choices
        self._logprob = -math.log(len(choices))
        self._sequences: dict[str, _Sequence] = {}

    def __getitem__(self, request_id: str) -> _Sequence:
        return self._sequences[request_id]

    def __len__(self) -> int:
        return len(self._sequences)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        matcher: Matcher | None = None,
    ) -> None:
        """Remember a request; `matcher` where its output has a form. Raises DriftError when the id is in use."""
        if request_id in self._sequences:
            raise DriftError(f"request id '{request_id}' is in use")
        formed = None if matcher is None else _formed(prompt, sampling, matcher)
        stops, logprobs = frozenset(sampling.stop_token_ids or ()), sampling.logprobs
        self._sequences[request_id] = _Sequence(
            array("q", prompt),
            token_ids(prompt, sampling.seed, self._choices) if formed is None else formed,
            stops,
            len(prompt) + sampling.min_tokens,
            logprobs,
            formed,
            bool(stops) or logprobs is not None or formed is not None,
        )

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids are no fault."""
        for request_id in request_ids:
            self._sequences.pop(request_id, None)

    def tokens_of(self, request_id: str) -> Sequence[int]:
        """The known tokens of a request, for the KV pool's page hashes."""
        return self._sequences[request_id].tokens

    def members(self, ids: tuple[str, ...]) -> _Members:
        """What work is done on; a request may be forgotten while it runs."""
        sequences = [self._sequences[request_id] for request_id in ids]
        return _Members(
            ids,
            [sequence.source for sequence in sequences],
            [sequence.tokens.append for sequence in sequences],
            [(place, sequence) for place, sequence in enumerate(sequences) if sequence.special],
        )

    def draw(self, members: _Members) -> _Drawn:
        """One token each; the ids of those it ends; log probabilities for those that asked."""
        tokens = list(map(next, members.sources))
        for append, token in zip(members.appends, tokens, strict=True):
            append(token)
        if not members.special:
            return tokens, (), None
        ids, special = members.ids, members.special
        stopped = tuple(ids[place] for place, sequence in special if sequence.stopped_by(tokens[place]))
        details = {
            ids[place]: self._details(tokens[place], sequence.logprobs)
            for place, sequence in special
            if sequence.logprobs is not None
        }
        return tokens, stopped, details or None

    def _details(self, token: int, count: int) -> TokenLogprob:
        """All tokens are as likely: the one drawn, and any others."""
        others = (other for other in self._choices if other != token)
        likeliest = islice(chain((token,), others), count)
        return TokenLogprob(self._logprob, [(each, self._logprob) for each in likeliest])

    def faults(self, members: _Members) -> list[tuple[str, str]]:
        """Requests whose outputs cannot be kept in their forms any longer, and why."""
        return [
            (members.ids[place], sequence.formed.matcher.fault)
            for place, sequence in members.special
            if sequence.formed is not None and sequence.formed.matcher.fault is not None
        ]


def _formed(prompt: Sequence[int], sampling: SamplingParams, matcher: Matcher) -> FormedTokens:
    """The tokens of an output in a form: as `token_ids`, the same for the same prompt, seed and form."""
    assert sampling.structured is not None
    numbers = token_ids(prompt, sampling.seed, _NUMBERS)
    return FormedTokens(matcher, sampling.structured.kind, numbers, sampling.min_tokens, sampling.max_tokens)


# --------------------------------------------------------------------------------------------- executor


class RealTimeExecutor:
    """Implements `drift_core.engine.ModelExecutor`: a `SimulatedExecutor` held to the monotonic clock.

    `post`, `arrive` and `shut_down` may be called from any thread, everything else from the engine's alone. A step
    is launched when the engine launches it, so that what the host takes between steps comes on top, as on a device; and
    as there, tokens are made while the step runs, pages are published and decisions made ahead.
    """

    dtype = "none"

    def __init__(
        self, subject: Subject, kv: PagedKv, plan: PoolPlan, tokens: SimulatedTokens, seed: int = 0
    ) -> None:
        self.kv = kv
        self.plan = plan
        self.costs = subject.costs
        self._tokens = tokens
        self._inner = SimulatedExecutor(
            subject.device, subject.truth, (), overheads=subject.overheads, seed=seed
        )
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._prefill = self._decode = _NOBODY
        self._drawn: _Drawn | None = None
        """The tokens of the decode step under way, once they are drawn."""
        self.meanwhile: Callable[[], bool] | None = None
        self._running: Gang | None = None
        self._sizes = {"prefill": 0, "decode": 0}

    @property
    def device(self) -> Device:
        """What it offers."""
        return self._inner.device

    @property
    def identity(self) -> tuple[object, ...]:
        """Nothing is measured, so nothing is kept."""
        return (self.device,)

    def now(self) -> float:
        """Seconds on the monotonic clock, which processes of one machine share."""
        return time.monotonic()

    def arrive(self, request: Request, sampling: SamplingParams, matcher: Matcher | None = None) -> None:
        """Queue a request with its prompt. Raises DriftError when its id is in use."""
        assert request.prompt is not None, f"request '{request.id}' has no prompt"
        self._tokens.add(request.id, request.prompt, sampling, matcher)
        self.post(RequestArrived(request))

    def post(self, event: Event) -> None:
        """Queue an event for the next `wait`."""
        self._inbox.put(event)

    def shut_down(self) -> None:
        """Make `wait` return `None`."""
        self._inbox.put(None)

    def wait(self, until: float | None) -> Sequence[Event] | None:
        """Block until the device has news, somebody posts some, or the clock reaches `until`."""
        due = self._inner.due
        if due is None or (until is not None and until < due):
            due = until
        elif self._inbox.empty():
            self._use_time(due)
        arrived: list[Event] = []
        try:
            event = self._inbox.get(timeout=None if due is None else max(due - self.now(), 0.0))
            while event is not None:
                arrived.append(event)
                event = self._inbox.get_nowait()
            return None
        except queue.Empty:
            return [self._with_tokens(event) for event in self._inner.elapse(self.now())] + arrived

    def _use_time(self, due: float) -> None:
        """What a real device does itself, or the host while that works."""
        if self._drawn is None and self._sizes["decode"]:
            self._drawn = self._draw(self._decode)
        if self.meanwhile is not None:
            self.meanwhile()
        while self._inbox.empty() and self.now() < due and self.kv.settle(SETTLED_AT_ONCE):
            pass

    def submit(self, gang: Gang) -> None:
        """Start a gang on the simulated device."""
        late = self._inner.elapse(self.now())
        self._inner.submit(gang)
        for event in late:  # it ended while the scheduler thought
            self._inbox.put(self._with_tokens(event))
        self._running = gang
        if gang.prefill is not None:
            self._prefill = self._tokens.members(self._sampled(gang.prefill))
            self._sizes["prefill"] = len(gang.prefill.chunks)
        if gang.decode is not None:
            if gang.decode.request_ids is not self._decode.ids:
                self._decode = self._tokens.members(gang.decode.request_ids)
            self._sizes["decode"] = len(gang.decode.request_ids)

    def forget(self, request_ids: Sequence[str]) -> None:
        """These requests ended."""
        self._tokens.forget(request_ids)
        self._inner.forget(request_ids)

    def lanes_now(self) -> LanesNow:
        """What the lanes do, for people who watch."""
        running, sizes = self._running, self._sizes
        if running is None or not (sizes["prefill"] or sizes["decode"]):
            return IDLE
        return LanesNow(running.partition, running.sharing, sizes["prefill"], sizes["decode"])

    def profile(self, grid: Grid, model: str, progress: Callable[[float], None]) -> CostTable:
        """Raises DriftError: there is nothing to measure."""
        raise DriftError("a simulated device has nothing to measure; its times are those of --simulate")

    def warm_up(self) -> None:
        """Nothing is cold."""

    def close(self) -> None:
        """Nothing to end."""

    def _sampled(self, block: PrefillBlock) -> tuple[str, ...]:
        """Requests that get a token when the block is done."""
        if block.layer_stop < self.device.num_layers:
            return ()
        return tuple(chunk.request_id for chunk in block.chunks if chunk.last)

    def _draw(self, members: _Members) -> _Drawn:
        drawn = self._tokens.draw(members)
        if members.special:
            for request_id, why in self._tokens.faults(members):
                self.post(RequestCancelled(request_id, FinishReason.FAILED, why))
        return drawn

    def _with_tokens(self, event: Event) -> Event:
        match event:
            case PrefillDone(seconds):
                self._sizes["prefill"] = 0
                tokens, stopped, details = self._draw(self._prefill)
                return PrefillDone(seconds, tokens, stopped, details)
            case DecodeDone(seconds):
                self._sizes["decode"] = 0
                drawn, self._drawn = self._drawn or self._draw(self._decode), None
                tokens, stopped, details = drawn
                return DecodeDone(seconds, tokens, stopped, details)
            case _:
                return event


# --------------------------------------------------------------------------------------- what is simulated


@dataclass(frozen=True, slots=True)
class Subject:
    """What is simulated: a device, what it does (`truth`), what the scheduler believes, and the room for KV."""

    device: Device
    truth: CostModel
    costs: CostModel
    overheads: Overheads
    max_context: int
    kv_tokens: int
    bytes_per_token: int


def parse_subject(text: str) -> Subject:
    """From "DEVICE/MODEL" or "step_ms=10[:token_us=10]". Raises DriftError naming what is wrong."""
    if "=" in text:
        return _fixed(text)
    device, slash, model = text.rpartition("/")
    if not slash or not device or not model:
        raise OptionError(
            f"simulate is '{text}'; give DEVICE/MODEL as {DEFAULT}, or a fixed step as step_ms=10"
        )
    return _described(device, model)


class FixedCost:
    """A decode step of a fixed time, whatever is in it and beside it; a prefill takes a step and so much per token, in
    proportion longer on fewer units than all."""

    def __init__(self, step_seconds: float, token_seconds: float, units: int) -> None:
        self._step = step_seconds
        self._token = token_seconds
        self._units = units

    def prefill(self, work: PrefillShape, units: int) -> float:
        """A step and the tokens."""
        return (self._step + self._token * work.new_tokens) * self._units / units

    def decode(self, work: DecodeShape, units: int) -> float:
        """A step."""
        return self._step

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """A step and the prefill's tokens."""
        return self._step + self._token * prefill.new_tokens

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """None."""
        return 1.0, 1.0

    def observe(self, observation: Observation) -> None:
        """Nothing to learn."""


def _fixed(text: str) -> Subject:
    options = {"step_ms": 10.0, "token_us": 10.0}
    for part in text.split(":"):
        name, equals, value = part.partition("=")
        if not equals or name not in options:
            raise OptionError(
                f"simulate takes {' and '.join(options)}, as step_ms=10:token_us=10, not '{part}'"
            )
        try:
            options[name] = float(value)
        except ValueError:
            raise OptionError(f"simulate: {name} is '{value}', need a number") from None
    step, token = options["step_ms"], options["token_us"]
    if not 0.1 <= step <= 60_000:
        raise OptionError(f"simulate: step_ms is {step:g}, need 0.1 to 60000")
    if not 0 <= token <= 1e6:
        raise OptionError(f"simulate: token_us is {token:g}, need 0 to 1000000")
    units = FIXED_UNITS
    splits = tuple(Partition(units - decode, decode) for decode in range(2, units, 2))
    menu = (Partition(units, 0), *splits, Partition(0, units))
    device = Device(units, menu, FIXED_LAYERS, frozenset(Sharing), name=f"simulated: steps of {step:g} ms")
    costs = FixedCost(step / 1e3, token / 1e6, units)
    return Subject(device, costs, costs, Overheads(), FIXED_CONTEXT, FIXED_POOL_TOKENS, FIXED_BYTES_PER_TOKEN)


def _described(device_name: str, model_name: str) -> Subject:
    """As `drift simulate --device DEVICE --model MODEL`: a fitted table where one is installed, else the roofline."""
    spec, model = device_spec(device_name), model_spec(model_name)
    costs, truth = (_costs(device_name, model_name) for _ in range(2))
    inner = innermost(costs)
    table_menu = inner.table.partitions() if isinstance(inner, FittedCost) else ()
    overheads = Overheads(
        block_seconds=spec.block_us * 1e-6,
        switch_seconds=spec.switch_us * 1e-6,
        launch_layer_seconds=spec.launch_seconds,
    )
    return Subject(
        simulated_device(spec, model, table_menu),
        Contended(Launched(truth, spec, model.num_layers), spec, model),
        Launched(costs, spec, model.num_layers),
        overheads,
        model.max_context,
        kv_tokens(spec, model),
        int(model.kv_bytes),
    )


def _costs(device: str, model: str) -> CostModel:
    from drift_scheduler.cost.fitted import fitted
    from drift_scheduler.cost.hardware import installed

    if table_name(device, model) in installed("tables"):
        return fitted("", device, model)
    return RooflineCost(device_spec(device), model_spec(model))


def build_simulated(setup: Setup) -> RealTimeExecutor:
    """The executor for `--device simulated`. Raises DriftError on what cannot be simulated."""
    config, model = setup.config, setup.model
    subject = parse_subject(config.simulate or DEFAULT)
    context = config.max_context or subject.max_context
    page = config.page_tokens
    memory = config.kv_memory_bytes or subject.kv_tokens * subject.bytes_per_token
    plan = plan_pool(memory, subject.bytes_per_token * page, page, context)
    tokens = SimulatedTokens(token_choices(model.vocab_size, model.eos_token_ids))
    kv = PagedKv(plan.num_pages, page, tokens.tokens_of, put_off=True)
    return RealTimeExecutor(subject, kv, plan, tokens, config.seed)
