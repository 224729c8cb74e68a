"""The facade over the bindings: errors, old drivers, and nothing needed to import it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
from fake_cuda import FakeCuda

from drift_kernels import driver as facade
from drift_kernels.driver import CudaError, Driver, DriverUnavailable, SmGroup, version_text


def test_an_error_code_is_an_exception_that_names_the_call() -> None:
    cuda = FakeCuda()
    cuda.failing = {"cuInit": 100}
    with pytest.raises(CudaError, match=r"cuInit failed: CUDA_ERROR_NO_DEVICE \(100\)") as caught:
        Driver(cuda).initialize()
    assert (caught.value.call, caught.value.code, caught.value.name) == (
        "cuInit",
        100,
        "CUDA_ERROR_NO_DEVICE",
    )


def test_facts_of_a_device() -> None:
    driver = Driver(FakeCuda())
    device = driver.device(0)
    assert driver.name(device) == "NVIDIA H200"
    assert driver.pci_bus_id(device) == "0000:1B:00.0"
    assert driver.memory_bytes(device) == 141 * 2**30
    assert driver.capability(device) == (9, 0)
    assert driver.multiprocessors(device) == 132
    assert driver.sm_resource(device).count == 132


def test_the_version_is_asked_once() -> None:
    cuda = FakeCuda(version=12040)
    driver = Driver(cuda)
    assert [driver.version(), driver.version()] == [12040, 12040]
    assert cuda.names() == ["cuDriverGetVersion"]
    assert version_text(12040) == "12.4"
    assert version_text(13010) == "13.1"


@pytest.mark.parametrize(
    ("version", "lacks", "structured", "queues"),
    [
        (13010, (), True, True),
        (13000, (), False, False),
        (13010, ("cuDevSmResourceSplit",), False, True),
        (13010, ("CUdevWorkqueueConfigScope",), True, False),
    ],
)
def test_newer_calls_need_both_driver_and_bindings(
    version: int, lacks: tuple[str, ...], structured: bool, queues: bool
) -> None:
    driver = Driver(FakeCuda(version=version, lacks=lacks))
    assert (driver.has_structured_split, driver.has_workqueues) == (structured, queues)


def test_parts_of_a_split_and_an_empty_remainder() -> None:
    driver = Driver(FakeCuda())
    whole = driver.sm_resource(driver.device(0))
    (first, second), rest = driver.split(whole, [SmGroup(32), SmGroup(100, backfill=True)])
    assert (first.count, second.count, rest.count) == (32, 100, 0)
    part, rest = driver.split_by_count(whole, 33)
    assert (part.count, rest.count) == (40, 92)
    with pytest.raises(CudaError, match="INVALID_RESOURCE_CONFIGURATION"):
        driver.split(part, [SmGroup(8)])


def test_the_context_before_comes_back_when_the_body_fails() -> None:
    cuda = FakeCuda()
    driver = Driver(cuda)
    with pytest.raises(ZeroDivisionError), driver.current("primary"):
        raise ZeroDivisionError
    assert cuda.current == []


@pytest.mark.parametrize("failing", ["cuStreamCreateWithPriority", "cuCtxPopCurrent"])
def test_a_stream_made_the_old_way_is_not_left_behind(failing: str) -> None:
    cuda = FakeCuda(lacks=("cuGreenCtxStreamCreate",))
    driver = Driver(cuda)
    device = driver.device(0)
    green = driver.create_green(driver.descriptor([driver.sm_resource(device).raw]), device)
    cuda.failing = {failing: 2}
    with pytest.raises(CudaError, match=failing):
        driver.create_green_stream(green)
    assert len(cuda.current) == (failing == "cuCtxPopCurrent")
    cuda.failing = {}
    driver.destroy_green(green)
    assert cuda.left() == []


@pytest.mark.parametrize(
    ("version", "way"), [(12040, "cuCtxFromGreenCtx"), (12050, "cuGreenCtxStreamCreate")]
)
def test_a_stream_is_made_as_the_driver_can_whatever_the_bindings_have(version: int, way: str) -> None:
    cuda = FakeCuda(version=version)
    driver = Driver(cuda)
    device = driver.device(0)
    green = driver.create_green(driver.descriptor([driver.sm_resource(device).raw]), device)
    started = len(cuda.calls)
    driver.create_green_stream(green)
    assert way in cuda.names(started)[:2]


def test_missing_bindings_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "cuda" or n.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(DriverUnavailable, match="cuda-bindings is not installed; pip install 'drift-kernels"):
        Driver()


def test_bindings_that_do_not_load_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError("libfoo.so:\n undefined symbol")

    monkeypatch.setattr(facade, "import_module", broken)
    with pytest.raises(DriverUnavailable, match=r"cuda-bindings does not load: libfoo\.so: undefined symbol"):
        Driver()


def test_importing_needs_no_bindings_no_nvml_and_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('cuda', 'pynvml', 'torch', 'triton'): sys.modules[name] = None\n"
        "import drift_kernels.driver, drift_kernels.nvml, drift_kernels.streams_only\n"
        "from drift_kernels.green_contexts import GreenContexts, PartitionUnavailable\n"
        "try: GreenContexts()\n"
        "except PartitionUnavailable as why: print(why)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "cuda-bindings is not installed; pip install 'drift-kernels[cuda]'\n"


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-bindings is not installed")
def test_without_a_driver_the_real_bindings_give_one_clear_line() -> None:
    try:
        there = Driver().version()
    except DriverUnavailable as error:
        why = str(error)
    else:
        pytest.skip(f"there is a driver here, of CUDA {version_text(there)}")
    assert why.startswith("no NVIDIA driver here")
    assert "\n" not in why
