"""What goes wrong at start-up or on closing: nothing stays behind, nothing goes twice, and the reason is one line."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress

import pytest
from fake_cuda import FakeCuda

from drift_kernels.driver import CudaError, Driver
from drift_kernels.green_contexts import GreenContexts, PartitionUnavailable
from drift_kernels.streams_only import StreamsOnly

MENU = [(100, 32), (84, 48)]
MACHINES = {
    "13.1": {},
    "12.8": {"version": 12080, "tells_granularity": False},
    "12.4": {"version": 12040, "tells_granularity": False, "lacks": ("cuGreenCtxStreamCreate",)},
    "topology": {"structured_refuses": (32,)},
}


def green(cuda: FakeCuda, **options: object) -> GreenContexts:
    return GreenContexts(driver=Driver(cuda), **options)


def start_up(machine: dict) -> list[str]:
    cuda = FakeCuda(**machine)
    contexts = green(cuda, menu=MENU)
    names = cuda.names()
    contexts.close()
    return names


EVERY_CALL = [
    pytest.param(machine, index, id=f"{machine}-{index}-{name}")
    for machine, options in MACHINES.items()
    for index, name in enumerate(start_up(options))
]


@pytest.mark.parametrize(("machine", "index"), EVERY_CALL)
def test_out_of_memory_at_any_call_leaves_nothing(machine: str, index: int) -> None:
    cuda = FakeCuda(**MACHINES[machine])
    cuda.failures[index] = 2
    with pytest.raises(PartitionUnavailable, match="CUDA_ERROR_OUT_OF_MEMORY") as caught:
        green(cuda, menu=MENU)
    assert cuda.left() == []
    assert caught.value.fix
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("machine", "index"), EVERY_CALL)
def test_a_symbol_missing_at_any_call_leaves_nothing(machine: str, index: int) -> None:
    cuda = FakeCuda(**MACHINES[machine])
    cuda.failures[index] = RuntimeError('Function "cuSomething" not found')
    with pytest.raises(PartitionUnavailable, match='Function "cuSomething" not found'):
        green(cuda, menu=MENU)
    assert cuda.left() == []


@pytest.mark.parametrize(("machine", "index"), EVERY_CALL)
@pytest.mark.parametrize("code", [801, 915])
def test_a_refusal_at_any_call_is_done_without_or_told(machine: str, index: int, code: int) -> None:
    cuda = FakeCuda(**MACHINES[machine])
    cuda.failures[index] = code
    with ExitStack() as stack, suppress(PartitionUnavailable):
        assert stack.enter_context(green(cuda, menu=MENU)).notes
    assert cuda.left() == []


def test_an_interrupt_during_start_up_leaves_nothing() -> None:
    class Interrupting(FakeCuda):
        def cuGreenCtxStreamCreate(self, greenCtx: object, flags: int, priority: int) -> object:
            if len(self.destroyed) + len([h for h in self.handles if h.kind == "stream"]) == 4:
                raise KeyboardInterrupt
            return super().cuGreenCtxStreamCreate(greenCtx, flags, priority)

    cuda = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        green(cuda, menu=MENU)
    assert cuda.left() == []


def test_closing_goes_backwards_and_twice_is_harmless() -> None:
    cuda = FakeCuda()
    contexts = green(cuda, menu=MENU)
    started = len(cuda.calls)
    created = [h for h in cuda.handles if h.alive]
    contexts.close()
    assert cuda.destroyed == created[::-1]
    names = cuda.names(started)
    assert names == [*["cuStreamDestroy", "cuGreenCtxDestroy"] * 4, *["cuStreamDestroy"] * 2, names[-1]]
    assert names[-1] == "cuDevicePrimaryCtxRelease"
    contexts.close()
    assert len(cuda.calls) == started + len(names)
    for use in (contexts.streams, contexts.torch_streams):
        with pytest.raises(RuntimeError, match="green contexts of NVIDIA H200 are closed"):
            use((100, 32))
    with pytest.raises(RuntimeError, match="closed"):
        contexts.streams((132, 0))


@pytest.mark.parametrize(
    ("name", "offset"), [("cuStreamDestroy", 0), ("cuGreenCtxDestroy", 1), ("cuDevicePrimaryCtxRelease", 6)]
)
def test_what_cannot_be_destroyed_does_not_keep_the_rest(
    name: str, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = FakeCuda()
    contexts = green(cuda, menu=[(100, 32)])
    started = len(cuda.calls)
    cuda.failures[started + offset] = 1
    with caplog.at_level(logging.WARNING), pytest.raises(CudaError, match=name):
        contexts.close()
    assert "could not be destroyed" in caplog.text
    names = cuda.names(started)
    assert names.count("cuGreenCtxDestroy") == 2
    assert names.count("cuStreamDestroy") == 4
    assert names.count("cuDevicePrimaryCtxRelease") == 1
    contexts.close()
    assert len(cuda.calls) == started + len(names)


def test_a_failed_destroy_during_a_failed_start_up_does_not_hide_the_reason() -> None:
    cuda = FakeCuda()
    cuda.failing = {"cuDevSmResourceSplit": 2, "cuDevicePrimaryCtxRelease": 1}
    with pytest.raises(PartitionUnavailable, match="cuDevSmResourceSplit failed: CUDA_ERROR_OUT_OF_MEMORY"):
        green(cuda, menu=MENU)


@pytest.mark.parametrize(
    ("machine", "reason", "fix"),
    [
        ({"version": 12030}, "the driver has CUDA 12.3, green contexts need 12.4", "550 or newer"),
        ({"capability": (5, 2)}, "compute capability 5.2, green contexts need 6.0", "'streams'"),
        ({"devices": 0}, "no CUDA device 0: there is none", "nvidia-smi"),
        ({"sms": 14}, "14 SMs, too few for two lanes of 8", "'streams'"),
        ({"lacks": ("cuDeviceGetDevResource",)}, "has no cuDeviceGetDevResource", "cuda-bindings>=12.8"),
        ({"lacks": ("cuGreenCtxCreate",)}, "has no cuGreenCtxCreate", "cuda-bindings>=12.8"),
    ],
)
def test_a_machine_that_cannot_is_told_why_and_what_helps(machine: dict, reason: str, fix: str) -> None:
    cuda = FakeCuda(**machine)
    with pytest.raises(PartitionUnavailable) as caught:
        green(cuda)
    assert reason in caught.value.reason
    assert fix in caught.value.fix
    assert str(caught.value) == f"{caught.value.reason}; {caught.value.fix}"
    assert cuda.left() == []


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(PartitionUnavailable, match="no CUDA device 3: there are 2, from 0"):
        GreenContexts(3, driver=Driver(FakeCuda(devices=2)))


def test_a_mig_instance_that_refuses_is_named() -> None:
    cuda = FakeCuda(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    cuda.failing = {"cuDeviceGetDevResource": 801}
    with pytest.raises(
        PartitionUnavailable, match=r"MIG 1g\.10gb.*CUDA_ERROR_NOT_SUPPORTED.*rather than a MIG"
    ):
        green(cuda)
    assert cuda.left() == []


def test_no_driver_library() -> None:
    cuda = FakeCuda()
    cuda.failing = {"cuDriverGetVersion": RuntimeError("libcuda.so.1 cannot\n be found")}
    for mechanism in (GreenContexts, StreamsOnly):
        with pytest.raises(
            PartitionUnavailable, match=r"no NVIDIA driver here .*libcuda\.so\.1 cannot be found"
        ):
            mechanism(driver=Driver(cuda))
    assert cuda.names() == ["cuDriverGetVersion"] * 2


def test_every_split_refused() -> None:
    cuda = FakeCuda()
    cuda.failing = {"cuDevSmResourceSplit": 915, "cuDevSmResourceSplitByCount": 915}
    with pytest.raises(PartitionUnavailable, match="no split was granted"):
        green(cuda)
    assert cuda.left() == []


@pytest.mark.parametrize("index", range(12))
def test_streams_only_leaves_nothing_at_any_failure(index: int) -> None:
    cuda = FakeCuda()
    cuda.failures[index] = 2
    with pytest.raises(PartitionUnavailable, match="CUDA_ERROR_OUT_OF_MEMORY"):
        StreamsOnly(driver=Driver(cuda))
    assert cuda.left() == []
