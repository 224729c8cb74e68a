"""Reading config.json: both spellings, each architecture's meaning of the entries, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from drift_core.model.config import (
    ARCHITECTURES,
    ModelConfig,
    ModelConfigError,
    Rope,
    load_config,
    model_directory,
    shape_config,
)
from drift_core.model.shapes import shape_names
from drift_scheduler.errors import DriftError, PluginError, UnknownNameError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(folder: Path, entries: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


def read(folder: Path, **changes: Any) -> ModelConfig:
    return load_config(write(folder, LLAMA | changes))


def complaint(folder: Path, **changes: Any) -> str:
    with pytest.raises(ModelConfigError) as caught:
        read(folder, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert "config.json" in message
    assert len(message) < 500
    return message


# ---------------------------------------------------------------- meaning


def test_llama_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config = read(tmp_path)
    theirs = transformers.LlamaConfig(**LLAMA)
    assert config.rms_eps == theirs.rms_norm_eps
    assert config.head_dim == theirs.head_dim == 16
    assert config.rope == Rope(theirs.rope_parameters["rope_theta"])
    assert config.layer_windows == (None, None, None)
    assert config.sliding_window is None
    assert not config.tied_embeddings
    assert config.dtype == "float32"
    assert config.scale == 0.25


def test_key_value_heads_default_to_heads_for_llama(tmp_path: Path) -> None:
    assert read(tmp_path, num_key_value_heads=None).num_kv_heads == 4


def test_biases_of_each_architecture(tmp_path: Path) -> None:
    def biases(name: str, **changes: Any) -> tuple[bool, bool, bool, bool]:
        c = read(tmp_path, architectures=[name], **changes)
        return c.qkv_bias, c.output_bias, c.mlp_bias, c.qk_norm

    assert biases("LlamaForCausalLM") == (False, False, False, False)
    assert biases("LlamaForCausalLM", attention_bias=True) == (True, True, False, False)
    assert biases("LlamaForCausalLM", mlp_bias=True) == (False, False, True, False)
    assert biases("MistralForCausalLM", attention_bias=True) == (False, False, False, False)
    assert biases("Qwen2ForCausalLM") == (True, False, False, False)
    assert biases("Qwen3ForCausalLM") == (False, False, False, True)
    assert biases("Qwen3ForCausalLM", attention_bias=True) == (True, True, False, True)


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("MistralForCausalLM", {}, (4096, 4096, 4096)),
        ("MistralForCausalLM", {"sliding_window": 16}, (16, 16, 16)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("LlamaForCausalLM", {"sliding_window": 16}, (None, None, None)),
        ("Qwen2ForCausalLM", {"sliding_window": 16}, (None, None, None)),
        ("Qwen2ForCausalLM", {"sliding_window": 16, "use_sliding_window": True}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 16),
        ),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            (8, 8, 8),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
    ],
)
def test_sliding_windows(
    tmp_path: Path, name: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = read(tmp_path, architectures=[name], **changes)
    assert config.layer_windows == windows
    assert config.sliding_window == (windows[0] if len(set(windows)) == 1 else None)


def test_head_dim_of_qwen3_and_mistral_need_not_be_hidden_over_heads(tmp_path: Path) -> None:
    assert read(tmp_path, architectures=["Qwen3ForCausalLM"]).head_dim == 128
    assert read(tmp_path, architectures=["Qwen3ForCausalLM"], head_dim=32).head_dim == 32
    assert read(tmp_path, architectures=["MistralForCausalLM"], head_dim=32).head_dim == 32
    assert read(tmp_path, architectures=["MistralForCausalLM"], head_dim=None).head_dim == 16


@pytest.mark.parametrize(
    ("old", "new", "rope"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": None},
            {"rope_parameters": {"rope_theta": 5e5}},
            Rope(5e5),
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            Rope(10000.0, "linear", 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_both_spellings_of_rope(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], rope: Rope) -> None:
    assert read(tmp_path, **old).rope == rope
    assert read(tmp_path, **new).rope == rope


def test_both_spellings_of_dtype(tmp_path: Path) -> None:
    assert read(tmp_path, torch_dtype="bfloat16").dtype == "bfloat16"
    assert read(tmp_path, dtype="float16").dtype == "float16"
    assert "float8" in complaint(tmp_path, dtype="float8_e4m3fn")


def test_end_of_text_ids_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5, 100]}))
    assert read(tmp_path, eos_token_id=5).eos_token_ids == (5, 7)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == (7, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelConfigError, match=r"generation_config.json: eos_token_id is '</s>'"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_writes_is_read_as_transformers_means_it(tmp_path: Path, kind: str) -> None:
    theirs = transformers.AutoConfig.for_model(kind, num_hidden_layers=3)
    theirs.architectures = [type(theirs).__name__.replace("Config", "ForCausalLM")]
    theirs.save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_context == theirs.max_position_embeddings
    assert ours.rope == Rope(theirs.rope_parameters["rope_theta"])
    assert ours.sliding_window == theirs.sliding_window if kind == "mistral" else ours.sliding_window is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_entries_mean_what_transformers_takes_for_them(tmp_path: Path, kind: str) -> None:
    theirs = transformers.AutoConfig.for_model(kind)
    name = type(theirs).__name__.replace("Config", "ForCausalLM")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    entries = {key: getattr(theirs, key) for key in needed}
    ours = load_config(write(tmp_path, {"architectures": [name], **entries}))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_context == theirs.max_position_embeddings
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_code_in_the_directory_never_runs(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    changes = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    assert read(tmp_path, **changes) == read(tmp_path)


# ---------------------------------------------------------------- a third party's architecture


def test_a_third_partys_architecture_is_one_more_builder(tmp_path: Path) -> None:
    table = {**ARCHITECTURES, "OtherForCausalLM": ARCHITECTURES["LlamaForCausalLM"]}
    folder = write(tmp_path, LLAMA | {"architectures": ["OtherForCausalLM"]})
    assert load_config(folder, table).hidden_size == 64
    with pytest.raises(
        ModelConfigError, match=r"no model architecture 'OtherForCausalLM'.*; installed: Llama"
    ):
        load_config(folder)


def test_a_builder_that_fails_is_named(tmp_path: Path) -> None:
    def broken(entries: Any) -> ModelConfig:
        raise KeyError("n_embd")

    folder = write(tmp_path, LLAMA)
    with pytest.raises(PluginError, match=r"architecture 'LlamaForCausalLM' failed: KeyError\('n_embd'\)"):
        load_config(folder, {"LlamaForCausalLM": broken})
    with pytest.raises(PluginError, match=r"returned dict, not ModelConfig"):
        load_config(folder, {"LlamaForCausalLM": dict})  # type: ignore[dict-item]


# ---------------------------------------------------------------- refusals


def test_missing_directory_and_config(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"no model directory '.*/none'.*'demo'"):
        load_config(tmp_path / "none")
    with pytest.raises(ModelConfigError, match=r"has no config.json"):
        load_config(tmp_path)
    assert issubclass(ModelConfigError, DriftError)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '"llama"', '{"a": 1' + "0" * 5000 + "}", "[" * 100_000, "\xff\xfe\x00"]
)
def test_corrupt_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelConfigError, match=r"config.json") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names", [["GPT2LMHeadModel"], ["LLamaForCausalLM"], [], None, "LlamaForCausalLM", [3]]
)
def test_unsupported_architecture_lists_the_supported(tmp_path: Path, names: Any) -> None:
    message = complaint(tmp_path, architectures=names)
    for name in ARCHITECTURES:
        assert name in message


def test_a_close_name_is_suggested(tmp_path: Path) -> None:
    assert "did you mean 'LlamaForCausalLM'?" in complaint(tmp_path, architectures=["LLamaForCausalLM"])


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
        ({"hidden_size": 66}, "hidden_size (66) is not a multiple of num_attention_heads (4)"),
        ({"head_dim": 15}, "head_dim (15) must be even"),
        ({"hidden_size": "64"}, "hidden_size is '64'; an integer"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; true or false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; choose from silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "choose from default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": ["llama3"]}}, "rope type ['llama3']"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope factor is 0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor (1.0) must be above"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "rope low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per kind of layer (full_attention)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised checkpoints are not supported"),
        ({"layer_types": ["full_attention"]}, "attention kinds for 1 layers"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types may list only"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"architectures": ["x" * 10_000 + "\n"]}, "architecture"),
    ],
)
def test_refusals_name_the_entry(tmp_path: Path, changes: dict[str, Any], culprit: str) -> None:
    assert culprit in complaint(tmp_path, **changes)


# ---------------------------------------------------------------- shapes and the embedded model


def test_shapes_have_the_published_numbers_of_parameters() -> None:
    assert {name: shape_config(name).num_parameters for name in shape_names()} == {
        "qwen2.5-0.5b": 494_032_768,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.1-8b": 8_030_261_248,
    }
    with pytest.raises(UnknownNameError, match=r"no model shape '0\.5b'; installed: llama-3"):
        load_config("random:0.5b")


def test_random_means_a_shape_without_a_checkpoint() -> None:
    assert load_config("random:qwen2.5-0.5b") == shape_config("qwen2.5-0.5b")


def test_demo_means_the_directory_within_the_package() -> None:
    assert model_directory("demo").name == "demo_model"
    assert model_directory("demo").parent.name == "drift_core"
    assert model_directory("./demo") == Path("./demo")


def test_the_config_needs_no_torch() -> None:
    code = "import sys, drift_core.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
