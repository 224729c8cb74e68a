"""Measures lane times on a device as the executor runs them, and makes the cost table of them.

A second executor over the same weights, pages and streams serves made-up requests: their page tables run through the
pool again and again, so any batch and context fits. Times are the device's, from events, launch gaps included; so a
prefill that the host cannot launch fast enough costs what it costs in service. Only while nothing is served.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

import numpy as np
import numpy.typing as npt

from drift_core.kv import PoolPlan
from drift_core.profile import Grid
from drift_core.sampler import SamplerState
from drift_core.sampling_params import SamplingParams
from drift_core.sequences import SequenceTable
from drift_scheduler.cost.table import CostTable, DecodeRow, FusedRow, PrefillRow, SlowdownRow
from drift_scheduler.domain import (
    DecodeDone,
    DecodeStep,
    Device,
    Event,
    Gang,
    LaneFailed,
    Partition,
    PrefillBlock,
    PrefillChunk,
    PrefillDone,
    PrefillShape,
    Sharing,
)
from drift_scheduler.errors import DriftError

if TYPE_CHECKING:
    from drift_core.batches import PageTables
    from drift_core.cuda.device import Accelerator
    from drift_core.cuda.lanes import DecodeLane
    from drift_core.lanes_now import LanesNow
    from drift_core.model.config import ModelConfig

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
_PATIENCE = 600.0
"""Seconds after which a piece of work counts as hung."""


def plan_grid(device: Device, *, max_context: int, max_running: int, full: bool) -> Grid:
    """What to measure on a GPU: `full` takes every split; the short one stays under five minutes for 8B."""
    splits = device.splits() if full else _spread(device.splits(), 3)
    counts = {entry.prefill for entry in splits} | {entry.decode for entry in splits} | {device.total_units}
    room = max_context - 32
    news = sorted({min(n, room) for n in ((64, 256, 1024, 2048, 4096, 8192) if full else (128, 1024, 4096))})
    reused = sorted({min(r, room // 2) for r in ((2048, 16384) if full else (4096,))})
    batches = sorted({min(b, max_running) for b in ((1, 8, 32, 64, 128, 256) if full else (1, 32, 128))})
    contexts = sorted({min(c, room) for c in ((256, 2048, 8192) if full else (256, 2048))})
    pairs = [(n, 0) for n in news] + [(min(n, room - r), r) for r in reused for n in news[1:3]]
    batch = min(32, max_running)
    half = room // 2  # decode goes on for as long as the prefill beside it
    cells = [(min(2048, room), batch, min(1024, half))]
    if full:
        cells += [
            (min(512, room), min(128, max_running), min(1024, half)),
            (min(8192, room), 8, min(4096, half)),
        ]
    chunks = (64, 256, 512, 1024, 2048) if full else (256, 1024)
    return Grid(
        prefill=tuple(dict.fromkeys(pairs)),
        decode=tuple((b, c) for b in batches for c in contexts),
        fused=tuple((min(n, room), b, min(1024, room)) for n in chunks for b in {batch, batches[-1]}),
        beside=tuple(cells),
        splits=tuple(splits),
        units=tuple(sorted(counts)),
        layers=device.num_layers,
        repeats=5 if full else 3,
    )


class Journal:
    """Measurements kept in a file as they are made, so that a profile that was cut short goes on where it was.

    One JSON line each; a line that is broken or of another device and model is no measurement.
    """

    def __init__(self, path: Path | None, subject: str) -> None:
        self._path, self._subject = path, subject
        self._known: dict[str, list[float]] = {}
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                self._read(line)

    def measured(self, key: Sequence[object], measure: Callable[[], list[float]]) -> list[float]:
        """The seconds known under a key, or those that `measure` finds now."""
        name = json.dumps(list(key))
        if name not in self._known:
            self._known[name] = measure()
            if self._path is not None:
                entry = {"subject": self._subject, "key": name, "seconds": self._known[name]}
                with self._path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        return self._known[name]

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            if entry["subject"] == self._subject:
                self._known[entry["key"]] = [float(value) for value in entry["seconds"]]
        except (ValueError, KeyError, TypeError):
            return


class Measured(Protocol):
    """What is asked of an executor to measure it: `drift_core.cuda.executor.CudaExecutor`."""

    @property
    def accelerator(self) -> Accelerator: ...

    @property
    def decode(self) -> DecodeLane: ...

    @property
    def plan(self) -> PoolPlan: ...

    @property
    def device(self) -> Device: ...

    @property
    def dtype(self) -> str: ...

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def kernels_description(self) -> str: ...

    def twin(self, kv: PageTables, sequences: SequenceTable) -> Measured:
        """Another over the same weights, cache and partitions."""

    def now(self) -> float: ...

    def submit(self, gang: Gang) -> None: ...

    def wait(self, until: float | None) -> Sequence[Event] | None: ...

    def forget(self, request_ids: Sequence[str]) -> None: ...

    def lanes_now(self) -> LanesNow: ...


class MadeUpPages:
    """As much of a KV pool as lanes ask for: every request's table runs through all pages from a place of its own."""

    def __init__(self, plan: PoolPlan, sequences: SequenceTable) -> None:
        self.page_tokens = plan.page_tokens
        self._num_pages, self._most = plan.num_pages, -(-plan.max_context // plan.page_tokens)
        self._sequences = sequences

    def page_table(self, request_id: str) -> npt.NDArray[np.int32]:
        """Pages for the request's tokens and some more."""
        count = min(len(self._sequences[request_id].tokens) // self.page_tokens + 16, self._most)
        start = crc32(request_id.encode()) % self._num_pages
        return ((start + np.arange(count)) % self._num_pages).astype(np.int32)

    def page_at(self, request_id: str, index: int) -> int:
        """One of them."""
        return (crc32(request_id.encode()) + index) % self._num_pages


class Rig:
    """Runs made-up work on an executor's device. `close` gives back nothing: streams belong to the executor."""

    def __init__(self, executor: Measured) -> None:
        self.sequences = SequenceTable()
        pages = MadeUpPages(executor.plan, self.sequences)
        self.executor = executor.twin(pages, self.sequences)
        self.device = executor.device
        self._vocab = executor.model_config.vocab_size
        self._made = 0

    def request(self, tokens: int) -> str:
        """A made-up request that knows that many tokens."""
        self._made += 1
        name = f"made-up-{self._made}"
        prompt = (np.arange(tokens) * 7919 % self._vocab).tolist()
        state = SamplerState(_GREEDY, prompt, (), self._vocab, self._made)
        self.sequences.add(name, prompt, state)
        self.executor.decode.cells.admit(name, state, self._made, chosen_before=True)
        return name

    def prefill_block(self, new: int, reused: int) -> PrefillBlock:
        """All layers of one request's prefill."""
        name = self.request(new + reused)
        chunk = PrefillChunk(name, reused, reused + new)
        return PrefillBlock(self._made, (chunk,), 0, self.device.num_layers)

    def decode_step(self, batch: int, context: int) -> DecodeStep:
        """Requests that have `context` tokens each."""
        return DecodeStep(tuple(self.request(context) for _ in range(batch)), batch * context)

    def run(self, gang: Gang) -> list[PrefillDone | DecodeDone]:
        """Submit and wait for all of it."""
        self.executor.submit(gang)
        return self.await_done((gang.prefill is not None) + (gang.decode is not None))

    def await_done(self, count: int) -> list[PrefillDone | DecodeDone]:
        """The next `count` ends. Raises DriftError when a lane failed or hangs."""
        found: list[PrefillDone | DecodeDone] = []
        deadline = self.executor.now() + _PATIENCE
        while len(found) < count:
            for event in self.executor.wait(deadline) or ():
                if isinstance(event, LaneFailed):
                    raise DriftError(event.message)
                if isinstance(event, PrefillDone | DecodeDone):
                    found.append(event)
            if self.executor.now() >= deadline:
                raise DriftError(f"work on the device did not end within {_PATIENCE:.0f} s")
        return found

    def forget(self) -> None:
        """Drop all made-up requests."""
        self.executor.forget([f"made-up-{index}" for index in range(1, self._made + 1)])

    # ------------------------------------------------------------------------------ times of one cell

    def prefill(self, partition: Partition, new: int, reused: int, repeats: int) -> list[float]:
        """Seconds of each run, the first left out."""
        times = []
        for _ in range(repeats + 1):
            gang = Gang(self._sharing(partition), partition, prefill=self.prefill_block(new, reused))
            times.append(self.run(gang)[0].seconds)
            self.forget()
        return times[1:]

    def decode(self, partition: Partition, batch: int, context: int, repeats: int) -> list[float]:
        """Seconds of each of some steps in a row."""
        step = self.decode_step(batch, context)
        gang = Gang(self._sharing(partition), partition, decode=step)
        times = [self.run(gang)[0].seconds for _ in range(repeats + 2)]
        self.forget()
        return times[2:]

    def fused(self, new: int, batch: int, context: int, repeats: int) -> list[float]:
        """Seconds of mixed passes on the whole device."""
        step = self.decode_step(batch, context)
        times = []
        for _ in range(repeats + 2):
            block = self.prefill_block(new, 0)
            times.append(self.run(Gang(Sharing.FUSED, self.device.all_decode, block, step))[0].seconds)
        self.forget()
        return times[2:]

    def beside(self, split: Partition, new: int, batch: int, context: int) -> tuple[list[float], list[float]]:
        """Seconds of a prefill and of the decode steps that ran while it did."""
        step, block = self.decode_step(batch, context), self.prefill_block(new, 0)
        sharing, most = self._sharing(split), self.executor.plan.max_context - context - 8
        self.run(Gang(sharing, split, decode=step))
        self.executor.submit(Gang(sharing, split, block, step))
        prefill: list[float] = []
        decode: list[float] = []
        while not prefill:
            for event in self.await_done(1):
                if isinstance(event, PrefillDone):
                    prefill.append(event.seconds)
                else:
                    decode.append(event.seconds)
                    if not prefill and len(decode) < most:
                        self.executor.submit(Gang(sharing, split, decode=step))
        while self.executor.lanes_now().sharing is not None:
            self.await_done(1)
        self.forget()
        return prefill, decode

    def _sharing(self, partition: Partition) -> Sharing:
        if partition == self.device.unpartitioned:
            return Sharing.STREAMS
        return Sharing.SPATIAL if partition.prefill and partition.decode else Sharing.EXCLUSIVE


def measure(
    executor: Measured,
    grid: Grid,
    *,
    model: str,
    progress: Callable[[float], None] = lambda fraction: None,
    journal: Path | None = None,
) -> CostTable:
    """Run the grid and return its table. `progress` is told the fraction done; `journal`: see `Journal`."""
    rig, device = Rig(executor), executor.device
    known = Journal(journal, f"{device.name}/{model}/{executor.dtype}")
    done = 0

    def typical(*key: object, times: Callable[[], list[float]]) -> float:
        nonlocal done
        found = statistics.median(known.measured(key, times))
        done += 1
        progress(done / grid.cells)
        return max(found, 1e-9)

    with executor.accelerator.rare("a profile"):
        prefill = [_prefill_row(rig, grid, u, n, r, typical) for u in grid.units for n, r in grid.prefill]
        decode = [_decode_row(rig, grid, u, b, c, typical) for u in grid.units for b, c in grid.decode]
        fused = [_fused_row(rig, grid, n, b, c, typical) for n, b, c in grid.fused]
        slowdown = [
            _slowdown_row(rig, grid, split, cell, known) for split in grid.splits for cell in grid.beside
        ]
        executor.accelerator.synchronize()
    progress(1.0)
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
        source=f"drift profile: medians of {grid.repeats} runs; {executor.kernels_description}",
    )


Typical = Callable[..., float]


def _prefill_row(rig: Rig, grid: Grid, units: int, new: int, reused: int, typical: Typical) -> PrefillRow:
    where = _lane_of(rig.device, 0, units)
    shape = PrefillShape.of([(new, reused)])
    seconds = typical(
        "prefill", units, new, reused, times=lambda: rig.prefill(where, new, reused, grid.repeats)
    )
    return PrefillRow(
        units=units,
        requests=1,
        new=new,
        reused=reused,
        new_squared=shape.new_squared,
        new_times_reused=shape.new_times_reused,
        seconds=seconds,
    )


def _decode_row(rig: Rig, grid: Grid, units: int, batch: int, context: int, typical: Typical) -> DecodeRow:
    where = _lane_of(rig.device, 1, units)
    seconds = typical(
        "decode", units, batch, context, times=lambda: rig.decode(where, batch, context, grid.repeats)
    )
    return DecodeRow(units=units, batch=batch, context_tokens=batch * context, seconds=seconds)


def _fused_row(rig: Rig, grid: Grid, new: int, batch: int, context: int, typical: Typical) -> FusedRow:
    seconds = typical(
        "fused", new, batch, context, times=lambda: rig.fused(new, batch, context, grid.repeats)
    )
    return FusedRow(
        units=rig.device.total_units,
        requests=1,
        new=new,
        reused=0,
        new_squared=new * new,
        new_times_reused=0,
        batch=batch,
        context_tokens=batch * context,
        seconds=seconds,
    )


def _slowdown_row(
    rig: Rig, grid: Grid, split: Partition, cell: tuple[int, int, int], known: Journal
) -> SlowdownRow:
    """Both lanes at once under a split, against each alone under it."""
    new, batch, context = cell

    def factors() -> list[float]:
        alone_prefill = statistics.median(rig.prefill(split, new, 0, grid.repeats))
        alone_decode = statistics.median(rig.decode(split, batch, context, grid.repeats))
        together_prefill: list[float] = []
        together_decode: list[float] = []
        for _ in range(grid.repeats):
            prefill, decode = rig.beside(split, new, batch, context)
            together_prefill += prefill
            together_decode += decode
        return [
            statistics.median(together_prefill) / alone_prefill,
            statistics.median(together_decode or [alone_decode]) / alone_decode,
        ]

    prefill, decode = known.measured(("beside", *split, *cell), factors)
    return SlowdownRow(
        prefill_units=split.prefill,
        decode_units=split.decode,
        new=new,
        reused=0,
        batch=batch,
        context_tokens=batch * context,
        prefill_factor=min(max(prefill, 1.0), 100.0),
        decode_factor=min(max(decode, 1.0), 100.0),
    )


def _lane_of(device: Device, lane: int, units: int) -> Partition:
    """A partition that gives a lane (0 prefill, 1 decode) so many units: the other lane stays idle on the rest."""
    if units == device.total_units:
        return (device.all_prefill, device.all_decode)[lane]
    exact = [split for split in device.splits() if split[lane] == units]
    if exact:
        return exact[0]
    return min(device.splits(), key=lambda split: abs(split[lane] - units))


def _spread(items: Sequence[Partition], most: int) -> tuple[Partition, ...]:
    if len(items) <= most:
        return tuple(items)
    return tuple(items[round(i * (len(items) - 1) / (most - 1))] for i in range(most))
