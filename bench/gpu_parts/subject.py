"""The model that is measured: Llama-3.1-8B's shape, or another, with random weights made on the device."""

from __future__ import annotations

from typing import Any


def model_of(name: str) -> Any:
    """A published shape's config."""
    from drift_core.model.config import shape_config

    return shape_config(name)


def weights_of(config: Any) -> Any:
    """Random bf16 weights on the device."""
    import torch

    from drift_core.model.weights import random_weights

    return random_weights(config, torch.bfloat16, "cuda")


def decoder_of(name: str, pages: int) -> tuple[Any, Any]:
    """A decoder on the whole device and a small cache."""
    import torch

    from drift_core.model.decoder import Decoder, KvCache
    from drift_kernels.ops import select_ops

    config = model_of(name)
    decoder = Decoder(config, weights_of(config), select_ops("cuda", torch.bfloat16, native=True), 8192)
    return decoder, KvCache.allocate(config, pages, 16, torch.bfloat16, "cuda")


def executor_of(
    config: Any,
    weights: Any,
    *,
    max_running: int,
    max_context: int,
    prefill_tokens: int = 8192,
    kv_bytes: int | None = None,
) -> Any:
    """A CUDA executor, on green contexts where there are any."""
    import torch

    from drift_core.cuda.assembly import CudaOptions, assemble_cuda, green_contexts_or_whole
    from drift_core.cuda.kernels import Shape, TritonKernels
    from drift_core.cuda.torch_cuda import TorchCuda

    accelerator = TorchCuda()
    kernels = TritonKernels(Shape.of(config, 16), accelerator.capability, torch.bfloat16)
    options = CudaOptions(
        max_running=max_running,
        max_context=max_context,
        prefill_tokens=prefill_tokens,
        kv_memory_bytes=kv_bytes,
    )
    return assemble_cuda(config, weights, accelerator, green_contexts_or_whole(accelerator), kernels, options)
