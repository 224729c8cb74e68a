"""Cosine and sine of every position's rotary angles, in the model's dtype.

Formulas and their order of operations are those of transformers' `modeling_rope_utils`, so that tables agree
to the bit. Knows nothing of queries and keys: turning them is an op.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drift_core.model.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """float32[head_dim / 2]: angle per position of each pair, in radians."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3(inverse, rope)
    return inverse


def _llama3(inverse: Tensor, rope: Rope) -> Tensor:
    """Wavelengths beyond `original_context / low_freq_factor` are stretched by `factor`, short ones kept."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inverse
    longest_kept, shortest_stretched = rope.original_context / high, rope.original_context / low
    stretched = torch.where(wavelength > shortest_stretched, inverse / rope.factor, inverse)
    smooth = (rope.original_context / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    between = (wavelength >= longest_kept) & (wavelength <= shortest_stretched)
    return torch.where(between, blended, stretched)


class RotaryTable:
    """Rows for positions `[0, max_context)`, computed up to what has been asked for and doubled on demand.

    Threads may share one: growing replaces both tables in one assignment, and every thread computes the same.
    """

    def __init__(
        self,
        rope: Rope,
        head_dim: int,
        max_context: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: int = 4096,
    ) -> None:
        self._inverse = inverse_frequencies(rope, head_dim)
        self._max_context, self._dtype, self._device = max_context, dtype, device
        self._tables = self._compute(min(rows, max_context))

    def rows(self, positions: Tensor, max_context: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, head_dim], of int64 positions[T], all below `max_context`.

        Raises ValueError beyond the model's context.
        """
        cos, sin = self._tables
        if max_context > cos.shape[0]:
            if max_context > self._max_context:
                raise ValueError(f"a context of {max_context} tokens exceeds the model's {self._max_context}")
            cos, sin = self._tables = self._compute(min(self._max_context, 2 * max_context))
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _compute(self, rows: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.inference_mode(False):
            half = torch.arange(rows, dtype=torch.float)[:, None] * self._inverse
            angles = torch.cat((half, half), dim=-1)
            cos, sin = angles.cos(), angles.sin()
            return cos.to(self._device, self._dtype), sin.to(self._device, self._dtype)
