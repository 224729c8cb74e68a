"""What the forms of outputs allow next, as bits on their way to the device: worked out while it computes logits.

A lane has one: room on the device and pinned on the host for a line of bits per row, and the rows they are for. They
are applied in a pass of their own after the logits are there, so captured graphs know nothing of them and any mix of
rows with and without will do. Knows nothing of how tokens are chosen afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drift_core.cuda.device import Accelerator, Stream
from drift_core.sampler import SamplerState
from drift_scheduler.domain import Lane

_ALIGNED_WORDS = 16

Formed = Sequence[tuple[int, SamplerState]]
"""Rows of logits, and whose output is held to a form there."""


class FormMasks:
    """Room for up to `samples` rows. One pass at a time: it is over before the next one's `open`."""

    def __init__(self, accelerator: Accelerator, samples: int, vocab_size: int, lane: Lane) -> None:
        self._accelerator = accelerator
        words = -(-vocab_size // 32)
        self._start = -(-samples // _ALIGNED_WORDS) * _ALIGNED_WORDS  # the rows come first
        size = self._start + samples * words
        self.device = accelerator.empty((size,), torch.int32, lane)
        self.picked = self.device[:samples]
        self.words = self.device[self._start :].view(samples, words)
        self._pinned = accelerator.pinned((size,), torch.int32)
        host: npt.NDArray[np.int32] = self._pinned.numpy()
        self._host_rows, self._host_words = host[:samples], host[self._start :].reshape(samples, words)
        self._slices: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: Formed = ()
        self._filled = 0

    def __len__(self) -> int:
        """Rows of the pass under way."""
        return len(self._rows)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to work out."""
        return self._filled == len(self._rows)

    def open(self, rows: Formed) -> None:
        """A pass with these rows begins."""
        self._accelerator.host_writes(self._pinned)
        self._rows, self._filled = rows, 0
        self._host_rows[: len(rows)] = [row for row, _ in rows]

    def fill_next(self) -> None:
        """Work out what one more row's output may go on with."""
        _, sampler = self._rows[self._filled]
        self._host_words[self._filled] = sampler.form_bits()
        self._filled += 1

    def rehearse(self, stream: Stream) -> None:
        """Send a mask of the first row that allows everything."""
        self._accelerator.host_writes(self._pinned)
        self._host_rows[0], self._host_words[0] = 0, -1
        self._copy(stream, 1)

    def send(self, stream: Stream) -> None:
        """Copy the rows and their bits, no more than there are."""
        assert self.complete, "masks are sent before they are worked out"
        self._copy(stream, len(self._rows))

    def _copy(self, stream: Stream, count: int) -> None:
        if count not in self._slices:
            stop = self._start + count * self.words.shape[1]
            self._slices[count] = self.device[:stop], self._pinned[:stop]
        self._accelerator.copy(stream, *self._slices[count])
