"""The device itself, through torch: `device.Accelerator` for one NVIDIA GPU.

Allocation, where it is allowed, goes through torch's caching allocator, which keeps freed memory per stream;
each lane's graphs share one private pool. Knows nothing of models or requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from drift_core.cuda.device import CudaError, Event, Graph, Place, Stream, Work, allowed
from drift_scheduler.domain import Lane


class TorchStream:
    """A stream with the place it runs in."""

    __slots__ = ("place", "raw")

    def __init__(self, place: Place, raw: torch.cuda.Stream) -> None:
        self.place, self.raw = place, raw


class TorchCuda:
    """One GPU of this machine. Raises CudaError where there is none."""

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise CudaError(
                "no CUDA device: torch finds none; use device cpu, or check the driver with `drift doctor`"
            )
        if index >= torch.cuda.device_count():
            raise CudaError(f"no CUDA device {index}; there are {torch.cuda.device_count()}, counted from 0")
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self.properties: Any = torch.cuda.get_device_properties(self.device)
        self._pools = {lane: torch.cuda.graph_pool_handle() for lane in Lane}

    @property
    def name(self) -> str:
        """As the driver calls it."""
        return str(self.properties.name)

    @property
    def units(self) -> int:
        """Multiprocessors."""
        return int(self.properties.multi_processor_count)

    @property
    def capability(self) -> int:
        """Compute capability as one number, 90 for 9.0."""
        return int(10 * self.properties.major + self.properties.minor)

    def now(self) -> float:
        """Seconds on the monotonic clock, which processes of one machine share."""
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def stream(self, place: Place, handle: int | None = None) -> Stream:
        """A new non-blocking stream, or a partition's."""
        if handle is None:
            return TorchStream(place, _call(torch.cuda.Stream, self.device))
        return TorchStream(place, _call(torch.cuda.ExternalStream, handle, device=self.device))

    def event(self) -> Event:
        """With timing."""
        return cast(Event, _call(torch.cuda.Event, enable_timing=True))

    def record(self, event: Event, stream: Stream) -> None:
        """Mark the stream's present end."""
        _event(event).record(_raw(stream))

    def wait(self, stream: Stream, event: Event) -> None:
        """Order on the device."""
        _raw(stream).wait_event(_event(event))

    def reached(self, event: Event) -> bool:
        """Poll."""
        try:
            return bool(_call(_event(event).query))
        except RuntimeError as error:
            raise CudaError(f"the device failed: {_line(error)}") from error

    def elapsed(self, start: Event, stop: Event) -> float:
        """Seconds by the device's clock."""
        return float(_event(start).elapsed_time(_event(stop))) / 1e3

    def launch(self, stream: Stream, work: Work) -> None:
        """Run eagerly."""
        with torch.inference_mode(), torch.cuda.stream(_raw(stream)):
            work.run()

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        """One DMA copy."""
        with torch.cuda.stream(_raw(stream)):
            target.copy_(source, non_blocking=True)

    def capture(self, stream: Stream, work: Work) -> Graph:
        """Capture; other lanes go on meanwhile (their launches come from this thread, before or after)."""
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.stream(_raw(stream)):
            graph.capture_begin(pool=self._pools[stream.place.lane], capture_error_mode="thread_local")
            try:
                work.run()
            except BaseException:
                _end_broken_capture(graph)
                raise
            graph.capture_end()
        return graph

    def replay(self, stream: Stream, graph: Graph, work: Work) -> None:
        """One launch."""
        with torch.cuda.stream(_raw(stream)):
            cast(torch.cuda.CUDAGraph, graph).replay()

    def empty(self, shape: Sequence[int], kind: torch.dtype, lane: Lane | None = None) -> Tensor:
        """Uninitialised."""
        with torch.inference_mode(False):
            return torch.empty(tuple(shape), dtype=kind, device=self.device)

    def pinned(self, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        """Page-locked, zeroed."""
        with torch.inference_mode(False):
            return torch.zeros(tuple(shape), dtype=kind, pin_memory=True)

    def host_writes(self, memory: Tensor) -> None:
        """Not checked here."""

    def host_reads(self, memory: Tensor) -> None:
        """Not checked here."""

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def begin_service(self) -> None:
        """Nothing to do: what allocates late is counted by `allocations`."""

    def rare(self, why: str) -> AbstractContextManager[None]:
        """Not checked here."""
        return allowed()

    def allocations(self) -> int:
        """Calls of cudaMalloc so far, which must not grow in service."""
        return int(torch.cuda.memory_stats(self.device).get("num_device_alloc", 0))

    def free_bytes(self) -> int:
        """Device memory nobody has, what torch has cached included."""
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free + cached)


def _call(make: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What torch's stubs leave untyped."""
    return make(*args, **named)


def _raw(stream: Stream) -> torch.cuda.Stream:
    return cast(TorchStream, stream).raw


def _event(event: Event) -> torch.cuda.Event:
    return cast(torch.cuda.Event, event)


def _end_broken_capture(graph: torch.cuda.CUDAGraph) -> None:
    """Leave capture mode after the captured work raised; what ending it says is of no interest then."""
    try:
        graph.capture_end()
    except RuntimeError:
        return


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
