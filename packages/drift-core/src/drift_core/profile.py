"""Measures both phases under each unit count, alone and side by side, and makes the cost table of it.

Every piece of work runs on a lane of its own, pinned as in service, with made-up tokens over the real weights
and KV pages. Knows nothing of requests or policies; to be done while nothing else runs, before serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from drift_core.lanes import Job, LaneThread, Pin
from drift_core.model.decoder import Decoder, KvCache
from drift_scheduler.cost.table import CostTable, DecodeRow, FusedRow, PrefillRow, SlowdownRow
from drift_scheduler.domain import Device, Lane, Partition, PrefillShape

T = TypeVar("T")
Work = Callable[[], object]

SHORT_LAYERS = 4
"""Layers of a prefill that a short measurement runs; the rest is assumed to take as long each."""

LEAST_S = 0.02
"""A piece of work is repeated for at least this long."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What to measure. `prefill`: (new, reused) tokens; `decode`: (batch, context of each); `units`: per lane."""

    prefill: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int], ...]
    fused: tuple[tuple[int, int, int], ...]  # new tokens, decode batch, context of each
    beside: tuple[tuple[int, int, int], ...]  # the same, for the slowdown
    splits: tuple[Partition, ...]
    units: tuple[int, ...]
    layers: int
    repeats: int

    @property
    def cells(self) -> int:
        """Measurements in all."""
        return (
            len(self.units) * (len(self.prefill) + len(self.decode))
            + len(self.fused)
            + len(self.splits) * len(self.beside)
        )


def plan_grid(device: Device, *, max_context: int, max_running: int, full: bool) -> Grid:
    """The grid for a device: `full` takes every split and all layers, otherwise a few seconds must do."""
    splits = device.splits()
    units = sorted({entry.prefill for entry in device.menu} | {entry.decode for entry in device.menu} - {0})
    units = [count for count in units if count]
    if not full:
        splits, units = tuple(_spread(splits, 2)), _spread(units, 3)
    room = max_context - 1
    largest = min(room, 2048 if full else 512)
    news = sorted({min(n, largest) for n in ((16, 64, 256, 512, 1024, 2048) if full else (16, 128, 512))})
    reuses = sorted({min(r, room - 16) for r in ((512, 2048) if full else (512,))} - {0})
    prefill = [(n, 0) for n in news] + [(min(n, room - r), r) for r in reuses if r > 0 for n in news[:2]]
    batches = sorted({min(b, max_running) for b in ((1, 4, 16, 64) if full else (1, 8, 32))})
    contexts = sorted({min(c, room) for c in ((64, 512, 2048) if full else (32, 512))})
    beside = [(min(256, largest), min(8, max_running), min(256, room))]
    if full:
        beside += [(largest, min(32, max_running), min(512, room)), (min(64, largest), 1, min(64, room))]
    return Grid(
        prefill=tuple(dict.fromkeys(prefill)),
        decode=tuple((b, c) for b in batches for c in contexts),
        fused=tuple(
            (min(n, largest), min(8, max_running), min(256, room)) for n in ((64, 256) if full else (128,))
        ),
        beside=tuple(beside),
        splits=tuple(splits),
        units=tuple(units),
        layers=device.num_layers if full else min(SHORT_LAYERS, device.num_layers),
        repeats=5 if full else 2,
    )


def spot_grid(device: Device, prefill: tuple[int, int], decode: tuple[int, int]) -> Grid:
    """One prefill (new, reused) and one decode step (batch, context in all) on the whole device."""
    batch, context = decode
    return Grid(
        prefill=(prefill,),
        decode=((batch, context // batch),),
        fused=(),
        beside=(),
        splits=(),
        units=(device.total_units,),
        layers=min(SHORT_LAYERS, device.num_layers),
        repeats=3,
    )


def measure(
    decoder: Decoder,
    cache: KvCache,
    device: Device,
    pin: Pin,
    grid: Grid,
    *,
    model: str,
    progress: Callable[[float], None] = lambda fraction: None,
) -> CostTable:
    """Run the grid and return its table. `progress` is told the fraction done."""
    bench = _Bench(decoder, cache, device, pin, grid, progress)
    with bench.lanes():
        warm_up(decoder, cache, device, bench.running)
        prefill = [bench.prefill_row(u, n, r) for u in grid.units for n, r in grid.prefill]
        decode = [bench.decode_row(u, b, c) for u in grid.units for b, c in grid.decode]
        fused = [bench.fused_row(n, b, c) for n, b, c in grid.fused]
        slowdown = [bench.slowdown_row(split, *cell) for split in grid.splits for cell in grid.beside]
    how = "all layers" if grid.layers == device.num_layers else f"{grid.layers} of {device.num_layers} layers"
    return CostTable(
        device=device.name,
        model=model,
        num_layers=device.num_layers,
        total_units=device.total_units,
        menu=tuple((entry.prefill, entry.decode) for entry in device.menu),
        prefill=tuple(prefill),
        decode=tuple(decode),
        fused=tuple(fused),
        slowdown=tuple(slowdown),
        source=f"drift profile: prefill over {how}, at least {grid.repeats} runs each; {decoder.ops.description}",
    )


def warm_up(decoder: Decoder, cache: KvCache, device: Device, lanes: Mapping[Lane, LaneThread]) -> None:
    """Run both phases once on each lane: first calls allocate, start workers and choose kernels."""
    layers = device.num_layers
    for lane, partition in ((Lane.PREFILL, device.all_prefill), (Lane.DECODE, device.all_decode)):
        for lens in ([min(16, decoder.config.max_context)], [1, 1]):
            _on(lanes[lane], partition, forward(decoder, cache, lens, lens, layers)).result()


def forward(
    decoder: Decoder, cache: KvCache, query_lens: Sequence[int], context_lens: Sequence[int], layers: int
) -> Work:
    """A forward pass over the first `layers` layers and the head, with made-up tokens in the pool's first pages.

    Contexts that together exceed the pool share pages, which no attention kernel minds.
    """
    counts = [-(-context // cache.page_tokens) for context in context_lens]
    starts = np.cumsum([0, *counts[:-1]])
    tables = [
        ((np.arange(count) + start) % cache.num_pages).astype(np.int32)
        for start, count in zip(starts, counts, strict=True)
    ]
    inputs = decoder.inputs(query_lens, context_lens, tables, cache.page_tokens)
    tokens = torch.arange(sum(query_lens)) % decoder.config.vocab_size
    ends = torch.tensor(np.cumsum(query_lens) - 1)

    def work() -> object:
        hidden = decoder.run_layers(decoder.embed(tokens), 0, layers, cache, inputs)
        return decoder.logits(hidden[ends]).argmax(-1)

    return work


class _Bench:
    """Two lanes and the work they are given."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        device: Device,
        pin: Pin,
        grid: Grid,
        progress: Callable[[float], None],
    ) -> None:
        self._decoder, self._cache, self._device, self._grid = decoder, cache, device, grid
        self._pin = pin
        self.running: dict[Lane, LaneThread] = {}
        self._progress = progress
        self._done = 0

    @contextmanager
    def lanes(self) -> Iterator[None]:
        """Both lanes, ended on the way out."""
        self.running = {lane: LaneThread(lane, self._pin) for lane in Lane}
        try:
            yield
        finally:
            for lane in self.running.values():
                lane.close()

    def prefill_row(self, units: int, new: int, reused: int) -> PrefillRow:
        """All layers of one request's prefill, from `grid.layers` of them and the rest of a forward pass."""
        seconds = self._solo(Lane.PREFILL, Partition(units, 0), self._prefill(new, reused, self._grid.layers))
        if self._grid.layers < self._device.num_layers:
            ends = self._solo(Lane.PREFILL, Partition(units, 0), self._prefill(new, reused, 0))
            share = self._device.num_layers / self._grid.layers
            seconds = ends + max(seconds - ends, 0.0) * share
        self._tick()
        shape = PrefillShape.of([(new, reused)])
        return PrefillRow(
            units=units,
            requests=1,
            new=new,
            reused=reused,
            new_squared=shape.new_squared,
            new_times_reused=shape.new_times_reused,
            seconds=seconds,
        )

    def decode_row(self, units: int, batch: int, context: int) -> DecodeRow:
        """One step of `batch` requests of `context` tokens each."""
        seconds = self._solo(Lane.DECODE, Partition(0, units), self._decode(batch, context))
        self._tick()
        return DecodeRow(units=units, batch=batch, context_tokens=batch * context, seconds=seconds)

    def fused_row(self, new: int, batch: int, context: int) -> FusedRow:
        """One mixed pass on the whole device."""
        seconds = self._solo(Lane.PREFILL, self._device.all_prefill, self._mixed(new, batch, context))
        self._tick()
        return FusedRow(
            units=self._device.total_units,
            requests=1,
            new=new,
            reused=0,
            new_squared=new * new,
            new_times_reused=0,
            batch=batch,
            context_tokens=batch * context,
            seconds=seconds,
        )

    def slowdown_row(self, split: Partition, new: int, batch: int, context: int) -> SlowdownRow:
        """Both lanes at once under a split, against each alone under it."""
        prefill, decode = self._prefill(new, 0, self._grid.layers), self._decode(batch, context)
        alone = self._solo(Lane.PREFILL, split, prefill), self._solo(Lane.DECODE, split, decode)
        seconds = max(4 * max(alone), 0.1)
        both = (
            _on(self.running[Lane.PREFILL], split, _repeat(prefill, seconds)),
            _on(self.running[Lane.DECODE], split, _repeat(decode, seconds)),
        )
        factors = [_typical(side.result()) / solo for side, solo in zip(both, alone, strict=True)]
        self._tick()
        return SlowdownRow(
            prefill_units=split.prefill,
            decode_units=split.decode,
            new=new,
            reused=0,
            batch=batch,
            context_tokens=batch * context,
            prefill_factor=min(max(factors[0], 1.0), 100.0),
            decode_factor=min(max(factors[1], 1.0), 100.0),
        )

    # ------------------------------------------------------------------------------------------ work

    def _prefill(self, new: int, reused: int, layers: int) -> Work:
        """`layers` of one request's prefill, embedding and head included."""
        return self._forward([new], [new + reused], layers)

    def _decode(self, batch: int, context: int) -> Work:
        return self._forward([1] * batch, [context] * batch, self._device.num_layers)

    def _mixed(self, new: int, batch: int, context: int) -> Work:
        return self._forward([new] + [1] * batch, [new] + [context] * batch, self._device.num_layers)

    def _forward(self, query_lens: Sequence[int], context_lens: Sequence[int], layers: int) -> Work:
        return forward(self._decoder, self._cache, query_lens, context_lens, layers)

    # --------------------------------------------------------------------------------------- running it

    def _solo(self, lane: Lane, partition: Partition, work: Work) -> float:
        """Typical seconds of `work` with the other lane idle."""
        times = _on(self.running[lane], partition, _repeat(work, LEAST_S, self._grid.repeats)).result()
        return _typical(times)

    def _tick(self) -> None:
        self._done += 1
        self._progress(self._done / self._grid.cells)


def _on(lane: LaneThread, partition: Partition, work: Callable[[], T]) -> Future[T]:
    """The result of `work` run on a lane."""
    future: Future[T] = Future()
    lane.start(Job(partition, lambda: future.set_result(work()), future.set_exception))
    return future


def _repeat(work: Work, seconds: float, repeats: int = 2) -> Callable[[], list[float]]:
    """Run `work` for `seconds`, at least `repeats` times; the seconds of each run."""

    def loop() -> list[float]:
        times: list[float] = []
        while len(times) < repeats or sum(times) < seconds:
            started = time.perf_counter()
            work()
            times.append(max(time.perf_counter() - started, 1e-9))
        return times

    return loop


def _typical(times: Sequence[float]) -> float:
    """The lower quartile: what else runs on the machine only ever makes a run longer."""
    return sorted(times)[len(times) // 4]


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of `items`, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
