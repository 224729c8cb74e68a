"""The decoding requests as arrays, one row each, kept from step to step and written into a pass's buffers.

A step of the same requests moves every row on by one; requests that come or go cost what there is to know of
them, and the rows of the others stay as they are. `move_on` does all that does not need the step's own pages
or tokens, so it can be done while the device runs the step before. Page tables are long, so a buffer gets what
has changed since it was filled last. Knows nothing of streams, layers or why a request decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from drift_core.batches import PageTables
from drift_core.cuda.buffers import Array
from drift_core.cuda.decode_work import DecodeWork, Ints
from drift_core.cuda.notes import Notes
from drift_core.sequences import SequenceState, SequenceTable

RECUT_STEPS = 64
"""Steps of the same rows after which their work is cut anew, so that shares stay equal."""

MOST_HOLES = 8
"""Rows that may do nothing in a step."""

MOST_NOTES = 16
"""Changes of page tables after which writing all of them takes no longer."""

_AT_ONCE = 16

HOST_TOKEN = -1
"""The cell of a row whose last token the device does not have."""

Cut = Callable[[Ints, int], DecodeWork]
Table = npt.NDArray[np.int32]


@dataclass(slots=True, eq=False)
class _Block:
    """A host block that rows were written into, and what of their page tables has changed since."""

    host: dict[str, Array]
    whole: bool = True
    rows: list[Ints] = field(default_factory=list)
    entries: list[tuple[Ints, Ints]] = field(default_factory=list)  # rows, and the entry of each

    def note(self, rows: Ints, entries: Ints | None = None) -> None:
        """These rows differ by now, in these entries or altogether."""
        if self.whole:
            return
        if entries is None:
            self.rows.append(rows)
        else:
            self.entries.append((rows, entries))
        if len(self.rows) + len(self.entries) > MOST_NOTES:
            self.rewrite()

    def rewrite(self) -> None:
        """Nothing in it can be relied on."""
        self.whole = True
        self.rows.clear()
        self.entries.clear()


@dataclass(slots=True, eq=False)
class Served:
    """The requests of a step: each has the row of its place among `rows`, but for the `moved`, (place, row).

    What a launch does not need is worked out when asked for first.
    """

    ids: tuple[str, ...]
    rows: list[SequenceState]
    moved: list[tuple[int, int]]
    _order: Ints | None = None
    _states: list[SequenceState] | None = None

    @property
    def order(self) -> Ints:
        """The row of each."""
        if self._order is None:
            self._order = np.arange(len(self.ids))
            for place, row in self.moved:
                self._order[place] = row
        return self._order

    @property
    def states(self) -> list[SequenceState]:
        """Theirs."""
        if self._states is None:
            self._states = [self.rows[row] for row in self.order.tolist()]
        return self._states


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
        notes: Notes,
    ) -> None:
        """notes: of tokens that are not in the sequences yet."""
        self._notes = notes
        self._sequences, self._kv, self._cut, self._cell_of = sequences, kv, cut, cell_of
        self.ids: tuple[str, ...] = ()
        self.states: list[SequenceState] = []
        self._row_of: dict[str, int] = {}
        self._context: Ints = np.zeros(capacity, np.int64)  # positions that the step reads, its own included
        self._slots: Ints = np.zeros(capacity, np.int64)  # where it writes
        self._cells: Ints = np.zeros(capacity, np.int64)
        self._table = np.zeros((capacity, pages), np.int32)
        self._on_host: list[int] = []  # rows whose last token the device does not have
        self._width = 1
        self._blocks: list[_Block] = []
        self._work: DecodeWork | None = None
        self._work_sms = 0
        self._age = 0
        self._moved = False  # whether the rows stand at the next step already
        self._turning: tuple[Ints, Ints] | None = None  # rows whose step begins a page, and which of theirs
        self._turned: list[Ints] = []  # of those, the ones whose page was looked up since `fill`
        self._looked_ahead = False  # whether their pages were asked for while there was time
        self.served: Served | None = None
        """Who the step is for, where some rows are nobody's; `None` where all rows are somebody's, in order."""
        self._holes: list[int] = []  # those rows

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def standing(self) -> bool:
        """Whether the rows stand at a step that was not run yet."""
        return self._moved

    @property
    def work(self) -> DecodeWork | None:
        """The attention work of the step that rows stand at, as far as it is known."""
        return self._work

    @property
    def context(self) -> Ints:
        """Positions that the step prepared last reads, its own included."""
        return self._context[: len(self.states)]

    @property
    def pages_used(self) -> Table:
        """Pages that the step reads, of all rows one after another."""
        there = np.arange(self._width) < -(-self.context // self._kv.page_tokens)[:, None]
        there[self._holes] = False
        pages: Table = self._table[: len(self.states), : self._width][there]
        return pages

    def move_on(self, num_sms: int) -> None:
        """Make the rows stand at the step after the last one; once per step, early or late."""
        if self._moved:
            return
        self._close_holes()
        self._moved = True
        count = len(self.states)
        self._context[:count] += 1
        self._slots[:count] += 1
        self._turning = None
        self._age += 1
        if self._work is None or self._work_sms != num_sms or self._age >= RECUT_STEPS:
            self._recut(num_sms)
        else:
            self._work.advance()
        self._find_turning()

    def cut_for(self, num_sms: int) -> bool:
        """Cut the work of the step that rows stand at for so many multiprocessors; whether it was not yet."""
        if self._work is not None and self._work_sms == num_sms:
            return False
        self._recut(num_sms)
        return True

    def expect(self, joining: Sequence[str], num_sms: int) -> None:
        """These will decode from the next step on, after those that do: read them while there is time.

        The rows stand at that step already. `choose` puts right what comes otherwise.
        """
        known = self._row_of
        fresh = tuple(request_id for request_id in joining if request_id not in known)
        if fresh and len(self.ids) + len(fresh) <= len(self._context):
            self._regroup(self.ids + fresh)
            self._recut(num_sms)
            self._find_turning()

    def turn_ahead(self) -> bool:
        """Look up those pages newly reached by the step that rows stand at which the pool has by now; once a step, and
        whether there were any."""
        if self._looked_ahead or not self._moved:
            return False
        self._looked_ahead = True
        if self._turning is None:
            self._find_turning()
        assert self._turning is not None
        rows, entries = self._turning
        found: list[int] = []
        pages: list[int] = []
        for at, (row, entry) in enumerate(zip(rows.tolist(), entries.tolist(), strict=True)):
            try:
                pages.append(self._kv.page_at(self.ids[row], entry))
            except (IndexError, ValueError):  # it leaves before it comes to that, or has left
                continue
            found.append(at)
        if not found:
            return False
        left = np.ones(len(rows), np.bool_)
        left[found] = False
        self._turning = rows[left], entries[left]
        self._take_pages(rows[found], entries[found], pages)
        return True

    def choose(self, request_ids: tuple[str, ...], num_sms: int, *, dense: bool = False) -> DecodeWork:
        """Rows for the step of `request_ids`, standing at it; pages newly reached are read from the pool.

        Where requests have only left, their rows may stay in it and do nothing: closing the gaps and cutting the
        work anew waits for `move_on`, when the device is busy. `dense`: not this time.
        """
        if not self._moved:
            self._close_holes()
        same = request_ids is self.ids or request_ids == self.ids
        if not same and (dense or not self._leave_holes(request_ids)):
            self._regroup(request_ids)
        self.move_on(num_sms)
        if self._work is None or self._work_sms != num_sms:
            self._recut(num_sms)
        self._turn_pages()
        assert self._work is not None
        return self._work

    def done(self) -> None:
        """The step that rows stand at was run."""
        self._moved = self._looked_ahead = False

    def reset(self) -> None:
        """Know nothing of any request."""
        self.served, self._holes = None, []
        self._regroup(())

    def forget_rows(self, request_ids: list[str]) -> None:
        """These prefill (again), so what their rows say will not hold."""
        for request_id in request_ids:
            if self._row_of.pop(request_id, None) is not None:
                self.ids, self.served, self._holes = (), None, []

    def forget_blocks(self) -> None:
        """Somebody else wrote into the host blocks."""
        for block in self._blocks:
            block.rewrite()

    def fill(self, host: dict[str, Array], table: Table, spare: tuple[int, int]) -> None:
        """Write tokens and sequences 0..B-1. spare: (page, cell) of what belongs to nobody and goes nowhere."""
        self.fill_ahead(host, table)
        self.fill_rest(host, table, spare)

    def fill_ahead(self, host: dict[str, Array], table: Table) -> None:
        """Write what is known before the step that runs has ended."""
        count = len(self.states)
        context, cells = self._context[:count], self._cells[:count]
        host["context_lens"][:count] = context
        np.subtract(context, 1, out=host["positions"][:count])
        np.subtract(-1, cells, out=host["source"][:count])
        host["slots"][:count] = self._slots[:count]
        host["sample_cells"][:count] = cells
        self._turned.clear()
        self._fill_table(host, table, count)

    def fill_rest(self, host: dict[str, Array], table: Table, spare: tuple[int, int]) -> None:
        """Write what is not: tokens chosen on the host, pages newly reached, who has left."""
        for rows in self._turned:
            host["slots"][rows] = self._slots[rows]
        self._turned.clear()
        if self._on_host:
            self._notes.settle()
        for row in self._on_host:
            host["source"][row] = self.states[row].tokens[-1]
            host["sample_cells"][row] = spare[1]
        self._fill_table(host, table, len(self.states))
        for row in self._holes:
            pad(host, table, row, row + 1, spare)

    # ------------------------------------------------------------------------------------------

    def _fill_table(self, host: dict[str, Array], table: Table, count: int) -> None:
        """What of the page tables this block lacks."""
        block = next((each for each in self._blocks if each.host is host), None)
        if block is None:
            block = _Block(host)
            self._blocks.append(block)
        if block.whole:
            table[:count, : self._width] = self._table[:count, : self._width]
            block.whole = False
            return
        for rows in block.rows:
            table[rows, : self._width] = self._table[rows, : self._width]
        for rows, entries in block.entries:
            table[rows, entries] = self._table[rows, entries]
        block.rows.clear()
        block.entries.clear()

    def _drop_work(self) -> None:
        if self._work is not None:
            self._work.give_back()
        self._work = None

    def _recut(self, num_sms: int) -> None:
        self._drop_work()
        self._work, self._work_sms, self._age = self._cut(self.context, num_sms), num_sms, 0

    def _leave_holes(self, request_ids: tuple[str, ...]) -> bool:
        """Whether the rows serve this step as they stand, some of them as nobody's."""
        here, row_of = len(self.ids), self._row_of
        if not self._moved or self._on_host:
            return False
        if not 0 < here - len(request_ids) <= MOST_HOLES:
            return False
        count = len(request_ids)
        changed = _changed(self.ids, request_ids, count)
        sources = [row_of.get(request_ids[row], -1) for row in changed]
        taken = set(sources)
        holes = [row for row in (*changed, *range(count, here)) if row not in taken]
        if -1 in taken or len(holes) != here - count:
            return False  # somebody is new
        moved = list(zip(changed, sources, strict=True))
        self._holes, self.served = holes, Served(request_ids, self.states, moved)
        return True

    def _close_holes(self) -> None:
        if self.served is not None:
            wanted, self.served, self._holes = self.served.ids, None, []
            self._regroup(wanted)

    def _find_turning(self) -> None:
        position, tokens = self.context - 1, self._kv.page_tokens
        rows = (position % tokens == 0).nonzero()[0]  # a third of flatnonzero's time
        entries = position[rows] // tokens
        self._turning = (rows, entries)
        if len(rows):
            self._width = max(self._width, int(entries.max()) + 1)

    def _turn_pages(self) -> None:
        """Rows whose step writes the first slot of a page: which page that is, the pool knows by now."""
        if self._turning is None:
            self._find_turning()
        assert self._turning is not None
        rows, entries = self._turning
        if not len(rows):
            return
        if self._holes:
            kept = [at for at, row in enumerate(rows.tolist()) if row not in self._holes]
            if not kept:
                return
            rows, entries = rows[kept], entries[kept]
        page_at, ids = self._kv.page_at, self.ids
        pairs = zip(rows.tolist(), entries.tolist(), strict=True)
        self._take_pages(rows, entries, [page_at(ids[row], entry) for row, entry in pairs])

    def _take_pages(self, rows: Ints, entries: Ints, pages: list[int]) -> None:
        new = np.array(pages, np.int64)
        self._table[rows, entries] = new
        self._slots[rows] = new * self._kv.page_tokens
        self._turned.append(rows)
        for block in self._blocks:
            block.note(rows, entries)

    def _regroup(self, request_ids: tuple[str, ...]) -> None:
        """Keep the rows of requests that stay, read those of requests that join."""
        old, count, row_of, before = self.ids, len(request_ids), self._row_of, self.states
        changed = _changed(old, request_ids, min(len(old), count))
        changed.extend(range(min(len(old), count), count))
        sources = [row_of.get(request_ids[row]) for row in changed]
        if 2 * len(changed) >= count:
            self._row_of = dict(zip(request_ids, range(count), strict=True))
        else:
            for gone in (*[old[row] for row in changed if row < len(old)], *old[count:]):
                row_of.pop(gone, None)
            row_of.update([(request_ids[row], row) for row in changed])
        self._move(changed, sources)
        self.ids, self.states = request_ids, before[:count]
        for row, source in zip(changed, sources, strict=True):
            state = self._join(row) if source is None else before[source]
            if row < len(self.states):
                self.states[row] = state
            else:
                self.states.append(state)
        self._turning, self._looked_ahead = None, False
        self._on_host = (self._cells[:count] == HOST_TOKEN).nonzero()[0].tolist()
        rows = np.array(changed, np.int64)
        for block in self._blocks:
            block.note(rows)
        self._drop_work()

    def _move(self, changed: list[int], sources: list[int | None]) -> None:
        """Rows that have only changed places."""
        moves = [(row, source) for row, source in zip(changed, sources, strict=True) if source is not None]
        if moves:
            to, source = (list(rows) for rows in zip(*moves, strict=True))
            for each in (self._context, self._slots, self._cells):
                each[to] = each[source]
            self._table[to, : self._width] = self._table[source, : self._width]

    def _join(self, row: int) -> SequenceState:
        """Read what there is to know of a request that the rows did not have."""
        self._notes.settle()
        request_id = self.ids[row]
        state, tokens = self._sequences[request_id], self._kv.page_tokens
        pages = self._kv.page_table(request_id)
        position = len(state.tokens) - 1 - (not self._moved)
        self._context[row] = position + 1
        self._slots[row] = int(pages[position // tokens]) * tokens + position % tokens
        self._cells[row] = self._cell_of(request_id)
        self._table[row, : len(pages)] = pages
        self._width = max(self._width, len(pages))
        return state


def _changed(old: tuple[str, ...], new: tuple[str, ...], count: int) -> list[int]:
    """Which of the first `count` are others. Few are, and comparing many at once takes a fifth of the time."""
    found: list[int] = []
    for start in range(0, count, _AT_ONCE):
        stop = min(start + _AT_ONCE, count)
        if old[start:stop] != new[start:stop]:
            found += [row for row in range(start, stop) if old[row] != new[row]]
    return found


def pad(
    host: dict[str, Array], table: npt.NDArray[np.int32], count: int, bucket: int, spare: tuple[int, int]
) -> None:
    """Make rows count..bucket-1 nobody's: one token of the spare page, stored nowhere. spare: (page, cell)."""
    page, cell = spare
    host["context_lens"][count:bucket] = 1
    host["source"][count:bucket] = 0
    host["positions"][count:bucket] = 0
    host["slots"][count:bucket] = -1
    host["sample_cells"][count:bucket] = cell
    table[count:bucket, 0] = page
