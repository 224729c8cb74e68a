"""Every hook a plugin may implement, in entry-point group `drift`.

Hooks assemble, Protocols run: each is called once at start-up to turn names into factories, never per step.
A registration hook returns `Mapping[name, factory]`; two plugins that register one name are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pluggy

from drift_scheduler.domain import Request
from drift_scheduler.protocols import CostModel, DispatchPolicy, Executor, Observer, PartitionPolicy

PROJECT = "drift"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def drift_dispatch_policies() -> Mapping[str, Callable[..., DispatchPolicy]]:  # type: ignore[empty-body]
    """Dispatch policies: name -> `(**options) -> DispatchPolicy`."""


@hookspec
def drift_partition_policies() -> Mapping[str, Callable[..., PartitionPolicy]]:  # type: ignore[empty-body]
    """Partition policies: name -> `(**options) -> PartitionPolicy`."""


@hookspec
def drift_cost_models() -> Mapping[str, Callable[..., CostModel]]:  # type: ignore[empty-body]
    """Cost models: name -> `(**options) -> CostModel`."""


@hookspec
def drift_workloads() -> Mapping[str, Callable[..., Iterable[Request]]]:  # type: ignore[empty-body]
    """Workload generators: name -> `(seed, **options) -> Iterable[Request]`, arrivals in order."""


@hookspec
def drift_executors() -> Mapping[str, Callable[..., Executor]]:  # type: ignore[empty-body]
    """Executors: device kind -> `(setup) -> Executor`; `setup` is what the engine has settled before it needs one."""


@hookspec
def drift_partition_mechanisms() -> Mapping[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """How a split is enforced: name -> `(device) -> PartitionMechanism` (affinity, green contexts, …)."""


@hookspec
def drift_observers(config: Mapping[str, Any]) -> Sequence[Observer]:  # type: ignore[empty-body]
    """Objects told of every step; `config` is what the engine or simulation was started with."""


@hookspec
def drift_models() -> Mapping[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Model architectures: the name in config.json -> `(config.json as dict) -> ModelConfig`."""


@hookspec
def drift_cli_commands() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Subcommands of `drift`: name -> click command."""
