"""From an EngineConfig to a started engine: names to objects, the executor with its model and pool, costs, a warm-up.

What can be wrong with the configuration is found first, before anything large is loaded. Imports no torch itself:
that is the executors' business, and not every one of them needs it. Knows nothing of sockets or clients.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from drift_core.engine import Engine, EngineConfig, ModelExecutor, Progress, Setup
from drift_core.joining import Joining
from drift_core.model.config import load_config, model_directory
from drift_scheduler import plugins
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.table import CostTable, read_table
from drift_scheduler.decision_log import DecisionLog
from drift_scheduler.errors import DriftError, UnknownNameError
from drift_scheduler.protocols import CostModel
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.simulation.run import parse_choice

log = logging.getLogger("drift.engine")

LOAD_FORMATS: Final = ("auto", "dummy")


def assemble(config: EngineConfig, progress: Progress) -> Engine:
    """Build and warm up everything. Raises DriftError on the first thing that is wrong."""
    registry = installed_registry()
    dispatch = policy(registry, "dispatch policy", config.dispatch, config.dispatch_options)
    partitions = policy(registry, "partition policy", config.partition, config.partition_options)
    given = _given_costs(config, registry)
    setup, executor = build_executor(config, registry, progress)
    try:
        costs = given if given is not None else _own_costs(setup, executor)
        progress("warm up", 0.0)
        executor.warm_up()
        settings: dict[str, Any] = msgspec.to_builtins(config)
        limits = Limits(max_running=config.max_running, max_context_tokens=executor.plan.max_context)
        scheduler = Scheduler(
            executor.device, executor.kv, dispatch, partitions, costs, limits, stopwatch=time.perf_counter
        )
        if hasattr(executor, "meanwhile"):
            executor.meanwhile = scheduler.plan_ahead
        if hasattr(executor, "planned"):
            executor.planned = lambda: scheduler.planned
        observers = registry.observers(settings)
        decisions = DecisionLog(config.log, scheduler, settings) if config.log else None
        joining = _joining(setup)
        return Engine(
            config, setup.model, setup.directory, executor, scheduler, observers, decisions, joining
        )
    except BaseException:
        executor.close()
        raise


def measure_table(config: EngineConfig, progress: Progress, *, full: bool) -> CostTable:
    """Load what `config` names and profile it, without serving. Raises DriftError."""
    from drift_core.costs import measure

    registry = installed_registry()
    setup, executor = build_executor(config, registry, progress)
    try:
        return measure(setup, executor, full=full)
    finally:
        executor.close()


def _joining(setup: Setup) -> Joining:
    """What compiles forms. The vocabulary is read now, with the warm-up: no step may wait for that later."""
    return Joining.of_model(setup.directory, setup.model.vocab_size, setup.model.eos_token_ids)


def build_executor(
    config: EngineConfig, registry: plugins.Registry, progress: Progress
) -> tuple[Setup, ModelExecutor]:
    """The executor that the configuration names, and what it was built from. Raises DriftError."""
    device = _device_kind(config.device, registry)
    if config.simulate is not None and device != "simulated":
        raise DriftError(f"simulate is for the device simulated, not for {device}; add --device simulated")
    if config.load_format not in LOAD_FORMATS:
        raise UnknownNameError("load format", config.load_format, LOAD_FORMATS)
    model = load_config(config.model, registry.of("model"))
    setup = Setup(config, model, model_directory(config.model), progress)
    executor: ModelExecutor = registry.create("executor", device, setup)
    return setup, executor


def installed_registry() -> plugins.Registry:
    """What is installed; a plugin that cannot be loaded does not keep the engine from starting without it."""
    registry = plugins.load(strict=False)
    for problem in registry.problems:
        log.warning("left out: %s", problem)
    return registry


def policy(registry: plugins.Registry, kind: str, choice: str, options: Mapping[str, Any]) -> Any:
    """A policy from `NAME` or `NAME:option=value:...`, and further options."""
    name, written = parse_choice(choice)
    return registry.create(kind, name, **(written | dict(options)))


def _device_kind(wanted: str, registry: plugins.Registry) -> str:
    """The executor's name: the accelerator where "auto" finds one that an executor is installed for."""
    installed = registry.of("executor")
    if wanted == "auto":
        import torch

        return "cuda" if "cuda" in installed and torch.cuda.is_available() else "cpu"
    if wanted not in installed:
        raise UnknownNameError("device", wanted, ["auto", *installed])
    return wanted


def _given_costs(config: EngineConfig, registry: plugins.Registry) -> CostModel | None:
    """The cost model of the configuration, where it does not have to be measured."""
    if config.cost != "auto":
        costs: CostModel = registry.create("cost model", config.cost, **config.cost_options)
        return costs
    if config.profile in ("short", "none"):
        return None
    return FittedCost(read_table(config.profile))


def _own_costs(setup: Setup, executor: ModelExecutor) -> CostModel:
    """What an executor says of itself, where it knows without measuring; else what is measured."""
    costs: CostModel | None = getattr(executor, "costs", None)
    if costs is not None:
        return costs
    from drift_core.costs import measured_costs

    return measured_costs(setup, executor)
