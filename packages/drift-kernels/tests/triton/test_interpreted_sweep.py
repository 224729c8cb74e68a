"""Random batches, models and partitions; DRIFT_SWEEP says how many (`nox -s kernel_sweep`)."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from ragged import FLOAT, Batch, some_lengths

from drift_kernels.triton_ops.lane import AttentionShape
from drift_kernels.triton_ops.tiles import ARCHITECTURES, HEAD_SIZES


@pytest.mark.parametrize("seed", range(int(os.environ.get("DRIFT_SWEEP", "4"))))
def test_random_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    page = int(rng.choice([16, 32, 64, 128, 256]))
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 17))
    shape = AttentionShape(kv_heads * group, kv_heads, int(rng.choice(HEAD_SIZES)), page)
    lengths = some_lengths(rng, int(rng.integers(1, 6)), 200, page)
    window = None if rng.random() < 0.6 else int(rng.integers(1, 150))
    dtype: torch.dtype = FLOAT[int(rng.integers(3))]
    batch = Batch.random(shape, lengths, dtype, window, seed)
    batch.check(int(rng.integers(1, 5)), int(rng.choice(ARCHITECTURES)))
