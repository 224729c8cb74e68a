"""Weights of a decoder: read from safetensors, or drawn at random for a model of a given shape.

The tensors of a checkpoint are matched by name and shape with what the config asks for before anything is
allocated, then copied one by one into their place, converted on the way. Knows nothing of requests or KV.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from drift_core.model.config import ModelConfig, ModelError, model_directory, random_shape, read_json_object

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_STORED_DTYPES = ("F32", "BF16", "F16")
_POOL = 1_048_573
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

Progress = Callable[[float], None]
"""Told the fraction that is done, from 0 to 1."""


class WeightsError(ModelError):
    """Missing, corrupt or ill-fitting weights."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Matrices are [out, in]; H hidden, D head_dim, F intermediate, q and kv counts of heads."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(q + 2 kv) D, H], queries first, then keys, then values
    output: Tensor  # [H, q D]
    mlp_norm: Tensor  # [H]
    gate_up: Tensor  # [2 F, H], gate first
    down: Tensor  # [H, F]
    qkv_bias: Tensor | None = None  # [(q + 2 kv) D]
    output_bias: Tensor | None = None  # [H]
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]
    gate_up_bias: Tensor | None = None  # [2 F]
    down_bias: Tensor | None = None  # [H]


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model. `head` is `embedding` itself where they are tied."""

    embedding: Tensor  # [vocab, H]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [H]
    head: Tensor  # [vocab, H]

    @property
    def dtype(self) -> torch.dtype:
        """Of every tensor."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Of every tensor."""
        return self.embedding.device


def load_weights(
    directory: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Weights:
    """Read model.safetensors, or the shards that model.safetensors.index.json lists; for "random:SHAPE", draw.

    Extra memory beyond the result: one tensor. Raises WeightsError naming the file, and the tensor where one
    is missing, unexpected, misshapen or of a quantised type.
    """
    done, total = 0, config.num_parameters
    if progress is not None:
        progress(0.0)
    if random_shape(directory) is not None:
        weights = random_weights(config, dtype, device)
        if progress is not None:
            progress(1.0)
        return weights
    folder = model_directory(directory)
    stored = _stored_tensors(folder)
    _check(stored, config, folder)

    def fill(name: str, target: Tensor) -> None:
        nonlocal done
        _copy(stored[name], name, target)
        done += target.numel()
        if progress is not None:
            progress(done / total)

    return _assemble(config, dtype, torch.device(device), fill)


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Weights:
    """Weights of the config's shape: matrices and biases uniform with deviation 0.02, norms near 1.

    The same seed gives the same weights on the same kind of device. The numbers repeat after a million, a
    prime, so that no two rows are alike: half a billion take 1 s, of which zeroing new memory is 0.8, not 8.
    """
    generator = torch.Generator(device).manual_seed(seed)
    limit = 0.02 * math.sqrt(3)
    pool = torch.empty(_POOL, dtype=dtype, device=device).uniform_(-limit, limit, generator=generator)
    starts = random.Random(seed)

    def fill(name: str, target: Tensor) -> None:
        numbers = pool.roll(starts.randrange(_POOL))
        for run in torch.split(target.view(-1), _POOL):
            run.copy_(numbers[: run.numel()])
        if name.endswith("norm.weight"):
            target.add_(1.0)

    return _assemble(config, dtype, torch.device(device), fill)


# ---------------------------------------------------------------- what a config asks for


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the checkpoint and its shape."""

    name: str
    shape: tuple[int, ...]


def _layer_parts(config: ModelConfig, index: int) -> dict[str, tuple[_Part, ...]]:
    """Fields of LayerWeights and the tensors that, stacked, make them up."""
    hidden, wide = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"

    def one(name: str, *shape: int) -> tuple[_Part, ...]:
        return (_Part(f"{name}.weight", shape),)

    def biases(*sized: tuple[str, int]) -> tuple[_Part, ...]:
        return tuple(_Part(f"{name}.bias", (size,)) for name, size in sized)

    parts = {
        "input_norm": one(f"model.layers.{index}.input_layernorm", hidden),
        "qkv": one(f"{attention}.q_proj", q, hidden)
        + one(f"{attention}.k_proj", kv, hidden)
        + one(f"{attention}.v_proj", kv, hidden),
        "output": one(f"{attention}.o_proj", hidden, q),
        "mlp_norm": one(f"model.layers.{index}.post_attention_layernorm", hidden),
        "gate_up": one(f"{mlp}.gate_proj", wide, hidden) + one(f"{mlp}.up_proj", wide, hidden),
        "down": one(f"{mlp}.down_proj", hidden, wide),
    }
    if config.qkv_bias:
        sizes = (f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)
        parts["qkv_bias"] = biases(*sizes)
    if config.output_bias:
        parts["output_bias"] = biases((f"{attention}.o_proj", hidden))
    if config.mlp_bias:
        parts["gate_up_bias"] = biases((f"{mlp}.gate_proj", wide), (f"{mlp}.up_proj", wide))
        parts["down_bias"] = biases((f"{mlp}.down_proj", hidden))
    if config.qk_norm:
        parts["q_norm"] = one(f"{attention}.q_norm", config.head_dim)
        parts["k_norm"] = one(f"{attention}.k_norm", config.head_dim)
    return parts


def _embedding(config: ModelConfig) -> _Part:
    return _Part("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))


def _final_norm(config: ModelConfig) -> _Part:
    return _Part("model.norm.weight", (config.hidden_size,))


def _head(config: ModelConfig) -> _Part:
    return _Part("lm_head.weight", (config.vocab_size, config.hidden_size))


def _all_parts(config: ModelConfig) -> Iterator[_Part]:
    yield _embedding(config)
    for index in range(config.num_layers):
        for parts in _layer_parts(config, index).values():
            yield from parts
    yield _final_norm(config)
    if not config.tied_embeddings:
        yield _head(config)


def _assemble(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, fill: Callable[[str, Tensor], None]
) -> Weights:
    """Allocate every tensor of the model and have `fill(checkpoint name, rows)` write each part of it."""

    def make(*parts: _Part) -> Tensor:
        ends = list(accumulate(part.shape[0] for part in parts))
        whole = torch.empty((ends[-1], *parts[0].shape[1:]), dtype=dtype, device=device)
        for part, end in zip(parts, ends, strict=True):
            fill(part.name, whole[end - part.shape[0] : end])
        return whole

    def layer(index: int) -> LayerWeights:
        return LayerWeights(**{f: make(*parts) for f, parts in _layer_parts(config, index).items()})

    with torch.no_grad(), torch.inference_mode(False):
        embedding = make(_embedding(config))
        layers = tuple(layer(index) for index in range(config.num_layers))
        norm = make(_final_norm(config))
        head = embedding if config.tied_embeddings else make(_head(config))
    return Weights(embedding, layers, norm, head)


# ---------------------------------------------------------------- what a directory holds


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in an open safetensors file."""

    file: Any  # safetensors.safe_open
    path: Path
    shape: tuple[int, ...]
    dtype: str


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    if (folder / _SINGLE).exists():
        return _open(folder / _SINGLE)
    if not (folder / _INDEX).exists():
        raise WeightsError(_no_weights(folder))
    index = folder / _INDEX
    listed = read_json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise WeightsError(f"{index} has no weight_map of tensor names to files")
    for shard in listed.values():
        _check_shard_name(index, shard)
    shards = {shard: _open(folder / shard) for shard in dict.fromkeys(listed.values())}
    stored = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    for name, shard in listed.items():
        if name not in shards[shard]:
            raise WeightsError(f"tensor '{name}' is not in {folder / shard}, where {_INDEX} has it")
        stored[name] = shards[shard][name]
    return stored


def _check_shard_name(index: Path, name: object) -> None:
    """A shard lies beside its index. Links are followed (caches keep weights behind them), folders are not."""
    plain = isinstance(name, str) and PurePosixPath(name).name == name and not set("\\\0") & set(name)
    if not (isinstance(name, str) and plain and name.endswith(".safetensors")):
        raise WeightsError(f"{index}: {name!r:.80} is no name of a .safetensors file beside it")


def _open(path: Path) -> dict[str, _Stored]:
    """The tensors of one file; safetensors checks its header against the file's length."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist or is not a file")
    try:
        file: Any = safe_open(str(path), framework="pt", device="cpu")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {
            name: _Stored(file, path, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        }
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is corrupt or truncated: {_line(error)}") from None


def _no_weights(folder: Path) -> str:
    others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
    found = f" (found {', '.join(others[:3])}: convert it to safetensors)" if others else ""
    return f"{folder} has neither {_SINGLE} nor {_INDEX}{found}"


def _check(stored: Mapping[str, _Stored], config: ModelConfig, folder: Path) -> None:
    """Every tensor the config asks for is there, in its shape and a known type, and no other."""
    wanted = {part.name: part.shape for part in _all_parts(config)}
    if missing := [name for name in wanted if name not in stored]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{folder} lacks tensor '{missing[0]}'{more}, which {config.architecture} needs")
    for name, tensor in stored.items():
        if name not in wanted:
            if _harmless(name, config):
                continue
            raise WeightsError(
                f"{tensor.path} holds tensor '{name:.200}', which {config.architecture} has no place for"
            )
        if tensor.shape != wanted[name]:
            raise WeightsError(
                f"{tensor.path}: tensor '{name}' has shape {list(tensor.shape)}, "
                f"config.json asks for {list(wanted[name])}"
            )
        if tensor.dtype not in _STORED_DTYPES:
            raise WeightsError(
                f"{tensor.path}: tensor '{name}' is stored as {tensor.dtype}; quantised checkpoints are not "
                f"supported, choose from {', '.join(_STORED_DTYPES)}"
            )


def _harmless(name: str, config: ModelConfig) -> bool:
    """What old checkpoints carry and transformers drops too: rotary tables, and a head that is tied anyway."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")


def _copy(stored: _Stored, name: str, target: Tensor) -> None:
    try:
        source: Tensor = stored.file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{stored.path}: tensor '{name}' cannot be read: {_line(error)}") from None
    target.copy_(source)
    if target.dtype == torch.float16 and source.dtype != torch.float16 and not _finite(target):
        raise WeightsError(
            f"{stored.path}: tensor '{name}' has values beyond float16; choose dtype bfloat16 or float32"
        )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
