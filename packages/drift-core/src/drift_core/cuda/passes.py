"""Forward passes as device work: a step from tokens to tokens, a range of a prefill's layers, choosing tokens.

A step (`Steps`) is the same code eagerly and captured: everything it reads lies in static buffers, so a graph
per place, kind and bucket serves every step. Knows rows and buffers; nothing of requests, gangs or order
between lanes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drift_core.cuda.buffers import PassBuffers, Room
from drift_core.cuda.device import Accelerator, Cells, Graph, Place, Stream, Touches, Work
from drift_core.cuda.kernels import Draws, Kernels
from drift_core.cuda.masks import FormMasks
from drift_core.model.decoder import Decoder, KvCache
from drift_kernels.inputs import AttentionInputs
from drift_scheduler.domain import Lane


class Model:
    """A decoder on its cache, with ops for any number of multiprocessors over the same weights."""

    def __init__(self, decoder: Decoder, cache: KvCache, kernels: Kernels, max_context: int) -> None:
        self.config, self.cache, self.kernels, self.max_context = decoder.config, cache, kernels, max_context
        self.dtype = decoder.weights.dtype
        self._first = decoder
        self._decoders: dict[int, Decoder] = {}

    def on(self, num_sms: int) -> Decoder:
        """The decoder whose kernels are launched for `num_sms`."""
        if num_sms not in self._decoders:
            made = copy(self._first)
            made.ops = self.kernels.ops(num_sms)
            self._decoders[num_sms] = made
        return self._decoders[num_sms]


class Outputs:
    """One lane's own: logits, chosen tokens on the device and on the host, scratch of its kernels."""

    def __init__(self, accelerator: Accelerator, lane: Lane, model: Model, samples: int, units: int) -> None:
        self.lane, self.samples = lane, samples
        self.logits = accelerator.empty((samples, model.config.vocab_size), torch.float32, lane)
        self.tokens = accelerator.empty((samples,), torch.int64, lane)
        self.host_tokens = accelerator.pinned((samples,), torch.int64)
        self.chosen: npt.NDArray[np.int64] = self.host_tokens.numpy()
        self.scratch = model.kernels.scratch(accelerator, lane, samples, units)
        self.masks = FormMasks(accelerator, samples, model.config.vocab_size, lane)
        self._accelerator, self._vocab = accelerator, model.config.vocab_size
        self._host_logits: Tensor | None = None

    @property
    def host_logits(self) -> Tensor:
        """Pinned room for every row of logits, made when first asked for: few requests need it."""
        if self._host_logits is None:
            with self._accelerator.rare("a request whose tokens are chosen on the host"):
                self._host_logits = self._accelerator.pinned((self.samples, self._vocab), torch.float32)
        return self._host_logits

    def own(self) -> tuple[Tensor, ...]:
        """Memory that nobody but this lane may touch meanwhile."""
        scratch = self.scratch
        return (
            self.logits, self.tokens, self.host_tokens,
            scratch.partial, scratch.partial_weight, scratch.peaks, scratch.places,
        )  # fmt: skip


class Extent(NamedTuple):
    """The sizes a pass is run or captured at. `lists`: its lists of attention work."""

    tokens: int
    sequences: int
    samples: int
    lists: tuple[str, ...]


@dataclass(slots=True)
class Pass:
    """Static buffers of one pass, and what runs over them."""

    model: Model
    buffers: PassBuffers
    outputs: Outputs
    last_tokens: Tensor  # int64[cells + 1], shared by the lanes, each using its own cells
    hidden: Tensor | None = None  # [tokens, H], a prefill's between its blocks

    @property
    def room(self) -> Room:
        """The largest pass."""
        return self.buffers.room

    def inputs(self, extent: Extent, num_sms: int) -> AttentionInputs:
        """The buffers as attention takes them."""
        model, tensor = self.model, self.buffers.tensor
        kernels = model.kernels
        laid = AttentionInputs(
            query_starts=tensor("query_starts")[: extent.sequences + 1],
            context_lens=tensor("context_lens")[: extent.sequences],
            page_table=tensor("page_table").view(self.room.sequences, self.room.pages)[: extent.sequences],
            slots=tensor("slots")[: extent.tokens],
            positions=tensor("positions")[: extent.tokens],
            max_query=extent.tokens,
            max_context=model.max_context,
            scale=model.config.scale,
            window=model.config.sliding_window,
        )
        return kernels.inputs(laid, self.buffers, extent.lists, self.outputs.scratch, num_sms)

    def embed(self, extent: Extent, num_sms: int) -> Tensor:
        """Hidden states of the tokens: given ones, and those that the device chose last."""
        source = self.buffers.tensor("source")[: extent.tokens]
        chosen = self.last_tokens[(-1 - source).clamp_(min=0)]
        return self.model.on(num_sms).embed(torch.where(source >= 0, source, chosen))

    def step(self, extent: Extent, num_sms: int) -> Callable[[], None]:
        """From tokens to the likeliest next ones; the logits stay for whoever wants others."""
        decoder, inputs = self.model.on(num_sms), self.inputs(extent, num_sms)

        def run() -> None:
            hidden = self.embed(extent, num_sms)
            hidden = decoder.run_layers(hidden, 0, self.model.config.num_layers, self.model.cache, inputs)
            self.finish(hidden, extent, num_sms)

        return run

    def finish(self, hidden: Tensor, extent: Extent, num_sms: int) -> None:
        """Logits of the rows that are sampled from, and the likeliest token of each."""
        count, decoder = extent.samples, self.model.on(num_sms)
        if count < extent.tokens or extent.lists != ("narrow",):
            hidden = hidden.index_select(0, self.buffers.tensor("sample_rows")[:count])
        weights = decoder.weights
        normed = decoder.ops.rms_norm(hidden, weights.final_norm, self.model.config.rms_eps)
        self.outputs.logits[:count].copy_(decoder.ops.linear(normed, weights.head))
        self._choose(count, None, num_sms)

    def choose_again(self, count: int, num_sms: int, *, drawn: bool, formed: int) -> None:
        """Forbid what the first `formed` masks say, then choose: if `drawn` as the buffers say, with temperature,
        filters and seed of each row, else the likeliest."""
        if formed:
            masks, logits = self.outputs.masks, self.outputs.logits[:count]
            self.model.kernels.mask(logits, masks.picked[:formed], masks.words[:formed], num_sms)
        if not drawn:
            self._choose(count, None, num_sms)
            return
        tensor = self.buffers.tensor
        rows = Draws(
            *(tensor(name)[:count] for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "drawn"))
        )
        self._choose(count, rows, num_sms)

    def fetch_logits(self, count: int) -> None:
        """The rows' logits on the host, for tokens that are chosen there."""
        self.outputs.host_logits[:count].copy_(self.outputs.logits[:count], non_blocking=True)

    def _choose(self, count: int, rows: Draws | None, num_sms: int) -> None:
        out = self.outputs
        self.model.kernels.choose(out.logits[:count], out.tokens[:count], rows, out.scratch, num_sms)
        self.last_tokens.index_copy_(0, self.buffers.tensor("sample_cells")[:count], out.tokens[:count])
        out.host_tokens[:count].copy_(out.tokens[:count], non_blocking=True)

    def touches(self, pages: Cells, written: Cells, cells: Cells) -> Touches:
        """What a step over these pages and cells of `last_tokens` touches."""
        reads: list[Tensor | Cells] = [self.buffers.device, pages, cells]
        return Touches(reads, [written, cells, *self.outputs.own()])


class Graphs:
    """Captured steps by place and extent; whatever is missing is captured when first needed."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._graphs: dict[tuple[Place, Extent], Graph] = {}
        self.capture_seconds = 0.0

    def __len__(self) -> int:
        return len(self._graphs)

    def drop(self, lists: tuple[str, ...]) -> None:
        """Forget graphs over buffers that are no more."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[1].lists != lists}

    def ready(self, place: Place, extent: Extent) -> bool:
        """Whether it is captured."""
        return (place, extent) in self._graphs

    def get(self, stream: Stream, extent: Extent, make: Callable[[], Work]) -> Graph:
        """The graph; `make` puts harmless numbers into the buffers and says what to capture: it also runs once."""
        key = (stream.place, extent)
        graph = self._graphs.get(key)
        if graph is None:
            with self._accelerator.rare(f"a graph of {extent.tokens} tokens on {stream.place}"):
                started = time.perf_counter()
                graph = self._capture(stream, make())
                self.capture_seconds += time.perf_counter() - started
            self._graphs[key] = graph
        return graph

    def _capture(self, stream: Stream, work: Work) -> Graph:
        self._accelerator.launch(stream, work)  # compiles kernels, makes library handles
        return self._accelerator.capture(stream, work)


def kv_cells(pages: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Cells:
    """Pages of KV."""
    return Cells("kv page", pages.ravel())


def token_cells(cells: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Cells:
    """Entries of `last_tokens`."""
    return Cells("last token", cells)
