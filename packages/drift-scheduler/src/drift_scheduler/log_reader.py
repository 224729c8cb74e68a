"""Reads decision logs (`drift.log/1`): the header, then the steps one by one; every fault is `log FILE:LINE: ...`.

A last line that was cut short, as a killed process leaves one, is dropped and said so. Further fields are ignored.
Knows what a log says, not what a policy would make of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from drift_scheduler.cost.hardware import plain
from drift_scheduler.cost.table import CostTable
from drift_scheduler.decision_log import SCHEMA
from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    DecodeShape,
    Device,
    Event,
    FinishReason,
    Lane,
    LaneFailed,
    Observation,
    Partition,
    PrefillDone,
    PrefillShape,
    Request,
    RequestArrived,
    RequestCancelled,
    Sharing,
)
from drift_scheduler.errors import DriftError
from drift_scheduler.legality import menu_fault
from drift_scheduler.scheduler import Limits

Units = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Sum = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Clock = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
Split = tuple[Units, Units]


class _Device(msgspec.Struct, frozen=True):
    units: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    layers: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    menu: tuple[Split, ...]
    sharings: tuple[Sharing, ...]
    name: str = "device"
    repartition_while_busy: bool = False
    system: str = ""


class _Kv(msgspec.Struct, frozen=True):
    total_pages: Positive
    page_tokens: Positive


class _Limits(msgspec.Struct, frozen=True):
    max_running: Positive
    max_waiting: Positive
    max_preemptions: Tokens
    max_context_tokens: Positive | None = None


class _Header(msgspec.Struct, frozen=True):
    schema: Literal["drift.log/1"]
    source: Literal["simulation", "engine"]
    device: _Device
    kv: _Kv
    limits: _Limits
    config: dict[str, Any]
    table: CostTable | None = None


class _Slo(msgspec.Struct, frozen=True):
    ttft: Seconds | None
    tbt: Seconds | None
    e2e: Seconds | None = None
    name: str = msgspec.field(default="default", name="class")


class _Arrived(msgspec.Struct, frozen=True):
    id: str
    arrival: Clock
    prompt_tokens: Tokens
    max_output_tokens: Tokens
    slo: _Slo
    output_tokens: Positive | None = None
    priority: int = 0
    session: str | None = None
    turn: Tokens = 0
    keys: tuple[Any, ...] = ()
    key_tokens: Positive = 16


class _Event(msgspec.Struct, frozen=True):
    """One event; exactly one of the first five fields says which."""

    arrived: _Arrived | None = None
    cancelled: str | None = None
    prefill_done: Seconds | None = None
    decode_done: Seconds | None = None
    lane_failed: Lane | None = None
    reason: FinishReason = FinishReason.CANCELLED
    message: str = ""
    stopped: tuple[str, ...] = ()


class LoggedPrefill(msgspec.Struct, frozen=True):
    """A block: its batch, layers `(start, stop)` and chunks `(request, start, stop, last)`."""

    batch: int
    layers: tuple[Units, Units]
    chunks: tuple[tuple[str, Tokens, Tokens, bool], ...]


class LoggedDecode(msgspec.Struct, frozen=True):
    """A decode step: how many requests, how many KV positions."""

    batch: Positive
    context: Tokens


class LoggedGang(msgspec.Struct, frozen=True):
    """A gang as a log has it."""

    sharing: Sharing
    partition: Split
    prefill: LoggedPrefill | None = None
    decode: LoggedDecode | None = None


class LoggedView(msgspec.Struct, frozen=True):
    """What a policy decides from, in numbers, as the step's decision left it."""

    waiting: Tokens
    decoding: Tokens
    running: Tokens
    free_pages: Tokens
    blocked: bool = False


class LoggedEnd(msgspec.Struct, frozen=True):
    """The end of a request. `keys`: names of the pages that its output filled."""

    id: str
    reason: FinishReason
    output_tokens: Tokens
    ttft: Seconds | None = None
    keys: tuple[Any, ...] = ()


class _Lane(msgspec.Struct, frozen=True):
    lane: Lane
    sharing: Sharing
    partition: Split
    layers: Units
    predicted: Seconds
    measured: Seconds
    overlapped: bool = False
    prefill: tuple[Tokens, Tokens, Tokens, Sum, Sum] | None = None
    decode: tuple[Tokens, Sum] | None = None


class _Line(msgspec.Struct, frozen=True):
    step: Tokens
    now: Clock
    events: tuple[_Event, ...]
    view: LoggedView
    gang: LoggedGang | None = None
    gaps: tuple[tuple[Seconds, Positive], ...] = ()
    finished: tuple[LoggedEnd, ...] = ()
    lanes: tuple[_Lane, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One step: what the scheduler was told, what it decided, what came of it. `line` counts from 1."""

    line: int
    index: int
    now: float
    events: tuple[Event, ...]
    view: LoggedView
    gang: LoggedGang | None
    gaps: tuple[tuple[float, int], ...]
    finished: tuple[LoggedEnd, ...]
    observations: tuple[Observation, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class DecisionLogFile:
    """A log: what its first line says, and its steps, read anew each time they are asked for."""

    path: str
    source: Literal["simulation", "engine"]
    device: Device
    total_pages: int
    page_tokens: int
    limits: Limits
    config: dict[str, Any]
    table: CostTable | None
    truncated: list[int] = field(default_factory=list)
    """The number of a last line that was cut short, once it was come by."""

    def steps(self) -> Iterator[LoggedStep]:
        """Every step in order. Raises DriftError `log FILE:LINE: ...` at the first line that cannot be."""
        return _steps(self)


def open_log(path: str | Path) -> DecisionLogFile:
    """Read a log's first line. Raises DriftError."""
    first = next(_lines(path), None)
    if first is None:
        raise DriftError(f"log {path}: empty; a log's first line says schema {SCHEMA}")
    number, data, _ = first
    header = _decode(_HEADER, data, path, number)
    logged = header.device
    device = Device(
        logged.units,
        tuple(Partition(*split) for split in logged.menu),
        logged.layers,
        frozenset(logged.sharings),
        logged.repartition_while_busy,
        logged.name,
        logged.system,
    )
    fault = menu_fault(device)
    if fault is not None:
        raise DriftError(f"log {path}:{number}: field device.menu: {fault}")
    return DecisionLogFile(
        path=str(path),
        source=header.source,
        device=device,
        total_pages=header.kv.total_pages,
        page_tokens=header.kv.page_tokens,
        limits=Limits(
            max_running=header.limits.max_running,
            max_waiting=header.limits.max_waiting,
            max_context_tokens=header.limits.max_context_tokens,
            max_preemptions=header.limits.max_preemptions,
        ),
        config=header.config,
        table=header.table,
    )


_HEADER = msgspec.json.Decoder(_Header)
_STEP = msgspec.json.Decoder(_Line)


def _lines(path: str | Path) -> Iterator[tuple[int, bytes, bool]]:
    """Lines with their numbers and whether they ended; blank ones are left out."""
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line, line.endswith(b"\n")
    except OSError as error:
        raise DriftError(f"log {path}: {error.strerror or error}") from error


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes, path: str | Path, number: int) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise DriftError(f"log {path}:{number}: {plain(error)}") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DriftError(f"log {path}:{number}: not JSON: {error}") from error


def _steps(log: DecisionLogFile) -> Iterator[LoggedStep]:
    path = log.path
    lines = _lines(path)
    next(lines, None)
    checks, names = _Checks(path), _Names()
    log.truncated.clear()
    for number, data, ended in lines:
        try:
            raw = _decode(_STEP, data, path, number)
        except DriftError:
            if ended:
                raise
            log.truncated.append(number)  # the process was killed while it wrote
            return
        step = LoggedStep(
            number,
            raw.step,
            raw.now,
            tuple(_event(event, path, number) for event in raw.events),
            raw.view,
            raw.gang,
            raw.gaps,
            raw.finished,
            tuple(_observation(lane) for lane in raw.lanes),
            raw.faults,
        )
        checks.take(step)
        yield names.told_apart(step)


class _Names:
    """Requests under names of their own: a client may use a name again, and served by another policy the two may be
    there at once. The second "a" is "a (2)"."""

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._now: dict[str, str] = {}  # what those are called that came under a used name

    def told_apart(self, step: LoggedStep) -> LoggedStep:
        """The step with these names."""
        events = tuple([self._event(event) for event in step.events])
        if not self._now:
            return step
        gang = step.gang
        if gang is not None and gang.prefill is not None:
            chunks = tuple((self._name(name), *rest) for name, *rest in gang.prefill.chunks)
            prefill = msgspec.structs.replace(gang.prefill, chunks=chunks)
            gang = msgspec.structs.replace(gang, prefill=prefill)
        finished = tuple(msgspec.structs.replace(end, id=self._name(end.id)) for end in step.finished)
        return replace(step, events=events, gang=gang, finished=finished)

    def _name(self, name: str) -> str:
        return self._now.get(name, name)

    def _event(self, event: Event) -> Event:
        match event:
            case RequestArrived(request):
                self._times[request.id] += 1
                if (times := self._times[request.id]) == 1:
                    return event
                self._now[request.id] = f"{request.id} ({times})"
                return RequestArrived(replace(request, id=self._now[request.id]))
            case PrefillDone(stopped=stopped) | DecodeDone(stopped=stopped) if stopped and self._now:
                return replace(event, stopped=tuple(map(self._name, stopped)))
            case RequestCancelled(request_id) if request_id in self._now:
                return replace(event, request_id=self._now[request_id])
            case _:
                return event


def _event(raw: _Event, path: str, line: int) -> Event:
    if raw.arrived is not None:
        return RequestArrived(_request(raw.arrived))
    if raw.cancelled is not None:
        return RequestCancelled(raw.cancelled, raw.reason)
    if raw.prefill_done is not None:
        return PrefillDone(raw.prefill_done, stopped=raw.stopped)
    if raw.decode_done is not None:
        return DecodeDone(raw.decode_done, stopped=raw.stopped)
    if raw.lane_failed is not None:
        return LaneFailed(raw.lane_failed, raw.message)
    kinds = "arrived, cancelled, prefill_done, decode_done, lane_failed"
    raise DriftError(f"log {path}:{line}: field events: an event without any of {kinds}")


def _request(raw: _Arrived) -> Request:
    slo = raw.slo
    return Request(
        id=raw.id,
        arrival=raw.arrival,
        prompt_tokens=raw.prompt_tokens,
        max_output_tokens=raw.max_output_tokens,
        slo=SLO(_unset(slo.ttft), _unset(slo.tbt), slo.e2e, slo.name),
        priority=raw.priority,
        prefix_keys=tuple(hashable(key) for key in raw.keys),
        key_tokens=raw.key_tokens,
        output_tokens=raw.output_tokens,
        session=raw.session,
        turn=raw.turn,
    )


def hashable(key: Any) -> Hashable:
    """A key as JSON has it, as a value that can be looked up."""
    if isinstance(key, list):
        return tuple(hashable(part) for part in key)
    return str(key) if isinstance(key, dict) else key


def _unset(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _observation(raw: _Lane) -> Observation:
    return Observation(
        raw.lane,
        Partition(*raw.partition),
        raw.sharing,
        None if raw.prefill is None else PrefillShape(*raw.prefill),
        None if raw.decode is None else DecodeShape(*raw.decode),
        raw.layers,
        raw.overlapped,
        raw.predicted,
        raw.measured,
    )


class _Checks:
    """What the types of a line cannot say: order, and that what ends had begun."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._index = -1
        self._now = -math.inf
        self._known: set[str] = set()  # requests that arrived and did not end
        self._busy: set[Lane] = set()
        # Requests whose end was told while these lanes worked: one that was cancelled may still stop in one of them.
        self._leaving: dict[Lane, set[str]] = {lane: set() for lane in Lane}

    def take(self, step: LoggedStep) -> None:
        """Raise DriftError naming the line, or remember what later lines build on."""
        if step.index <= self._index:
            self._fail(step, f"field step: {step.index} after {self._index}")
        if step.now < self._now:
            self._fail(step, f"field now: {step.now} after {self._now}")
        self._index, self._now = step.index, step.now
        for event in step.events:
            self._event(step, event)
        if step.gang is not None:
            self._gang(step, step.gang)
        ended = {end.id for end in step.finished}
        self._known -= ended
        for lane in self._busy:
            self._leaving[lane] |= ended

    def _event(self, step: LoggedStep, event: Event) -> None:
        match event:
            case RequestArrived(request):
                if request.id in self._known:
                    self._fail(step, f"request '{request.id}' arrives twice")
                self._known.add(request.id)
            case PrefillDone(stopped=stopped):
                self._ended(step, Lane.PREFILL, stopped)
            case DecodeDone(stopped=stopped):
                self._ended(step, Lane.DECODE, stopped)
            case LaneFailed(lane):
                self._ended(step, lane, ())
            case RequestCancelled():  # it may be on its way when the request ends
                pass

    def _ended(self, step: LoggedStep, lane: Lane, stopped: tuple[str, ...]) -> None:
        if lane not in self._busy:
            self._fail(step, f"the {lane.value} lane ends work that no gang began")
        self._busy.discard(lane)
        for request_id in stopped:
            if request_id not in self._known and request_id not in self._leaving[lane]:
                self._fail(step, f"request '{request_id}' stops and is not there")
        self._leaving[lane].clear()

    def _gang(self, step: LoggedStep, gang: LoggedGang) -> None:
        for lane, work in ((Lane.PREFILL, gang.prefill), (Lane.DECODE, gang.decode)):
            if work is None:
                continue
            if lane in self._busy:
                self._fail(step, f"a gang for the busy {lane.value} lane")
            self._busy.add(lane)
        for request_id, start, stop, _ in gang.prefill.chunks if gang.prefill is not None else ():
            if request_id not in self._known or start >= stop:
                self._fail(step, f"chunk [{start}, {stop}) of request '{request_id}' cannot be")

    def _fail(self, step: LoggedStep, message: str) -> None:
        raise DriftError(f"log {self._path}:{step.line}: {message}")
