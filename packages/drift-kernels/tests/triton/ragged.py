"""Ragged batches over poisoned pages: whatever a kernel must not read or write is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drift_kernels import reference
from drift_kernels.inputs import AttentionInputs
from drift_kernels.triton_ops.lane import AttentionLane, AttentionShape, PlannedInputs

# bf16 rounds weights and result to 8 bits; fp32 differs by the order of sums alone.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FLOAT = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Batch:
    """One step and its KV; `tables` are the pages of each sequence."""

    shape: AttentionShape
    query_lens: list[int]
    context_lens: list[int]
    tables: list[list[int]]
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    scale: float
    window: int | None

    @classmethod
    def random(
        cls,
        shape: AttentionShape,
        lengths: list[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        window: int | None = None,
        seed: int = 0,
    ) -> Batch:
        """lengths: (query, context) of each sequence. Pages are shuffled; slots outside contexts hold NaN."""
        rng = torch.Generator().manual_seed(seed)
        query, context = [n for n, _ in lengths], [n for _, n in lengths]
        needed = [-(-n // shape.page_tokens) for n in context]
        order = torch.randperm(sum(needed) + 3, generator=rng).tolist()
        tables = [[order.pop() for _ in range(n)] for n in needed]
        place = (sum(needed) + 3, shape.page_tokens, shape.kv_heads, shape.head)
        pages = [torch.full(place, float("nan"), dtype=dtype) for _ in range(2)]
        for table, n in zip(tables, context, strict=True):
            slots = torch.tensor([table[i // shape.page_tokens] * shape.page_tokens + i % shape.page_tokens
                                  for i in range(n)])  # fmt: skip
            for cache in pages:
                values = torch.randn(n, shape.kv_heads, shape.head, generator=rng)
                cache.view(-1, shape.kv_heads, shape.head)[slots] = values.to(dtype)
        q = torch.randn(sum(query), shape.heads, shape.head, generator=rng).to(dtype)
        return cls(shape, query, context, tables, q, *pages, shape.head**-0.5, window)

    def want(self) -> Tensor:
        """What the reference says."""
        shape = self.shape
        inputs = AttentionInputs.build(
            self.query_lens, self.context_lens, self.tables, shape.page_tokens, self.scale, self.window
        )
        return reference.attend(self.q, self.k_pages, self.v_pages, inputs)

    def lane(self, most_sms: int = 4, architecture: int = 90) -> AttentionLane:
        """A lane with room for this batch and no more; its scratch is poisoned."""
        lane = AttentionLane(
            self.shape, len(self.query_lens), sum(self.query_lens), max(self.context_lens), most_sms,
            architecture, "cpu",
        )  # fmt: skip
        lane._scratch.fill_(float("nan"))
        lane._weights.fill_(float("nan"))
        return lane

    def plan(self, lane: AttentionLane, num_sms: int = 2) -> PlannedInputs:
        return lane.plan(self.query_lens, self.context_lens, self.tables, self.scale, num_sms, self.window)

    def check(self, num_sms: int = 2, architecture: int = 90) -> None:
        """The kernel's output, on a partition of num_sms, is the reference's everywhere."""
        planned = self.plan(self.lane(num_sms, architecture), num_sms)
        out = torch.full_like(self.q, float("nan"))
        planned.attend(self.q, self.k_pages, self.v_pages, out)
        close(out, self.want())


def close(got: Tensor, want: Tensor) -> None:
    limit = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), want.float(), atol=limit, rtol=limit)


def some_lengths(rng: np.random.Generator, sequences: int, most: int, page: int) -> list[tuple[int, int]]:
    """Ragged (query, context): one-token requests, empty prefixes, page boundaries and anything in between."""
    lengths = []
    for _ in range(sequences):
        context = int(rng.choice([1, page - 1, page, page + 1, 2 * page, rng.integers(1, most + 1)]))
        query = int(rng.choice([1, 1, context, rng.integers(1, context + 1)]))
        lengths.append((query, context))
    return lengths
