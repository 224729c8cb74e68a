"""The shipped demo model is small, whole, and an ordinary Hugging Face directory."""

from __future__ import annotations

import json
import struct
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers

DIRECTORY = Path(str(files("drift_core"))) / "demo_model"
TOKENIZER = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


def read(name: str) -> Any:
    return json.loads((DIRECTORY / name).read_text(encoding="utf-8"))


def test_the_directory_is_under_ten_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= set(sizes)
    assert sum(sizes.values()) < 10_000_000, sizes


def test_the_config_describes_a_llama_that_the_kernels_support() -> None:
    config = read("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["max_position_embeddings"] >= 2048
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()


def test_the_weights_have_the_shapes_of_the_config_and_are_finite() -> None:
    config = read("config.json")
    weights = load_file(DIRECTORY / "model.safetensors")
    hidden, ffn, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        expected |= {
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
            f"model.layers.{i}.post_attention_layernorm.weight": (hidden,),
            f"model.layers.{i}.self_attn.q_proj.weight": (q, hidden),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, hidden),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, hidden),
            f"model.layers.{i}.self_attn.o_proj.weight": (hidden, q),
            f"model.layers.{i}.mlp.gate_proj.weight": (ffn, hidden),
            f"model.layers.{i}.mlp.up_proj.weight": (ffn, hidden),
            f"model.layers.{i}.mlp.down_proj.weight": (hidden, ffn),
        }
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16, name
        assert bool(torch.isfinite(tensor).all()), name
        assert float(tensor.float().std()) > 0, f"{name} was never trained"


def test_the_weights_file_is_plain_safetensors() -> None:
    with (DIRECTORY / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    assert header["__metadata__"] == {"format": "pt"}


def test_the_special_tokens_agree_everywhere() -> None:
    config, generation, tokens = (
        read("config.json"),
        read("generation_config.json"),
        read("tokenizer_config.json"),
    )
    for name in ("bos_token", "eos_token", "pad_token"):
        number = TOKENIZER.token_to_id(tokens[name])
        assert config[f"{name}_id"] == generation[f"{name}_id"] == number
    for token in tokens["additional_special_tokens"]:
        assert TOKENIZER.encode(token, add_special_tokens=False).ids == [TOKENIZER.token_to_id(token)]


def test_encoding_adds_the_begin_token_and_only_when_asked() -> None:
    begin = read("config.json")["bos_token_id"]
    assert TOKENIZER.encode("list").ids[0] == begin
    assert begin not in TOKENIZER.encode("list", add_special_tokens=False).ids


def test_every_byte_has_a_token() -> None:
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(TOKENIZER.get_vocab())


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n    indented\n", "naïve café", "日本語 🐍👩‍👩‍👧", "\x00\x7f\u2028", "\r\n\t", "e\u0301"],
)
def test_awkward_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_the_chat_template_marks_the_turns() -> None:
    tokens = read("tokenizer_config.json")
    template = ImmutableSandboxedEnvironment().from_string(tokens["chat_template"])
    text = template.render(
        messages=[
            {"role": "user", "content": "What does len do? "},
            {"role": "assistant", "content": "It counts."},
            {"role": "user", "content": "And id?"},
        ],
        add_generation_prompt=True,
        bos_token=tokens["bos_token"],
        eos_token=tokens["eos_token"],
    )
    assert text == (
        "<|begin|><|user|>What does len do?<|assistant|>It counts.<|end|><|user|>And id?<|assistant|>"
    )
    assert (
        TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        == text
    )


def test_the_model_has_learned_documentation() -> None:
    """The record beside the weights: far below the 8.0 nats of guessing among 3072 tokens."""
    assert read("training.json")["held_out_loss"] < 3.5
