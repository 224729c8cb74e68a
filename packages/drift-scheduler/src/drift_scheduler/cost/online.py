"""A cost model that wraps another and corrects it from observed steps.

Each finished piece of work that ran alone compares measured with predicted time. The ratio's logarithm is averaged
exponentially in three cells, from particular to general: (lane, units, size), (lane, units), (lane); size is the
power of two of the work's tokens or batch. A prediction is the wrapped model's times the most particular factor that
has been seen often enough. The wrapped model's contention guard gets all work, measured against the corrected
prediction; what ran beside the other lane corrects downwards only, since contention never speeds work up.

Deterministic: the same observations in the same order give the same model. Never leaves sane bounds: one observation
moves no average by more than a factor of `ceiling`, and no factor leaves [1/ceiling, ceiling].
"""

from __future__ import annotations

import math

from drift_scheduler.domain import (
    DecodeShape,
    FloatArray,
    IntArray,
    Lane,
    Observation,
    Partition,
    PrefillShape,
    Sharing,
)
from drift_scheduler.errors import OptionError
from drift_scheduler.protocols import CostModel, PrefillEach

Cell = tuple[str, int, int]
"""(prefill, decode or fused; units, 0 for any; size exponent, -1 for any)."""

ENOUGH = 8
"""Observations after which a cell speaks for itself."""


class _Average:
    """An exponential moving average of log ratios, the first few weighted equally."""

    __slots__ = ("count", "factor", "mean")

    def __init__(self) -> None:
        self.mean = 0.0
        self.count = 0
        self.factor = 1.0

    def add(self, log_ratio: float, rate: float, bound: float) -> None:
        self.count += 1
        self.mean += (log_ratio - self.mean) * max(rate, 1.0 / self.count)
        self.factor = math.exp(min(bound, max(-bound, self.mean)))


class OnlineCost:
    """Implements `CostModel` around `inner`. `rate`: weight of the newest observation. `ceiling`: most that a
    prediction is corrected by, either way."""

    def __init__(self, inner: CostModel, num_layers: int, rate: float = 0.05, ceiling: float = 2.0) -> None:
        if not 0 < rate <= 1:
            raise OptionError(f"option 'rate' is {rate!r}, need a number above 0 and at most 1")
        if not 1 < ceiling <= 10:
            raise OptionError(f"option 'ceiling' is {ceiling!r}, need a number above 1 and at most 10")
        self.inner = inner
        self._layers = num_layers
        self._rate = rate
        self._bound = math.log(ceiling)
        self._cells: dict[Cell, _Average] = {}
        self._each: PrefillEach | None = getattr(inner, "prefill_each", None)
        if self._each is not None:
            self.prefill_each = self._prefill_each  # not offered where the inner model does not

    def prefill(self, work: PrefillShape, units: int) -> float:
        """The wrapped model's, corrected."""
        return self.inner.prefill(work, units) * self.factor("prefill", units, work.new_tokens)

    def _prefill_each(self, new: IntArray, reused: IntArray, units: int) -> FloatArray:
        """`prefill` of each of these requests alone."""
        assert self._each is not None
        seconds = self._each(new, reused, units)
        if self._cells:
            by_size: dict[int, float] = {}  # a factor is one of all lengths with as many bits
            factors = []
            for length in new.tolist():
                bits = length.bit_length()
                if bits not in by_size:
                    by_size[bits] = self.factor("prefill", units, length)
                factors.append(by_size[bits])
            seconds *= factors
        return seconds

    def decode(self, work: DecodeShape, units: int) -> float:
        """The wrapped model's, corrected."""
        return self.inner.decode(work, units) * self.factor("decode", units, work.batch)

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """The wrapped model's, corrected."""
        return self.inner.fused(prefill, decode, units) * self.factor("fused", units, prefill.new_tokens)

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """The wrapped model's guard, which learns from corrected ratios."""
        return self.inner.slowdown(prefill, decode, partition)

    def observe(self, observation: Observation) -> None:
        """Take in one piece of work; what cannot be compared is passed on or left."""
        seen = observation
        if not (seen.measured > 0 and math.isfinite(seen.measured)):
            return
        phase, units, size = _place(seen)
        predicted = self._inner_seconds(seen, units)
        if predicted is None or predicted <= 0:
            return
        ratio = seen.measured / predicted
        beside = seen.overlapped and seen.sharing is not Sharing.FUSED
        factor = self.factor(phase, units, size)
        if not beside or ratio < factor:
            bounded = min(self._bound, max(-self._bound, math.log(ratio)))
            for cell in ((phase, units, size.bit_length()), (phase, units, -1), (phase, 0, -1)):
                self._cells.setdefault(cell, _Average()).add(bounded, self._rate, self._bound)
        self.inner.observe(seen.with_measured(seen.measured / factor))

    def factor(self, phase: str, units: int, size: int) -> float:
        """What the wrapped model's prediction is multiplied by: 1 until enough was seen."""
        cells = self._cells
        if not cells:
            return 1.0
        for cell in ((phase, units, size.bit_length()), (phase, units, -1), (phase, 0, -1)):
            average = cells.get(cell)
            if average is not None and average.count >= ENOUGH:
                return average.factor
        return 1.0

    def _inner_seconds(self, seen: Observation, units: int) -> float | None:
        if seen.sharing is Sharing.FUSED:
            if seen.prefill is None or seen.decode is None:
                return None
            return self.inner.fused(seen.prefill, seen.decode, units)
        if seen.lane is Lane.DECODE:
            return None if seen.decode is None else self.inner.decode(seen.decode, units)
        if seen.prefill is None:
            return None
        return self.inner.prefill(seen.prefill, units) * seen.layers / self._layers


def _place(seen: Observation) -> tuple[str, int, int]:
    """Phase, units and size of the observed work."""
    prefill_tokens = seen.prefill.new_tokens if seen.prefill is not None else 0
    if seen.sharing is Sharing.SPATIAL:
        units = seen.partition.decode if seen.lane is Lane.DECODE else seen.partition.prefill
    else:
        units = max(seen.partition)
    if seen.sharing is Sharing.FUSED:
        return "fused", units, prefill_tokens
    if seen.lane is Lane.PREFILL:
        return "prefill", units, prefill_tokens
    return "decode", units, seen.decode.batch if seen.decode is not None else 0
