"""The paper's solo-run latency model (arXiv 2504.14489), fitted to a cost table.

One set of coefficients per unit count; n new and r reused tokens of each request, B the decode batch:

    T_prefill = a*sum(n^2) + b*sum(n*r) + c*sum(n) + d
    T_decode  = e*sum(r) + f*B + g

Least squares of the *relative* error with non-negative coefficients. A unit count between two measured ones
interpolates their coefficients linearly in 1/units (exact for work that scales plus a fixed part); one below
the smallest scales its coefficients by 1/units; one above the largest uses the largest's. Knows nothing of layers'
launch costs or of how a device is built; it is as good as its table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from drift_scheduler.cost.guard import ContentionGuard, refine
from drift_scheduler.cost.table import CostTable, FusedRow, find_table
from drift_scheduler.domain import (
    DecodeShape,
    FloatArray,
    IntArray,
    Observation,
    Partition,
    PrefillShape,
)

Coefficients = tuple[float, ...]

DEFAULT_SLOWDOWN = 1.2
"""The prior of the contention guard where a table has no slowdown rows."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far predictions are from the table's rows, relative: the worst, the mean, and the worst row's index."""

    worst: float
    mean: float
    row: int
    rows: int


def fitted(
    table: str = "",
    device: str = "",
    model: str = "",
    slowdown_prefill: float | None = None,
    slowdown_decode: float | None = None,
) -> FittedCost:
    """The model fitted to a file or a built-in table (see `drift_scheduler.cost.FACTORIES`)."""
    return FittedCost(find_table(table, device, model), slowdown_prefill, slowdown_decode)


class FittedCost:
    """Implements `CostModel`. Predictions are plain float arithmetic on cached coefficients, about 1 us."""

    def __init__(
        self,
        table: CostTable,
        slowdown_prefill: float | None = None,
        slowdown_decode: float | None = None,
    ) -> None:
        self.table = table
        self._prefill_fits = _fit_by_units(
            [(r.units, (r.new_squared, r.new_times_reused, r.new, 1), r.seconds) for r in table.prefill]
        )
        self._decode_fits = _fit_by_units(
            [(r.units, (r.context_tokens, r.batch, 1), r.seconds) for r in table.decode]
        )
        self._prefill: dict[int, Coefficients] = dict(self._prefill_fits)
        self._decode: dict[int, Coefficients] = dict(self._decode_fits)
        self._latest: tuple[PrefillShape, DecodeShape, int, float] | None = None
        """The latest mixed pass: it is predicted once, and looked at four times when it has ended."""
        self._fused_extra = (0.0, 0.0)
        self._fused_extra = self._fit_fused(table.fused)
        self._latest = None
        self.guard = self._start_guard(slowdown_prefill, slowdown_decode)

    def prefill(self, work: PrefillShape, units: int) -> float:
        """Seconds for all layers of a prefill on `units` units, alone."""
        c = self._prefill.get(units) or self.prefill_coefficients(units)
        return c[0] * work.new_squared + c[1] * work.new_times_reused + c[2] * work.new_tokens + c[3]

    def prefill_each(self, new: IntArray, reused: IntArray, units: int) -> FloatArray:
        """`prefill` of each of these requests alone."""
        c = self._prefill.get(units) or self.prefill_coefficients(units)
        seconds: FloatArray = c[0] * (new * new) + c[1] * (new * reused) + c[2] * new + c[3]
        return seconds

    def decode(self, work: DecodeShape, units: int) -> float:
        """Seconds for one decode step on `units` units, alone."""
        c = self._decode.get(units) or self.decode_coefficients(units)
        return c[0] * work.context_tokens + c[1] * work.batch + c[2]

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """Seconds for one mixed pass: weights are read once, so the linear parts share one pass over them.

        The chunk's formula with the decode tokens among its new ones, at least the decode's own weight-bound part,
        plus the decode's reading of KV; plus what fused rows of the table showed beyond that.
        """
        known = self._latest
        if known is not None and known[0] is prefill and known[1] is decode and known[2] == units:
            return known[3]
        p = self._prefill.get(units) or self.prefill_coefficients(units)
        d = self._decode.get(units) or self.decode_coefficients(units)
        new = prefill.new_tokens
        compute = p[2] * (new + decode.batch) + p[3]
        shared = max(compute, d[1] * decode.batch + d[2])
        attention = (
            p[0] * prefill.new_squared + p[1] * prefill.new_times_reused + d[0] * decode.context_tokens
        )
        fixed, per_token = self._fused_extra
        seconds = shared + attention + fixed + per_token * new
        self._latest = prefill, decode, units, seconds
        return seconds

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """Worst factors (prefill, decode) seen in this cell of the guard's grid, or its prior."""
        return self.guard.worst(prefill, decode, partition)

    def observe(self, observation: Observation) -> None:
        """Refine the contention guard from work that ran beside the other lane."""
        refine(self.guard, self, observation, self.table.num_layers)

    def prefill_coefficients(self, units: int) -> Coefficients:
        """(a, b, c, d) in seconds for a unit count, measured or interpolated."""
        if units not in self._prefill:
            self._prefill[units] = _at(self._prefill_fits, units)
        return self._prefill[units]

    def decode_coefficients(self, units: int) -> Coefficients:
        """(e, f, g) in seconds for a unit count, measured or interpolated."""
        if units not in self._decode:
            self._decode[units] = _at(self._decode_fits, units)
        return self._decode[units]

    def deviations(self) -> dict[str, Deviation]:
        """How well `prefill`, `decode` and, where the table has rows, `fused` reproduce the table."""
        rows = self.table
        found = {
            "prefill": _deviation([self.prefill(r.shape(), r.units) / r.seconds for r in rows.prefill]),
            "decode": _deviation([self.decode(r.shape(), r.units) / r.seconds for r in rows.decode]),
        }
        if rows.fused:
            ratios = [self.fused(r.prefill(), r.decode(), r.units) / r.seconds for r in rows.fused]
            found["fused"] = _deviation(ratios)
        return found

    def _fit_fused(self, rows: Sequence[FusedRow]) -> tuple[float, float]:
        """Seconds a mixed pass takes beyond the formula: (fixed, per new token), both at least 0."""
        if not rows:
            return (0.0, 0.0)
        base = np.array([self.fused(r.prefill(), r.decode(), r.units) for r in rows])
        seconds = np.array([r.seconds for r in rows])
        terms = np.array([[1.0, r.new] for r in rows])
        fixed, per_token = non_negative(terms / seconds[:, None], (seconds - base) / seconds)
        return (fixed, per_token)

    def _start_guard(self, prefill: float | None, decode: float | None) -> ContentionGuard:
        rows = self.table.slowdown
        worst_prefill = max((r.prefill_factor for r in rows), default=DEFAULT_SLOWDOWN)
        worst_decode = max((r.decode_factor for r in rows), default=DEFAULT_SLOWDOWN)
        guard = ContentionGuard(
            worst_prefill if prefill is None else prefill, worst_decode if decode is None else decode
        )
        for row in rows:
            prefill_shape = PrefillShape(1, row.new, row.reused, row.new**2, row.new * row.reused)
            decode_shape = DecodeShape(row.batch, row.context_tokens)
            partition = Partition(row.prefill_units, row.decode_units)
            guard.record_prefill(row.prefill_factor, prefill_shape, decode_shape, partition)
            guard.record_decode(row.decode_factor, prefill_shape, decode_shape, partition)
        return guard


def non_negative(terms: FloatArray, values: FloatArray) -> Coefficients:
    """The x >= 0 that minimises |terms x - values|, for a handful of columns.

    Such a minimum is the unconstrained one over some subset of the columns; with at most four columns all subsets
    are tried, which is exact and needs no iteration. Ties go to fewer columns.
    """
    columns = terms.shape[1]
    scale = np.maximum(np.abs(terms).max(axis=0, initial=0.0), 1e-300)
    scaled = terms / scale
    best, best_error = np.zeros(columns), float(values @ values)
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            x, _, _, _ = np.linalg.lstsq(scaled[:, chosen], values, rcond=None)
            residual = scaled[:, chosen] @ x - values
            error = float(residual @ residual)
            if (x >= 0).all() and error < best_error * (1 - 1e-9) - 1e-18:
                best, best_error = np.zeros(columns), error
                best[list(chosen)] = x
    return tuple(float(v) for v in best / scale)


def _fit_by_units(rows: Sequence[tuple[int, tuple[float, ...], float]]) -> dict[int, Coefficients]:
    """Coefficients per unit count, by increasing count; relative error is what is minimised."""
    by_units: dict[int, list[tuple[tuple[float, ...], float]]] = {}
    for units, terms, seconds in rows:
        by_units.setdefault(units, []).append((terms, seconds))
    fits: dict[int, Coefficients] = {}
    for units in sorted(by_units):
        measured = np.array([s for _, s in by_units[units]])
        sums = np.array([t for t, _ in by_units[units]], dtype=np.float64)
        fits[units] = non_negative(sums / measured[:, None], np.ones(len(measured)))
    return fits


def _at(fits: Mapping[int, Coefficients], units: int) -> Coefficients:
    """Coefficients for a unit count that was not measured (see the module's docstring)."""
    counts = list(fits)
    if units <= 0:
        raise ValueError(f"a lane without units has no cost (asked for {units} units)")
    if units > counts[-1]:
        return fits[counts[-1]]
    if units < counts[0]:
        return tuple(c * counts[0] / units for c in fits[counts[0]])
    above = counts[bisect_left(counts, units)]
    below = counts[bisect_left(counts, units) - 1]
    weight = (1 / units - 1 / above) / (1 / below - 1 / above)
    return tuple(weight * b + (1 - weight) * a for a, b in zip(fits[above], fits[below], strict=True))


def _deviation(ratios: Sequence[float]) -> Deviation:
    errors = [abs(ratio - 1) for ratio in ratios]
    worst = max(errors)
    return Deviation(worst, sum(errors) / len(errors), errors.index(worst), len(errors))
