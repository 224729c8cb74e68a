"""The contention guard: how much slower, at worst, each lane gets when both run.

A grid of cells over the prefill's new and reused tokens, the decode's batch and context, and the split; each
cell keeps the largest slowdown seen there. Knows nothing of solo times; cost models pass it ratios to theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

from drift_scheduler.domain import DecodeShape, Lane, Observation, Partition, PrefillShape, Sharing
from drift_scheduler.protocols import CostModel

Cell = tuple[int, int, int, int, int]
"""Exponents of powers of two of (new, reused, batch, context), -1 for any, and the decode units of the split."""

SETTLED = 16
"""Observations after which a cell's own worst case replaces the prior it started from."""

CEILING = 4.0
"""Largest ratio recorded: beyond it something else (a page fault, a debugger) slowed the lane down."""


class _Grid:
    """Worst ratio by cell for one lane."""

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.answers: dict[Cell, float] = {}
        self._seen: dict[Cell, tuple[float, int]] = {}

    def record(self, cell: Cell, ratio: float) -> None:
        worst, count = self._seen.get(cell, (1.0, 0))
        worst, count = max(worst, min(CEILING, ratio)), count + 1
        self._seen[cell] = (worst, count)
        self.answers[cell] = worst if count >= SETTLED else max(self.prior, worst)


class ContentionGuard:
    """Worst slowdown factors (prefill, decode) by cell; the prior counts until a cell has seen enough.

    What ran beside is not always known; such observations count in the cell "beside anything", which answers where
    no exact cell does.
    """

    def __init__(self, prior_prefill: float = 1.2, prior_decode: float = 1.2) -> None:
        if not (1.0 <= prior_prefill <= 100.0 and 1.0 <= prior_decode <= 100.0):
            raise ValueError(
                f"slowdown factors are between 1 and 100, not {prior_prefill} and {prior_decode}"
            )
        self._prefill = _Grid(prior_prefill)
        self._decode = _Grid(prior_decode)

    def worst(self, prefill: PrefillShape, decode: DecodeShape, partition: Partition) -> tuple[float, float]:
        """Factors (prefill, decode), each at least 1."""
        new, reused = prefill.new_tokens.bit_length(), prefill.reused_tokens.bit_length()
        batch, context = decode.batch.bit_length(), decode.context_tokens.bit_length()
        units = partition.decode
        exact = (new, reused, batch, context, units)
        of_prefill, of_decode = self._prefill.answers, self._decode.answers
        slow_prefill = of_prefill.get(exact) or of_prefill.get((new, reused, -1, -1, units))
        slow_decode = of_decode.get(exact) or of_decode.get((-1, -1, batch, context, units))
        return slow_prefill or self._prefill.prior, slow_decode or self._decode.prior

    def record_prefill(
        self, ratio: float, prefill: PrefillShape, decode: DecodeShape | None, partition: Partition
    ) -> None:
        """Measured / solo seconds of a prefill that ran beside `decode` (`None`: not known)."""
        self._prefill.record(_cell(prefill, None, partition), ratio)
        if decode is not None:
            self._prefill.record(_cell(prefill, decode, partition), ratio)

    def record_decode(
        self, ratio: float, prefill: PrefillShape | None, decode: DecodeShape, partition: Partition
    ) -> None:
        """Measured / solo seconds of a decode step that ran beside `prefill` (`None`: not known)."""
        self._decode.record(_cell(None, decode, partition), ratio)
        if prefill is not None:
            self._decode.record(_cell(prefill, decode, partition), ratio)

    def cells(self) -> Mapping[str, Mapping[Cell, float]]:
        """Every cell with observations and its factor, per lane."""
        return {"prefill": dict(self._prefill.answers), "decode": dict(self._decode.answers)}


def _cell(prefill: PrefillShape | None, decode: DecodeShape | None, partition: Partition) -> Cell:
    return (
        -1 if prefill is None else prefill.new_tokens.bit_length(),
        -1 if prefill is None else prefill.reused_tokens.bit_length(),
        -1 if decode is None else decode.batch.bit_length(),
        -1 if decode is None else decode.context_tokens.bit_length(),
        partition.decode,
    )


def refine(guard: ContentionGuard, model: CostModel, seen: Observation, num_layers: int) -> None:
    """Record an observation from beside the other lane in the guard, against the model's own solo time."""
    if not seen.overlapped or seen.measured <= 0:
        return
    beside = (Sharing.SPATIAL, Sharing.STREAMS)  # streams fill cells of their own, having all units for both
    if seen.sharing not in beside:
        return
    if seen.lane is Lane.DECODE and seen.decode is not None:
        solo = model.decode(seen.decode, seen.partition.decode)
        if solo > 0:
            guard.record_decode(seen.measured / solo, seen.prefill, seen.decode, seen.partition)
    elif seen.lane is Lane.PREFILL and seen.prefill is not None:
        solo = model.prefill(seen.prefill, seen.partition.prefill) * seen.layers / num_layers
        if solo > 0:
            guard.record_prefill(seen.measured / solo, seen.prefill, seen.decode, seen.partition)
