"""The decoder: runs layers `[i, j)` of any ragged batch over a paged KV cache.

One class for every architecture; the config's data decides what a layer does. Knows nothing of requests,
phases or lanes: prefill and decode differ only in their `AttentionInputs`. It keeps no state between calls
and no scratch memory, so several threads may run one Decoder at once on batches whose slots are disjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from drift_core.model.config import ModelConfig
from drift_core.model.rotary import RotaryTable
from drift_core.model.weights import LayerWeights, Weights
from drift_kernels.inputs import AttentionInputs, PageTables
from drift_kernels.ops import Ops

Lengths = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of every layer: `k[layer]`, `v[layer]` are [num_pages, page_tokens, kv_heads, head_dim]."""

    k: list[Tensor]
    v: list[Tensor]
    page_tokens: int

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> KvCache:
        """Zeroed pages for all layers, `num_pages * bytes_per_page` bytes."""
        shape = (num_pages, page_tokens, config.num_kv_heads, config.head_dim)
        with torch.inference_mode(False):
            k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
            v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        return cls(k, v, page_tokens)

    @staticmethod
    def bytes_per_page(config: ModelConfig, page_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers, keys and values."""
        per_layer = page_tokens * config.num_kv_heads * config.head_dim * dtype.itemsize
        return 2 * config.num_layers * per_layer

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.k[0].shape[0]


class Decoder:
    """A model ready to run: config, weights and the ops for their device and dtype."""

    def __init__(
        self, config: ModelConfig, weights: Weights, ops: Ops, max_context: int | None = None
    ) -> None:
        """max_context: positions to prepare for; without it the rotary table starts small and grows."""
        self.config, self.weights, self.ops = config, weights, ops
        rows = {} if max_context is None else {"rows": max_context}
        self._rotary = RotaryTable(
            config.rope, config.head_dim, config.max_context, weights.dtype, weights.device, **rows
        )
        self._device = str(weights.device)
        self._heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)

    def inputs(
        self, query_lens: Lengths, context_lens: Lengths, page_tables: PageTables, page_tokens: int
    ) -> AttentionInputs:
        """`AttentionInputs.build` with this model's scale, window and device."""
        return AttentionInputs.build(
            query_lens,
            context_lens,
            page_tables,
            page_tokens,
            self.config.scale,
            self.config.sliding_window,
            self._device,
        )

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """int64[T] -> the residual stream before layer 0, [T, H]."""
        return F.embedding(token_ids, self.weights.embedding)

    @torch.inference_mode()
    def run_layers(
        self, hidden: Tensor, layer_start: int, layer_stop: int, kv: KvCache, inputs: AttentionInputs
    ) -> Tensor:
        """The residual stream [T, H] before layer `layer_start` -> before `layer_stop`; `hidden` stays as it is.

        Writes the keys and values of these layers at `inputs.slots`. A layer's own window goes before
        `inputs.window`. Raises ValueError for layers the model lacks, a hidden state of another batch or a
        context beyond the model's.
        """
        config = self.config
        if not 0 <= layer_start <= layer_stop <= config.num_layers:
            raise ValueError(f"layers [{layer_start}, {layer_stop}) are not within [0, {config.num_layers})")
        if hidden.shape != (inputs.positions.shape[0], config.hidden_size):
            raise ValueError(
                f"hidden has shape {list(hidden.shape)}, the batch needs "
                f"{[inputs.positions.shape[0], config.hidden_size]}"
            )
        if layer_start == layer_stop:
            return hidden
        ops, layers, windows = self.ops, self.weights.layers, config.layer_windows
        rotary = self._rotary.rows(inputs.positions, inputs.max_context)
        eps, residual = config.rms_eps, hidden
        normed = ops.rms_norm(hidden, layers[layer_start].input_norm, eps)
        for i in range(layer_start, layer_stop):
            layer = layers[i]
            if windows[i] != inputs.window:
                inputs = replace(inputs, window=windows[i])
            mixed = self._attention(normed, layer, kv.k[i], kv.v[i], rotary, inputs)
            normed, residual = ops.add_rms_norm(mixed, residual, layer.mlp_norm, eps)
            gate_up = ops.linear(normed, layer.gate_up, layer.gate_up_bias)
            fed = ops.linear(ops.silu_and_mul(gate_up), layer.down, layer.down_bias)
            if i + 1 == layer_stop:
                return fed + residual
            normed, residual = ops.add_rms_norm(fed, residual, layers[i + 1].input_norm, eps)
        raise AssertionError("unreachable: the range is not empty")

    def _attention(
        self,
        normed: Tensor,
        layer: LayerWeights,
        k_pages: Tensor,
        v_pages: Tensor,
        rotary: tuple[Tensor, Tensor],
        inputs: AttentionInputs,
    ) -> Tensor:
        """Attention of one layer over the pages, projected back: [T, H] -> [T, H]."""
        ops, config = self.ops, self.config
        tokens = normed.shape[0]
        qkv = ops.linear(normed, layer.qkv, layer.qkv_bias)
        q, k, v = qkv.view(tokens, -1, config.head_dim).split_with_sizes(self._heads, dim=1)
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = layer.q_norm, layer.k_norm
        q = ops.rotate_and_write(q, k, v, *rotary, k_pages, v_pages, inputs.slots, norms, config.rms_eps)
        seen = ops.attend(q, k_pages, v_pages, inputs)
        return ops.linear(seen.reshape(tokens, -1), layer.output, layer.output_bias)

    @torch.no_grad()
    def logits(self, hidden_rows: Tensor) -> Tensor:
        """The residual stream after the last layer, [R, H] -> float32[R, vocab].

        The result is an ordinary tensor, not an inference tensor: samplers may change it in place.
        """
        weights = self.weights
        normed = self.ops.rms_norm(hidden_rows, weights.final_norm, self.config.rms_eps)
        return self.ops.linear(normed, weights.head).float()
