"""The doctor on this machine, and on machines with every kind of trouble."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from drift_core import doctor
from drift_core.doctor import Finding, Machine, as_json, examine, healthy
from drift_kernels import green_contexts, ops
from drift_kernels.driver import CudaError, DriverUnavailable
from drift_kernels.green_contexts import PartitionUnavailable

NO_GPU = Machine(cuda=lambda: FakeDriver(version=None), kernel_driver=False)


class FakeDriver:
    """As much of `drift_kernels.driver.Driver` as the doctor asks."""

    def __init__(
        self,
        *,
        version: int | None = 13010,
        devices: int = 1,
        capability: tuple[int, int] = (9, 0),
        code: int = 0,
    ) -> None:
        self._version, self._devices, self._capability, self._code = version, devices, capability, code

    def version(self) -> int:
        if self._version is None:
            raise DriverUnavailable("no NVIDIA driver here (libcuda not found)", "install the driver")
        return self._version

    def initialize(self) -> None:
        if self._code:
            raise CudaError("cuInit", self._code, "CUDA_ERROR")

    def device_count(self) -> int:
        return self._devices

    def device(self, index: int) -> int:
        return index

    def name(self, device: int) -> str:
        return "NVIDIA H200"

    def pci_bus_id(self, device: int) -> str:
        return "0000:1B:00.0"

    def memory_bytes(self, device: int) -> int:
        return 141 << 30

    def capability(self, device: int) -> tuple[int, int]:
        return self._capability

    def multiprocessors(self, device: int) -> int:
        return 132


class Contexts:
    """Green contexts that are there."""

    description, notes = "green contexts on 132 SMs", ("100+32 is granted as 92+40",)

    def __init__(self, index: int, driver: object) -> None:
        self.index = index

    def __enter__(self) -> Contexts:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def menu(self) -> tuple[tuple[int, int], ...]:
        return ((132, 0), (92, 40), (0, 132))


class Nvml:
    """A device at rest; `throttling` as NVML's bits."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, throttling: int = 0, *, starts: bool = True) -> None:
        self.throttling, self.starts = throttling, starts

    def nvmlInit(self) -> None:
        if not self.starts:
            raise self.NVMLError("Driver/library version mismatch")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> str:
        return bus

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return 1980

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return 345

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 75_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 30

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.throttling


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with one device on which all works."""
    select = ops.select_ops

    def chosen(device: str, dtype: object, **options: object) -> object:
        if device.startswith("cuda"):
            return SimpleNamespace(description="Triton for sm_90")
        return select(device, dtype, **options)

    monkeypatch.setattr(ops, "select_ops", chosen)
    monkeypatch.setattr(green_contexts, "GreenContexts", Contexts)
    return Machine(cuda=FakeDriver, nvml=Nvml(), kernel_driver=True, torch_cuda=lambda: True)


def look(machine: Machine, section: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in dict(doctor.SECTIONS)[section](machine)}


def with_(machine: Machine, **changes: object) -> Machine:
    return Machine(**{name: getattr(machine, name) for name in Machine.__slots__} | changes)


def test_this_machine_is_examined_whole_and_every_trouble_has_a_fix() -> None:
    findings = examine(NO_GPU)
    assert {finding.section for finding in findings} == {"software", "cpu", "gpu", "drift"}
    assert {
        "python",
        "torch",
        "drift-core",
        "processor",
        "cpu-affinity",
        "driver",
        "registry",
        "demo model",
    } <= {finding.name for finding in findings}
    assert healthy(findings), [finding for finding in findings if finding.status == "broken"]
    for finding in findings:
        assert (finding.fix is not None) == (finding.status in ("limited", "broken"))
        assert "\n" not in finding.detail + (finding.fix or "")
    json.dumps(as_json(findings))


def test_the_command_reports_and_its_exit_code_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = [
        Finding("cpu", "kernels", "limited", "torch", "install a compiler"),
        Finding("gpu", "driver", "absent", "none"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    run = CliRunner().invoke(doctor.doctor, [])
    assert run.exit_code == 0
    assert "kernels: torch\n      fix: install a compiler\n" in run.output
    assert "All that is here works." in run.output
    found.append(Finding("drift", "plugins", "broken", "x", "update it"))
    target = tmp_path / "doctor.json"
    run = CliRunner().invoke(doctor.doctor, ["--json", str(target)])
    assert run.exit_code == 1
    assert "1 of 3 are broken" in run.output
    run = CliRunner().invoke(doctor.doctor, ["--json", "-"])
    written = json.loads(run.output)
    assert written == json.loads(target.read_text())
    assert (written["schema"], written["healthy"]) == ("drift.doctor/1", False)
    assert written["findings"][2] == {
        "section": "drift", "name": "plugins", "status": "broken", "detail": "x", "fix": "update it", "facts": {},
    }  # fmt: skip


def test_a_report_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from drift_scheduler.cli import drift

    monkeypatch.setattr(doctor, "examine", list)
    run = CliRunner().invoke(drift, ["doctor", "--json", str(tmp_path / "no" / "such.json")])
    assert run.exit_code == 2
    assert "drift: cannot write" in run.output


def test_the_command_is_installed() -> None:
    run = CliRunner().invoke(doctor.doctor, ["--help"])
    assert "no GPU is no fault" in run.output
    from drift_scheduler import plugins

    assert "doctor" in plugins.load().of("command")


def test_a_look_that_breaks_is_a_finding_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine) -> object:
        yield Finding("cpu", "first", "ok", "seen")
        raise OSError("no\n such thing")

    monkeypatch.setattr(doctor, "SECTIONS", (("cpu", broken), ("drift", doctor.look_at_drift)))
    findings = examine(NO_GPU)
    assert [finding.name for finding in findings][:2] == ["first", "look"]
    assert findings[1].detail == "OSError: no such thing"
    assert findings[-1].section == "drift"
    assert not healthy(findings)


# ---------------------------------------------------------------------------------------------- software


def test_what_a_package_lacks_is_named_with_the_command_that_installs_it() -> None:
    def version(name: str) -> str:
        if name in ("msgspec", "transformers", "uvloop", "drift-gateway"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    requires = [
        "torch>=2.11",
        "msgspec>=0.19",
        "uvloop; platform_system != 'Windows'",
        "triton; extra == 'cuda'",
    ]
    found = look(with_(NO_GPU, version=version, requires=lambda name: requires), "software")
    assert (found["drift-core"].status, found["drift-core"].fix) == ("broken", "pip install msgspec")
    assert found["drift-gateway"].status == found["transformers"].status == "absent"


def test_an_old_python_and_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (9, 9))
    monkeypatch.setattr(doctor, "OLDEST_TORCH", (99, 0))
    found = look(NO_GPU, "software")
    assert found["python"].status == found["torch"].status == "broken"
    assert found["python"].fix == "use Python 9.9 or newer"


# --------------------------------------------------------------------------------------------------- CPU


def test_instruction_sets_are_read_from_either_kind_of_cpuinfo(tmp_path: Path) -> None:
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text(
        "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 amx_bf16 avx512_bf16\n\nprocessor\t: 1\n"
    )
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd bf16 sve\nCPU part\t: 0xd4f\n\n")
    assert look(with_(NO_GPU, cpuinfo=x86), "cpu")["processor"].facts["instructions"] == [
        "avx2",
        "avx512_bf16",
        "amx_bf16",
    ]
    assert look(with_(NO_GPU, cpuinfo=arm), "cpu")["processor"].facts["instructions"] == [
        "asimd",
        "bf16",
        "sve",
    ]
    nothing = look(with_(NO_GPU, cpuinfo=tmp_path / "none"), "cpu")["processor"]
    assert nothing.status == "ok"
    assert "no vector instructions known" in nothing.detail


def test_ops_that_fall_back_and_workers_that_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ops.ReferenceOps("torch reference: no C compiler 'cc' on the path")
    monkeypatch.setattr(ops, "select_ops", lambda *a, **k: slow)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    found = look(NO_GPU, "cpu")
    assert found["kernels, bfloat16"].status == found["openmp"].status == "limited"
    assert "no C compiler" in found["kernels, bfloat16"].detail
    assert "C compiler" in str(found["kernels, bfloat16"].fix)


# --------------------------------------------------------------------------------------------------- GPU


def test_no_gpu_is_no_fault_and_a_driver_without_cuda_is_one() -> None:
    assert look(NO_GPU, "gpu")["driver"].status == "absent"
    running = look(with_(NO_GPU, kernel_driver=True), "gpu")["driver"]
    assert (running.status, running.fix) == ("broken", "install the driver")
    assert look(Machine(cuda=lambda: FakeDriver(devices=0)), "gpu")["driver"].status == "absent"
    hidden = Machine(cuda=lambda: FakeDriver(code=100), kernel_driver=True)
    assert look(hidden, "gpu")["driver"].status == "absent"
    mismatch = Machine(cuda=lambda: FakeDriver(code=803), kernel_driver=True)
    assert look(mismatch, "gpu")["driver"].status == "broken"


def test_a_gpu_on_which_all_works(gpu: Machine) -> None:
    found = look(gpu, "gpu")
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["device 0"].detail == "NVIDIA H200: compute capability 9.0, 132 SMs, 144384 MiB"
    partitions = found["device 0, green contexts"]
    assert partitions.detail == "green contexts on 132 SMs: 132+0 92+40 0+132; 100+32 is granted as 92+40"
    assert partitions.facts["menu"] == [[132, 0], [92, 40], [0, 132]]
    assert found["device 0, kernels"].detail == "Triton for sm_90"
    assert found["device 0, clocks"].detail == "SMs at 345 of 1980 MHz, power 75 W, temperature 30 C"


def test_green_contexts_that_cannot_be_say_why(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(index: int, driver: object) -> object:
        raise PartitionUnavailable(
            "the driver has CUDA 12.2, green contexts need 12.4", "install a newer one"
        )

    monkeypatch.setattr(green_contexts, "GreenContexts", refused)
    found = look(gpu, "gpu")["device 0, green contexts"]
    assert (found.status, found.fix) == ("limited", "install a newer one")
    assert "need 12.4" in found.detail


def test_contexts_that_cannot_be_given_back_are_broken(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Contexts):
        def __exit__(self, *error: object) -> None:
            raise CudaError("cuGreenCtxDestroy", 700, "CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(green_contexts, "GreenContexts", Stuck)
    assert look(gpu, "gpu")["device 0, green contexts"].status == "broken"


def test_an_old_device_leaves_the_cpu(gpu: Machine) -> None:
    found = look(with_(gpu, cuda=lambda: FakeDriver(capability=(7, 5))), "gpu")
    assert found["device 0"].status == "limited"
    assert "device 0, kernels" not in found


def test_torch_and_triton_that_do_not_use_the_device_are_broken(
    gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drift_kernels.native_library import NativeUnavailable

    def none(device: str, dtype: object, **options: object) -> object:
        raise NativeUnavailable("triton is not installed")

    monkeypatch.setattr(ops, "select_ops", none)
    found = look(with_(gpu, torch_cuda=lambda: False), "gpu")
    assert found["torch"].status == found["device 0, kernels"].status == "broken"
    assert "drift-kernels[cuda]" in str(found["device 0, kernels"].fix)


def test_throttling_and_a_mute_nvml_limit(gpu: Machine) -> None:
    hot = look(with_(gpu, nvml=Nvml(0x40)), "gpu")["device 0, clocks"]
    assert hot.status == "limited"
    assert "throttled by hardware thermal slowdown" in hot.detail
    mute = look(with_(gpu, nvml=Nvml(starts=False)), "gpu")["device 0, clocks"]
    assert (mute.status, mute.fix) == ("limited", "install the NVIDIA driver")
    assert "version mismatch" in mute.detail


# ------------------------------------------------------------------------------------------------- Drift


def test_plugins_that_do_not_load_and_that_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    from drift_scheduler import plugins
    from drift_scheduler.errors import PluginError

    real = plugins.load()
    broken = plugins.Registry(real.manager, real.names, (PluginError("plugin 'x' cannot be imported"),))
    monkeypatch.setattr(plugins, "load", lambda strict: broken)
    found = look(NO_GPU, "drift")
    assert (found["plugins"].status, found["registry"].status) == ("broken", "ok")
    assert "green-contexts" in found["registry"].facts["partition mechanism"]

    def clash(strict: bool) -> object:
        raise PluginError("dispatch policy 'gang' is registered by both 'a' and 'b'")

    monkeypatch.setattr(plugins, "load", clash)
    assert "both 'a' and 'b'" in look(NO_GPU, "drift")["plugins"].detail


def test_an_embedded_model_that_is_not_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from drift_core.model import config

    monkeypatch.setattr(config, "model_directory", lambda name: tmp_path)
    found = look(NO_GPU, "drift")["demo model"]
    assert "lacks config.json, model.safetensors, tokenizer.json" in found.detail
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert look(NO_GPU, "drift")["demo model"].status == "broken"


# --------------------------------------------------------------------------------------- the mechanisms


def test_mechanisms_are_registered_and_say_why_not_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from drift_kernels import driver
    from drift_scheduler import plugins
    from drift_scheduler.errors import DriftError, OptionError

    registry = plugins.load()
    assert {"cpu-affinity", "green-contexts", "streams"} <= set(registry.of("partition mechanism"))
    assert registry.create("partition mechanism", "cpu-affinity", 1).units == 1

    def none() -> object:
        raise DriverUnavailable("cuda-bindings is not installed", "pip install it")

    monkeypatch.setattr(driver, "load_bindings", none)
    for name in ("green-contexts", "streams"):
        with pytest.raises(
            DriftError, match=f"partition mechanism '{name}': cuda-bindings is not installed; pip"
        ):
            registry.create("partition mechanism", name, 0)
        with pytest.raises(OptionError, match="takes no option 'colour'"):
            registry.create("partition mechanism", name, 0, colour="red")
