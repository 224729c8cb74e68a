"""Tokens of requests in flight, kept until their readers take them.

An engine step brings one token each for hundreds of requests. They are written down together, in columns, and each
reader takes what is its own when it is its turn. This module knows no sockets, no turns, and no frames but the items
it keeps.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from drift_core.frames import AcceptedItem, FinishedItem, TokenIds, TokenLogprob

MAX_ROWS: Final = 256
"""Steps whose tokens are kept together in one block."""

LATE_ROWS: Final = 2048
"""Who is so many steps late gets its own tokens for itself, so that all others' need not be kept."""

ROWS_BETWEEN: Final = 16
"""Room for so many is left between two slots, a line of the processor's cache: were they a power of two of lines
apart, the tokens of a step would fall on a few sets of it and push one another out."""

SHARED_ROWS: Final = 16
"""Times of so many steps are not copied for each request, but kept once for all."""

FIRST_SLOTS: Final = 64

if TYPE_CHECKING:
    Times = array[float]
else:
    Times = array  # has no parameters before Python 3.12


class Block:
    """Steps one after another, and the tokens that they brought: each request's lie side by side, in its slot.

    `token_ids` (slots * `width`) int32, slot after slot: what a reader takes is in one or two lines of the
    processor's cache and not in one for each token. `rows`: how many steps there are, each of a `times` in seconds and
    a `micros` (`width`) int64 in whole microseconds. `first`: how many steps were there before. `next`: the block that
    follows.
    """

    __slots__ = (
        "__weakref__",
        "_micros",
        "_steps",
        "first",
        "micros",
        "next",
        "rows",
        "times",
        "token_ids",
        "width",
    )

    def __init__(self, slots: int, first: int) -> None:
        self.first = first
        self.width = MAX_ROWS + ROWS_BETWEEN
        self.rows = 0
        columns = np.empty((slots, self.width), np.int32)
        self._steps = columns.T
        self.token_ids = columns.reshape(-1).data  # cut in a third of the time
        self.times: Times = array("d")
        self.micros = np.empty(self.width, np.int64)
        self._micros = self.micros.data
        self.next: Block | None = None

    def add(self, slots: npt.NDArray[np.intp], token_ids: TokenIds, now: float) -> None:
        """One more step, of a token for each of these slots."""
        row = self.rows
        self._steps[row][slots] = token_ids
        self.times.append(now)
        self._micros[row] = int(now * 1e6)
        self.rows = row + 1

    def add_all(
        self, slots: npt.NDArray[np.intp], token_ids: Sequence[TokenIds], times: Sequence[float]
    ) -> None:
        """As many more steps, of which each has a token for each of these slots."""
        row, rows = self.rows, self.rows + len(times)
        tokens = np.frombuffer(b"".join(token_ids), np.int32)
        self._steps[row:rows, slots] = tokens.reshape(len(times), len(slots))
        self.times.extend(times)
        for at in times:
            self._micros[row] = int(at * 1e6)
            row += 1
        self.rows = rows


class Columns:
    """Tokens of requests that get one each at every step.

    A step's token ids are written down in one go, and its time is kept once: whoever reads takes what is its own when
    it is its turn. Telling hundreds of requests of a token one by one would take longer than all else that a step
    brings. A request has the same slot from its joining to its leaving, so that it does not hear of others that come
    and go. Each reader holds the block that it reads, and so those that follow, and what all have read is gone.

    `find` gives a request in flight by its id.
    """

    def __init__(self, find: Callable[[str], Progress | None]) -> None:
        self._find = find
        self._ids: list[str] | None = None  # of the latest step
        self._slots = np.empty(0, np.intp)  # theirs
        self._slot_of: dict[str, int] = {}
        self._free: list[int] = []  # a heap
        self._latest = Block(0, 0)
        self.steps = 0
        """That it was ever told of."""

    def add(self, ids: list[str], token_ids: TokenIds, now: float) -> bool:
        """One step's tokens; `False` if a request is there twice, and nothing was done."""
        if ids is not self._ids and ids != self._ids and not self._change(ids):
            return False
        if self._latest.rows >= MAX_ROWS:
            self._begin(max(FIRST_SLOTS, 2 * len(ids)))
        self._latest.add(self._slots, token_ids, now)
        self.steps += 1
        return True

    def add_all(self, ids: list[str], token_ids: Sequence[TokenIds], times: Sequence[float]) -> bool:
        """The tokens of several steps of the same requests: each slot is gone to once. `False` if these are not the
        requests of the step before, and nothing was done."""
        if ids is not self._ids:
            return False
        if self._latest.rows + len(times) <= MAX_ROWS:
            self._latest.add_all(self._slots, token_ids, times)
            self.steps += len(times)
        else:
            for tokens, now in zip(token_ids, times, strict=True):
                self.add(ids, tokens, now)
        return True

    def forget(self, request_id: str) -> None:
        """Another request of this id will come."""
        if (slot := self._slot_of.pop(request_id, None)) is not None:
            heappush(self._free, slot)
            self._ids = None

    def _change(self, ids: list[str]) -> bool:
        """Those that were not in the step before join, and those that no longer are leave."""
        slot_of, find = self._slot_of, self._find
        now = set(ids)
        if len(now) < len(ids):
            return False
        for request_id in slot_of.keys() - now:
            heappush(self._free, slot_of.pop(request_id))
            if (gone := find(request_id)) is not None:
                gone.leave()
        come = [request_id for request_id in ids if request_id not in slot_of]
        if len(come) > len(self._free):
            self._begin(max(FIRST_SLOTS, 2 * len(ids)))
        for request_id in come:
            slot = slot_of[request_id] = heappop(self._free)
            if (progress := find(request_id)) is not None:
                progress.join(self, self._latest, slot)
        self._slots = np.fromiter(map(slot_of.__getitem__, ids), np.intp, len(ids))
        self._ids = ids
        return True

    def _begin(self, slots: int) -> None:
        """A new block, of so many slots unless more are in use."""
        used = set(self._slot_of.values())
        slots = max(slots, max(used, default=0) + 1)
        self._free = [slot for slot in range(slots) if slot not in used]  # in order, and so a heap
        begun = Block(slots, self.steps)
        self._latest.next = self._latest = begun


class Progress:
    """What one request has to tell: tokens in order that were not taken yet, and the times of all it ever had.

    `accepted` and `finished` are set once and stay. `logprobs` are those of the tokens not taken yet. `times` is
    complete when `take` has just been called, and once `finished` is set. Some tokens may still be in `Columns`.
    """

    __slots__ = (
        "_begin",
        "_columns",
        "_own_micros",
        "_own_times",
        "_pieces",
        "_row",
        "_timed",
        "accepted",
        "block",
        "finished",
        "id",
        "logprobs",
        "micros",
        "token_ids",
    )

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.accepted: AcceptedItem | None = None
        self.token_ids: list[int] = []
        self._own_times: Times = array("d")  # which others do not have
        self._pieces = [self._own_times]
        self.micros: list[int] = []
        """The times of the tokens that `take` gave last, in whole microseconds."""
        self._own_micros: list[int] = []  # of `token_ids`
        self.logprobs: list[TokenLogprob | None] | None = None
        self.finished: FinishedItem | None = None
        self._columns: Columns | None = None
        self.block: Block | None = None
        """What is read of the columns. Then every step brings a token."""
        self._begin = 0  # where its slot begins, in `Block.token_ids`
        self._row = 0  # of the block, the first that was not read
        self._timed = 0  # the first whose time was not kept

    @property
    def times(self) -> Times:
        """Of its tokens, seconds on the engine's clock. In pieces, as long as nobody asks: most belong to all who had
        a token at the same steps, and copies for each would be most of what the gateway keeps."""
        own = self._pieces[0]
        if len(self._pieces) > 1:
            for piece in self._pieces[1:]:
                own.extend(piece)
            self._own_times, self._pieces = own, [own]
        return own

    @property
    def behind(self) -> int:
        """Tokens not taken yet."""
        return len(self.token_ids) + self._behind_columns()

    @property
    def oldest(self) -> float | None:
        """The time of the first token not taken yet."""
        if self.token_ids:
            return self.times[-len(self.token_ids)]
        block = self.block
        if block is None:
            return None
        if self._row < block.rows:
            return block.times[self._row]
        if block.next is None:
            return None
        return self._go_on(block, block.next).times[0]

    def add(self, token_id: int, now: float) -> None:
        """One more token."""
        self.settle()
        self.token_ids.append(token_id)
        self.times.append(now)
        self._own_micros.append(int(now * 1e6))

    def take(self) -> tuple[list[int], list[float], list[TokenLogprob | None] | None]:
        """Token ids, times and log probabilities that came since the last call."""
        self.settle()
        token_ids, self.token_ids = self.token_ids, []
        self.micros, self._own_micros = self._own_micros, []
        if not token_ids:
            return token_ids, [], None
        logprobs, self.logprobs = self.logprobs, None
        return token_ids, self.times[-len(token_ids) :].tolist(), logprobs

    def take_offsets(self, begun: int) -> tuple[list[int], list[int]]:
        """As `take`, token ids, and when they came: microseconds after `begun`, which are never less than 0.

        Most messages are made of these, so what they do not need is not done.
        """
        block = self.block
        if block is None or self.token_ids:
            token_ids, _, _ = self.take()
            offsets = [at - begun for at in self.micros]
        else:
            token_ids, offsets = self._read(block, begun)
            while block.next is not None:
                block = self._go_on(block, block.next)
                more_ids, more_offsets = self._read(block, begun)
                token_ids += more_ids
                offsets += more_offsets
        if offsets and offsets[0] < 0:
            offsets = [max(offset, 0) for offset in offsets]
        return token_ids, offsets

    def add_logprob(self, logprob: TokenLogprob) -> None:
        """Put it beside the token that came last; earlier ones that came without have `None`."""
        self.settle()
        if self.logprobs is None:
            self.logprobs = []
        self.logprobs.extend([None] * (len(self.token_ids) - 1 - len(self.logprobs)))
        self.logprobs.append(logprob)

    def join(self, columns: Columns, block: Block, slot: int) -> None:
        """Tokens come that way, from the next step on."""
        self.leave()
        self._columns, self.block, self._begin = columns, block, slot * block.width
        self._row = self._timed = block.rows

    def settle(self) -> None:
        """Take what is in the columns."""
        block = self.block
        while block is not None:
            token_ids, micros = self._read(block, 0)
            self.token_ids += token_ids
            self._own_micros += micros
            if block.next is None:
                self._keep_times(block)
                break
            block = self._go_on(block, block.next)

    def leave(self) -> None:
        """Tokens do not come by columns any more."""
        self.settle()
        self._columns = self.block = None

    def let_rows_go(self) -> None:
        """Take what is in the columns if they are kept for this one's sake."""
        if self._behind_columns() > LATE_ROWS:
            self.settle()

    def _behind_columns(self) -> int:
        """Tokens not taken out of columns: whoever is in them has one at every step."""
        columns, block = self._columns, self.block
        return 0 if columns is None or block is None else columns.steps - block.first - self._row

    def _read(self, block: Block, begun: int) -> tuple[list[int], list[int]]:
        """What it has not read of a block: token ids, and microseconds after `begun`."""
        row, stop, begin = self._row, block.rows, self._begin
        self._row = stop
        token_ids = block.token_ids[begin + row : begin + stop].tolist()
        return token_ids, (block.micros[row:stop] - begun).tolist()

    def _go_on(self, block: Block, after: Block) -> Block:
        """All of a block was read: go to the one after it."""
        self._keep_times(block)
        self.block, self._row, self._timed = after, 0, 0
        return after

    def _keep_times(self, block: Block) -> None:
        """Times of a block that were not kept yet."""
        first, self._timed = self._timed, block.rows
        if first == 0 and block.next is not None and block.rows >= SHARED_ROWS:
            self._pieces.append(block.times)
            return
        times = block.times[first:]
        if self._pieces[-1] is self._own_times:
            self._own_times.extend(times)
        else:
            self._own_times = times
            self._pieces.append(times)
