"""The decoder's own promises: what it refuses, what it leaves alone, and how much memory a page takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drift_core.model.config import ModelConfig, Rope
from drift_core.model.decoder import Decoder, KvCache
from drift_core.model.rotary import RotaryTable, inverse_frequencies
from drift_core.model.weights import random_weights
from drift_kernels.ops import ReferenceOps

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_eps=1e-6,
    rope=Rope(10000.0),
    layer_windows=(None, None, None),
    max_context=100,
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(CONFIG, random_weights(CONFIG, torch.float32), ReferenceOps())


def batch(decoder: Decoder, tokens: int = 10) -> tuple[torch.Tensor, KvCache, Any]:
    kv = KvCache.allocate(CONFIG, 8, 4, torch.float32)
    inputs = decoder.inputs([tokens], [tokens], [[5, 2, 7]], 4)
    return decoder.embed(torch.arange(tokens)), kv, inputs


def test_run_layers_leaves_the_hidden_state_as_it_is(decoder: Decoder) -> None:
    hidden, kv, inputs = batch(decoder)
    before = hidden.clone()
    decoder.run_layers(hidden, 0, 3, kv, inputs)
    assert torch.equal(hidden, before)
    assert decoder.run_layers(hidden, 1, 1, kv, inputs) is hidden


def test_only_the_layers_and_slots_of_the_block_are_written(decoder: Decoder) -> None:
    hidden, kv, inputs = batch(decoder)
    decoder.run_layers(hidden, 1, 2, kv, inputs)
    for cache in (kv.k, kv.v):
        assert [bool(layer.any()) for layer in cache] == [False, True, False]
        written = cache[1].flatten(2).any(-1)
        assert written.sum() == 10
        assert written[[5, 2]].all()
        assert written[7].tolist() == [True, True, False, False]


class Counting(ReferenceOps):
    """Notes what a decoder calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in ("called", "description"):
            self.called.append(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_norm_rotation_and_kv_write_are_one_op(qk_norm: bool) -> None:
    config = replace(CONFIG, qk_norm=qk_norm)
    ops = Counting()
    decoder = Decoder(config, random_weights(config, torch.float32), ops)
    hidden, kv, inputs = batch(decoder)
    ops.called.clear()
    decoder.run_layers(hidden, 0, 3, kv, inputs)
    assert ops.called.count("rotate_and_write") == 3
    assert not {"apply_rotary", "write_kv"} & set(ops.called)
    assert ops.called.count("rms_norm") == 1  # the first of all; others are added with their residual


def test_logits_are_ordinary_tensors_that_samplers_may_change(decoder: Decoder) -> None:
    hidden, kv, inputs = batch(decoder)
    logits = decoder.logits(decoder.run_layers(hidden, 0, 3, kv, inputs)[-1:])
    logits[0, 3] += 1.0
    assert logits.shape == (1, 50)
    assert logits.dtype == torch.float32
    assert not logits.is_inference()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 1)])
def test_layers_the_model_lacks(decoder: Decoder, start: int, stop: int) -> None:
    hidden, kv, inputs = batch(decoder)
    with pytest.raises(ValueError, match=rf"layers \[{start}, {stop}\) are not within \[0, 3\)"):
        decoder.run_layers(hidden, start, stop, kv, inputs)


def test_a_hidden_state_of_another_batch(decoder: Decoder) -> None:
    hidden, kv, inputs = batch(decoder)
    with pytest.raises(ValueError, match=r"hidden has shape \[9, 32\], the batch needs \[10, 32\]"):
        decoder.run_layers(hidden[:9], 0, 1, kv, inputs)


def test_a_context_beyond_the_models(decoder: Decoder) -> None:
    kv = KvCache.allocate(CONFIG, 32, 4, torch.float32)
    inputs = decoder.inputs([1], [101], [list(range(26))], 4)
    with pytest.raises(ValueError, match="context of 101 tokens exceeds the model's 100"):
        decoder.run_layers(decoder.embed(torch.tensor([1])), 0, 1, kv, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_page_is_what_allocation_takes(dtype: torch.dtype) -> None:
    kv = KvCache.allocate(CONFIG, 6, 4, dtype)
    assert kv.num_pages == 6
    assert sum(t.nbytes for t in kv.k + kv.v) == 6 * KvCache.bytes_per_page(CONFIG, 4, dtype)


def test_a_layers_own_window_goes_before_the_inputs(decoder: Decoder) -> None:
    """A caller that knows nothing of windows cannot get them wrong."""
    windowed = Decoder(replace(CONFIG, layer_windows=(3, None, 3)), decoder.weights, decoder.ops)
    hidden, kv, inputs = batch(windowed)
    assert inputs.window is None
    out = windowed.run_layers(hidden, 0, 3, kv, inputs)
    again = windowed.run_layers(hidden, 0, 3, kv, replace(inputs, window=1))
    assert torch.equal(out, again)
    assert not torch.allclose(out, decoder.run_layers(hidden, 0, 3, kv, inputs))


# ---------------------------------------------------------------- rotary tables


@pytest.mark.parametrize(
    "rope",
    [
        Rope(10000.0, "linear", 3.0),
        Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        Rope(10000.0, "llama3", 32.0, 0.5, 6.0, 128),
    ],
)
def test_frequencies_are_those_of_transformers_to_the_bit(rope: Rope) -> None:
    parameters = {
        "rope_type": rope.kind,
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }
    if rope.kind == "linear":
        parameters = {key: parameters[key] for key in ("rope_type", "rope_theta", "factor")}
    theirs, _ = ROPE_INIT_FUNCTIONS[rope.kind](LlamaConfig(head_dim=64, rope_parameters=parameters))
    assert torch.equal(inverse_frequencies(rope, 64), theirs)


def test_growing_a_table_keeps_the_rows_it_had() -> None:
    make = (Rope(10000.0), 16, 1000, torch.float32, torch.device("cpu"))
    small, full = RotaryTable(*make, rows=8), RotaryTable(*make, rows=1000)
    for highest in (7, 8, 100, 999):
        positions = torch.tensor([0, highest // 2, highest])
        for ours, theirs in zip(
            small.rows(positions, highest + 1), full.rows(positions, highest + 1), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_a_table_grown_in_inference_mode_serves_outside_it() -> None:
    table = RotaryTable(Rope(10000.0), 16, 1000, torch.float32, torch.device("cpu"), rows=8)
    with torch.inference_mode():
        table.rows(torch.tensor([20]), 21)
    assert not table.rows(torch.tensor([20]), 21)[0].is_inference()
