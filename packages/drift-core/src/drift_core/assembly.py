"""The CPU executor from an EngineConfig: weights, KV pool, cores.

Knows nothing of sockets, clients or policies; `drift_core.composition` puts the engine together.
"""

from __future__ import annotations

import logging

import torch

from drift_core.engine import EngineConfig, Setup
from drift_core.executor import CpuExecutor
from drift_core.kv import PagedKv, PoolPlan, plan_pool, pool_pages
from drift_core.lanes import Pin
from drift_core.memory import available_bytes, check_weights_fit, kv_budget, readable
from drift_core.model.config import ModelConfig
from drift_core.model.decoder import Decoder, KvCache
from drift_core.model.weights import DTYPES, Weights, load_weights, random_weights
from drift_core.sequences import SequenceTable
from drift_kernels.affinity import CpuAffinity
from drift_kernels.ops import Ops, select_ops
from drift_scheduler.domain import DIVIDING, Device, Lane, Partition, Sharing
from drift_scheduler.errors import DriftError, UnknownNameError

log = logging.getLogger("drift.engine")


def build_cpu(setup: Setup) -> CpuExecutor:
    """The CPU executor with its weights and KV pool. Raises DriftError when memory or weights do not do."""
    config, model = setup.config, setup.model
    affinity = _affinity(config.cores)
    dtype_name = _dtype_name(config.dtype, model)
    dtype = DTYPES[dtype_name]
    ops = _ops(dtype)
    max_context = setup.max_context
    check_weights_fit(config.model, model.num_parameters * dtype.itemsize, available_bytes())
    weights = weights_on("cpu", setup, dtype)
    setup.progress("allocate KV", 0.0)
    plan = _plan(config, model, dtype, max_context)
    log.info(plan.describe())
    cache = KvCache.allocate(model, plan.num_pages, plan.page_tokens, dtype, "cpu")
    decoder = Decoder(model, weights, ops, plan.max_context)
    return cpu_executor(decoder, cache, plan, affinity, seed=config.seed)


def weights_on(device: str, setup: Setup, dtype: torch.dtype) -> Weights:
    """The model's weights on a device: of its checkpoint, mapped and copied tensor by tensor, or made up there."""

    def tell(fraction: float) -> None:
        setup.progress("load weights", fraction)

    tell(0.0)
    if setup.config.load_format == "dummy":
        weights = random_weights(setup.model, dtype, device, setup.config.seed)
        tell(1.0)
        return weights
    return load_weights(setup.directory, setup.model, dtype, device, tell)


def cpu_executor(
    decoder: Decoder,
    cache: KvCache,
    plan: PoolPlan,
    affinity: CpuAffinity,
    *,
    seed: int = 0,
    device: Device | None = None,
) -> CpuExecutor:
    """An executor over a decoder and its cache, with its own tokens and KV pool.

    `device`: another menu than the cores', for tests; then lanes share all the cores.
    """
    sequences = SequenceTable()
    kv = PagedKv(plan.num_pages, plan.page_tokens, sequences.tokens_of)
    own = cpu_device(affinity, decoder.config.num_layers)
    pin = pin_with(affinity) if device is None else _pin_nowhere
    return CpuExecutor(decoder, cache, kv, plan, sequences, device or own, pin, seed)


def cpu_device(affinity: CpuAffinity, num_layers: int) -> Device:
    """What the cores offer. One core cannot be split, so there nothing runs side by side."""
    menu = tuple(Partition(prefill, decode) for prefill, decode in affinity.menu())
    sharings = DIVIDING if affinity.units > 1 else DIVIDING - {Sharing.SPATIAL}
    return Device(affinity.units, menu, num_layers, sharings, name=f"cpu: {affinity.description}")


def pin_with(affinity: CpuAffinity) -> Pin:
    """The affinity mechanism in the scheduler's words."""

    def pin(lane: Lane, partition: Partition) -> int:
        return affinity.pin(lane.value, (partition.prefill, partition.decode))

    return pin


def _pin_nowhere(lane: Lane, partition: Partition) -> None:
    """Leave the thread where it is."""


# ---------------------------------------------------------------------------------------------- choices


def _affinity(cores: int | None) -> CpuAffinity:
    try:
        return CpuAffinity(cores)
    except ValueError as error:
        raise DriftError(str(error)) from error


def _dtype_name(wanted: str, model: ModelConfig) -> str:
    if wanted == "auto":
        return model.dtype
    if wanted not in DTYPES:
        raise UnknownNameError("dtype", wanted, ["auto", *DTYPES])
    return wanted


def _ops(dtype: torch.dtype) -> Ops:
    ops = select_ops("cpu", dtype)
    log.info("ops: %s", ops.description)
    return ops


def _plan(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, max_context: int) -> PoolPlan:
    page = KvCache.bytes_per_page(model, config.page_tokens, dtype)
    useful = -(-max_context // config.page_tokens) * config.max_running * page
    budget = kv_budget(config.kv_memory_bytes, useful=useful, available=available_bytes())
    fitting = pool_pages(budget, page) * config.page_tokens
    if config.max_context is None and config.kv_memory_bytes is None and 1 < fitting < max_context:
        log.warning(
            "the context is limited to %d tokens of the model's %d, which is what %s of KV hold; give it more memory",
            fitting, max_context, readable(budget),
        )  # fmt: skip
        max_context = fitting
    return plan_pool(budget, page, config.page_tokens, max_context)
