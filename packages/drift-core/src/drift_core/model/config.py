"""What a decoder-only model is, as data, and how Hugging Face's config.json says it.

One `ModelConfig` describes every supported architecture; a builder per architecture name turns the entries of
a config.json into one. Reads JSON and nothing else: knows nothing of torch, weights or devices, and never runs
or imports anything that a model directory carries (`auto_map` is ignored).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from drift_core.model.shapes import published_shape
from drift_scheduler.errors import DriftError, PluginError, UnknownNameError

RopeKind = Literal["default", "linear", "llama3"]
ROPE_KINDS: Final[tuple[RopeKind, ...]] = ("default", "linear", "llama3")
DTYPE_NAMES: Final = ("float32", "bfloat16", "float16")
DEMO_MODEL: Final = "demo"
RANDOM_MODEL: Final = "random:"
_MAX_JSON_BYTES = 64 << 20


class ModelError(DriftError):
    """A model directory that cannot be served; the message names the file and what would do."""


class ModelConfigError(ModelError):
    """A missing, corrupt, inconsistent or unsupported config.json."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. `linear` divides every frequency by `factor`; `llama3` only the low ones,
    with a smooth passage between wavelengths `original_context / high_freq_factor` and `/ low_freq_factor`.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder: pre-norm attention and gated SiLU layers over a residual stream.

    `layer_windows[i]`: tokens that layer i's attention sees, the current one included; `None`: all of them.
    `max_context`: positions the model was made for. `dtype`: what the checkpoint says it was made in.
    Raises ModelConfigError when the sizes do not fit together.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope: Rope
    layer_windows: tuple[int | None, ...]
    max_context: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ModelConfigError(
                f"head_dim ({self.head_dim}) must be even: rotary embedding turns two halves"
            )
        if len(self.layer_windows) != self.num_layers:
            raise ModelConfigError(
                f"attention kinds for {len(self.layer_windows)} layers, but num_hidden_layers is {self.num_layers}"
            )
        if self.rope.kind not in ROPE_KINDS:
            raise ModelConfigError(_unsupported_rope(self.rope.kind))

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.head_dim**-0.5)

    @property
    def sliding_window(self) -> int | None:
        """The window all layers share; `None` when they see everything or differ."""
        windows = set(self.layer_windows)
        return windows.pop() if len(windows) == 1 else None

    @property
    def num_parameters(self) -> int:
        """Stored numbers; a tied head counts once."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size + 2)
        layer += self.qkv_bias * (q + 2 * kv) + self.output_bias * self.hidden_size
        layer += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        layer += self.qk_norm * 2 * self.head_dim
        tables = 1 if self.tied_embeddings else 2
        return self.num_layers * layer + self.hidden_size * (tables * self.vocab_size + 1)


ConfigBuilder = Callable[[Mapping[str, Any]], ModelConfig]


def model_directory(model: str | Path) -> Path:
    """The directory that `model` means: the embedded one for "demo", otherwise the path itself."""
    if str(model) != DEMO_MODEL:
        return Path(model)
    return Path(str(resources.files("drift_core"))) / "demo_model"


def random_shape(model: str | Path) -> str | None:
    """SHAPE of "random:SHAPE": a published model's shape (`drift_core.model.shapes`) with random weights."""
    name = str(model)
    return name.removeprefix(RANDOM_MODEL) if name.startswith(RANDOM_MODEL) else None


def shape_config(name: str) -> ModelConfig:
    """The config of a published model's shape. Raises UnknownNameError with the names there are."""
    entries = published_shape(name)
    return ARCHITECTURES[entries["architectures"][0]](entries)


def load_config(
    directory: str | Path, architectures: Mapping[str, ConfigBuilder] | None = None
) -> ModelConfig:
    """Read config.json, and generation_config.json for further end-of-text ids.

    architectures: builders by the name in config.json's `architectures`; default `ARCHITECTURES`.
    "demo" is the embedded model, "random:SHAPE" a published shape without a checkpoint.
    Raises ModelConfigError, one line that names the file and the choices; UnknownNameError for the shape.
    """
    if (shape := random_shape(directory)) is not None:
        return shape_config(shape)
    table = ARCHITECTURES if architectures is None else architectures
    folder = model_directory(directory)
    if not folder.is_dir():
        raise ModelConfigError(
            f"no model directory '{directory}'; give a local Hugging Face directory, '{DEMO_MODEL}' or "
            f"'{RANDOM_MODEL}SHAPE' (nothing is downloaded)"
        )
    path = folder / "config.json"
    entries = read_json_object(path)
    try:
        config = _build(entries, table)
        further = folder / "generation_config.json"
        if further.exists():
            path = further
            ids = _token_ids(_Entries(read_json_object(further)), config.vocab_size)
            config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + ids)))
    except (ModelConfigError, UnknownNameError) as error:
        raise ModelConfigError(f"{path}: {error}") from None
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB. Raises ModelConfigError when it is missing or not one."""
    if not path.is_file():
        raise ModelConfigError(f"{path.parent} has no {path.name}; a Hugging Face model directory has one")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelConfigError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON_BYTES} are read")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise ModelConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ModelConfigError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content


def _build(entries: dict[str, Any], table: Mapping[str, ConfigBuilder]) -> ModelConfig:
    for key in ("quantization_config", "compression_config"):
        if entries.get(key):
            raise ModelConfigError(
                f"{key}: quantised checkpoints are not supported; choose float32, bfloat16 or float16 weights"
            )
    names = entries.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ModelConfigError(f"architectures is {names!r}; supported: {', '.join(sorted(table))}")
    name = names[0]
    if name not in table:
        raise UnknownNameError("model architecture", _short(name)[1:-1], table)
    try:
        config = table[name](entries)
    except ModelConfigError:
        raise
    except Exception as error:
        raise PluginError(f"the builder of architecture '{name}' failed: {error!r}") from error
    if not isinstance(config, ModelConfig):
        raise PluginError(
            f"the builder of architecture '{name}' returned {type(config).__name__}, not ModelConfig"
        )
    return config


# ---------------------------------------------------------------- architectures


def _llama(entries: Mapping[str, Any]) -> ModelConfig:
    fields = _Entries(entries)
    bias = fields.flag("attention_bias", False)
    return _decoder(
        "LlamaForCausalLM",
        fields,
        max_context=2048,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _mistral(entries: Mapping[str, Any]) -> ModelConfig:
    fields = _Entries(entries)
    window = fields.optional_integer("sliding_window", 4096)
    return _decoder("MistralForCausalLM", fields, kv_heads=8, max_context=131072, window=window)


def _qwen2(entries: Mapping[str, Any]) -> ModelConfig:
    fields = _Entries(entries)
    return _decoder(
        "Qwen2ForCausalLM",
        fields,
        kv_heads=32,
        max_context=32768,
        qkv_bias=True,
        window=_qwen_window(fields),
        first_windowed=_qwen_first_windowed(fields),
    )


def _qwen3(entries: Mapping[str, Any]) -> ModelConfig:
    fields = _Entries(entries)
    bias = fields.flag("attention_bias", False)
    return _decoder(
        "Qwen3ForCausalLM",
        fields,
        kv_heads=32,
        head_dim=128,
        max_context=32768,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        window=_qwen_window(fields),
        first_windowed=_qwen_first_windowed(fields),
    )


def _qwen_window(fields: _Entries) -> int | None:
    """Qwen's window holds only with `use_sliding_window`, whatever `sliding_window` says."""
    return (
        fields.optional_integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    )


def _qwen_first_windowed(fields: _Entries) -> int:
    return fields.integer("max_window_layers", 28, low=0, high=_MAX_LAYERS)


ARCHITECTURES: Final[Mapping[str, ConfigBuilder]] = MappingProxyType(
    {
        "LlamaForCausalLM": _llama,
        "MistralForCausalLM": _mistral,
        "Qwen2ForCausalLM": _qwen2,
        "Qwen3ForCausalLM": _qwen3,
    }
)

# Bounds are generous; they keep a forged config from asking for absurd allocations or loops.
_MAX_LAYERS = 1024


def _decoder(
    architecture: str,
    fields: _Entries,
    *,
    max_context: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    first_windowed: int = 0,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """What all architectures share; the keywords are transformers' defaults and the differences.

    `window` holds from layer `first_windowed` on, unless `layer_types` lists the layers.
    """
    fields.choice("hidden_act", "silu", ("silu",))
    layers = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    heads = fields.integer("num_attention_heads", high=4096)
    hidden = fields.integer("hidden_size", high=1 << 17)
    size = fields.optional_integer("head_dim", head_dim, high=1024)
    if size is None and hidden % heads:
        raise ModelConfigError(f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})")
    positions = fields.integer("max_position_embeddings", max_context, high=1 << 24)
    vocab = fields.integer("vocab_size", high=1 << 22)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", high=1 << 20),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.optional_integer("num_key_value_heads", kv_heads, high=4096) or heads,
        head_dim=size or hidden // heads,
        rms_eps=fields.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        rope=_rope(fields, positions),
        layer_windows=_layer_windows(fields, layers, window, first_windowed),
        max_context=positions,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=_token_ids(fields, vocab),
        dtype=_dtype(fields),
    )


def _layer_windows(
    fields: _Entries, layers: int, window: int | None, first_windowed: int
) -> tuple[int | None, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(window if i >= first_windowed else None for i in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise ModelConfigError(f"layer_types may list only {' and '.join(known)}; got {_short(kinds)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(fields: _Entries, max_context: int) -> Rope:
    """Both spellings: `rope_theta` beside `rope_scaling`, and `rope_parameters` that holds everything."""
    inner: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = fields.get(key)
        if value is not None and not isinstance(value, dict):
            raise ModelConfigError(f"{key} is {_short(value)}; an object or null is needed")
        inner |= value or {}
    if inner.get("rope_theta") is None:
        inner["rope_theta"] = fields.get("rope_theta")
    scaling = _Entries(inner, "rope ")
    if nested := [key for key, value in inner.items() if isinstance(value, dict)]:
        raise ModelConfigError(f"rope parameters per kind of layer ({', '.join(nested)}) are not supported")
    share = inner.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise ModelConfigError(f"partial_rotary_factor {share} is not supported; only 1.0 is")
    kind = inner.get("rope_type", inner.get("type")) or "default"
    if kind not in ROPE_KINDS:
        raise ModelConfigError(_unsupported_rope(kind))
    theta = scaling.number("rope_theta", 10000.0, low=1.0, high=1e15)
    if kind == "default":
        return Rope(theta)
    factor = scaling.number("factor", low=1e-3, high=1e6)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    rope = Rope(
        theta,
        "llama3",
        factor,
        scaling.number("low_freq_factor", low=1e-3, high=1e6),
        scaling.number("high_freq_factor", low=1e-3, high=1e6),
        scaling.integer("original_max_position_embeddings", max_context, high=1 << 24),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise ModelConfigError(
            f"rope high_freq_factor ({rope.high_freq_factor}) must be above low_freq_factor ({rope.low_freq_factor})"
        )
    return rope


def _unsupported_rope(kind: object) -> str:
    return f"rope type {_short(kind)} is not supported; choose from {', '.join(ROPE_KINDS)}"


def _token_ids(fields: _Entries, vocab_size: int) -> tuple[int, ...]:
    """`eos_token_id`: an id, a list of them, or null. Ids beyond the vocabulary can never be sampled: dropped."""
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ModelConfigError(f"eos_token_id is {_short(value)}; a token id or a list of them is needed")
    return tuple(i for i in ids if 0 <= i < vocab_size)


def _dtype(fields: _Entries) -> str:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    return fields.choice(key, "float32", DTYPE_NAMES)


# ---------------------------------------------------------------- entries of a JSON object


_REQUIRED: Final = object()


@dataclass(frozen=True, slots=True)
class _Entries:
    """Entries of a config, read with their type and bounds; every complaint names the entry. null is absent."""

    values: Mapping[str, Any]
    prefix: str = ""

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def integer(self, name: str, default: object = _REQUIRED, low: int = 1, high: int = 1 << 40) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._complaint(name, value, f"an integer from {low} to {high} is needed")
        return value

    def optional_integer(self, name: str, default: int | None, high: int = 1 << 40) -> int | None:
        """`default` when the entry is absent; `None` when it is null, as transformers reads it."""
        if name not in self.values:
            return default
        return None if self.values[name] is None else self.integer(name, high=high)

    def number(self, name: str, default: object = _REQUIRED, *, low: float, high: float) -> float:
        value = self._value(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise self._complaint(name, value, f"a number from {low:g} to {high:g} is needed")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._complaint(name, value, "true or false is needed")
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self._complaint(name, value, f"choose from {', '.join(choices)}")
        return value

    def _value(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        if value is None and default is _REQUIRED:
            raise ModelConfigError(f"{self.prefix}{name} is missing")
        return default if value is None else value

    def _complaint(self, name: str, value: object, wanted: str) -> ModelConfigError:
        return ModelConfigError(f"{self.prefix}{name} is {_short(value)}; {wanted}")


def _short(value: object) -> str:
    """A value from a file, safe and short enough to stand in one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
