"""What drift-core registers: commands, model architectures, the CPU executor and its partition mechanism.

Loaded by every `drift` command, so everything heavy is imported by the factories and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from drift_scheduler.hookspecs import hookimpl

if TYPE_CHECKING:
    from drift_core.assembly import Setup
    from drift_core.executor import CpuExecutor
    from drift_kernels.affinity import CpuAffinity


@hookimpl
def drift_cli_commands() -> Mapping[str, Any]:
    """`drift generate` and `drift profile`."""
    from drift_core import cli

    return {"generate": cli.generate, "profile": cli.profile}


@hookimpl
def drift_models() -> Mapping[str, Callable[..., Any]]:
    """The architectures of `drift_core.model.config`."""
    from drift_core.model.config import ARCHITECTURES

    return ARCHITECTURES


@hookimpl
def drift_executors() -> Mapping[str, Callable[..., Any]]:
    """Device kind -> `(Setup) -> executor`."""
    return {"cpu": _cpu}


@hookimpl
def drift_partition_mechanisms() -> Mapping[str, Callable[..., Any]]:
    """Core affinity, for CPUs."""
    return {"affinity": _affinity}


def _cpu(setup: Setup) -> CpuExecutor:
    from drift_core.assembly import build_cpu

    return build_cpu(setup)


def _affinity(device: int | None = None) -> CpuAffinity:
    from drift_kernels.affinity import CpuAffinity

    return CpuAffinity(device)
