"""Decode rows kept from step to step say what rows read anew would: whoever comes, goes, moves or prefills again."""

from __future__ import annotations

import random
from array import array
from typing import Any

import numpy as np
import pytest

from drift_core.cuda.buffers import Room
from drift_core.cuda.decode_work import DecodeWork, NativeCut, cut_decode
from drift_core.cuda.notes import Notes
from drift_core.cuda.rows import DecodeRows
from drift_core.sampler import SamplerState
from drift_core.sampling_params import SamplingParams
from drift_core.sequences import SequenceTable
from drift_kernels.native_library import NativeUnavailable

PAGE, CAPACITY, PAGES, SPARE, UNITS = 4, 12, 90, 99, 8
SPARE_PAGE = 77
GREEDY = SamplingParams(temperature=0.0)


class Pool:
    """Pages of requests that only grow."""

    page_tokens = PAGE

    def __init__(self) -> None:
        self.pages: dict[str, list[int]] = {}
        self.next = 1

    def cover(self, request_id: str, positions: int) -> None:
        pages = self.pages.setdefault(request_id, [])
        while len(pages) * PAGE < positions:
            pages.append(self.next)
            self.next += 1

    def page_table(self, request_id: str) -> Any:
        return np.array(self.pages[request_id], np.int32)

    def page_at(self, request_id: str, index: int) -> int:
        return self.pages[request_id][index]


class World:
    """Requests that come and go, and the rows that follow them."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.pool, self.sequences, self.cells = Pool(), SequenceTable(), {}
        self.ids: list[str] = []
        self.made = self.holes = self.turned = 0
        self.rows = self.new_rows()
        self.blocks = [self.new_block() for _ in range(3)]

    def new_rows(self) -> DecodeRows:
        def cut(context: Any, sms: int) -> DecodeWork:
            return cut_decode(context, 2, 8, 16, 2 * sms)

        return DecodeRows(self.sequences, self.pool, cut, self.cells.__getitem__, CAPACITY, PAGES, Notes())

    def new_block(self) -> tuple[dict[str, Any], Any]:
        host: dict[str, Any] = {
            name: np.full(count, -7, {"i4": np.int32, "i8": np.int64, "f4": np.float32}[kind])
            for name, (kind, count) in Room(CAPACITY, CAPACITY, CAPACITY, PAGES).fields().items()
        }
        return host, host["page_table"].reshape(CAPACITY, PAGES)

    def join(self) -> None:
        name, length = f"r{self.made}", self.draw.randint(1, 40)
        self.made += 1
        self.sequences.add(name, list(range(length)), SamplerState(GREEDY, [1], (), 100, 0))
        self.sequences[name].tokens.append(5)
        self.cells[name] = -1 if self.draw.random() < 0.2 else self.made
        self.ids.append(name)

    def leave(self) -> None:
        row = self.draw.randrange(len(self.ids))
        last = self.ids.pop()
        if row < len(self.ids):
            self.ids[row] = last

    def prefill_again(self) -> None:
        """A preempted request's pages are others."""
        name = self.draw.choice(self.ids)
        self.pool.pages[name] = []
        self.pool.cover(name, len(self.sequences[name].tokens))
        self.rows.forget_rows([name])

    def change(self) -> None:
        for _ in range(self.draw.choice([0, 0, 1, 1, 2, 5])):
            if self.ids and self.draw.random() < 0.5:
                self.leave()
            elif len(self.ids) < CAPACITY:
                self.join()
        if self.ids and self.draw.random() < 0.1:
            self.prefill_again()
        if self.draw.random() < 0.1:
            self.rows.forget_blocks()
            for host, _ in self.blocks:
                host["page_table"][:] = -9
        if self.draw.random() < 0.05:
            self.rows.reset()

    def step(self) -> None:
        if not self.ids:
            return
        for name in self.ids:
            self.pool.cover(name, len(self.sequences[name].tokens))
        host, table = self.blocks[self.draw.randrange(3)]
        work = self.rows.choose(tuple(self.ids), UNITS)
        self.rows.fill(host, table, (SPARE_PAGE, SPARE))
        anew, (want, want_table) = self.new_rows(), self.new_block()
        fresh = anew.choose(tuple(self.ids), UNITS)
        anew.fill(want, want_table, (SPARE_PAGE, SPARE))
        count = len(self.ids)
        served = self.rows.served
        order = list(range(count)) if served is None else served.order.tolist()
        if served is not None:
            assert served.ids == tuple(self.ids)
            assert [id(state) for state in served.states] == [id(self.sequences[i]) for i in self.ids]
        assert [id(self.rows.states[row]) for row in order] == [id(self.sequences[i]) for i in self.ids]
        for field in ("context_lens", "source", "positions", "slots", "sample_cells"):
            assert host[field][order].tolist() == want[field][:count].tolist(), field
        for row, name in zip(order, self.ids, strict=True):
            pages = -(-len(self.sequences[name].tokens) // PAGE)
            assert table[row, :pages].tolist() == self.pool.pages[name][:pages], (row, name)
        for row in set(range(len(self.rows))) - set(order):
            self.holes += 1
            assert (host["slots"][row], host["sample_cells"][row], table[row, 0]) == (-1, SPARE, SPARE_PAGE)
            assert (host["source"][row], host["context_lens"][row]) == (0, 1)
        mine = work.items[np.isin(work.items[:, 0], order)]
        assert int((mine[:, 4] - mine[:, 3]).sum()) == int((fresh.items[:, 4] - fresh.items[:, 3]).sum())
        self.rows.done()
        for name in self.ids:
            self.sequences[name].tokens.append(7)


@pytest.mark.parametrize("seed", range(8))
def test_rows_kept_are_rows_read_anew(seed: int) -> None:
    world = World(seed)
    for _ in range(300):
        world.change()
        world.step()
        if world.draw.random() < 0.7 and len(world.rows):
            world.rows.move_on(UNITS)
            if world.draw.random() < 0.3 and len(world.ids) < CAPACITY:
                world.join()
                world.pool.cover(world.ids[-1], len(world.sequences[world.ids[-1]].tokens))
                world.rows.expect([world.ids[-1]], UNITS)
            if world.draw.random() < 0.7:
                for name in world.ids:  # some get the page of the step to come early
                    if name in world.pool.pages and world.draw.random() < 0.8:
                        world.pool.cover(name, len(world.sequences[name].tokens))
                world.turned += world.rows.turn_ahead()
                assert not world.rows.turn_ahead(), "once a step"
            if world.draw.random() < 0.5:
                host, table = world.blocks[world.draw.randrange(3)]
                world.rows.fill_ahead(host, table)
    assert world.holes
    assert world.turned


def test_a_block_that_is_up_to_date_gets_only_what_changed() -> None:
    world = World(0)
    for _ in range(6):
        world.join()
    world.blocks = world.blocks[:1]
    world.draw.randrange = lambda *_: 0  # type: ignore[method-assign]
    world.step()
    _, table = world.blocks[0]
    table[:6] = -3
    world.join()
    for name in world.ids:
        world.pool.cover(name, len(world.sequences[name].tokens))
    world.rows.choose(tuple(world.ids), UNITS)
    world.rows.fill(*world.blocks[0], (SPARE_PAGE, SPARE))
    rewritten = {row for row in range(7) if (table[row] >= 0).any()}
    turned = {i for i, name in enumerate(world.ids) if (len(world.sequences[name].tokens) - 1) % PAGE == 0}
    assert rewritten == turned | {6}


def test_memory_given_back_serves_the_next_list() -> None:
    try:
        cut = NativeCut()
    except NativeUnavailable as why:
        pytest.skip(str(why))
    context = np.array([5, 90, 33, 200], np.int64)
    first = cut(context, 2, 16, 32, 24)
    at = first.items.ctypes.data
    kept = cut(context + 1, 2, 16, 32, 24)  # the first is in use: this one lies elsewhere
    assert kept.items.ctypes.data != at
    first.give_back()
    for lengths in (context[:3], context + 40, np.arange(1, 60)):
        work, want = cut(lengths, 2, 16, 32, 24), cut_decode(lengths, 2, 16, 32, 24)
        for name in ("bounds", "items", "merges", "last"):
            assert np.array_equal(getattr(work, name), getattr(want, name)), name
        work.give_back()
    want = cut_decode(context + 1, 2, 16, 32, 24)
    assert np.array_equal(kept.items, want.items)
    assert array("q", kept.last.tolist()) == array("q", want.last.tolist())
