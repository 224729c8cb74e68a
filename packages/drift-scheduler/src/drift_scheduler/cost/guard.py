"""The contention guard: how much slower, at worst, each lane gets when both run.

A grid of cells over the prefill's new and reused tokens, the decode's batch and context, and the split; each
cell keeps the largest slowdown seen there. Knows nothing of solo times; cost models pass it ratios to theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from drift_scheduler.domain import DecodeShape, Lane, Observation, Partition, PrefillShape, Sharing
from drift_scheduler.protocols import CostModel

Cell = tuple[int, int, int, int, int]

SETTLED = 16
"""Observations of a lane after which a cell's own worst case replaces the prior it started from."""

CEILING = 4.0
"""Largest ratio recorded: beyond it something else (a page fault, a debugger) slowed the lane down."""


@dataclass(slots=True)
class _Worst:
    prefill: float = 1.0
    decode: float = 1.0
    prefill_seen: int = 0
    decode_seen: int = 0


class ContentionGuard:
    """Worst slowdown factors (prefill, decode) by cell; the prior counts until a cell has seen enough."""

    def __init__(self, prior_prefill: float = 1.2, prior_decode: float = 1.2) -> None:
        if not (1.0 <= prior_prefill <= 100.0 and 1.0 <= prior_decode <= 100.0):
            raise ValueError(
                f"slowdown factors are between 1 and 100, not {prior_prefill} and {prior_decode}"
            )
        self.prior = (prior_prefill, prior_decode)
        self._cells: dict[Cell, _Worst] = {}
        self._answers: dict[Cell, tuple[float, float]] = {}

    def worst(self, prefill: PrefillShape, decode: DecodeShape, partition: Partition) -> tuple[float, float]:
        """Factors (prefill, decode), each at least 1."""
        return self._answers.get(
            (
                prefill.new_tokens.bit_length(),
                prefill.reused_tokens.bit_length(),
                decode.batch.bit_length(),
                decode.context_tokens.bit_length(),
                partition.decode,
            ),
            self.prior,
        )

    def record(
        self,
        prefill: PrefillShape,
        decode: DecodeShape,
        partition: Partition,
        *,
        prefill_ratio: float | None = None,
        decode_ratio: float | None = None,
    ) -> None:
        """Learn measured seconds / solo seconds of one lane, or both, that ran beside the other."""
        cell = _cell(prefill, decode, partition)
        seen = self._cells.get(cell)
        if seen is None:
            seen = self._cells[cell] = _Worst()
        if prefill_ratio is not None:
            seen.prefill = max(seen.prefill, min(CEILING, prefill_ratio))
            seen.prefill_seen += 1
        if decode_ratio is not None:
            seen.decode = max(seen.decode, min(CEILING, decode_ratio))
            seen.decode_seen += 1
        self._answers[cell] = (
            seen.prefill if seen.prefill_seen >= SETTLED else max(self.prior[0], seen.prefill),
            seen.decode if seen.decode_seen >= SETTLED else max(self.prior[1], seen.decode),
        )

    def cells(self) -> Iterator[tuple[Cell, tuple[float, float]]]:
        """Every cell with observations, and its factors; a cell's sizes are powers of two (exponents)."""
        return iter(self._answers.items())


def refine(guard: ContentionGuard, model: CostModel, seen: Observation, num_layers: int) -> None:
    """Record an overlapped spatial observation in the guard, against the model's own solo time."""
    if not seen.overlapped or seen.sharing is not Sharing.SPATIAL:
        return
    if seen.prefill is None or seen.decode is None or seen.measured <= 0:
        return
    if seen.lane is Lane.DECODE:
        solo = model.decode(seen.decode, seen.partition.decode)
        guard.record(seen.prefill, seen.decode, seen.partition, decode_ratio=seen.measured / solo)
    else:
        solo = model.prefill(seen.prefill, seen.partition.prefill) * seen.layers / num_layers
        guard.record(seen.prefill, seen.decode, seen.partition, prefill_ratio=seen.measured / solo)


def _cell(prefill: PrefillShape, decode: DecodeShape, partition: Partition) -> Cell:
    return (
        prefill.new_tokens.bit_length(),
        prefill.reused_tokens.bit_length(),
        decode.batch.bit_length(),
        decode.context_tokens.bit_length(),
        partition.decode,
    )
