"""Shapes of published models, for runs with random weights: no checkpoint, realistic costs.

Sizes are those of the models' own config.json. Knows nothing of their weights or vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from drift_scheduler.errors import UnknownNameError

_SHAPES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "qwen2.5-0.5b": {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        },
        "llama-3.1-8b": {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
        "llama-3.2-1b": {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        },
    }
)


def shape_names() -> tuple[str, ...]:
    """Names that `published_shape` knows."""
    return tuple(_SHAPES)


def published_shape(name: str) -> Mapping[str, Any]:
    """What matters of a published model's config.json. Raises UnknownNameError with the names there are."""
    if name not in _SHAPES:
        raise UnknownNameError("model shape", name, _SHAPES)
    return _SHAPES[name]
