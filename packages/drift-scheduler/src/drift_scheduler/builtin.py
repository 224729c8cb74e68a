"""The built-in plugin: registers Drift's own policies, cost models and workloads as a third party would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from drift_scheduler import cost, dispatch, partition, workloads
from drift_scheduler.domain import Request
from drift_scheduler.hookspecs import hookimpl
from drift_scheduler.protocols import CostModel, DispatchPolicy, PartitionPolicy


@hookimpl
def drift_dispatch_policies() -> Mapping[str, Callable[..., DispatchPolicy]]:
    """Built-in dispatch policies."""
    return dispatch.FACTORIES


@hookimpl
def drift_partition_policies() -> Mapping[str, Callable[..., PartitionPolicy]]:
    """Built-in partition policies."""
    return partition.FACTORIES


@hookimpl
def drift_cost_models() -> Mapping[str, Callable[..., CostModel]]:
    """Built-in cost models."""
    return cost.FACTORIES


@hookimpl
def drift_workloads() -> Mapping[str, Callable[..., Iterable[Request]]]:
    """Built-in workloads."""
    return workloads.FACTORIES
