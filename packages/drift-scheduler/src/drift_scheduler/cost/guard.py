"""The contention guard: how much slower, at worst, each lane gets when both run.

A grid of cells over the prefill's new and reused tokens, the decode's batch and context, and the split; each
cell keeps the largest slowdown seen there. What one lane beside the other can cause is kept for good. Beyond that lie
accidents (a page fault, another process), which are forgotten: a split must not look bad for ever after one. Work on
the undivided device has its accidents, too, and is judged by them alike, or a policy would flee from each split's worst
case to something whose worst case nobody kept.

Knows nothing of solo times; cost models pass it ratios to theirs.
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
"""Largest ratio recorded."""

CONTENTION = 1.5
"""Largest ratio that is put down to the other lane; published are 1.2 on A100 and 1.3 on H100."""

WINDOW = 64
"""Observations of a cell after which an accident is half forgotten, after twice as many wholly."""

RETRY = 1024
"""Observations elsewhere after which a cell is given another chance, as an accident may have kept everyone away."""

NOTICEABLE = 1.01
"""Smallest ratio of undivided work that counts: less is rounding and launching."""


class _Recent:
    """The worst of the last `WINDOW` to twice as many ratios."""

    __slots__ = ("_before", "_count", "_now", "worst")

    def __init__(self) -> None:
        self._before = self._now = self.worst = 1.0
        self._count = 0

    def add(self, ratio: float) -> None:
        self._now = max(self._now, min(CEILING, ratio))
        self._count += 1
        self.worst = max(self._before, self._now)
        if self._count == WINDOW:
            self._before, self._now, self._count = self._now, 1.0, 0

    def forget(self) -> None:
        self._before = self._now = self.worst = 1.0
        self._count = 0


class _Seen:
    """What a cell remembers."""

    __slots__ = ("contention", "count", "latest", "recent")

    def __init__(self) -> None:
        self.contention = 1.0
        self.count = 0
        self.latest = 0  # the grid's count of observations when the cell had its last
        self.recent = _Recent()


class _Grid:
    """Worst ratio by cell for one lane."""

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.answers: dict[Cell, float] = {}
        self._seen: dict[Cell, _Seen] = {}
        self._count = 0

    def record(self, cell: Cell, ratio: float) -> None:
        seen = self._seen.get(cell)
        if seen is None:
            seen = self._seen[cell] = _Seen()
        self._count += 1
        seen.count += 1
        seen.latest = self._count
        seen.contention = max(seen.contention, min(CONTENTION, ratio))
        seen.recent.add(ratio)
        self._answer(cell, seen)
        if self._count % RETRY == 0:
            for other, stale in self._seen.items():
                if stale.latest <= self._count - RETRY and stale.recent.worst > stale.contention:
                    stale.recent.forget()
                    self._answer(other, stale)

    def _answer(self, cell: Cell, seen: _Seen) -> None:
        worst = max(seen.contention, seen.recent.worst)
        self.answers[cell] = worst if seen.count >= SETTLED else max(self.prior, worst)


class ContentionGuard:
    """Worst slowdown factors (prefill, decode) by cell; the prior counts until a cell has seen enough.

    On the undivided device, no unit of it being the other lane's: how much longer than predicted such work took of
    late, 1 to begin with.

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
        self._undivided = {Lane.PREFILL: _Recent(), Lane.DECODE: _Recent()}

    def worst(self, prefill: PrefillShape, decode: DecodeShape, partition: Partition) -> tuple[float, float]:
        """Factors (prefill, decode), each at least 1."""
        if not (partition.prefill and partition.decode):
            return self._undivided[Lane.PREFILL].worst, self._undivided[Lane.DECODE].worst
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

    def record_undivided(self, ratio: float, lane: Lane) -> None:
        """Measured / predicted seconds of work that had the device for itself."""
        self._undivided[lane].add(ratio if ratio >= NOTICEABLE else 1.0)

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
    """Record an observation in the guard, against the model's own solo time: contention where the work ran beside the
    other lane, accidents where it had the device for itself."""
    if seen.measured <= 0:
        return
    beside = seen.sharing in (Sharing.SPATIAL, Sharing.STREAMS)
    if beside and not seen.overlapped:
        return  # alone on a part of the device: neither
    units = max(seen.partition)
    if seen.sharing is Sharing.FUSED:
        if seen.prefill is not None and seen.decode is not None:
            _undivided(guard, seen, model.fused(seen.prefill, seen.decode, units))
    elif seen.lane is Lane.DECODE and seen.decode is not None:
        # Streams fill cells of their own, having all units for both.
        solo = model.decode(seen.decode, seen.partition.decode if beside else units)
        if not beside:
            _undivided(guard, seen, solo)
        elif solo > 0:
            guard.record_decode(seen.measured / solo, seen.prefill, seen.decode, seen.partition)
    elif seen.lane is Lane.PREFILL and seen.prefill is not None:
        solo = (
            model.prefill(seen.prefill, seen.partition.prefill if beside else units)
            * seen.layers
            / num_layers
        )
        if not beside:
            _undivided(guard, seen, solo)
        elif solo > 0:
            guard.record_prefill(seen.measured / solo, seen.prefill, seen.decode, seen.partition)


def _undivided(guard: ContentionGuard, seen: Observation, solo: float) -> None:
    if solo > 0:
        guard.record_undivided(seen.measured / solo, seen.lane)
