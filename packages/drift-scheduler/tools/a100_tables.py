"""Write the built-in A100 cost tables from published latencies, and print each cost model's error against them.

    python packages/drift-scheduler/tools/a100_tables.py [--write]

Source: the latencies by SM count, decode intercepts and context slopes that follow from the authors' published fits
(arXiv 2504.14489) for Llama 3 8B and 70B, tensor parallel over eight A100 80 GB. What is published per SM count is two
decode and two prefill latencies (70B), one of each (8B). The two formulas have seven coefficients, so the rest is
assumed, as follows, and marked in the tables' `source`:

- a pair of new tokens costs half of a (new, reused) pair, being causal: a = b/2;
- a prefill of hardly any tokens costs what a decode step's fixed part costs: d = g;
- decode slopes at 80 SMs: between their neighbours in 1/SMs, and from the two published latencies;
- 8B: context slope and attention coefficients in proportion to KV bytes and to heads x layers (0.4 and 0.2 of
  70B's); per-request decode cost in proportion to layers x hidden size (0.2 of 70B's).

Rows are then written for a grid of shapes, the published ones first, so that the table also says something about shapes
between them. Mixed passes (70B, 32 decodes of 1K): 505 ms with a 4K-token budget and 100 ms with 256 are published.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.hardware import device_spec, menu, model_spec
from drift_scheduler.cost.roofline import RooflineCost
from drift_scheduler.cost.table import CostTable, DecodeRow, FusedRow, PrefillRow, table_name, write_table
from drift_scheduler.domain import DecodeShape, PrefillShape

DATA = Path(__file__).parents[1] / "src" / "drift_scheduler" / "data" / "tables"
DEVICE = "8xa100-80gb"
K = 1024

# SMs -> published ms: 70B decode of 32 x 1K and 32 x 4K, prefill of 4K, of 2K with 32K reused; 8B decode, prefill.
PUBLISHED = {
    16: (55.6, 80.0, 2042, 1775, 11.9, 272),
    32: (34.1, 46.8, 1054, 908, 8.1, 143),
    48: (31.1, 38.9, 751, 671, 7.6, 107),
    64: (26.5, 33.1, 599, 508, 6.7, 92),
    80: (26.0, 31.5, 516, 464, 6.6, 82),
    108: (25.3, 29.1, 445, 403, 6.5, 73),
}
INTERCEPT = {16: 43.1, 32: 27.7, 48: 25.0, 64: 22.2, 80: 21.9, 108: 21.6}  # ms; 80: between its neighbours
SLOPE = {
    16: 0.254,
    32: 0.132,
    48: 0.0805,
    64: 0.0684,
    80: 0.0573,
    108: 0.0396,
}  # ms per 1K; 80: from the latencies
MIXED = ((4 * K - 32, 505.0), (256 - 32, 100.0))  # new tokens, ms, beside 32 decodes of 1K on all SMs

DECODE_SHAPES = ((1, K), (8, 8 * K), (64, 64 * K), (128, 256 * K), (256, 256 * K))
PREFILL_SHAPES = ((128, 0), (512, 0), (1 * K, 0), (1 * K, 8 * K), (8 * K, 0), (512, 64 * K), (16 * K, 16 * K))


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables instead of only comparing")
    options = parser.parse_args()
    for table in (table_70b(), table_8b()):
        path = DATA / f"{table_name(table.device, table.model)}.json"
        if options.write:
            write_table(table, path)
            print(f"wrote {path.name}: {len(table.prefill)} prefill, {len(table.decode)} decode rows")
        compare(table)


def table_70b() -> CostTable:
    """The 70B table."""
    decode: list[DecodeRow] = []
    prefill: list[PrefillRow] = []
    for units, (d1, d4, p4, p2, _, _) in PUBLISHED.items():
        e, g = SLOPE[units] / K, INTERCEPT[units]
        f = (d1 - g - e * 32 * K) / 32
        decode += _decode_rows(units, (((32, 32 * K), d1), ((32, 128 * K), d4)), (e, f, g))
        b, c, d = _prefill_coefficients(p4, p2, g)
        known = (((4 * K, 0), p4), ((2 * K, 32 * K), p2))
        prefill += _prefill_rows(units, known, (b / 2, b, c, d))
    fused = tuple(
        FusedRow(units=108, requests=1, new=n, reused=0, new_squared=n * n, new_times_reused=0,
                 batch=32, context_tokens=32 * K, seconds=ms / 1e3)
        for n, ms in MIXED
    )  # fmt: skip
    return _table("llama-3.1-70b", prefill, decode, fused)


def table_8b() -> CostTable:
    """The 8B table; see the module's docstring for what is taken over from 70B."""
    decode: list[DecodeRow] = []
    prefill: list[PrefillRow] = []
    for units, (d1, _, p4, p2, d8, p8) in PUBLISHED.items():
        e70, g70 = SLOPE[units] / K, INTERCEPT[units]
        e, f = 0.4 * e70, 0.2 * (d1 - g70 - e70 * 32 * K) / 32
        g = d8 - e * 32 * K - f * 32
        decode += _decode_rows(units, (((32, 32 * K), d8),), (e, f, g))
        b = 0.2 * _prefill_coefficients(p4, p2, g70)[0]
        c = (p8 - g - b / 2 * (4 * K) ** 2) / (4 * K)
        prefill += _prefill_rows(units, (((4 * K, 0), p8),), (b / 2, b, c, g))
    return _table("llama-3.1-8b", prefill, decode, ())


def compare(table: CostTable) -> None:
    """Errors of both models, over all rows and on the published cells alone."""
    fitted, roofline = FittedCost(table), RooflineCost(device_spec(table.device), model_spec(table.model))
    print(f"\n{table.model} on {table.device}: relative error, predicted over table")
    for phase, deviation in fitted.deviations().items():
        print(
            f"  fitted   {phase:8} worst {deviation.worst:6.1%}  mean {deviation.mean:6.1%}  of {deviation.rows} rows"
        )
    pairs = [("prefill", roofline.prefill(r.shape(), r.units) / r.seconds - 1) for r in table.prefill]
    pairs += [("decode", roofline.decode(r.shape(), r.units) / r.seconds - 1) for r in table.decode]
    pairs += [
        ("fused", roofline.fused(r.prefill(), r.decode(), r.units) / r.seconds - 1) for r in table.fused
    ]
    for phase in dict.fromkeys(p for p, _ in pairs):
        errors = [abs(e) for p, e in pairs if p == phase]
        print(f"  roofline {phase:8} worst {max(errors):6.1%}  mean {sum(errors) / len(errors):6.1%}")
    print("  published cells, ms: published, fitted, roofline")
    for units, cells in PUBLISHED.items():
        columns = [
            (ms, _predict(fitted, kind, shape, units), _predict(roofline, kind, shape, units))
            for (kind, shape), ms in zip(_cells(table.model), _of(table.model, cells), strict=True)
        ]
        print(
            f"  {units:5}  "
            + "  ".join(f"{p:7.1f} {f:7.1f} {r:7.1f} ({r / p - 1:+5.0%})" for p, f, r in columns)
        )


def _cells(model: str) -> tuple[tuple[str, tuple[int, int]], ...]:
    if model == "llama-3.1-70b":
        return (
            ("decode", (32, 32 * K)),
            ("decode", (32, 128 * K)),
            ("prefill", (4 * K, 0)),
            ("prefill", (2 * K, 32 * K)),
        )
    return (("decode", (32, 32 * K)), ("prefill", (4 * K, 0)))


def _of(model: str, cells: tuple[float, ...]) -> tuple[float, ...]:
    return cells[:4] if model == "llama-3.1-70b" else cells[4:]


def _predict(costs: FittedCost | RooflineCost, kind: str, shape: tuple[int, int], units: int) -> float:
    if kind == "decode":
        return 1e3 * costs.decode(DecodeShape(*shape), units)
    return 1e3 * costs.prefill(PrefillShape.of([shape]), units)


def _prefill_coefficients(p4: float, p2: float, d: float) -> tuple[float, float, float]:
    """(b, c, d) in ms from the two published prefills: two equations, with a = b/2."""
    # p4 = b/2 (4K)^2 + c 4K + d;  p2 = b/2 (2K)^2 + b 2K 32K + c 2K + d
    b = (p2 - p4 / 2 - d / 2) / ((2 * K) ** 2 / 2 + 2 * K * 32 * K - (4 * K) ** 2 / 4)
    c = (p4 - d - b / 2 * (4 * K) ** 2) / (4 * K)
    return b, c, d


Known = tuple[tuple[tuple[int, int], float], ...]


def _decode_rows(units: int, known: Known, efg: tuple[float, float, float]) -> list[DecodeRow]:
    e, f, g = efg
    derived = tuple((shape, e * shape[1] + f * shape[0] + g) for shape in DECODE_SHAPES)
    return [
        DecodeRow(units=units, batch=batch, context_tokens=context, seconds=round(ms / 1e3, 7))
        for (batch, context), ms in known + derived
    ]


def _prefill_rows(units: int, known: Known, abcd: tuple[float, float, float, float]) -> list[PrefillRow]:
    a, b, c, d = abcd
    derived = tuple(((n, r), a * n * n + b * n * r + c * n + d) for n, r in PREFILL_SHAPES)
    return [
        PrefillRow(units=units, requests=1, new=n, reused=r, new_squared=n * n, new_times_reused=n * r,
                   seconds=round(ms / 1e3, 7))
        for (n, r), ms in known + derived
    ]  # fmt: skip


def _table(
    model: str, prefill: list[PrefillRow], decode: list[DecodeRow], fused: tuple[FusedRow, ...]
) -> CostTable:
    return CostTable(
        device=DEVICE,
        model=model,
        num_layers=model_spec(model).num_layers,
        total_units=108,
        menu=tuple((p.prefill, p.decode) for p in menu(device_spec(DEVICE))),
        prefill=tuple(prefill),
        decode=tuple(decode),
        fused=fused,
        source=(
            "Latencies by SM count from the authors' published fits (arXiv 2504.14489), tensor parallel over eight "
            "A100 80 GB: per SM count the first rows. The other rows are derived from them as described in "
            "packages/drift-scheduler/tools/a100_tables.py, not measured."
        ),
    )


if __name__ == "__main__":
    main()
