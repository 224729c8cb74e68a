"""What drift-core registers: commands, model architectures, executors and the partition mechanisms.

Loaded by every `drift` command, so everything heavy is imported by the factories and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drift_scheduler.hookspecs import hookimpl

if TYPE_CHECKING:
    from drift_core.cuda.executor import CudaExecutor
    from drift_core.engine import Setup
    from drift_core.executor import CpuExecutor
    from drift_core.simulated import RealTimeExecutor
    from drift_kernels.affinity import CpuAffinity
    from drift_kernels.green_contexts import GreenContexts
    from drift_kernels.streams_only import StreamsOnly


@hookimpl
def drift_cli_commands() -> Mapping[str, Any]:
    """`drift generate`, `drift profile` and `drift doctor`."""
    from drift_core import cli, doctor

    return {"generate": cli.generate, "profile": cli.profile, "doctor": doctor.doctor}


@hookimpl
def drift_models() -> Mapping[str, Callable[..., Any]]:
    """The architectures of `drift_core.model.config`."""
    from drift_core.model.config import ARCHITECTURES

    return ARCHITECTURES


@hookimpl
def drift_executors() -> Mapping[str, Callable[..., Any]]:
    """Device kind -> `(Setup) -> executor`."""
    return {"cpu": _cpu, "cuda": _cuda, "simulated": _simulated}


@hookimpl
def drift_partition_mechanisms() -> Mapping[str, Callable[..., Any]]:
    """Core affinity for CPUs; green contexts, and streams without a partition, for NVIDIA GPUs."""
    return {"cpu-affinity": _affinity, "green-contexts": _green_contexts, "streams": _streams}


def _cpu(setup: Setup) -> CpuExecutor:
    from drift_core.assembly import build_cpu

    return build_cpu(setup)


def _cuda(setup: Setup) -> CudaExecutor:
    from drift_core.cuda.assembly import build_cuda

    return build_cuda(setup)


def _simulated(setup: Setup) -> RealTimeExecutor:
    from drift_core.simulated import build_simulated

    return build_simulated(setup)


def _affinity(device: int | None = None) -> CpuAffinity:
    from drift_kernels.affinity import CpuAffinity

    return CpuAffinity(device)


def _green_contexts(
    device: int = 0, *, relax_coscheduling: bool = False, menu: Sequence[tuple[int, int]] | None = None
) -> GreenContexts:
    from drift_kernels.green_contexts import GreenContexts, PartitionUnavailable
    from drift_scheduler.errors import DriftError

    try:
        return GreenContexts(device, relax_coscheduling=relax_coscheduling, menu=menu)
    except PartitionUnavailable as why:
        raise DriftError(f"partition mechanism 'green-contexts': {why}") from why


def _streams(device: int = 0, *, decode_first: bool = True) -> StreamsOnly:
    from drift_kernels.streams_only import PartitionUnavailable, StreamsOnly
    from drift_scheduler.errors import DriftError

    try:
        return StreamsOnly(device, decode_first=decode_first)
    except PartitionUnavailable as why:
        raise DriftError(f"partition mechanism 'streams': {why}") from why
