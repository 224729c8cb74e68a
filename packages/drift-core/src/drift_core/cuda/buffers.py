"""The numbers of one forward pass, at addresses that never change: filled on the host, sent in one copy.

Everything that differs from step to step lies in one flat block of device memory, so that a captured graph
serves any step and a step costs one transfer. Two pinned blocks take turns on the host: one is filled while
the other may still be read. Arrays that every step uses come first and the page table last, so that a small
step sends little.

Knows nothing of requests or lanes' order; whoever fills a block sees to it that the copy before last is over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drift_core.cuda.decode_work import ITEM_WORDS, MERGE_WORDS
from drift_core.cuda.device import Accelerator, Stream

_ALIGNED_WORDS = 16  # of 4 bytes: every array starts at a multiple of 64 bytes
_TURNS = 2

Array = npt.NDArray[np.generic]

_DTYPES = {
    "i4": (np.int32, torch.int32),
    "i8": (np.int64, torch.int64),
    "f4": (np.float32, torch.float32),
}


@dataclass(frozen=True, slots=True)
class ListSize:
    """Room for one list of attention work."""

    programs: int
    items: int
    merges: int


@dataclass(frozen=True, slots=True)
class Room:
    """The largest pass: query tokens, sequences, rows sampled from, pages of a sequence, lists of work."""

    tokens: int
    sequences: int
    samples: int
    pages: int
    narrow: ListSize | None = None
    wide: ListSize | None = None

    def fields(self) -> dict[str, tuple[str, int]]:
        """Every array: its element type and count, in the order they lie in memory."""
        found = {
            "query_starts": ("i4", self.sequences + 1),
            "context_lens": ("i4", self.sequences),
            "source": ("i8", self.tokens),
            "positions": ("i8", self.tokens),
            "slots": ("i8", self.tokens),
            "sample_rows": ("i8", self.samples),
            "sample_cells": ("i8", self.samples),
            "temperature": ("f4", self.samples),
            "top_k": ("i4", self.samples),
            "top_p": ("f4", self.samples),
            "min_p": ("f4", self.samples),
            "seeds": ("i8", self.samples),
            "drawn": ("i4", self.samples),
        }
        for name, size in (("narrow", self.narrow), ("wide", self.wide)):
            if size is not None:
                found[f"{name}_count"] = ("i4", 1)
                found[f"{name}_bounds"] = ("i4", size.programs + 1)
                found[f"{name}_items"] = ("i4", size.items * ITEM_WORDS)
                found[f"{name}_merges"] = ("i4", size.merges * MERGE_WORDS)
        found["page_table"] = ("i4", self.sequences * self.pages)
        return found


class PassBuffers:
    """One block on the device and two on the host; `host` names arrays of the block being filled."""

    def __init__(self, accelerator: Accelerator, room: Room) -> None:
        self.room = room
        self._accelerator = accelerator
        self._layout: dict[str, tuple[str, int, int]] = {}
        words = 0
        for name, (kind, count) in room.fields().items():
            self._layout[name] = (kind, words, count)
            size = count * (2 if kind == "i8" else 1)
            words += -(-size // _ALIGNED_WORDS) * _ALIGNED_WORDS
        self.device = accelerator.empty((words,), torch.int32)
        self._pinned = [accelerator.pinned((words,), torch.int32) for _ in range(_TURNS)]
        self._views = [
            {name: self._view(block.numpy(), name) for name in self._layout} for block in self._pinned
        ]
        self._turn = 0
        self._slices: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def open(self) -> dict[str, Array]:
        """The other host block, to be filled; by name."""
        self._turn = (self._turn + 1) % _TURNS
        return self.reopen()

    def reopen(self) -> dict[str, Array]:
        """The block opened last, which was not sent yet."""
        self._accelerator.host_writes(self._pinned[self._turn])
        return self._views[self._turn]

    def send(self, stream: Stream, sequences: int) -> None:
        """Copy the block opened last, the page table as far as its first `sequences` rows."""
        found = self._slices.get((self._turn, sequences))
        if found is None:
            _, start, _ = self._layout["page_table"]
            stop = start + sequences * self.room.pages
            found = self._slices[self._turn, sequences] = (
                self.device[:stop],
                self._pinned[self._turn][:stop],
            )
        self._accelerator.copy(stream, *found)

    def table(self, host: dict[str, Array]) -> npt.NDArray[np.int32]:
        """The page table of a host block, [sequences, pages]."""
        table: npt.NDArray[np.int32] = host["page_table"].reshape(self.room.sequences, self.room.pages)  # type: ignore[assignment]
        return table

    def tensor(self, name: str) -> Tensor:
        """An array on the device."""
        kind, start, count = self._layout[name]
        words = self.device[start : start + count * (2 if kind == "i8" else 1)]
        return words if kind == "i4" else words.view(_DTYPES[kind][1])

    def _view(self, block: npt.NDArray[np.int32], name: str) -> Array:
        kind, start, count = self._layout[name]
        words = block[start : start + count * (2 if kind == "i8" else 1)]
        return words.view(_DTYPES[kind][0])
