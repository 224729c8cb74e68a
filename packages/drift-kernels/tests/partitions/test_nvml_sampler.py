"""The sampler against a fake NVML; its names against the real bindings where they are installed."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest

from drift_kernels.nvml import THROTTLING, Sampler


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class FakeNvml:
    """One H200 at rest that throttles from the second reading on. `dies_at`: the reading that fails."""

    NVMLError, NVMLError_NotSupported = NVMLError, NVMLError_NotSupported

    def __init__(
        self, *, mute: tuple[str, ...] = (), dies_at: int | None = None, starts: bool = True
    ) -> None:
        self.mute, self.dies_at, self.starts = mute, dies_at, starts
        self.calls: list[tuple[object, ...]] = []
        self.open = 0
        self.looks = 0
        self.enough = threading.Event()

    def nvmlInit(self) -> None:
        if not self.starts:
            raise NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index:
            raise NVMLError("Invalid Argument")
        return "device 0"

    def nvmlDeviceGetHandleByPciBusId(self, pciBusId: str) -> str:
        self.calls.append(("bus", pciBusId))
        return "device 0"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA H200"

    def nvmlDeviceGetMaxClockInfo(self, handle: str, type: int) -> int:
        return 1980

    def nvmlDeviceGetClockInfo(self, handle: str, type: int) -> int:
        return self._tell("clock", {1: 1980 - 100 * self.looks, 2: 3201}[type])

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self.looks += 1
        if self.looks == self.dies_at:
            raise NVMLError("GPU is lost")
        if self.looks >= 4:
            self.enough.set()
        return self._tell("power", 600_000 + 1000 * self.looks)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert sensor == 0
        return self._tell("temperature", 60)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._tell("throttling", 0x1 if self.looks == 1 else 0x4 | 0x1)

    def _tell(self, what: str, value: int) -> int:
        if what in self.mute:
            raise NVMLError_NotSupported
        return value


def test_a_measurement_is_summed_up() -> None:
    nvml = FakeNvml()
    clock = itertools.count(10.0, 2.0)
    with Sampler(interval_s=3600, nvml=nvml, clock=lambda: next(clock)) as sampler:
        assert nvml.open == 1
    summary = sampler.summary()
    assert nvml.open == 0
    assert (summary.device, summary.readings, summary.duration_s) == ("NVIDIA H200", 2, 2.0)
    assert summary.sm_clock_mhz == (1780.0, 1830.0, 1880.0)
    assert summary.sm_clock_max_mhz == 1980
    assert summary.power_w == (601.0, 601.5, 602.0)
    assert summary.temperature_c == (60.0, 60.0, 60.0)
    assert summary.throttled == {"power cap": 0.5}
    assert summary.unavailable is None
    assert summary.as_dict()["throttled"] == {"power cap": 0.5}
    with pytest.raises(RuntimeError, match="one measurement"):
        sampler.__enter__()


def test_it_goes_on_looking_while_the_measurement_runs() -> None:
    nvml = FakeNvml()
    with Sampler(interval_s=0.001, nvml=nvml) as sampler:
        assert nvml.enough.wait(60)
    assert sampler.summary().readings >= 4
    assert not [t for t in threading.enumerate() if t.name == "drift-nvml"]


def test_what_a_device_does_not_tell_is_none() -> None:
    nvml = FakeNvml(mute=("power", "clock", "temperature", "throttling"))
    with Sampler(interval_s=3600, nvml=nvml) as sampler:
        pass
    summary = sampler.summary()
    assert summary.readings == 2
    assert (summary.power_w, summary.sm_clock_mhz, summary.temperature_c) == (None, None, None)
    assert summary.throttled == {}


@pytest.mark.parametrize("dies_at", [1, 2])
def test_a_device_that_stops_answering_ends_the_sampling_and_not_the_measurement(dies_at: int) -> None:
    nvml = FakeNvml(dies_at=dies_at)
    with Sampler(interval_s=3600, nvml=nvml) as sampler:
        pass
    assert sampler.summary().readings == dies_at - 1
    assert sampler.summary().unavailable == "nvmlDeviceGetPowerUsage: GPU is lost; see `nvidia-smi`"
    assert nvml.open == 0


def test_the_measurements_own_error_comes_through() -> None:
    nvml = FakeNvml()
    with pytest.raises(ZeroDivisionError), Sampler(interval_s=3600, nvml=nvml):
        raise ZeroDivisionError
    assert nvml.open == 0


def test_a_device_by_its_bus_id() -> None:
    nvml = FakeNvml()
    with Sampler("0000:1B:00.0", interval_s=3600, nvml=nvml):
        pass
    assert nvml.calls == [("bus", "0000:1B:00.0")]


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sampler(nvml=FakeNvml(starts=False)) as sampler:
        pass
    assert sampler.summary().unavailable == (
        "NVML does not start: NVML Shared Library Not Found; install the NVIDIA driver"
    )
    nvml = FakeNvml()
    with Sampler(3, nvml=nvml) as sampler:
        pass
    assert "NVML has no device 3: Invalid Argument" in str(sampler.unavailable)
    assert nvml.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Sampler() as sampler:
        pass
    assert sampler.summary().unavailable == "nvidia-ml-py is not installed; pip install 'drift-kernels[cuda]'"
    with pytest.raises(ValueError, match="interval_s is 0"):
        Sampler(interval_s=0)


def test_names_and_numbers_of_the_real_bindings() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name in vars(FakeNvml):
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU) == (1, 2, 0)
    assert issubclass(pynvml.NVMLError_NotSupported, pynvml.NVMLError)
    assert set(THROTTLING) == {
        pynvml.nvmlClocksThrottleReasonSwPowerCap,
        pynvml.nvmlClocksThrottleReasonHwSlowdown,
        pynvml.nvmlClocksThrottleReasonSyncBoost,
        pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
