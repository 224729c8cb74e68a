"""The mechanism that divides nothing: two streams of the whole device, one for each lane.

The baseline that partitions are compared with, and what lanes run on when they have the device to themselves. The
hardware alone decides which kernel gets an SM; of the two streams decode's is the more urgent, so that the
comparison is with streams at their best. Knows nothing of what the lanes run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drift_kernels.driver import (
    INVALID_DEVICE,
    NO_DEVICE,
    NOT_SUPPORTED,
    Context,
    CudaError,
    Device,
    Driver,
    DriverUnavailable,
    version_text,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

log = logging.getLogger("drift.kernels.partition")

Partition = tuple[int, int]  # (prefill SMs, decode SMs)
Handles = tuple[int | None, int | None]  # CUstream of (prefill, decode), None for a lane without SMs


class PartitionUnavailable(Exception):
    """Why a mechanism cannot work here, and what would help; `str` is both in one line."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix


class Owned:
    """What was created, to be destroyed in reverse order, each thing once and whatever becomes of the others."""

    def __init__(self) -> None:
        self._undo: list[tuple[str, Callable[[], None]]] = []

    def add(self, what: str, undo: Callable[[], None]) -> None:
        """`undo` destroys `what`, just created."""
        self._undo.append((what, undo))

    def take_over(self, other: Owned) -> None:
        """Own what `other` owned, as created after everything here."""
        self._undo += other._undo
        other._undo = []

    def destroy(self) -> list[Exception]:
        """Destroy everything; what failed comes back and is not tried again."""
        failed: list[Exception] = []
        while self._undo:
            what, undo = self._undo.pop()
            try:
                undo()
            except Exception as error:  # the others still have to go
                log.warning("%s could not be destroyed: %s", what, error)
                failed.append(error)
        return failed


class StreamsOnly:
    """Two non-blocking streams in the device's primary context, the one torch works in.

    A partition is (units, 0), (0, units) or, for both lanes at once, (units, units).
    """

    def __init__(
        self, device_index: int = 0, *, driver: Driver | None = None, decode_first: bool = True
    ) -> None:
        """device_index: among the visible devices, as torch counts. decode_first: give decode the urgent stream.

        Raises PartitionUnavailable.
        """
        self.device_index = device_index
        self._owned = Owned()
        self._closed = False
        try:
            self.driver = Driver() if driver is None else driver
            self.device, self.name, self.cuda_version = _open(self.driver, device_index)
            self._primary = self._retain()
            self.units = self.driver.multiprocessors(self.device)
            self._prefill, self._decode = self._create(decode_first)
        except BaseException as error:
            self._owned.destroy()
            raise_unavailable(error, getattr(self, "name", f"device {device_index}"))
            raise

    @property
    def description(self) -> str:
        """One line for logs."""
        cuda = version_text(self.cuda_version)
        return f"two streams on all {self.units} SMs of {self.name}, no partition (driver: CUDA {cuda})"

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing is asked of the driver that it could grant otherwise."""
        return ()

    def menu(self) -> tuple[Partition, ...]:
        """The whole device for either lane: nothing can be divided."""
        return ((self.units, 0), (0, self.units))

    def streams(self, split: Partition) -> Handles:
        """Stream handles of the lanes. Raises ValueError for a partition that divides the device."""
        self._check_open()
        prefill, decode = split
        if {prefill, decode} not in ({0, self.units}, {self.units}):
            raise ValueError(
                f"split {split} divides the device, two plain streams cannot; choose from "
                f"{[*self.menu(), (self.units, self.units)]}"
            )
        return (self._prefill if prefill else None, self._decode if decode else None)

    def realised(self, split: Partition) -> Partition:
        """SMs each lane may use: those asked for."""
        self.streams(split)
        return split

    def torch_streams(self, split: Partition) -> tuple[Any, Any]:
        """The same streams as `torch.cuda.ExternalStream`s."""
        return as_torch(self.streams(split), self.device_index)

    def close(self) -> None:
        """Destroy the streams; the lanes must be idle. A second call does nothing. Raises the first CudaError."""
        raise_first(self.destroy())

    def destroy(self) -> list[Exception]:
        """Like `close`, but what failed comes back."""
        self._closed = True
        return self._owned.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the streams of {self.name} are closed")

    def _retain(self) -> Context:
        context = self.driver.retain_primary(self.device)
        self._owned.add("the primary context", lambda: self.driver.release_primary(self.device))
        return context

    def _create(self, decode_first: bool) -> tuple[int, int]:
        with self.driver.current(self._primary):
            urgent = self.driver.greatest_priority() if decode_first else 0
            prefill = self.driver.create_stream()
            self._owned.add("the prefill stream", lambda: self.driver.destroy_stream(prefill))
            decode = self.driver.create_stream(urgent)
            self._owned.add("the decode stream", lambda: self.driver.destroy_stream(decode))
        return as_handle(prefill), as_handle(decode)


def as_handle(stream: Any) -> int:
    """The address that `torch.cuda.ExternalStream` and other libraries take."""
    return int(stream)


def as_torch(handles: Handles, device_index: int) -> tuple[Any, Any]:
    """Wrap stream handles for torch, which is imported only here."""
    import torch

    wrap: Any = torch.cuda.ExternalStream
    device = torch.device("cuda", device_index)
    prefill, decode = (None if handle is None else wrap(handle, device=device) for handle in handles)
    return prefill, decode


def raise_first(failed: list[Exception]) -> None:
    """Raise the first of several failures, with the others as notes."""
    if failed:
        for other in failed[1:]:
            failed[0].add_note(f"also: {other}")
        raise failed[0]


def raise_unavailable(error: BaseException, device_name: str) -> None:
    """Raise PartitionUnavailable for a failed start-up where driver or device is to blame; else do nothing."""
    if isinstance(error, DriverUnavailable):
        raise PartitionUnavailable(error.reason, error.fix) from error
    if isinstance(error, CudaError):
        raise PartitionUnavailable(f"{device_name}: {error}", _fix(error.code, device_name)) from error


def _fix(code: int, device_name: str) -> str:
    if code == NO_DEVICE:
        return "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    if code == INVALID_DEVICE:
        return "choose a device that `nvidia-smi` lists"
    if code == NOT_SUPPORTED and "MIG" in device_name:
        return "give the process the whole GPU rather than a MIG instance, or use the mechanism 'streams'"
    if code == NOT_SUPPORTED:
        return "use the mechanism 'streams', or a device and driver that have green contexts"
    return "see `nvidia-smi` for what else uses the device, and `dmesg` for its errors"


def _open(driver: Driver, index: int) -> tuple[Device, str, int]:
    """Device, its name and the driver's CUDA version."""
    version = driver.version()
    driver.initialize()
    count = driver.device_count()
    if not 0 <= index < count:
        there = f"there are {count}, from 0" if count else "there is none"
        raise PartitionUnavailable(
            f"no CUDA device {index}: {there}", "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        )
    device = driver.device(index)
    return device, driver.name(device), version
