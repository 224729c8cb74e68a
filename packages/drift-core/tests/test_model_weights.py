"""Loading safetensors: what is read, converted and fused, and what is refused before anything is allocated."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from drift_core.model.config import ModelConfig, Rope
from drift_core.model.weights import DTYPES, Weights, WeightsError, load_weights, random_weights
from drift_scheduler.errors import DriftError

Tensors = dict[str, Tensor]

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_eps=1e-6,
    rope=Rope(10000.0),
    layer_windows=(None, None),
    max_context=64,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
)


def checkpoint(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Tensors:
    """A checkpoint as transformers names it, spelled out by hand."""
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    layer = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
        "mlp.gate_proj.weight": (f, h),
        "mlp.up_proj.weight": (f, h),
        "mlp.down_proj.weight": (h, f),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.bias": (h,),
        "mlp.gate_proj.bias": (f,),
        "mlp.up_proj.bias": (f,),
        "mlp.down_proj.bias": (h,),
        "self_attn.q_norm.weight": (d,),
        "self_attn.k_norm.weight": (d,),
    }
    shapes = {f"model.layers.{i}.{n}": s for i in range(config.num_layers) for n, s in layer.items()}
    shapes |= {"model.embed_tokens.weight": (config.vocab_size, h), "model.norm.weight": (h,)}
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, h)
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_sharded(folder: Path, tensors: Tensors, weight_map: dict[str, Any] | None = None) -> Path:
    names = ("one.safetensors", "two.safetensors")
    shards: dict[str, Tensors] = {name: {} for name in names}
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[names[index % 2]][name] = tensor
    for name, content in shards.items():
        save_file(content, folder / name)
    listed = {tensor: shard for shard, content in shards.items() for tensor in content}
    index_file = {"metadata": {}, "weight_map": listed | (weight_map or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return folder


def all_tensors(weights: Weights) -> list[Tensor]:
    layers = [getattr(layer, f.name) for layer in weights.layers for f in fields(layer)]
    return [t for t in (weights.embedding, weights.final_norm, weights.head, *layers) if t is not None]


def complaint(folder: Path, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(DriftError) as caught:
        load_weights(folder, config, dtype)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("form", [save, save_sharded])
def test_fused_tensors_hold_their_parts_in_order(
    tmp_path: Path, form: Callable[[Path, Tensors], Path]
) -> None:
    tensors = checkpoint()
    weights = load_weights(form(tmp_path, tensors), CONFIG, torch.float32)
    prefix = "model.layers.1."
    layer, attention = weights.layers[1], prefix + "self_attn."
    q, k, v = (tensors[f"{attention}{n}_proj.weight"] for n in "qkv")
    assert torch.equal(layer.qkv, torch.cat((q, k, v)))
    assert layer.qkv.is_contiguous()
    assert layer.qkv_bias is not None
    assert torch.equal(layer.qkv_bias, torch.cat([tensors[f"{attention}{n}_proj.bias"] for n in "qkv"]))
    gate, up = tensors[prefix + "mlp.gate_proj.weight"], tensors[prefix + "mlp.up_proj.weight"]
    assert torch.equal(layer.gate_up, torch.cat((gate, up)))
    assert layer.down_bias is not None
    assert torch.equal(layer.down_bias, tensors[prefix + "mlp.down_proj.bias"])
    assert layer.k_norm is not None
    assert torch.equal(layer.k_norm, tensors[attention + "k_norm.weight"])
    assert torch.equal(layer.mlp_norm, tensors[prefix + "post_attention_layernorm.weight"])
    assert torch.equal(weights.head, tensors["lm_head.weight"])
    assert torch.equal(weights.final_norm, tensors["model.norm.weight"])


@pytest.mark.parametrize("target", DTYPES.values(), ids=str)
@pytest.mark.parametrize("stored", DTYPES.values(), ids=str)
def test_dtype_conversion(tmp_path: Path, stored: torch.dtype, target: torch.dtype) -> None:
    tensors = checkpoint(dtype=stored)
    weights = load_weights(save(tmp_path, tensors), CONFIG, target)
    assert weights.dtype == target
    assert {t.dtype for t in all_tensors(weights)} == {target}
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"].to(target))


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    config = replace(CONFIG, tied_embeddings=True)
    weights = load_weights(save(tmp_path, checkpoint(config)), config, torch.float32)
    assert weights.head is weights.embedding
    # Some checkpoints store the tied head too; the embedding is what counts, as in transformers.
    extra = checkpoint(config) | {"lm_head.weight": torch.zeros(40, 16)}
    again = load_weights(save(tmp_path, extra), config, torch.float32)
    assert torch.equal(again.head, weights.head)


def test_old_rotary_tables_are_passed_over(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    load_weights(save(tmp_path, checkpoint() | extra), CONFIG, torch.float32)


def test_progress_goes_from_0_to_1(tmp_path: Path) -> None:
    seen: list[float] = []
    load_weights(save(tmp_path, checkpoint()), CONFIG, torch.float32, progress=seen.append)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_a_checkpoint_is_mapped_and_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, checkpoint())
    sources: list[Tensor] = []
    real = Tensor.copy_

    def copy(target: Tensor, source: Tensor, *rest: Any) -> Tensor:
        sources.append(source)
        return real(target, source, *rest)

    monkeypatch.setattr(Tensor, "copy_", copy)
    load_weights(folder, CONFIG, torch.float32)
    file = folder / "model.safetensors"
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    assert sources
    for source in sources:
        assert any(low <= source.data_ptr() < high for low, high in mapped)


@pytest.mark.parametrize("tied", [True, False])
def test_number_of_parameters(tied: bool) -> None:
    config = replace(CONFIG, tied_embeddings=tied)
    weights = random_weights(config, torch.float32)
    assert config.num_parameters == sum(t.numel() for t in {id(t): t for t in all_tensors(weights)}.values())


def test_random_weights_repeat_with_their_seed() -> None:
    first, again = (all_tensors(random_weights(CONFIG, torch.bfloat16, seed=3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = all_tensors(random_weights(CONFIG, torch.bfloat16, seed=4))
    assert not torch.equal(first[0], other[0])
    assert 0.015 < first[0].float().std().item() < 0.025


def test_a_random_model_needs_no_directory() -> None:
    seen: list[float] = []
    weights = load_weights("random:any", CONFIG, torch.bfloat16, progress=seen.append)
    assert weights.embedding.shape == (40, 16)
    assert seen == [0.0, 1.0]


# ---------------------------------------------------------------- refusals


def test_nothing_there(tmp_path: Path) -> None:
    assert "neither model.safetensors nor model.safetensors.index.json" in complaint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "found pytorch_model.bin: convert it to safetensors" in complaint(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    tensors = checkpoint()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    message = complaint(save(tmp_path, tensors))
    assert "lacks tensor 'model.layers.1.mlp.up_proj.weight', which Qwen3ForCausalLM needs" in message


def test_unexpected_tensor(tmp_path: Path) -> None:
    extra = {"model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16)}
    message = complaint(save(tmp_path, checkpoint() | extra))
    assert "model.safetensors holds tensor 'model.layers.2.mlp.up_proj.weight'" in message


def test_misshapen_tensor(tmp_path: Path) -> None:
    wrong = {"model.norm.weight": torch.zeros(17)}
    message = complaint(save(tmp_path, checkpoint() | wrong))
    assert "model.safetensors: tensor 'model.norm.weight' has shape [17]" in message
    assert "asks for [16]" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_quantised_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    wrong = {"model.norm.weight": torch.zeros(16).to(dtype)}
    message = complaint(save(tmp_path, checkpoint() | wrong))
    assert "quantised checkpoints are not supported, choose from F32, BF16, F16" in message


def test_values_beyond_float16(tmp_path: Path) -> None:
    wrong = {"model.norm.weight": torch.full((16,), 1e6)}
    folder = save(tmp_path, checkpoint() | wrong)
    assert "'model.norm.weight' has values beyond float16" in complaint(folder, dtype=torch.float16)
    load_weights(folder, CONFIG, torch.bfloat16)


def test_a_size_bomb_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("allocated before the shapes were checked")

    folder = save(tmp_path, checkpoint())
    monkeypatch.setattr(torch, "empty", refuse)
    huge = replace(CONFIG, vocab_size=1 << 22, hidden_size=1 << 17)
    assert "has shape [40, 16], config.json asks for [4194304, 131072]" in complaint(folder, huge)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    path = save(tmp_path, checkpoint()) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else len(content) * kept)])
    assert "model.safetensors is corrupt or truncated" in complaint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"not a safetensors file at all, but text",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 64)
        + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}'[:64].ljust(64),
    ],
)
def test_corrupt_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors is corrupt or truncated" in complaint(tmp_path)


def test_a_directory_in_a_files_place(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors does not exist or is not a file" in complaint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/one.safetensors",
        "..\\one.safetensors",
        "..",
        "",
        ".",
        "one.bin",
        "one\0.safetensors",
        3,
        None,
        ["one.safetensors"],
    ],
)
def test_shards_elsewhere_are_refused(tmp_path: Path, shard: Any) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save(tmp_path, checkpoint())  # what a traversal would reach
    folder = save_sharded(inside, checkpoint(), {"model.norm.weight": shard})
    message = complaint(folder)
    assert "index.json" in message
    assert "is no name of a .safetensors file beside it" in message


def test_missing_shard(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path, checkpoint(), {"model.norm.weight": "three.safetensors"})
    assert "three.safetensors does not exist" in complaint(folder)


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path) -> None:
    tensors = checkpoint()
    last = list(tensors)[-1]
    shard = "one.safetensors" if len(tensors) % 2 == 0 else "two.safetensors"
    folder = save_sharded(tmp_path, tensors, {last: shard})
    message = complaint(folder)
    assert f"tensor '{last}' is not in" in message
    assert shard in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_corrupt_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in complaint(tmp_path)


def test_links_to_weights_elsewhere_are_followed(tmp_path: Path) -> None:
    """As in a download cache, where every file of a snapshot is a link."""
    store, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    store.mkdir()
    snapshot.mkdir()
    save(store, checkpoint())
    (snapshot / "model.safetensors").symlink_to(store / "model.safetensors")
    load_weights(snapshot, CONFIG, torch.float32)


def test_errors_of_weights_are_errors_for_people() -> None:
    assert issubclass(WeightsError, DriftError)
