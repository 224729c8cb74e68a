"""Model inputs of prefill chunks and decode steps: token rows, positions and page tables of one forward pass.

Built on the engine's thread from what the scheduler decided; lanes only read them. Knows nothing of lanes,
layers or sampling. The decode rows persist between steps, so a step of the same requests costs a few array
operations instead of a walk over every request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from drift_core.model.decoder import Decoder
from drift_core.sequences import SequenceState, SequenceTable
from drift_kernels.inputs import AttentionInputs
from drift_scheduler.domain import PrefillChunk

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class PageTables(Protocol):
    """The part of the KV pool that batches read."""

    @property
    def page_tokens(self) -> int:
        """Token positions per page."""

    def page_table(self, request_id: str) -> Int32Array:
        """The request's pages in order."""

    def page_at(self, request_id: str, index: int) -> int:
        """One of them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. Row `sample_rows[i]` of its result yields the next token of request `sample_ids[i]`."""

    token_ids: torch.Tensor  # int64[T]
    inputs: AttentionInputs
    sample_rows: Int64Array
    sample_ids: tuple[str, ...]
    states: list[SequenceState]


class _DecodeRows:
    """Arrays with one row per decoding request, kept from step to step."""

    __slots__ = ("context", "ids", "index", "last", "row_of", "starts", "states", "table")

    def __init__(
        self, ids: tuple[str, ...] = (), states: Sequence[SequenceState] = (), pages: int = 8
    ) -> None:
        count = len(ids)
        self.ids = ids
        self.row_of = {request_id: row for row, request_id in enumerate(ids)}
        self.states = list(states)
        self.last: Int64Array = np.empty(count, np.int64)  # the token whose KV this step writes
        self.context: Int64Array = np.empty(count, np.int64)  # positions once it has been written
        self.table: Int32Array = np.zeros((count, pages), np.int32)
        self.index: Int64Array = np.arange(count)
        self.starts = torch.arange(count + 1, dtype=torch.int32)


class BatchBuilder:
    """Turns chunks and decode steps into batches for one decoder."""

    def __init__(self, decoder: Decoder, sequences: SequenceTable, kv: PageTables) -> None:
        self._decoder = decoder
        self._sequences = sequences
        self._kv = kv
        self._rows = _DecodeRows()

    def prefill(self, chunks: Sequence[PrefillChunk]) -> Batch:
        """The rows of each chunk, one after another."""
        tokens, lengths, stops = self._rows_of(chunks)
        tables = [self._kv.page_table(chunk.request_id) for chunk in chunks]
        inputs = self._decoder.inputs(lengths, stops, tables, self._kv.page_tokens)
        return Batch(torch.from_numpy(tokens), inputs, *self._finishing(chunks, lengths))

    def decode(self, request_ids: tuple[str, ...]) -> Batch:
        """One row per request: its latest token."""
        rows = self._advance(request_ids)
        return Batch(
            torch.from_numpy(rows.last.copy()),
            self._decode_inputs(rows),
            rows.index,
            request_ids,
            rows.states,
        )

    def mixed(self, chunks: Sequence[PrefillChunk], request_ids: tuple[str, ...]) -> Batch:
        """The rows of the chunks, then one per decoding request, in one ragged batch."""
        tokens, lengths, stops = self._rows_of(chunks)
        rows = self._advance(request_ids)
        tables = [self._kv.page_table(chunk.request_id) for chunk in chunks]
        decodes, first = len(request_ids), len(tokens)
        table = np.zeros(
            (len(chunks) + decodes, max(rows.table.shape[1], *(len(pages) for pages in tables))), np.int32
        )
        for row, pages in enumerate(tables):
            table[row, : len(pages)] = pages
        table[len(chunks) :, : rows.table.shape[1]] = rows.table
        inputs = self._decoder.inputs(
            np.concatenate([lengths, np.ones(decodes, np.int64)]),
            np.concatenate([stops, rows.context]),
            table,
            self._kv.page_tokens,
        )
        sample_rows, sample_ids, states = self._finishing(chunks, lengths)
        return Batch(
            torch.from_numpy(np.concatenate([tokens, rows.last])),
            inputs,
            np.concatenate([sample_rows, first + rows.index]),
            sample_ids + request_ids,
            states + rows.states,
        )

    def decoded(self, token_ids: Sequence[int]) -> None:
        """The latest decode rows yielded these tokens; the next step starts from them."""
        self._rows.last[:] = token_ids

    def _advance(self, request_ids: tuple[str, ...]) -> _DecodeRows:
        """Rows for `request_ids`, one position on; pages newly reached are read from the pool."""
        if request_ids != self._rows.ids:
            self._rows = self._regroup(request_ids)
        rows = self._rows
        rows.context += 1
        position = rows.context - 1
        for row in np.flatnonzero(position % self._kv.page_tokens == 0).tolist():
            self._read_pages(rows, row)
        return rows

    def _decode_inputs(self, rows: _DecodeRows) -> AttentionInputs:
        """What `AttentionInputs.build` makes of one row each, without its checks: half the time of a step."""
        page_tokens, config = self._kv.page_tokens, self._decoder.config
        positions = rows.context - 1
        pages = positions // page_tokens
        longest = int(rows.context.max())
        slots = rows.table[rows.index, pages] * page_tokens + positions - pages * page_tokens
        return AttentionInputs(
            query_starts=rows.starts,
            context_lens=torch.from_numpy(rows.context.astype(np.int32)),
            page_table=torch.from_numpy(rows.table[:, : -(-longest // page_tokens)].copy()),
            slots=torch.from_numpy(slots),
            positions=torch.from_numpy(positions),
            max_query=1,
            max_context=longest,
            scale=config.scale,
            window=config.sliding_window,
        )

    def _regroup(self, request_ids: tuple[str, ...]) -> _DecodeRows:
        """Keep the rows of requests that stay, read those of requests that join."""
        old = self._rows
        states = [self._sequences[request_id] for request_id in request_ids]
        new = _DecodeRows(request_ids, states, old.table.shape[1])
        source = np.array([old.row_of.get(request_id, -1) for request_id in request_ids], np.int64)
        kept = source >= 0
        new.last[kept] = old.last[source[kept]]
        new.context[kept] = old.context[source[kept]]
        new.table[kept] = old.table[source[kept]]
        for row in np.flatnonzero(~kept).tolist():
            tokens = new.states[row].tokens
            new.last[row] = tokens[-1]
            new.context[row] = len(tokens) - 1
            self._read_pages(new, row)
        return new

    def _read_pages(self, rows: _DecodeRows, row: int) -> None:
        pages = self._kv.page_table(rows.ids[row])
        if len(pages) > rows.table.shape[1]:
            wider = np.zeros((len(rows.ids), 2 * len(pages)), np.int32)
            wider[:, : rows.table.shape[1]] = rows.table
            rows.table = wider
        rows.table[row, : len(pages)] = pages

    def _rows_of(self, chunks: Sequence[PrefillChunk]) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Token ids of all rows, rows of each chunk, and the context each ends with."""
        self._forget_rows(chunk.request_id for chunk in chunks)
        tokens = np.concatenate([self._tokens(chunk) for chunk in chunks])
        lengths = np.array([chunk.tokens for chunk in chunks], np.int64)
        return tokens, lengths, np.array([chunk.stop for chunk in chunks], np.int64)

    def _finishing(
        self, chunks: Sequence[PrefillChunk], lengths: Int64Array
    ) -> tuple[Int64Array, tuple[str, ...], list[SequenceState]]:
        """The last rows of chunks whose prompt is complete, and whose they are."""
        last = [index for index, chunk in enumerate(chunks) if chunk.last]
        ids = tuple([chunks[index].request_id for index in last])
        return lengths.cumsum()[last] - 1, ids, [self._sequences[request_id] for request_id in ids]

    def _forget_rows(self, request_ids: Iterable[str]) -> None:
        """Requests that prefill (again) have new pages: their decode rows must be read anew."""
        stale = [request_id for request_id in request_ids if request_id in self._rows.row_of]
        for request_id in stale:
            del self._rows.row_of[request_id]
        if stale:
            self._rows.ids = ()

    def _tokens(self, chunk: PrefillChunk) -> Int64Array:
        tokens = self._sequences[chunk.request_id].tokens
        assert chunk.stop <= len(tokens), f"chunk {chunk} reaches past {len(tokens)} known tokens"
        assert chunk.last == (chunk.stop == len(tokens)), f"chunk {chunk} of {len(tokens)} known tokens"
        return np.array(tokens[chunk.start : chunk.stop], np.int64)
