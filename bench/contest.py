"""Is `drift` ever beaten? `nox -s bench -- contest`, options `[SCENARIO.toml] [--jobs N] [--resume PATH]
[--rivals PATH] [--json PATH] [--write PATH]`.

On every cell of bench/grid-full.toml: the goodput of `drift` and of chunked prefill with its best token budget; then
each other policy of one device, chunked prefill with every budget included, is asked whether it holds at 1 / 0.98 of
`drift`'s rate, and searched further if it does. That costs one short trial a rival where `drift` is not beaten, and so
the whole grid takes an hour on two cores where full searches take most of a day. Where only `drift` has changed since
an earlier run, `--rivals` takes what that run found of the others: it stays true, and only a bar that is lower now is
asked about again. Writes docs/goodput.md on request.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from drift_scheduler.bench import Cell, Grid, read_grid
from drift_scheduler.goodput import Outcome, Trial, seed_search
from drift_scheduler.plugins import Registry, load
from drift_scheduler.scenario_file import System
from drift_scheduler.tuning import TOKEN_BUDGETS, policy_search
from drift_scheduler.workers import run_searches

ROOT = Path(__file__).parents[1]
GRID = Path(__file__).with_name("grid-full.toml")
SHARE = 0.98
"""Of the best other policy's goodput, which `drift` must reach."""

Row = dict[str, Any]


def rivals(policies: Sequence[str]) -> list[str]:
    """Everything that `drift` is held against, chunked prefill with each budget."""
    named: list[str] = []
    for policy in policies:
        budgets = TOKEN_BUDGETS if policy == "chunked-prefill" else ()
        named += [f"{policy}:token_budget={budget}" for budget in budgets] or [policy]
    return [policy for policy in named if policy != "drift"]


def contest(
    cell: Cell, policies: Sequence[str], registry: Registry, earlier: Row | None = None
) -> Generator[Sequence[Trial], Sequence[Outcome], Row]:
    """One cell's row: `drift`, tuned chunked prefill, and whoever is above `drift` by more than the share forgives.

    `earlier`: the cell's row of a run with another `drift`.
    """
    scenario = replace(cell.scenario, seed=cell.plan.seeds[0])
    ours = yield from seed_search(replace(scenario, dispatch="drift"), cell.plan, cell.start)
    if earlier is None:
        tuned = yield from policy_search(
            registry, replace(scenario, dispatch="chunked-prefill"), cell.plan, cell.start, with_report=False
        )
        best, rate = tuned.dispatch, tuned.rate
    else:
        best, rate = earlier["chunked_dispatch"], earlier["chunked"]
    chunked_dispatch, chunked = best, rate
    above: dict[str, float] = {}
    for rival in rivals(policies):
        if rival == chunked_dispatch:
            continue
        if earlier is not None and not earlier["above"] and ours.rate >= earlier["drift"]:
            continue  # asked at a bar no higher than today's, it did not hold
        bar = max(rate, ours.rate / SHARE)
        found = yield from seed_search(
            replace(scenario, dispatch=rival), cell.plan, cell.start, at_least=bar, near=bar or None
        )
        if found.rate > rate:
            best, rate = rival, found.rate
            above[rival] = found.rate
    return {
        "cell": cell.key,
        "drift": ours.rate,
        "limited_by": ours.reason,
        "chunked": chunked,
        "chunked_dispatch": chunked_dispatch,
        "best_other": best,
        "best_other_rate": rate,
        "above": above,
    }


def of_best(row: Row) -> float | None:
    """`drift`'s goodput over the best other found; an upper bound where no rival was above the bar. `None`: nobody
    ever meets the targets."""
    if not row["best_other_rate"]:
        return 1.0 if row["drift"] else None
    return float(row["drift"] / row["best_other_rate"])


def beaten(rows: Sequence[Row]) -> list[Row]:
    """Rows in which `drift` is below its share of the best."""
    return [row for row in rows if (of_best(row) or 1.0) < SHARE]


# --------------------------------------------------------------------------------------------- the page


def page(rows: Sequence[Row], grid: Grid, settings: Mapping[str, Any]) -> str:
    """docs/goodput.md."""
    lost = beaten(rows)
    lines = [
        "# Goodput: `drift` against every policy of one device",
        "",
        "The highest request rate at which p99 TTFT over requests and p99 TBT over tokens keep their targets,",
        "simulated. The grid is in `bench/grid-full.toml`: three systems, five generated workloads, four replayed",
        "traces, and the TBT targets that each system can meet at all. Where a cell lost, the policy was changed,",
        "never the grid. The traces are public, and not in this repository: Mooncake's conversation and synthetic ones",
        "and Azure's of 2023, as JSON Lines ([workloads](workloads.md#traces)) in `shared/traces` beside the checkout.",
        "",
        f"- Cells: {len(rows)} of {len(grid.cells)}{_left_out(rows, grid)}. `drift` is below {SHARE} of the best other "
        f"policy in {len(lost)} of them.",
        *(
            f"- {system.model} on {system.device}: {over_chunked(rows, system)}"
            for system in grid.file.all_systems()
        ),
        "",
        "On eight A100 with 70B the cost table knows mixed passes from two published points only, which charge every",
        "one of them some 50 ms ([validation](validation.md)); chunked prefill is probably better there than these",
        "ratios say.",
        "",
        "Chunked prefill has its best token budget of eight in each cell. The other policies are "
        + ", ".join(f"`{p}`" for p in grid.file.policies if p not in ("drift", "chunked-prefill"))
        + ":",
        f"each was asked whether it holds at 1 / {SHARE} of `drift`'s rate (or of an earlier `drift`'s, where lower);",
        "where one does, the last column names it.",
        "",
    ]
    for system in grid.file.all_systems():
        prefix = f"{system.device}/{system.model}/"
        lines += [
            f"## {system.model} on {system.device}",
            "",
            "| workload | TBT target, ms | TTFT target, s | `drift`, requests/s | limited by "
            "| chunked prefill (budget) | ratio | beaten by |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [line(row, grid) for row in rows if row["cell"].startswith(prefix)]
        lines.append("")
    lines += [
        "---",
        "Generated by `nox -s bench -- contest --write docs/goodput.md`: "
        + ", ".join(f"{key} {value}" for key, value in settings.items())
        + ". One seed: a ratio of single rates is uncertain by about twice the tolerance.",
    ]
    return "\n".join(lines) + "\n"


def _left_out(rows: Sequence[Row], grid: Grid) -> str:
    """Which workloads lack cells."""
    known = {row["cell"] for row in rows}
    missing = Counter(cell.workload.title for cell in grid.cells if cell.key not in known)
    return f" (not run: {', '.join(f'{n} of {name}' for name, n in missing.items())})" if missing else ""


def over_chunked(rows: Sequence[Row], system: System) -> str:
    """One system's ratios to tuned chunked prefill, in a sentence."""
    here = [row for row in rows if row["cell"].startswith(f"{system.device}/{system.model}/")]
    ratios = [row["drift"] / row["chunked"] for row in here if row["chunked"]]
    if not ratios:
        return "chunked prefill never meets the targets."
    never = sum(1 for row in here if row["drift"] and not row["chunked"])
    more = f"; in {never} more cells chunked prefill never meets the targets" if never else ""
    return (
        f"{geometric_mean(ratios):.2f} times the goodput of tuned chunked prefill (geometric mean of {len(ratios)} "
        f"cells), {min(ratios):.2f} at least and {max(ratios):.2f} at most{more}."
    )


def line(row: Row, grid: Grid) -> str:
    """One cell."""
    (cell,) = (cell for cell in grid.cells if cell.key == row["cell"])
    budget = row["chunked_dispatch"].rpartition("=")[2]
    chunked = f"{row['chunked']:.3g} ({budget})" if row["chunked"] else "never"
    ratio = f"{row['drift'] / row['chunked']:.2f}" if row["chunked"] else "-"
    share = of_best(row)
    lost = f"`{row['best_other']}` ({share:.2f})" if share is not None and share < SHARE else "-"
    drift = f"{row['drift']:.3g}" if row["drift"] else "never"
    slo = cell.scenario.slo
    return (
        f"| {cell.workload.title} | {slo.tbt * 1e3:g} | {slo.ttft:g} | {drift} | {row['limited_by']} | {chunked} "
        f"| {ratio} | {lost} |"
    )


# --------------------------------------------------------------------------------------------- command


def read_rows(path: Path | None) -> dict[str, Row]:
    """Rows of an earlier, broken run."""
    if path is None or not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["cell"]: row for row in rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print a line a cell; 1 where `drift` is beaten."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", nargs="?", type=Path, default=GRID)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="only cells whose name holds this")
    parser.add_argument("--resume", type=Path, help="keep rows there, and go on from those of a broken run")
    parser.add_argument("--rivals", type=Path, help="rows of a run since which no other policy has changed")
    parser.add_argument("--known", action="store_true", help="run nothing: write what --resume holds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="the page")
    options = parser.parse_args(arguments)
    registry = load(installed=False)
    grid = read_grid(options.scenario, registry)
    known, earlier = read_rows(options.resume), read_rows(options.rivals)
    begun = time.monotonic()

    def done(name: str, row: Row) -> None:
        known[name] = row
        share = of_best(row)
        print(
            f"{name}: drift {row['drift']:.4g} ({row['limited_by']}), chunked {row['chunked']:.4g}, best other "
            f"{row['best_other']} {row['best_other_rate']:.4g}, share {'-' if share is None else f'{share:.3f}'}",
            flush=True,
        )
        if options.resume is not None:
            with options.resume.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    wanted = [cell for cell in grid.cells if options.only in cell.key]
    searches = {
        c.key: contest(c, grid.file.policies, registry, earlier.get(c.key))
        for c in wanted
        if c.key not in known
    }
    if searches and not options.known:
        run_searches(searches, options.jobs, registry, on_done=done)
    rows = [known[cell.key] for cell in wanted if cell.key in known]
    search = grid.file.search
    settings = {"seeds": list(search.seeds), "tolerance": search.tolerance, "requests": search.requests}
    if options.json is not None:
        document = {"schema": "drift.bench.contest/1", "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.write is not None:
        options.write.write_text(page(rows, grid, settings), encoding="utf-8")
    lost = beaten(rows)
    print(
        f"{len(rows)} cells, drift beaten in {len(lost)}, {time.monotonic() - begun:.0f} s", file=sys.stderr
    )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
