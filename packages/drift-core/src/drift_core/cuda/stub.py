"""A device made of bookkeeping: streams and events in virtual time, and a watch over who touches what in which
order.

Work really runs, on the CPU, in the order of issue; so results are right where the order is. Whether the
order is *guaranteed* is judged apart from that, by vector clocks: each stream counts its operations, an event
carries what its stream knew, `wait` passes that on. Two touches of one piece of memory, one of them a write,
of which neither is known to the other, are a fault even when they happened to come right. What the host has
seen orders the host's own memory and nothing else: graphs may be launched ahead of what it sees.

`faults` lists what went wrong, each with the kind first: order, host-order, split, allocation, capture, wait,
copy, graph. Knows nothing of requests; costs are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from drift_core.cuda.device import Cells, Event, Graph, Place, Stream, Touches, Work
from drift_scheduler.domain import Lane

POLL_SECONDS = 1e-6
"""Virtual time that a look at an event takes."""

Clock = dict[int, int]
Key = tuple[str, int]
Cost = Callable[[Work, Place], float]


def flat_cost(work: Work, place: Place) -> float:
    """A microsecond, and 20 us a layer and 0.5 us a token and layer of a lane that has all units."""
    return 1e-6 + work.layers * (2e-5 + 5e-7 * work.tokens)


@dataclass(eq=False, slots=True)
class StubStream:
    """Its clock counts what it knows of every stream; `free_at`: when its last operation ends."""

    place: Place
    index: int
    clock: Clock = field(default_factory=dict)
    free_at: float = 0.0


@dataclass(eq=False, slots=True)
class StubEvent:
    """Recorded: when it is reached, and what its stream knew then."""

    at: float | None = None
    clock: Clock = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class StubGraph:
    """Captured work, and where it was captured."""

    place: Place
    run: Callable[[], object]


@dataclass(slots=True)
class _Memory:
    """Who touched a piece of memory last: (stream, its count, name of the work)."""

    write: tuple[int, int, str] | None = None
    reads: dict[int, tuple[int, str]] = field(default_factory=dict)


_HOST = -1


class StubDevice:
    """Implements `device.Accelerator` without a device.

    `runs`: whether work is executed; without it only time passes. `checks`: whether anything is watched.
    `shared_scratch`, `lost_waits`: faults planted on purpose, for tests of the watch itself.
    """

    kind = "cpu"
    name = "stub"

    def __init__(
        self,
        units: int = 16,
        cost: Cost = flat_cost,
        *,
        runs: bool = True,
        checks: bool = True,
        shared_scratch: bool = False,
        lost_waits: bool = False,
    ) -> None:
        self.units = units
        self.faults: list[str] = []
        self.log: list[tuple[str, Place, float, float]] = []  # what ran: name, where, from, to
        self._cost, self._runs, self._checks = cost, runs, checks
        self._shared_scratch, self._lost_waits = shared_scratch, lost_waits
        self._time = 0.0
        self._streams: list[StubStream] = []
        self._memory: dict[Key, _Memory] = {}
        self._host_knows: Clock = {}
        self._pinned: set[int] = set()
        self._scratch: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}
        self._kept: list[Tensor] = []  # addresses name memory: none may be used twice
        self._serving = False
        self._rare: list[str] = []

    # -------------------------------------------------------------------------------------- time

    def now(self) -> float:
        """Virtual seconds."""
        return self._time

    def pause(self, seconds: float) -> None:
        """Time passes."""
        self._time += max(seconds, POLL_SECONDS)

    def reached(self, event: Event) -> bool:
        """Whether virtual time has come that far; the host then knows what the event knew."""
        self._time += POLL_SECONDS
        stub = cast(StubEvent, event)
        assert stub.at is not None, "an event was asked for before it was recorded"
        if stub.at > self._time:
            return False
        _join(self._host_knows, stub.clock)
        return True

    def elapsed(self, start: Event, stop: Event) -> float:
        """Virtual seconds between two events."""
        first, last = cast(StubEvent, start).at, cast(StubEvent, stop).at
        assert first is not None
        assert last is not None
        return last - first

    # ----------------------------------------------------------------------------------- streams

    def stream(self, place: Place, handle: int | None = None) -> Stream:
        """A new stream; handles mean nothing here."""
        made = StubStream(place, len(self._streams))
        self._streams.append(made)
        return made

    def event(self) -> Event:
        """Not recorded yet."""
        return StubEvent()

    def record(self, event: Event, stream: Stream) -> None:
        """At the stream's present end."""
        stub, of = cast(StubEvent, event), cast(StubStream, stream)
        stub.at = max(of.free_at, self._time)
        stub.clock = dict(of.clock)

    def wait(self, stream: Stream, event: Event) -> None:
        """The stream learns what the event knows, and does not go on before it; unless waits get lost."""
        if self._lost_waits:
            return
        of, stub = cast(StubStream, stream), cast(StubEvent, event)
        assert stub.at is not None, "a stream was to wait for an event that nobody recorded"
        _join(of.clock, stub.clock)
        of.free_at = max(of.free_at, stub.at)

    def launch(self, stream: Stream, work: Work) -> None:
        """Run now, take time later."""
        self._operate(cast(StubStream, stream), work, work.run)

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        """A copy; between memory that is pinned or the device's, else it would wait for the device."""
        if self._checks:
            self._check_copy(target, source)
        work = Work("copy", lambda: target.copy_(source), lambda: Touches([source], [target]))
        self._operate(cast(StubStream, stream), work, work.run)

    def _check_copy(self, target: Tensor, source: Tensor) -> None:
        if not self._is_pinned(target) and not self._is_pinned(source):
            self._fault("copy", "neither side is pinned: the host would wait for the device")
        if not (target.is_contiguous() and source.is_contiguous()):
            self._fault("copy", "a strided copy goes through memory of its own and waits for it")

    def capture(self, stream: Stream, work: Work) -> Graph:
        """Nothing runs; the work is kept for replays."""
        if self._serving and not self._rare:
            self._fault("capture", f"{work.name} was captured in service")
        return StubGraph(stream.place, work.run)

    def replay(self, stream: Stream, graph: Graph, work: Work) -> None:
        """Run what was captured. A graph belongs to the units it was captured on."""
        stub = cast(StubGraph, graph)
        if stub.place != stream.place:
            self._fault("graph", f"{work.name}, captured on {stub.place}, was replayed on {stream.place}")
        self._operate(cast(StubStream, stream), work, stub.run)

    def _operate(self, stream: StubStream, work: Work, run: Callable[[], object]) -> None:
        start = max(self._time, stream.free_at)
        if self._checks:
            self._check_split(stream, work, start)
        stream.free_at = start + self._cost(work, stream.place)
        self.log.append((work.name, stream.place, start, stream.free_at))
        count = stream.clock.get(stream.index, 0) + 1
        stream.clock[stream.index] = count
        if self._checks:
            for key in _keys(work.touches().reads):
                self._read(key, stream.index, count, stream.clock, work.name)
            for key in _keys(work.touches().writes):
                self._write(key, stream.index, count, stream.clock, work.name)
        if self._runs:
            with torch.inference_mode():
                run()

    def _check_split(self, stream: StubStream, work: Work, start: float) -> None:
        mine = stream.place.partition
        for other in self._streams:
            if other.place.partition != mine and other.free_at > start:
                self._fault("split", f"{work.name} began on {stream.place} while {other.place} was busy")

    # ------------------------------------------------------------------------------------ memory

    def empty(self, shape: Sequence[int], kind: torch.dtype, lane: Lane | None = None) -> Tensor:
        """Memory filled with what must not be read; a lane's own, unless scratch is shared by mistake."""
        if self._serving and not self._rare:
            self._fault("allocation", f"{list(shape)} of {kind} in service")
        if self._shared_scratch and lane is not None:
            known = self._scratch.get((tuple(shape), kind))
            if known is not None:
                return known
        with torch.inference_mode(False):
            made = torch.empty(tuple(shape), dtype=kind)
            made.fill_(float("nan") if kind.is_floating_point else -1)
        self._kept.append(made)
        if lane is not None:
            self._scratch[(tuple(shape), kind)] = made
        return made

    def pinned(self, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        """Host memory that copies may use."""
        if self._serving and not self._rare:
            self._fault("allocation", f"pinned {list(shape)} of {kind} in service")
        with torch.inference_mode(False):
            made = torch.zeros(tuple(shape), dtype=kind)
        self._kept.append(made)
        self._pinned.add(made.untyped_storage().data_ptr())
        return made

    def host_writes(self, memory: Tensor) -> None:
        """A fault if a copy that reads it is not known to be over."""
        if self._checks:
            self._write(_key(memory), _HOST, 0, self._host_knows, "the host")

    def host_reads(self, memory: Tensor) -> None:
        """A fault if a copy that fills it is not known to be over."""
        if self._checks:
            self._read(_key(memory), _HOST, 0, self._host_knows, "the host")

    def synchronize(self) -> None:
        """Everything is over, and the host and every stream know it."""
        if self._serving and not self._rare:
            self._fault("wait", "the host waited for the device in service")
        self._time = max([self._time, *(stream.free_at for stream in self._streams)])
        for stream in self._streams:
            _join(self._host_knows, stream.clock)
        for stream in self._streams:
            _join(stream.clock, self._host_knows)

    def begin_service(self) -> None:
        """Allocation, capture and waiting are faults from now on."""
        self._serving = True

    @contextmanager
    def rare(self, why: str) -> Iterator[None]:
        """They are none in here."""
        self._rare.append(why)
        try:
            yield
        finally:
            self._rare.pop()

    # ------------------------------------------------------------------------------------- order

    def _read(self, key: Key, stream: int, count: int, clock: Clock, name: str) -> None:
        memory = self._memory.setdefault(key, _Memory())
        self._check_known(memory.write, key, stream, clock, name, "reads")
        if stream != _HOST:
            memory.reads[stream] = (count, name)

    def _write(self, key: Key, stream: int, count: int, clock: Clock, name: str) -> None:
        memory = self._memory.setdefault(key, _Memory())
        self._check_known(memory.write, key, stream, clock, name, "overwrites")
        for reader, (seen, by) in memory.reads.items():
            self._check_known((reader, seen, by), key, stream, clock, name, "overwrites, while it is read by")
        if stream == _HOST:
            memory.write = None
        else:
            memory.write = (stream, count, name)
        memory.reads.clear()

    def _check_known(
        self, earlier: tuple[int, int, str] | None, key: Key, stream: int, clock: Clock, name: str, does: str
    ) -> None:
        if earlier is None or earlier[0] == stream or clock.get(earlier[0], 0) >= earlier[1]:
            return
        kind = "host-order" if stream == _HOST else "order"
        where = "the host" if stream == _HOST else str(self._streams[stream].place)
        other = self._streams[earlier[0]].place
        self._fault(
            kind, f"{name} on {where} {does} {earlier[2]} on {other}, unordered: {key[0]} {key[1]:#x}"
        )

    def _is_pinned(self, memory: Tensor) -> bool:
        return memory.untyped_storage().data_ptr() in self._pinned

    def _fault(self, kind: str, what: str) -> None:
        self.faults.append(f"{kind}: {what}")


def _join(into: Clock, other: Clock) -> None:
    for stream, count in other.items():
        if into.get(stream, 0) < count:
            into[stream] = count


def _key(memory: Tensor) -> Key:
    return "memory", memory.untyped_storage().data_ptr()


def _keys(touched: Sequence[Tensor | Cells]) -> Iterator[Key]:
    for each in touched:
        if isinstance(each, Cells):
            for cell in set(each.ids.tolist()):
                yield each.array, cell
        else:
            yield _key(each)
