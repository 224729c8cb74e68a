"""What an executor's work costs: a kept or fresh measurement, or an estimate from first principles.

Knows nothing of requests or policies; `drift_core.composition` asks where the configuration gives no costs.
"""

from __future__ import annotations

import logging

import msgspec

from drift_core import profile, profile_cache
from drift_core.engine import ModelExecutor, Setup
from drift_core.model.weights import DTYPES
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.hardware import ModelSpec, device_spec
from drift_scheduler.cost.roofline import RooflineCost
from drift_scheduler.cost.table import CostTable
from drift_scheduler.protocols import CostModel

log = logging.getLogger("drift.engine")

SPOT_TOLERANCE = 1.5
"""A kept profile whose times are off by more than this factor is measured again."""


def measured_costs(setup: Setup, executor: ModelExecutor) -> CostModel:
    """A fit of the short profile, or without one an estimate. Raises DriftError."""
    if setup.config.profile == "none":
        return _estimated_costs(setup, executor)
    return FittedCost(_table(setup, executor))


def measure(setup: Setup, executor: ModelExecutor, *, full: bool) -> CostTable:
    """Profile an executor: every split and all layers (`full`), or what a few seconds allow."""
    running = setup.config.max_running
    own = getattr(executor, "plan_grid", None)  # of executors whose devices are nothing like CPU cores
    if own is not None:
        grid = own(max_running=running, full=full)
    else:
        grid = profile.plan_grid(
            executor.device, max_context=executor.plan.max_context, max_running=running, full=full
        )
    setup.progress("profile", 0.0)
    return executor.profile(grid, setup.config.model, lambda fraction: setup.progress("profile", fraction))


def _table(setup: Setup, executor: ModelExecutor) -> CostTable:
    """The short profile: from an earlier start with everything alike, or measured now and kept."""
    place = profile_cache.place(*executor.identity)
    table = profile_cache.find(place)
    if table is not None and _still_true(table, setup, executor):
        log.info("profile: taken from %s", place)
        return table
    table = measure(setup, executor, full=False)
    if profile_cache.keep(table, place):
        log.info("profile: measured, kept in %s", place)
    return table


def _still_true(table: CostTable, setup: Setup, executor: ModelExecutor) -> bool:
    """Whether two of a kept table's times are what they are now: it may have been measured beside other work."""
    total = executor.device.total_units
    prefills = [row for row in table.prefill if row.units == total and row.requests == 1]
    decodes = [row for row in table.decode if row.units == total]
    if not prefills or not decodes:
        return False
    prefill, decode = prefills[0], decodes[-1]
    grid = profile.spot_grid(
        executor.device, prefill=(prefill.new, prefill.reused), decode=(decode.batch, decode.context_tokens)
    )
    now = executor.profile(grid, setup.config.model, lambda fraction: None)
    ratios = (now.prefill[0].seconds / prefill.seconds, now.decode[0].seconds / decode.seconds)
    return all(1 / SPOT_TOLERANCE <= ratio <= SPOT_TOLERANCE for ratio in ratios)


def _estimated_costs(setup: Setup, executor: ModelExecutor) -> CostModel:
    """First principles, without a measurement: the right order of magnitude at best."""
    model = setup.model
    own = getattr(executor, "described", None)  # of executors whose devices are nothing like CPU cores
    if own is not None:
        spec = own()
    else:
        spec = msgspec.structs.replace(device_spec("cpu"), units=executor.device.total_units)
    size = float(DTYPES[executor.dtype].itemsize)
    described = ModelSpec(
        name=setup.config.model,
        num_layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate=model.intermediate_size,
        vocab=model.vocab_size,
        tied_embeddings=model.tied_embeddings,
        bytes_per_weight=size,
        bytes_per_kv=size,
        max_context=model.max_context,
    )
    return RooflineCost(spec, described)
