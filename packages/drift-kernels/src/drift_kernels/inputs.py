"""What paged attention needs to know of a ragged batch, built once per step and used by every layer.

Knows nothing of requests or of who owns a page: the caller hands in lengths and page tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

PageTables = Sequence[Sequence[int] | npt.NDArray[np.integer]] | npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """A ragged batch of B sequences with T query tokens in all.

    Sequence b owns the query rows `query_starts[b]:query_starts[b + 1]`; they are the last positions of its
    context of `context_lens[b]` tokens, so their own keys and values must be in the pages before `attend`.
    """

    query_starts: torch.Tensor  # int32[B + 1], from 0 to T
    context_lens: torch.Tensor  # int32[B], tokens in KV including this step's
    page_table: torch.Tensor  # int32[B, max_pages]; entries past a sequence's context are 0 and never read
    slots: torch.Tensor  # int64[T], page * page_tokens + offset: where each query token's KV goes
    positions: torch.Tensor  # int64[T], position of each query token in its sequence
    max_query: int
    max_context: int
    scale: float
    window: int | None  # a token sees itself and the `window - 1` tokens before it; None: all before it

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int] | npt.NDArray[np.integer],
        context_lens: Sequence[int] | npt.NDArray[np.integer],
        page_tables: PageTables,
        page_tokens: int,
        scale: float,
        window: int | None = None,
        device: str | torch.device = "cpu",
    ) -> AttentionInputs:
        """Lay out one step's batch. `page_tables`: pages of each sequence in order, or an array [B, pages].

        numpy rows are quick (256 sequences of 63 pages: 0.2 ms), lists of int are not (1 ms).
        Raises ValueError when a sequence has no query token, more of them than context, or too few pages.
        """
        query = np.asarray(query_lens, dtype=np.int64)
        context = np.asarray(context_lens, dtype=np.int64)
        _check_lengths(query, context, page_tokens, window)
        table = _pad(page_tables, -(-context // page_tokens))
        starts = np.zeros(len(query) + 1, dtype=np.int64)
        query.cumsum(out=starts[1:])
        total = int(starts[-1])
        owner = np.arange(len(query))
        if total == len(query):  # pure decode: one row a sequence
            positions = context - 1
        else:
            owner = owner.repeat(query)
            positions = np.arange(total) + (context - starts[1:]).repeat(query)
        page = positions // page_tokens
        slots = (table[owner, page] - page) * page_tokens + positions
        return cls(
            query_starts=_tensor(starts.astype(np.int32), device),
            context_lens=_tensor(context.astype(np.int32), device),
            page_table=_tensor(table, device),
            slots=_tensor(slots, device),
            positions=_tensor(positions, device),
            max_query=int(query.max()),
            max_context=int(context.max()),
            scale=float(scale),
            window=window,
        )


def _check_lengths(
    query: npt.NDArray[np.int64], context: npt.NDArray[np.int64], page_tokens: int, window: int | None
) -> None:
    if page_tokens < 1:
        raise ValueError(f"page_tokens must be at least 1, got {page_tokens}")
    if window is not None and window < 1:
        raise ValueError(f"window must be None or at least 1, got {window}")
    if query.ndim != 1 or len(query) == 0:
        raise ValueError(f"query_lens must list at least one sequence, got shape {query.shape}")
    if context.shape != query.shape:
        raise ValueError(
            f"context_lens has shape {context.shape}, query_lens {query.shape}: one entry each per sequence"
        )
    if query.min() < 1:
        b = int(query.argmin())
        raise ValueError(f"query_lens[{b}] is {query[b]}: every sequence needs at least one query token")
    short = query > context
    if short.any():
        b = int(short.argmax())
        raise ValueError(
            f"context_lens[{b}] is {context[b]}, less than the {query[b]} query tokens it includes"
        )


def _pad(tables: PageTables, pages_needed: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """int32[B, max pages needed] from ragged tables; pages beyond a sequence's context are dropped."""
    if len(tables) != len(pages_needed):
        raise ValueError(f"page_tables has {len(tables)} rows for {len(pages_needed)} sequences")
    width = int(pages_needed.max())
    if isinstance(tables, np.ndarray):
        if tables.ndim != 2 or tables.shape[1] < width:
            raise ValueError(f"page_tables has shape {tables.shape}, the longest context needs {width} pages")
        return np.ascontiguousarray(tables[:, :width], dtype=np.int32)
    needed = pages_needed.tolist()
    used = [pages[:n] for pages, n in zip(tables, needed, strict=True)]
    if (held := list(map(len, used))) != needed:
        b = next(b for b, n in enumerate(needed) if held[b] < n)
        raise ValueError(f"page_tables[{b}] has {held[b]} pages, its context needs {needed[b]}")
    padded = np.zeros((len(tables), width), dtype=np.int32)
    padded[np.arange(width) < pages_needed[:, None]] = np.concatenate(used)
    return padded


def _tensor(array: npt.NDArray[np.integer], device: str | torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device == "cpu" else tensor.to(device, non_blocking=True)
