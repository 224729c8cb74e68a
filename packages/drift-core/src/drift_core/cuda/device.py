"""What the executor asks of a device: streams, events, graphs, asynchronous copies, memory. The seam to the
stub.

Rules that every use keeps, and `stub.StubDevice` checks: an order between streams is said to the device
(`wait`), never inferred from what the host has seen; host buffers that copies read are pinned and not
rewritten before the copy is known to be over; nothing is allocated or captured after `begin_service`, except
inside `rare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, dtype

from drift_scheduler.domain import Lane, Partition
from drift_scheduler.errors import DriftError


class CudaError(DriftError):
    """The device, its driver or its memory cannot do what was asked."""


class Place(NamedTuple):
    """Where a stream runs: a lane's part of a partition; `partition` is `None` for the whole device."""

    lane: Lane
    partition: Partition | None

    def __str__(self) -> str:
        return f"{self.lane.value} of {self.partition or 'the whole device'}"


class Cells(NamedTuple):
    """Elements of one shared array that several lanes use side by side: pages of KV, entries of a table."""

    array: str
    ids: npt.NDArray[np.integer]


class Touches(NamedTuple):
    """Memory that a piece of device work reads and writes, as far as another lane or the host may touch it too."""

    reads: Sequence[Tensor | Cells] = ()
    writes: Sequence[Tensor | Cells] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of device work. `touches` and the sizes are asked only by devices that check or keep virtual time."""

    name: str
    run: Callable[[], object]
    touches: Callable[[], Touches]
    tokens: int = 0
    layers: int = 0


class Stream(Protocol):
    """Work in order."""

    @property
    def place(self) -> Place: ...


class Event(Protocol):
    """A point in a stream; opaque."""


class Graph(Protocol):
    """Captured work; opaque."""


class Accelerator(Protocol):
    """The device. Only `stream`, `pinned`, `empty`, `capture` and `synchronize` may allocate or block."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """What torch calls it: "cuda", or "cpu" for the stub."""

    @property
    def units(self) -> int:
        """Multiprocessors."""

    def now(self) -> float:
        """Seconds on the clock that requests' arrivals are on."""

    def pause(self, seconds: float) -> None:
        """Let at most about that much time pass; 0 only lets other threads run."""

    def stream(self, place: Place, handle: int | None = None) -> Stream:
        """A new stream, or one made elsewhere (a partition's) by its driver handle."""

    def event(self) -> Event: ...

    def record(self, event: Event, stream: Stream) -> None: ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What `stream` is given from now on runs after `event`; the host goes on at once."""

    def reached(self, event: Event) -> bool:
        """Whether everything before the event is done; never blocks. Raises CudaError after a device fault."""

    def elapsed(self, start: Event, stop: Event) -> float:
        """Seconds between two reached events."""

    def launch(self, stream: Stream, work: Work) -> None:
        """Run torch operations on a stream."""

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        """An asynchronous copy between device and pinned memory; both contiguous."""

    def capture(self, stream: Stream, work: Work) -> Graph:
        """Capture `work` on a stream, with the memory pool of the stream's lane; it must have run there before."""

    def replay(self, stream: Stream, graph: Graph, work: Work) -> None:
        """Run a captured graph; `work` says what it touches this time."""

    def empty(self, shape: Sequence[int], kind: dtype, lane: Lane | None = None) -> Tensor:
        """Device memory; `lane`: of that lane alone."""

    def pinned(self, shape: Sequence[int], kind: dtype) -> Tensor:
        """Zeroed host memory that asynchronous copies may use."""

    def host_writes(self, memory: Tensor) -> None:
        """The host is about to overwrite pinned memory. Free, except where it is checked."""

    def host_reads(self, memory: Tensor) -> None:
        """The host is about to read pinned memory that a copy filled."""

    def synchronize(self) -> None:
        """Wait for everything; for set-up and measurement."""

    def begin_service(self) -> None:
        """From now on nothing may be allocated, captured or waited for outside `rare`."""

    def rare(self, why: str) -> AbstractContextManager[None]:
        """Allow it for once: a graph nobody needed before, a batch larger than any."""


class Partitions(Protocol):
    """A partition mechanism: `drift_kernels.green_contexts.GreenContexts`, or `StreamsOnly` of the same shape."""

    @property
    def units(self) -> int: ...

    def menu(self) -> tuple[tuple[int, int], ...]:
        """(prefill, decode) units of each split it has prepared."""

    def streams(self, split: tuple[int, int]) -> tuple[int | None, int | None]:
        """Driver handles of the prefill and the decode stream; (units, units) is both lanes on everything."""

    def realised(self, split: tuple[int, int]) -> tuple[int, int]:
        """Units that the lanes of a split really have."""

    def close(self) -> None: ...


@contextmanager
def allowed() -> Iterator[None]:
    """`Accelerator.rare` of devices that do not check."""
    yield
