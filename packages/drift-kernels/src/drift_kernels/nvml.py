"""What a GPU's clocks, power and temperature did during a measurement, by NVML.

A measurement taken while the device throttles says nothing about the code; `Sampler` tells. Knows nothing of what is
measured. Importing it needs neither NVML nor its bindings, and a sampler without them samples nothing and says why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

THROTTLING = {
    0x0000000000000004: "power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000010: "sync boost",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "power brake",
}
"""Bits of NVML's reasons for a clock below the maximum that distort a measurement; being idle does not."""

_SM, _MEMORY, _GPU_TEMPERATURE = 1, 2, 0  # NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU
_INSTALL = "pip install 'drift-kernels[cuda]'"


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the device; None where it does not tell. at: seconds on the sampler's clock."""

    at: float
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    throttling: frozenset[str]


@dataclass(frozen=True, slots=True)
class Summary:
    """What the readings of one measurement come to. throttled: share of the readings under each reason, 0 to 1.

    unavailable: why there are no readings, or no more of them; None where all went well.
    """

    device: str | None
    readings: int
    duration_s: float
    sm_clock_mhz: tuple[float, float, float] | None  # least, mean, most
    sm_clock_max_mhz: int | None
    power_w: tuple[float, float, float] | None
    temperature_c: tuple[float, float, float] | None
    throttled: dict[str, float]
    unavailable: str | None

    def as_dict(self) -> dict[str, Any]:
        """For reports in JSON."""
        return asdict(self)


class Sampler:
    """Looks at one device every `interval_s` seconds, from a thread of its own, between entering and leaving.

    It looks when entered and when left too, so there are at least two readings. Never raises for a device or a
    library that is not there: `unavailable` says so.
    """

    def __init__(
        self,
        device: int | str = 0,
        *,
        interval_s: float = 0.05,
        nvml: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """device: a PCI bus id (`Driver.pci_bus_id`), or NVML's own index, which CUDA_VISIBLE_DEVICES does not change.

        nvml: a module of the shape of `pynvml`; None imports that.
        """
        if interval_s <= 0:
            raise ValueError(f"interval_s is {interval_s}, need more than 0")
        self._device, self._interval_s, self._given, self._clock = device, interval_s, nvml, clock
        self._nvml: Any = None
        self._handle: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.readings: list[Reading] = []
        self.name: str | None = None
        self.sm_clock_max_mhz: int | None = None
        self.unavailable: str | None = None

    def __enter__(self) -> Self:
        if self._thread is not None or self.readings:
            raise RuntimeError("a sampler is for one measurement, make another")
        self._open()
        if self._nvml is not None and self._look():
            self._thread = threading.Thread(target=self._run, name="drift-nvml", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._nvml is not None:
            if self.unavailable is None:
                self._look()
            self._close()

    def summary(self) -> Summary:
        """What has been seen so far."""
        seen = list(self.readings)
        reasons = sorted({reason for reading in seen for reason in reading.throttling})
        return Summary(
            device=self.name,
            readings=len(seen),
            duration_s=seen[-1].at - seen[0].at if seen else 0.0,
            sm_clock_mhz=_spread([r.sm_clock_mhz for r in seen]),
            sm_clock_max_mhz=self.sm_clock_max_mhz,
            power_w=_spread([r.power_w for r in seen]),
            temperature_c=_spread([r.temperature_c for r in seen]),
            throttled={reason: sum(reason in r.throttling for r in seen) / len(seen) for reason in reasons},
            unavailable=self.unavailable,
        )

    def _open(self) -> None:
        try:
            nvml = import_module("pynvml") if self._given is None else self._given
        except ImportError:
            self.unavailable = f"nvidia-ml-py is not installed; {_INSTALL}"
            return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self.unavailable = f"NVML does not start: {error}; install the NVIDIA driver"
            return
        self._nvml = nvml
        try:
            if isinstance(self._device, str):
                self._handle = nvml.nvmlDeviceGetHandleByPciBusId(self._device)
            else:
                self._handle = nvml.nvmlDeviceGetHandleByIndex(self._device)
        except nvml.NVMLError as error:
            self.unavailable = (
                f"NVML has no device {self._device}: {error}; choose one that `nvidia-smi` lists"
            )
            self._close()
            return
        name = self._ask("nvmlDeviceGetName")
        self.name = name.decode(errors="replace") if isinstance(name, bytes) else name
        self.sm_clock_max_mhz = self._ask("nvmlDeviceGetMaxClockInfo", _SM)

    def _close(self) -> None:
        nvml, self._nvml = self._nvml, None
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            self.unavailable = self.unavailable or f"NVML does not shut down: {error}"

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            if not self._look():
                return

    def _look(self) -> bool:
        """Take a reading; whether the device still answers."""
        power = self._ask("nvmlDeviceGetPowerUsage")
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        reading = Reading(
            at=self._clock(),
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", _SM),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", _MEMORY),
            power_w=None if power is None else power / 1000,
            temperature_c=self._ask("nvmlDeviceGetTemperature", _GPU_TEMPERATURE),
            throttling=frozenset(text for bit, text in THROTTLING.items() if reasons & bit),
        )
        if self.unavailable is None:
            self.readings.append(reading)
        return self.unavailable is None

    def _ask(self, function: str, *arguments: int) -> Any:
        """None for what this device does not tell; any other error ends the sampling."""
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError_NotSupported:
            return None
        except self._nvml.NVMLError as error:
            self.unavailable = f"{function}: {error}; see `nvidia-smi`"
            return None


def _spread(values: list[Any]) -> tuple[float, float, float] | None:
    known = [float(value) for value in values if value is not None]
    return (min(known), sum(known) / len(known), max(known)) if known else None
