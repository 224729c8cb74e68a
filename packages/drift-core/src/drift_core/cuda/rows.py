"""The decoding requests as arrays, one row each, kept from step to step and written into a pass's buffers.

A step of the same requests moves every row on by one; requests that come or go cost a regrouping. `prepare`
does all that does not need the step's own pages or tokens, so it can be done while the device runs the step
before. Knows nothing of streams, layers or why a request decodes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from drift_core.batches import PageTables
from drift_core.cuda.buffers import Array
from drift_core.cuda.decode_work import DecodeWork, Ints
from drift_core.sequences import SequenceState, SequenceTable

RECUT_STEPS = 64
"""Steps of the same rows after which their work is cut anew, so that shares stay equal."""

HOST_TOKEN = -1
"""The cell of a row whose last token the device does not have."""

Cut = Callable[[Ints, int], DecodeWork]


class DecodeRows:
    """`cell_of(request_id)`: where the device keeps a request's last token, or `HOST_TOKEN`."""

    def __init__(
        self,
        sequences: SequenceTable,
        kv: PageTables,
        cut: Cut,
        cell_of: Callable[[str], int],
        capacity: int,
        pages: int,
    ) -> None:
        self._sequences, self._kv, self._cut, self._cell_of = sequences, kv, cut, cell_of
        self.ids: tuple[str, ...] = ()
        self.states: list[SequenceState] = []
        self._row_of: dict[str, int] = {}
        self._context: Ints = np.zeros(0, np.int64)  # positions in KV before the next step
        self._cells: Ints = np.zeros(0, np.int64)
        self._table, self._other_table = (np.zeros((capacity, pages), np.int32) for _ in range(2))
        self._width = 1
        self._work: DecodeWork | None = None
        self._work_sms = 0
        self._age = 0
        self._moved = False  # whether the rows stand at the next step already

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def standing(self) -> bool:
        """Whether the rows stand at a step that was not run yet."""
        return self._moved

    @property
    def context(self) -> Ints:
        """Positions that the step prepared last reads, its own included."""
        return self._context

    @property
    def pages_used(self) -> npt.NDArray[np.int32]:
        """Pages that the step reads, of all rows one after another."""
        there = np.arange(self._width) < -(-self._context // self._kv.page_tokens)[:, None]
        pages: npt.NDArray[np.int32] = self._table[: len(self.ids), : self._width][there]
        return pages

    def move_on(self, num_sms: int) -> None:
        """Make the rows stand at the step after the last one; once per step, early or late."""
        if self._moved:
            return
        self._moved = True
        self._context += 1
        self._age += 1
        if self._work is None or self._work_sms != num_sms or self._age >= RECUT_STEPS:
            self._recut(num_sms)
        else:
            self._work.advance()

    def choose(self, request_ids: tuple[str, ...], num_sms: int) -> DecodeWork:
        """Rows for the step of `request_ids`, standing at it; pages newly reached are read from the pool."""
        if request_ids != self.ids:
            self._regroup(request_ids)
        self.move_on(num_sms)
        if self._work is None or self._work_sms != num_sms:
            self._recut(num_sms)
        tokens = self._kv.page_tokens
        for row in np.flatnonzero((self._context - 1) % tokens == 0).tolist():
            self._read_pages(row)
        assert self._work is not None
        return self._work

    def done(self) -> None:
        """The step that rows stand at was run."""
        self._moved = False

    def reset(self) -> None:
        """Know nothing of any request."""
        self._regroup(())

    def forget_rows(self, request_ids: list[str]) -> None:
        """These prefill (again), so what their rows say will not hold."""
        for request_id in request_ids:
            if self._row_of.pop(request_id, None) is not None:
                self.ids = ()

    def fill(self, host: dict[str, Array], table: npt.NDArray[np.int32], spare_cell: int) -> None:
        """Write tokens and sequences 0..B-1; `spare_cell` takes the tokens that go nowhere."""
        count = len(self.ids)
        context = self._context
        position = context - 1
        page = position // self._kv.page_tokens
        host["context_lens"][:count] = context
        host["source"][:count] = -1 - self._cells
        for row in np.flatnonzero(self._cells == HOST_TOKEN).tolist():
            host["source"][row] = self.states[row].tokens[-1]
        host["positions"][:count] = position
        slots = self._table[np.arange(count), page].astype(np.int64)
        slots *= self._kv.page_tokens
        slots += position - page * self._kv.page_tokens
        host["slots"][:count] = slots
        host["sample_cells"][:count] = np.where(self._cells == HOST_TOKEN, spare_cell, self._cells)
        table[:count, : self._width] = self._table[:count, : self._width]

    # ------------------------------------------------------------------------------------------

    def _recut(self, num_sms: int) -> None:
        self._work, self._work_sms, self._age = self._cut(self._context, num_sms), num_sms, 0

    def _regroup(self, request_ids: tuple[str, ...]) -> None:
        """Keep the rows of requests that stay, read those of requests that join."""
        before = list(map(self._row_of.get, request_ids))
        joined = [row for row, old in enumerate(before) if old is None]
        states = self.states
        self.states = [
            states[old] if old is not None else self._sequences[request_id]
            for old, request_id in zip(before, request_ids, strict=True)
        ]
        self.ids = request_ids
        self._row_of = dict(zip(request_ids, range(len(request_ids)), strict=True))
        source = np.array([0 if old is None else old for old in before], np.int64)
        if len(joined) == len(source):
            context, cells = np.zeros((2, len(source)), np.int64)
        else:
            context, cells = self._context[source] - self._moved, self._cells[source]
            context[joined] = 0
        self._width = width = int(context.max(initial=0)) // self._kv.page_tokens + 1
        self._other_table[: len(source), :width] = self._table[source, :width]
        self._table, self._other_table = self._other_table, self._table
        self._context, self._cells = context, cells
        for row in joined:
            context[row] = len(self.states[row].tokens) - 1
            cells[row] = self._cell_of(request_ids[row])
            self._read_pages(row)
        self._work, self._moved = None, False

    def _read_pages(self, row: int) -> None:
        pages = self._kv.page_table(self.ids[row])
        if len(pages) > self._width:
            self._table[: len(self.ids), self._width : len(pages)] = 0
            self._width = len(pages)
        self._table[row, : len(pages)] = pages
        self._table[row, len(pages) : self._width] = 0


def pad(
    host: dict[str, Array], table: npt.NDArray[np.int32], count: int, bucket: int, spare: tuple[int, int]
) -> None:
    """Rows that fill a bucket up: one token of a page that belongs to nobody, stored nowhere. spare: (page, cell)."""
    page, cell = spare
    host["context_lens"][count:bucket] = 1
    host["source"][count:bucket] = 0
    host["positions"][count:bucket] = 0
    host["slots"][count:bucket] = -1
    host["sample_cells"][count:bucket] = cell
    table[count:bucket, 0] = page
