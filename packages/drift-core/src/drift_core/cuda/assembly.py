"""From a `Setup` to a CUDA executor: device, partitions, weights, memory plan, kernels.

What can be wrong is found before weights are loaded. The partition mechanism is green contexts where device and driver
have them; elsewhere the whole device for one phase at a time or for two plain streams, and a line in the log says why.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from drift_core.assembly import weights_on
from drift_core.cuda.device import Partitions
from drift_core.cuda.executor import CudaExecutor
from drift_core.cuda.kernels import Shape, TritonKernels
from drift_core.cuda.torch_cuda import TorchCuda
from drift_core.engine import Setup
from drift_core.kv import PagedKv, PoolPlan, plan_pool, pool_pages
from drift_core.memory import check_weights_fit, readable
from drift_core.model.config import ModelConfig
from drift_core.model.decoder import Decoder, KvCache
from drift_core.model.weights import DTYPES, Weights
from drift_core.sequences import SequenceTable
from drift_scheduler.domain import Device, Partition, Sharing
from drift_scheduler.errors import DriftError, UnknownNameError

log = logging.getLogger("drift.engine")

CUDA_DTYPES = ("bfloat16", "float16")
PREFILL_TOKENS = 8192
MEMORY_SHARE = 0.92
"""Of what weights and reserve leave free, the share that KV may take."""


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What an executor is built with, besides model and device."""

    page_tokens: int = 16
    max_running: int = 64
    max_context: int = 8192
    kv_memory_bytes: int | None = None
    prefill_tokens: int = PREFILL_TOKENS
    seed: int = 0


def build_cuda(setup: Setup) -> CudaExecutor:
    """The executor with its weights and KV pool. Raises DriftError when device, memory or weights do not do."""
    config, model = setup.config, setup.model
    accelerator = TorchCuda()
    dtype = DTYPES[_dtype_name(config.dtype, model)]
    kernels = _kernels(Shape.of(model, config.page_tokens), accelerator, dtype)
    check_weights_fit(config.model, model.num_parameters * dtype.itemsize, accelerator.free_bytes())
    partitions = green_contexts_or_whole(accelerator)
    try:
        weights = weights_on("cuda", setup, dtype)
        options = CudaOptions(
            config.page_tokens, config.max_running, setup.max_context, config.kv_memory_bytes,
            max(PREFILL_TOKENS, min(setup.max_context, 4 * PREFILL_TOKENS)), config.seed,
        )  # fmt: skip
        setup.progress("allocate KV", 0.0)
        return assemble_cuda(model, weights, accelerator, partitions, kernels, options)
    except BaseException:
        partitions.close()
        raise


def assemble_cuda(
    model: ModelConfig,
    weights: Weights,
    accelerator: TorchCuda,
    partitions: Partitions,
    kernels: TritonKernels,
    options: CudaOptions,
) -> CudaExecutor:
    """An executor over weights that are on the device."""
    device = cuda_device(accelerator, partitions, model.num_layers)
    plan = plan_memory(model, weights.dtype, accelerator.free_bytes(), len(device.splits()) + 2, options)
    log.info(plan.describe())
    cache = KvCache.allocate(model, plan.num_pages + 1, plan.page_tokens, weights.dtype, accelerator.device)
    decoder = Decoder(model, weights, kernels.ops(accelerator.units), plan.max_context)
    sequences = SequenceTable()
    kv = PagedKv(plan.num_pages, plan.page_tokens, sequences.tokens_of, put_off=True)
    return CudaExecutor(
        accelerator, partitions, decoder, cache, kernels, kv, plan, sequences, device,
        max_running=options.max_running, prefill_tokens=options.prefill_tokens, seed=options.seed,
    )  # fmt: skip


def green_contexts_or_whole(accelerator: TorchCuda) -> Partitions:
    """Splits of the device, or the reason in the log why there are none."""
    from drift_kernels.streams_only import PartitionUnavailable, StreamsOnly

    try:
        from drift_kernels.green_contexts import GreenContexts

        made = GreenContexts(accelerator.device.index or 0)
    except PartitionUnavailable as why:
        log.warning("the device is not divided: %s", why)
        return StreamsOnly(accelerator.device.index or 0)
    log.info("%s", made.description)
    for note in made.notes:
        log.info("partitions: %s", note)
    return made


def cuda_device(accelerator: TorchCuda, partitions: Partitions, num_layers: int) -> Device:
    """What scheduler and policies see of it."""
    menu = tuple(Partition(*entry) for entry in partitions.menu())
    sharings = frozenset(Sharing)
    if not any(entry.prefill and entry.decode for entry in menu):
        sharings -= {Sharing.SPATIAL}
    return Device(partitions.units, menu, num_layers, sharings, name=f"cuda: {accelerator.name}")


def plan_memory(
    model: ModelConfig, dtype: torch.dtype, free: int, prefill_streams: int, options: CudaOptions
) -> PoolPlan:
    """The KV pool for what is free: less what passes need, or as large as asked for. Raises DriftError."""
    page = KvCache.bytes_per_page(model, options.page_tokens, dtype)
    reserve = pass_bytes(model, dtype, options) * prefill_streams
    budget = int((free - reserve) * MEMORY_SHARE)
    wanted = options.kv_memory_bytes
    if wanted is not None and wanted > free:
        raise DriftError(
            f"too little memory: a KV budget of {readable(wanted)}, and {readable(free)} of the device are free"
        )
    max_context = options.max_context
    fitting = pool_pages(wanted or budget, page) * options.page_tokens
    if wanted is None and 1 < fitting < max_context:
        log.warning("the context is limited to %d tokens of %d: that much KV fits", fitting, max_context)
        max_context = fitting
    useful = -(-max_context // options.page_tokens) * options.max_running * page
    return plan_pool(wanted or min(budget, useful), page, options.page_tokens, max_context)


def pass_bytes(model: ModelConfig, dtype: torch.dtype, options: CudaOptions) -> int:
    """What the tensors of one prefill come to at their most, on one stream: torch keeps freed memory per stream."""
    wide = 3 * model.intermediate_size + 6 * model.hidden_size
    wide += 2 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return options.prefill_tokens * wide * dtype.itemsize


def _dtype_name(wanted: str, model: ModelConfig) -> str:
    if wanted == "auto":
        return model.dtype if model.dtype in CUDA_DTYPES else CUDA_DTYPES[0]
    if wanted not in CUDA_DTYPES:
        raise UnknownNameError("dtype on a GPU", wanted, ["auto", *CUDA_DTYPES])
    return wanted


def _kernels(shape: Shape, accelerator: TorchCuda, dtype: torch.dtype) -> TritonKernels:
    try:
        return TritonKernels(shape, accelerator.capability, dtype)
    except ModuleNotFoundError as missing:
        raise DriftError(
            f"{missing.name} is not installed, device cuda needs it: pip install 'drift-kernels[cuda]'"
        ) from missing
    except ValueError as why:
        raise DriftError(f"no kernels for this model on {accelerator.name}: {why}") from why
