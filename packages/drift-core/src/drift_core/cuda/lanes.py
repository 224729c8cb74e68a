"""The two lanes: what each keeps on the device, and how steps, mixed passes and prefill blocks become launches.

A lane's buffers, scratch, outputs and graphs are its own. Methods fill host buffers and return launches,
which the executor makes when the order between lanes is settled. Knows nothing of events or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from drift_core.batches import PageTables
from drift_core.cuda.buffers import Array, PassBuffers, Room
from drift_core.cuda.cells import TokenCells
from drift_core.cuda.choosing import Choice, Chooser, Sampled
from drift_core.cuda.decode_work import DecodeWork, Ints
from drift_core.cuda.device import Accelerator, Graph, Stream, Touches, Work
from drift_core.cuda.masks import FormMasks
from drift_core.cuda.notes import Notes
from drift_core.cuda.order import Order
from drift_core.cuda.passes import Extent, Graphs, Model, Outputs, Pass, kv_cells, token_cells
from drift_core.cuda.rows import DecodeRows, pad
from drift_core.sequences import SequenceState, SequenceTable
from drift_scheduler.domain import Lane, PrefillBlock, PrefillChunk

NARROW, BOTH, WIDE = ("narrow",), ("narrow", "wide"), ("wide",)

COMMON_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Batches whose decode graphs are captured at start-up; a step takes the smallest that holds it."""

MIXED_GRAPH_TOKENS = 2048
"""Mixed passes of more tokens are launched eagerly: there the launches take less time than the work."""

MOST_PREFILLS = 2

REHEARSED_TOKENS = (64, 63, 1)
"""Kernels are compiled apart for sizes that are multiples of 16, for others and for 1."""

Launch = Callable[[], None]


class DecodeLane:
    """Decode steps, and mixed passes, which run on the decode lane's stream for the whole device."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Model,
        kv: PageTables,
        sequences: SequenceTable,
        max_running: int,
        prefill_tokens: int,
    ) -> None:
        self._accelerator, self._model, self._kv, self._sequences = accelerator, model, kv, sequences
        units, kernels = accelerator.units, model.kernels
        self._pages = -(-model.max_context // kv.page_tokens)
        self._spare_page = model.cache.num_pages - 1
        self.max_running = max_running
        self.cells = TokenCells(2 * max_running)
        self.last_tokens = accelerator.empty((self.cells.count + 1,), torch.int64)
        self._samples = bucket_of(max_running + 1)  # a profile's mixed pass has one request more
        self.outputs = Outputs(accelerator, Lane.DECODE, model, self._samples, units)
        rows = bucket_of(max_running)
        self._steps = self._pass(Room(rows, rows, rows, self._pages, narrow=kernels.narrow_size(rows, units)))
        for _ in range(2):  # every step has one row a sequence
            self._steps.buffers.open()["query_starts"][:] = np.arange(rows + 1)
        self._opened = False  # whether a host block of steps is open, and not sent yet
        self._filled: DecodeWork | None = (
            None  # the work that is written there already, with the rows it is of
        )
        self._ahead = False  # whether the other host block may be written while the step under way runs
        self._joining: list[str] = []
        self._nobody: dict[int, int] = {}  # by host block of steps: rows from there on are nobody's in it
        self.notes = Notes()
        self._mixes = self._pass(self._mixed_room(prefill_tokens))
        self._chooser = Chooser(accelerator, self.outputs, self.cells, self.notes)
        self.graphs = Graphs(accelerator)
        self._common: dict[tuple[int, int], Graph] = {}  # of steps: by stream and bucket, once they were used
        self.rows = DecodeRows(
            sequences, kv, kernels.cut_narrow,
            lambda request_id: self.cells.cell(request_id, sequences[request_id].sampler), rows, self._pages,
            self.notes,
        )  # fmt: skip

    def _pass(self, room: Room) -> Pass:
        return Pass(self._model, PassBuffers(self._accelerator, room), self.outputs, self.last_tokens)

    def _mixed_room(self, tokens: int) -> Room:
        units, kernels, rows = self._accelerator.units, self._model.kernels, self._samples
        return Room(
            tokens + rows, 2 * rows, rows, self._pages,
            kernels.narrow_size(rows, units), kernels.wide_size(rows, tokens, units),
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------- steps

    def common_extents(self) -> list[Extent]:
        """Steps that are captured at start-up."""
        most = bucket_of(self.max_running)
        return [step_extent(bucket) for bucket in COMMON_BUCKETS if bucket <= most]

    def mixed_extents(self, most: int) -> list[Extent]:
        """Mixed passes of up to `most` tokens, as they are captured."""
        found = [self._mixed_extent(tokens) for tokens in range(32, min(most, MIXED_GRAPH_TOKENS) + 1, 32)]
        extents = dict.fromkeys(_mixed_bucket(extent) for extent in found)
        return [extent for extent in extents if extent.tokens <= self._mixes.room.tokens]

    def _mixed_extent(self, tokens: int) -> Extent:
        """Every mixed pass samples from as many rows: reading the head's weights costs the same for few."""
        return Extent(tokens, self._mixes.room.sequences, self._samples, BOTH)

    def expect(self, ids: Sequence[str]) -> None:
        """These have their first token, and will most likely be in the next step."""
        self._joining += ids

    def forget(self, ids: Sequence[str]) -> None:
        """These have ended."""
        self.cells.forget(ids)
        if self._joining:
            self._joining = [request_id for request_id in self._joining if request_id not in ids]

    def prepare(self, units: int) -> bool:
        """Do some of what the next step needs, while this one runs; whether there was anything to do."""
        rows = self.rows
        if not len(rows):
            return False
        if not rows.standing:
            rows.move_on(units)
        elif self._joining:
            rows.expect(self._joining, units)
            self._joining = []
        elif rows.cut_for(units) or rows.turn_ahead() or self._chooser.look_ahead(rows.ids, rows.states):
            return True
        elif self._ahead and rows.work is not None and self._filled is not rows.work:
            self._fill_ahead(rows.work)
        else:
            return False
        return True

    def step(self, ids: tuple[str, ...], stream: Stream, units: int, order: Order) -> list[Launch]:
        """One token for each of `ids`; a second launch, if there is one, when `masks` is complete."""
        each, rows, self._joining = self._steps, self.rows, []
        work = rows.choose(ids, units)
        count, spare = len(rows), (self._spare_page, self.cells.spare)
        bucket = bucket_of(count)
        extent, graph = step_extent(bucket), self._common.get((id(stream), bucket))
        self._ahead = graph is not None or self.graphs.ready(stream.place, extent)
        if graph is None:
            if not self._ahead:  # the other block is sent with the capture
                order.catch_up(stream)
            graph = self._common[id(stream), bucket] = self.graph(stream, extent, units)
        host = each.buffers.reopen() if work is self._filled else self._fill_ahead(work)
        table = each.buffers.table(host)
        rows.fill_rest(host, table, spare)
        filled = self._nobody[id(host)]
        if count < filled:
            pad(host, table, count, filled, spare)
            self._nobody[id(host)] = count
        self._filled, self._opened = None, False
        choice = self._chooser.ask(rows.ids, rows.states, host, each, rows.served)
        touches = self._touches(each, host, extent, np.zeros(0, np.int64))
        run = Work("decode", _nothing, touches, count, self._layers)

        def launch() -> None:
            each.buffers.send(stream, extent.sequences)
            self._accelerator.replay(stream, graph, run)
            choice.begin(stream, units)

        return [launch, lambda: choice.finish(stream, units)] if choice.waits else [launch]

    @property
    def masks(self) -> FormMasks:
        """Of the pass under way."""
        return self.outputs.masks

    def rehearse(self, stream: Stream, units: int) -> None:
        """Compile what no captured step runs."""
        self._chooser.rehearse(stream, units, self._steps)

    def _fill_ahead(self, work: DecodeWork) -> dict[str, Array]:
        """Write what the rows that stand there and their work say into a host block."""
        buffers = self._steps.buffers
        host = buffers.reopen() if self._opened else buffers.open()
        self._opened, self._filled = True, work
        self._nobody[id(host)] = max(self._nobody.get(id(host), buffers.room.sequences), len(self.rows))
        self.rows.fill_ahead(host, buffers.table(host))
        _fill_list(host, "narrow", work.bounds, work.items, work.merges)
        return host

    def graph(self, stream: Stream, extent: Extent, units: int) -> Graph:
        """The captured step of an extent on a stream."""
        each = self._steps if extent.lists == NARROW else self._mixes

        def make() -> Work:
            self.rows.forget_blocks()
            self._nobody.clear()
            self._filled, self._opened = None, False
            host = each.buffers.open()
            table = each.buffers.table(host)
            pad(host, table, 0, extent.sequences, (self._spare_page, self.cells.spare))
            _pad_tokens(host, 0, extent.tokens)
            host["query_starts"][: extent.sequences + 1] = np.minimum(
                np.arange(extent.sequences + 1), extent.tokens
            )
            host["sample_rows"][: extent.samples] = 0
            host["sample_cells"][: extent.samples] = self.cells.spare
            for name in extent.lists:
                _fill_list(host, name, *_NO_WORK)
            each.buffers.send(stream, extent.sequences)
            none = np.zeros(0, np.int64)
            name = f"capture of {extent.tokens} tokens"
            return Work(
                name,
                each.step(extent, units),
                lambda: each.touches(kv_cells(none), kv_cells(none), token_cells(none)),
                extent.tokens,
                self._layers,
            )

        return self.graphs.get(stream, extent, make)

    # ---------------------------------------------------------------------------------------- mixed

    def mixed(
        self, chunks: Sequence[PrefillChunk], ids: tuple[str, ...], stream: Stream, units: int, order: Order
    ) -> list[Launch]:
        """A token for each of `ids`, and the chunks' rows, in one pass; firsts come after the others. As `step`."""
        chunk_tokens = sum(chunk.tokens for chunk in chunks)
        self._make_room(chunk_tokens)
        each, count = self._mixes, len(ids)
        finishing = [chunk for chunk in chunks if chunk.last]
        exact = self._mixed_extent(count + chunk_tokens)
        extent = _mixed_bucket(exact)
        captured = extent.tokens <= min(MIXED_GRAPH_TOKENS, each.room.tokens)
        graph: Graph | None = None
        if captured:
            if not self.graphs.ready(stream.place, extent):
                order.catch_up(stream)
            graph = self.graph(stream, extent, units)
        else:
            extent = exact
        self.rows.forget_rows([chunk.request_id for chunk in chunks])
        self._filled, self._joining = None, []
        work = self.rows.choose(ids, units, dense=True)
        host = each.buffers.open()
        table = each.buffers.table(host)
        self.rows.fill(host, table, (self._spare_page, self.cells.spare))
        pages = self._fill_chunks(host, table, chunks, count, units)
        _fill_list(host, "narrow", work.bounds, work.items, work.merges)
        pad_from = count + len(chunks)
        host["context_lens"][pad_from : extent.sequences] = 1
        table[pad_from : extent.sequences, 0] = self._spare_page
        host["query_starts"][pad_from + 1 : extent.sequences + 1] = count + chunk_tokens
        _pad_tokens(host, count + chunk_tokens, extent.tokens)
        firsts = self._fill_samples(host, chunks, finishing, count, extent.samples)
        states = self.rows.states + [self._sequences[chunk.request_id] for chunk in finishing]
        choice = self._chooser.ask(ids + firsts, states, host, each)
        touches = self._touches(each, host, extent, pages)
        step = _nothing if captured else each.step(extent, units)
        run = Work("mixed", step, touches, count + chunk_tokens, self._layers)

        def launch() -> None:
            # Sequences that pad have no tokens; what a graph finds in their rows was sent at its capture.
            each.buffers.send(stream, pad_from if captured else extent.sequences)
            if graph is not None:
                self._accelerator.replay(stream, graph, run)
            else:
                self._accelerator.launch(stream, run)
            choice.begin(stream, units)

        return [launch, lambda: choice.finish(stream, units)] if choice.waits else [launch]

    @property
    def states(self) -> list[SequenceState]:
        """Whose tokens the pass under way will yield, in order."""
        return self._chooser.asked.states

    def sampled(self) -> Sampled:
        """What the pass that is done now yields."""
        return self._chooser.answer()

    def _fill_chunks(
        self,
        host: dict[str, Array],
        table: np.ndarray[Any, np.dtype[np.int32]],
        chunks: Sequence[PrefillChunk],
        count: int,
        units: int,
    ) -> Ints:
        """Chunks behind `count` decode rows; returns their pages."""
        layout = lay_out(chunks, self._sequences, self._kv)
        layout.fill(host, table, count, count)
        host["query_starts"][: count + 1] = np.arange(count + 1)
        query, context = layout.query, layout.context
        cut = self._model.kernels.cut_wide(count, query, context, units)
        _fill_list(host, "wide", cut.bounds, cut.items, cut.merges)
        return layout.pages()

    def _fill_samples(
        self,
        host: dict[str, Array],
        chunks: Sequence[PrefillChunk],
        finishing: Sequence[PrefillChunk],
        count: int,
        samples: int,
    ) -> tuple[str, ...]:
        """Rows sampled from: the decode rows, then the last rows of chunks that end a prompt; whose the latter are."""
        ends = count + np.cumsum([chunk.tokens for chunk in chunks]) - 1
        last = ends[[index for index, chunk in enumerate(chunks) if chunk.last]]
        ids = tuple(chunk.request_id for chunk in finishing)
        host["sample_rows"][:count] = np.arange(count)
        host["sample_rows"][count : count + len(ids)] = last
        host["sample_rows"][count + len(ids) : samples] = 0
        fill_cells(host, count, ids, self.cells, self._sequences)
        host["sample_cells"][count + len(ids) : samples] = self.cells.spare
        return ids

    def _make_room(self, tokens: int) -> None:
        rows = bucket_of(self.max_running)
        if tokens + rows > self._mixes.room.tokens:
            with self._accelerator.rare(f"a mixed pass of {tokens} tokens, more than any before"):
                self._accelerator.synchronize()
                self._mixes = self._pass(self._mixed_room(2 * tokens))
                self.graphs.drop(BOTH)

    @property
    def _layers(self) -> int:
        return self._model.config.num_layers

    def _touches(
        self, each: Pass, host: dict[str, Array], extent: Extent, more_pages: Ints
    ) -> Callable[[], Touches]:
        """What the pass that `host` describes touches, for devices that ask; decided now, as `host` is refilled."""
        if self._accelerator.kind == "cuda":
            return Touches
        slots = cast(Ints, host["slots"])[: extent.tokens]
        cells = cast(Ints, host["sample_cells"])[: extent.samples]
        pages = np.concatenate([self.rows.pages_used, more_pages])
        touches = each.touches(
            kv_cells(pages),
            kv_cells(slots[slots >= 0] // self._kv.page_tokens),
            token_cells(cells[cells < self.cells.spare]),
        )
        return lambda: touches


class PrefillLane:
    """Prefill batches, of which two may be under way: each has a pass's buffers and its hidden states."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Model,
        kv: PageTables,
        sequences: SequenceTable,
        decode: DecodeLane,
        prefill_tokens: int,
    ) -> None:
        self._accelerator, self._model, self._kv, self._sequences = accelerator, model, kv, sequences
        self._cells, self._last_tokens = decode.cells, decode.last_tokens
        self._rows = decode.max_running
        self._pages = -(-model.max_context // kv.page_tokens)
        self.outputs = Outputs(accelerator, Lane.PREFILL, model, bucket_of(self._rows), accelerator.units)
        self._passes = [self._pass(prefill_tokens) for _ in range(MOST_PREFILLS)]
        self._chooser = Chooser(accelerator, self.outputs, self._cells, decode.notes)
        self._batches: dict[int, _Batch] = {}
        self.requests = 0

    def _pass(self, tokens: int) -> Pass:
        kernels, config = self._model.kernels, self._model.config
        wide = kernels.wide_size(self._rows, tokens, self._accelerator.units)
        room = Room(tokens, self._rows, bucket_of(self._rows), self._pages, wide=wide)
        hidden = self._accelerator.empty((tokens, config.hidden_size), self._model.dtype)
        return Pass(
            self._model, PassBuffers(self._accelerator, room), self.outputs, self._last_tokens, hidden
        )

    def block(self, block: PrefillBlock, stream: Stream, units: int, layers_at_once: int) -> list[Launch]:
        """The launches of a block, at most `layers_at_once` layers each."""
        batch = self._batches.get(block.batch_id)
        if batch is None:
            assert block.layer_start == 0, f"batch {block.batch_id} starts at layer {block.layer_start}"
            batch = self._open(block)
        launches: list[Launch] = []
        if len(block.chunks) < len(batch.chunks):
            launches.append(self._drop(batch, block.chunks, stream))
        assert block.layer_start == batch.layer, f"{block} follows layer {batch.layer}"
        batch.layer = block.layer_stop
        self.requests = len(block.chunks)
        if batch.cut_for != units:
            launches.append(self._send(batch, stream, units))
        steps = range(block.layer_start, block.layer_stop, layers_at_once)
        for start in steps:
            stop = min(start + layers_at_once, block.layer_stop)
            launches.append(self._layers(batch, start, stop, stop == block.layer_stop, stream, units))
        if block.layer_stop == self._model.config.num_layers:
            launches.append(self._ending(batch, stream, units))
            del self._batches[block.batch_id]
        return launches

    def sampled(self) -> Sampled:
        """First tokens of the batch that is done now."""
        return self._chooser.answer()

    def forget(self, sequences: SequenceTable) -> None:
        """Drop batches of which no request is left."""
        for batch_id, batch in list(self._batches.items()):
            if not any(chunk.request_id in sequences for chunk in batch.chunks):
                del self._batches[batch_id]

    def rehearse(self, stream: Stream, units: int, tokens: int) -> None:
        """Run a made-up prompt over no pages: compiles kernels, makes library handles, fills the allocator."""
        each = self._passes[0]
        extent = Extent(tokens, 1, 1, WIDE)
        host = each.buffers.open()
        table = each.buffers.table(host)
        pad(host, table, 0, 1, (self._model.cache.num_pages - 1, self._cells.spare))
        _pad_tokens(host, 0, tokens)
        host["query_starts"][:2] = (0, tokens)
        host["context_lens"][0] = tokens
        table[0, : -(-tokens // self._kv.page_tokens)] = self._model.cache.num_pages - 1
        host["sample_rows"][0], host["sample_cells"][0] = 0, self._cells.spare
        _fill_list(host, "wide", *_NO_WORK)
        each.buffers.send(stream, 1)
        none = np.zeros(0, np.int64)
        touches = each.touches(kv_cells(none), kv_cells(none), token_cells(none))
        work = Work("rehearsal", each.step(extent, units), lambda: touches, tokens, 1)
        self._accelerator.launch(stream, work)

    # ----------------------------------------------------------------------------------- a batch's life

    def _open(self, block: PrefillBlock) -> _Batch:
        taken = {id(batch.each) for batch in self._batches.values()}
        free = [index for index, each in enumerate(self._passes) if id(each) not in taken]
        assert free, f"batch {block.batch_id} is one more than {MOST_PREFILLS} under way"
        layout = lay_out(block.chunks, self._sequences, self._kv)
        tokens = int(layout.query.sum())
        if tokens > self._passes[free[0]].room.tokens:
            with self._accelerator.rare(f"a prefill of {tokens} tokens, more than any before"):
                self._accelerator.synchronize()
                self._passes[free[0]] = self._pass(tokens)
        batch = _Batch(block.chunks, layout, self._passes[free[0]])
        self._batches[block.batch_id] = batch
        return batch

    def _send(self, batch: _Batch, stream: Stream, units: int) -> Launch:
        """Fill and send the batch's numbers, its work cut for `units`."""
        batch.cut_for = units
        layout, each = batch.layout, batch.each

        def launch() -> None:
            host = each.buffers.open()
            layout.fill(host, each.buffers.table(host), 0, 0)
            cut = self._model.kernels.cut_wide(0, layout.query, layout.context, units)
            _fill_list(host, "wide", cut.bounds, cut.items, cut.merges)
            finishing = [index for index, chunk in enumerate(batch.chunks) if chunk.last]
            ends = layout.query.cumsum() - 1
            batch.ids = tuple(batch.chunks[index].request_id for index in finishing)
            host["sample_rows"][: len(finishing)] = ends[finishing]
            fill_cells(host, 0, batch.ids, self._cells, self._sequences)
            states = [self._sequences[request_id] for request_id in batch.ids]
            batch.choice = self._chooser.ask(batch.ids, states, host, each)
            each.buffers.send(stream, len(batch.chunks))

        return launch

    def _layers(self, batch: _Batch, start: int, stop: int, last: bool, stream: Stream, units: int) -> Launch:
        each, model, layout = batch.each, self._model, batch.layout
        tokens = int(layout.query.sum())
        extent = Extent(tokens, len(batch.chunks), 0, WIDE)

        def run() -> None:
            decoder, hidden = model.on(units), batch.hidden
            if start == 0:
                hidden = each.embed(extent, units)
            elif hidden is None:
                assert each.hidden is not None
                hidden = each.hidden[:tokens]
            hidden = decoder.run_layers(hidden, start, stop, model.cache, each.inputs(extent, units))
            if last and stop < model.config.num_layers:
                assert each.hidden is not None
                each.hidden[:tokens].copy_(hidden)  # the next block may run on another stream
                hidden = None
            batch.hidden = hidden

        pages = layout.pages()
        written = layout.written_pages()

        def touches() -> Touches:
            assert each.hidden is not None
            scratch = self.outputs.scratch
            own = [each.hidden, scratch.partial, scratch.partial_weight]
            return Touches([each.buffers.device, kv_cells(pages)], [*own, kv_cells(written)])

        work = Work("prefill", run, touches, tokens, stop - start)
        return lambda: self._accelerator.launch(stream, work)

    def _ending(self, batch: _Batch, stream: Stream, units: int) -> Launch:
        """Choose the first tokens of the prompts that are complete."""
        each, layout = batch.each, batch.layout

        def launch() -> None:
            if not batch.ids:
                batch.hidden = None
                return
            extent = Extent(int(layout.query.sum()), len(batch.chunks), len(batch.ids), WIDE)
            cells = np.array([self._cells.cell(i, self._sequences[i].sampler) for i in batch.ids])
            none = np.zeros(0, np.int64)

            def run() -> None:
                assert batch.hidden is not None
                each.finish(batch.hidden, extent, units)
                batch.hidden = None

            touches = each.touches(kv_cells(none), kv_cells(none), token_cells(cells[cells >= 0]))
            self._accelerator.launch(stream, Work("first tokens", run, lambda: touches, len(batch.ids)))
            choice, masks = batch.choice, self.outputs.masks
            assert choice is not None
            choice.begin(stream, units)
            if (
                choice.waits
            ):  # at once: what may begin an output is known, only preempted ones are at another place
                while not masks.complete:
                    masks.fill_next()
                choice.finish(stream, units)

        return launch

    def _drop(self, batch: _Batch, chunks: tuple[PrefillChunk, ...], stream: Stream) -> Launch:
        """Cut the batch to the chunks that are left."""
        kept = {chunk.request_id for chunk in chunks}
        rows = np.concatenate(
            [np.full(chunk.tokens, chunk.request_id in kept) for chunk in batch.chunks]
        ).nonzero()[0]
        each, layer = batch.each, batch.layer
        batch.chunks, batch.layout = chunks, lay_out(chunks, self._sequences, self._kv)
        batch.cut_for = 0

        def run() -> None:
            if layer and each.hidden is not None:
                index = each.buffers.tensor("source")[: len(rows)]
                each.hidden[: len(rows)].copy_(each.hidden.index_select(0, index))

        def launch() -> None:
            host = each.buffers.open()
            host["source"][: len(rows)] = rows  # the numbers of the batch follow in a second copy
            each.buffers.send(stream, 0)
            assert each.hidden is not None
            touched = Touches([each.buffers.device], [each.hidden])
            self._accelerator.launch(stream, Work("drop rows", run, lambda: touched, len(rows)))

        return launch


@dataclass(slots=True, eq=False)
class _Batch:
    """A prefill batch between its blocks. `cut_for`: units its numbers were last sent for, 0: not yet."""

    chunks: tuple[PrefillChunk, ...]
    layout: Layout
    each: Pass
    layer: int = 0
    cut_for: int = 0
    hidden: Tensor | None = None
    ids: tuple[str, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows of some chunks, one after another."""

    tokens: Ints  # [T]
    query: Ints  # [C], rows of each chunk
    context: Ints  # [C], positions each ends with
    tables: list[np.ndarray[Any, np.dtype[np.int32]]]
    page_tokens: int

    def fill(
        self, host: dict[str, Array], table: np.ndarray[Any, np.dtype[np.int32]], rows: int, sequences: int
    ) -> None:
        """Write them behind `rows` rows of `sequences` sequences."""
        total, count = len(self.tokens), len(self.query)
        ends = self.query.cumsum()
        owner = np.arange(count).repeat(self.query)
        position = np.arange(total) + (self.context - ends)[owner]
        for index, pages in enumerate(self.tables):
            table[sequences + index, : len(pages)] = pages
        page = position // self.page_tokens
        slots = table[sequences + owner, page].astype(np.int64) * self.page_tokens
        host["source"][rows : rows + total] = self.tokens
        host["positions"][rows : rows + total] = position
        host["slots"][rows : rows + total] = slots + position - page * self.page_tokens
        host["query_starts"][sequences] = rows
        host["query_starts"][sequences + 1 : sequences + count + 1] = rows + ends
        host["context_lens"][sequences : sequences + count] = self.context

    def pages(self) -> Ints:
        """Every page of theirs."""
        return np.concatenate(self.tables).astype(np.int64)

    def written_pages(self) -> Ints:
        """Those that their new rows lie in."""
        parts = [
            pages[(context - query) // self.page_tokens : -(-context // self.page_tokens)]
            for pages, query, context in zip(self.tables, self.query, self.context, strict=True)
        ]
        return np.concatenate(parts).astype(np.int64)


def lay_out(chunks: Sequence[PrefillChunk], sequences: SequenceTable, kv: PageTables) -> Layout:
    """The rows of chunks, from what is known of their requests."""
    tokens = [_tokens(sequences[chunk.request_id].tokens, chunk) for chunk in chunks]
    context = np.array([chunk.stop for chunk in chunks], np.int64)
    needed = (-(-context // kv.page_tokens)).tolist()
    tables = [kv.page_table(chunk.request_id)[:n] for chunk, n in zip(chunks, needed, strict=True)]
    query = np.array([chunk.tokens for chunk in chunks], np.int64)
    return Layout(np.concatenate(tokens), query, context, tables, kv.page_tokens)


def _tokens(known: Sequence[int], chunk: PrefillChunk) -> Ints:
    assert chunk.stop <= len(known), f"chunk {chunk} reaches past {len(known)} known tokens"
    assert chunk.last == (chunk.stop == len(known)), f"chunk {chunk} of {len(known)} known tokens"
    return np.array(known[chunk.start : chunk.stop], np.int64)


def fill_cells(
    host: dict[str, Array], start: int, ids: Sequence[str], cells: TokenCells, sequences: SequenceTable
) -> None:
    """Where the device is to keep the tokens of `ids`."""
    for row, request_id in enumerate(ids, start):
        cell = cells.cell(request_id, sequences[request_id].sampler)
        host["sample_cells"][row] = cells.spare if cell < 0 else cell


def bucket_of(count: int) -> int:
    """The smallest captured batch that holds `count` requests."""
    for bucket in COMMON_BUCKETS:
        if count <= bucket:
            return bucket
    return -(-count // 128) * 128


def step_extent(bucket: int) -> Extent:
    """A decode step of a bucket."""
    return Extent(bucket, bucket, bucket, NARROW)


def _mixed_bucket(exact: Extent) -> Extent:
    """Tokens rounded up to an eighth or less of themselves."""
    tokens = exact.tokens
    step = max(32, 1 << max(tokens.bit_length() - 3, 0))
    return exact._replace(tokens=-(-tokens // step) * step)


_NO_ITEMS = np.zeros((0, 8), np.int32)
_NO_WORK = (np.zeros(1, np.int32), _NO_ITEMS, _NO_ITEMS)


def _fill_list(
    host: dict[str, Array],
    name: str,
    bounds: np.ndarray[Any, np.dtype[np.int32]],
    items: np.ndarray[Any, np.dtype[np.int32]],
    merges: np.ndarray[Any, np.dtype[np.int32]],
) -> None:
    host[f"{name}_count"][0] = len(merges)
    host[f"{name}_bounds"][: len(bounds)] = bounds
    host[f"{name}_bounds"][len(bounds) :] = bounds[-1]
    host[f"{name}_items"][: items.size] = items.ravel()
    host[f"{name}_merges"][: merges.size] = merges.ravel()


def _pad_tokens(host: dict[str, Array], start: int, stop: int) -> None:
    host["source"][start:stop] = 0
    host["positions"][start:stop] = 0
    host["slots"][start:stop] = -1


def _nothing() -> None:
    return
