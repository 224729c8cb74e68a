"""Hold the simulator against the published numbers and write docs/validation.md.

    python bench/validate.py [--quick] [--jobs N] [--write PATH] [--json PATH] [--resume PATH]

Published: arXiv 2504.14489, eight A100 80 GB, tensor parallel. Three questions: do the cost models reproduce the
published latencies; do goodput ratios between systems come out as published; do the ablations move what they moved
there. Everything in the document's tables is computed here; its explanations are written here too, and say what the
numbers of the last full run showed. `--quick` is a smoke test: short trials, two workloads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec

from drift_scheduler.cost.fitted import FittedCost, fitted
from drift_scheduler.cost.roofline import roofline
from drift_scheduler.cost.table import built_in_table, table_name, write_table
from drift_scheduler.domain import SLO, DecodeShape, PrefillShape
from drift_scheduler.goodput import Outcome, PolicyGoodput, SearchPlan, Trial, begin
from drift_scheduler.plugins import Registry, load
from drift_scheduler.simulation.run import Scenario, Simulation
from drift_scheduler.tuning import policy_search
from drift_scheduler.workers import run_searches

ROOT = Path(__file__).parents[1]
CLUSTER = "8xa100-80gb"
BIG, SMALL = "llama-3.1-70b", "llama-3.1-8b"
K = 1024

# --------------------------------------------------------------------------------- what was published

LATENCIES = {  # SMs -> ms: 70B decode 32 x 1K, 32 x 4K, prefill 4K, 2K with 32K reused; 8B decode 32 x 1K, prefill 4K
    16: (55.6, 80.0, 2042, 1775, 11.9, 272),
    32: (34.1, 46.8, 1054, 908, 8.1, 143),
    48: (31.1, 38.9, 751, 671, 7.6, 107),
    64: (26.5, 33.1, 599, 508, 6.7, 92),
    80: (26.0, 31.5, 516, 464, 6.6, 82),
    108: (25.3, 29.1, 445, 403, 6.5, 73),
}
CELLS = ("70B decode 32x1K", "70B decode 32x4K", "70B prefill 4K", "70B 2K+32K reused", "8B decode 32x1K",
         "8B prefill 4K")  # fmt: skip

NEVER = float("inf")
"""A rival that never meets its target."""

WHAT_IF = "chunked-prefill with dear mixed passes"
BASELINES = ("chunked-prefill", "nanoflow", "loongserve", "pd-disaggregated")

TTFT = {"sharegpt": 10.0, "openthoughts": 10.0, "conversation": 30.0, "tool-agent": 30.0, "loogle": 90.0}
"""Targets for the first token, seconds: only there to tell a queue that grows from one that does not."""

SPAN = 8
"""Arrivals span at least so many times that, or an overloaded run ends before its queue shows."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the published ratios: gang over each rival, `None` where nothing was published."""

    workload: str
    model: str
    device: str
    tbt: float
    published: Mapping[str, float | None]

    @property
    def label(self) -> str:
        """Workload, model and device."""
        on = "one A100" if self.device == "a100-80gb" else "8 A100"
        return f"{self.workload} {self.model.rsplit('-', 1)[-1].upper()}, {on}"


def _cell(workload: str, model: str, *values: float | None, device: str = CLUSTER) -> Cell:
    return Cell(
        workload, model, device, 0.1 if model == BIG else 0.05, dict(zip(BASELINES, values, strict=True))
    )


RATIOS = (
    _cell("tool-agent", BIG, 3.06, NEVER, 2.62, 1.62),
    _cell("tool-agent", SMALL, 2.6, 5.2, 2.0, 1.3),
    _cell("sharegpt", BIG, 1.9, 1.73, 9.5, 1.46),
    _cell("loogle", BIG, 1.71, 2.0, 1.33, 2.0),
    _cell("openthoughts", BIG, 2.0, 2.0, NEVER, 2.0),
    Cell("conversation", BIG, CLUSTER, 0.1, {"chunked-prefill": None, "pd-disaggregated": None}),
    Cell("sharegpt", SMALL, "a100-80gb", 0.05, {"chunked-prefill": 1.2}),
)
OTHERS = {"streams": 1.61, "temporal": 1.2}
"""Drift over two unpartitioned streams, and over temporal slicing alone (at least); workloads not stated."""

ABLATIONS = {SMALL: (0.010, 0.314), BIG: (0.010, 0.672)}
"""What p99 TBT rises by, seconds: without slicing, and without slicing and polling."""

BUBBLE = 0.077

# ------------------------------------------------------------------------------------------ latencies


def latencies() -> dict[str, Any]:
    """Both models' relative errors on every published cell."""
    found: dict[str, Any] = {}
    for name, make in (("fitted", fitted_pair), ("roofline", roofline_pair)):
        big, small = make()
        rows = {}
        for units, published in LATENCIES.items():
            seconds = (
                big.decode(DecodeShape(32, 32 * K), units),
                big.decode(DecodeShape(32, 128 * K), units),
                big.prefill(PrefillShape.of([(4 * K, 0)]), units),
                big.prefill(PrefillShape.of([(2 * K, 32 * K)]), units),
                small.decode(DecodeShape(32, 32 * K), units),
                small.prefill(PrefillShape.of([(4 * K, 0)]), units),
            )
            rows[str(units)] = [1e3 * s / ms - 1 for s, ms in zip(seconds, published, strict=True)]
        errors = [abs(e) for row in rows.values() for e in row]
        found[name] = {"cells": rows, "worst": max(errors), "mean": sum(errors) / len(errors)}
    return found


def fitted_pair() -> tuple[Any, Any]:
    return fitted("", CLUSTER, BIG), fitted("", CLUSTER, SMALL)


def roofline_pair() -> tuple[Any, Any]:
    return roofline(CLUSTER, BIG), roofline(CLUSTER, SMALL)


# --------------------------------------------------------------------------------------------- ratios

Search = Generator[Sequence[Trial], Sequence[Outcome], PolicyGoodput]


def scenario_of(cell: Cell, dispatch: str) -> Scenario:
    """What a cell simulates for a policy."""
    return Scenario(cell.workload, cell.device, cell.model, dispatch, SLO(TTFT[cell.workload], cell.tbt))


@dataclass(frozen=True, slots=True)
class Effort:
    """How long trials are: the plan, and the least span of arrivals in TTFT targets."""

    plan: SearchPlan
    span: float

    def search(self, cell: Cell, dispatch: str, registry: Registry, cost: str | None = None) -> Search:
        """One cell's search for one policy."""
        scenario = replace(scenario_of(cell, dispatch), cost=cost)
        start = begin(scenario, self.plan, registry)
        start = replace(start, span_s=max(start.span_s, self.span * TTFT[cell.workload]))
        return policy_search(registry, scenario, self.plan, start)


def searches(cells: Sequence[Cell], effort: Effort, registry: Registry) -> dict[str, Search]:
    """One search a cell and policy, named `cell|policy`."""
    found: dict[str, Search] = {}
    for cell in cells:
        others = OTHERS if cell.device == CLUSTER and cell.workload in ("tool-agent", "sharegpt") else ()
        for policy in ("gang", *cell.published, *others):
            found[f"{cell.label}|{policy}"] = effort.search(cell, policy, registry)
    return found


def goodputs(found: Mapping[str, PolicyGoodput]) -> dict[str, Any]:
    """Rates, what limits them, and what ran, by `cell|policy`."""
    rows = {}
    for name, result in found.items():
        report = result.report or {}
        rows[name] = {
            "rate": result.rate,
            "dispatch": result.dispatch,
            "limited_by": result.seeds[0].reason,
            "tbt_p99_s": report.get("tbt_s", {}).get("p99"),
            "bubble_ratio": report.get("lanes", {}).get("bubble_ratio"),
            "hits": report.get("kv", {}).get("prefix_hit_ratio"),
        }
    return rows


# --------------------------------------------------------------------------------- one thing not known


def mixed_8b(folder: Path) -> Path:
    """The 8B table with mixed passes that cost beyond their parts what 70B's were published to, layer for layer."""
    big, small = built_in_table(table_name(CLUSTER, BIG)), built_in_table(table_name(CLUSTER, SMALL))
    plain = FittedCost(msgspec.structs.replace(big, fused=()))
    row = min(big.fused, key=lambda r: r.new)
    extra = (
        (row.seconds - plain.fused(row.prefill(), row.decode(), row.units))
        * small.num_layers
        / big.num_layers
    )
    costs = FittedCost(small)
    rows = tuple(
        msgspec.structs.replace(r, seconds=costs.fused(r.prefill(), r.decode(), r.units) + extra)
        for r in big.fused
    )
    path = folder / "8b-with-mixed-passes.json"
    write_table(msgspec.structs.replace(small, fused=rows), path)
    return path


def what_if(cells: Sequence[Cell], effort: Effort, registry: Registry, table_path: Path) -> dict[str, Search]:
    """Tuned chunked prefill on tool-agent 8B, were its mixed passes as dear as 70B's."""
    return {
        f"{cell.label}|{WHAT_IF}": effort.search(
            cell, "chunked-prefill", registry, cost=f"fitted:table={table_path}"
        )
        for cell in cells
        if (cell.workload, cell.model) == ("tool-agent", SMALL)
    }


# ------------------------------------------------------------------------------------------ ablations


def ablations(rates: Mapping[str, float], requests: int, registry: Registry) -> dict[str, Any]:
    """p99 TBT of gang on tool-agent at 3/4 of its goodput: whole, without slicing, and without polling as well."""
    found = {}
    for model, tbt in ((SMALL, 0.05), (BIG, 0.1)):
        rows = []
        for dispatch, polling in (
            ("gang", True),
            ("gang:slice_layers=false", True),
            ("gang:slice_layers=false", False),
        ):
            scenario = Scenario(
                "tool-agent",
                CLUSTER,
                model,
                dispatch,
                SLO(30.0, tbt),
                rate=rates[model] / 2,
                requests=requests,
            )
            simulation = Simulation(scenario, registry)
            simulation.overheads = replace(simulation.overheads, polling=polling)
            report = simulation.run()
            rows.append({"p99": report["tbt_s"]["p99"], "bubble": report["lanes"]["bubble_ratio"]})
        found[model] = {"rate": 0.75 * rates[model], "runs": rows}
    return found


# ------------------------------------------------------------------------------------------- document


def document(result: Mapping[str, Any]) -> str:
    """The whole of docs/validation.md."""
    parts = [HEAD, latency_section(result["latencies"]), ratio_section(result), ablation_section(result)]
    parts.append(WHY_DIFFERENT)
    settings = result["settings"]
    command = "bench/validate.py" + (" --quick (a smoke test, not a result)" if settings["quick"] else "")
    parts.append(
        f"---\nGenerated by `python {command}`: seeds {settings['seeds']}, tolerance {settings['tolerance']:.0%}, "
        f"trials of at least {settings['requests']} requests and {settings['span']} times the TTFT target.\n"
    )
    return "\n".join(parts)


def latency_section(found: Mapping[str, Any]) -> str:
    lines = ["## Latencies\n"]
    for name in ("fitted", "roofline"):
        model = found[name]
        lines.append(
            f"`{name}`: worst {model['worst']:.1%}, mean {model['mean']:.1%} of 36 cells"
            + (" (to be within 9%)." if name == "fitted" else " (nothing measured goes in).")
        )
        lines.append("")
        lines += table(
            ("SMs", *CELLS), [(u, *(f"{e:+.1%}" for e in row)) for u, row in model["cells"].items()]
        )
        lines.append("")
    return "\n".join(lines)


def ratio_section(result: Mapping[str, Any]) -> str:
    rates = result["goodput"]
    rows, speeds = [], []
    for cell in RATIOS:
        gang = rates.get(f"{cell.label}|gang")
        if gang is None:
            continue
        shown = []
        for policy in BASELINES:
            rival = rates.get(f"{cell.label}|{policy}")
            shown.append(
                "-" if rival is None else compare(gang["rate"], rival["rate"], cell.published[policy])
            )
        rows.append((cell.label, *shown))
        names = [n for n in ("gang", *BASELINES, *OTHERS, WHAT_IF) if f"{cell.label}|{n}" in rates]
        speeds += [(cell.label if n == "gang" else "", *speed(n, rates[f"{cell.label}|{n}"])) for n in names]
    lines = ["## Goodput ratios\n", RATIO_TEXT, *table(("gang over", *BASELINES), rows), ""]
    lines += ["Against two ways of sharing one device, as `measured (published)`:\n"]
    lines += table(("gang over", *OTHERS), others_rows(rates))
    lines += ["\nThe rates behind them, requests per second:\n"]
    lines += table(
        ("cell", "policy", "goodput", "limited by", "p99 TBT there, ms", "bubbles", "prefix hits"), speeds
    )
    return "\n".join(lines) + "\n"


def others_rows(rates: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for cell in RATIOS:
        have = [f"{cell.label}|{name}" in rates for name in OTHERS]
        if all(have):
            gang = rates[f"{cell.label}|gang"]["rate"]
            rows.append(
                (
                    cell.label,
                    *(compare(gang, rates[f"{cell.label}|{n}"]["rate"], p) for n, p in OTHERS.items()),
                )
            )
    return rows


def compare(gang: float, rival: float, published: float | None) -> str:
    """`measured (published)`, marked where they are more than 25% apart."""
    measured = gang / rival if rival else NEVER
    text = "never meets" if measured == NEVER else f"{measured:.2f}"
    if published is None:
        return text
    wanted = "never meets" if published == NEVER else f"{published:.2f}"
    close = measured == published or (
        NEVER not in (measured, published) and abs(measured / published - 1) <= 0.25
    )
    return f"{text} ({wanted})" if close else f"**{text}** ({wanted})"


def speed(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    tbt, bubbles, hits = row["tbt_p99_s"], row["bubble_ratio"], row["hits"]
    return (
        f"`{row['dispatch'] if row['dispatch'].startswith(name) else name}`",
        f"{row['rate']:.2f}" if row["rate"] else "never meets",
        row["limited_by"] or "-",
        "-" if tbt is None else f"{1e3 * tbt:.0f}",
        "-" if bubbles is None else f"{bubbles:.1%}",
        "-" if not hits else f"{hits:.0%}",
    )


def ablation_section(result: Mapping[str, Any]) -> str:
    rows = []
    for model, found in result["ablations"].items():
        whole, unsliced, blocking = (run["p99"] * 1e3 for run in found["runs"])
        slicing, polling = (1e3 * ms for ms in ABLATIONS[model])
        rows.append(
            (model, f"{found['rate']:.2f}/s", f"{whole:.0f}", f"{unsliced - whole:+.0f} ({slicing:+.0f})",
             f"{blocking - whole:+.0f} ({polling:+.0f})", f"{found['runs'][0]['bubble']:.1%} ({BUBBLE:.1%})")
        )  # fmt: skip
    lines = ["## Ablations\n", ABLATION_TEXT]
    lines += table(
        ("tool-agent", "rate", "p99 TBT, ms", "without slicing", "nor polling", "bubble ratio"), rows
    )
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


HEAD = """# Validation: how far to trust the simulator

The published numbers are those of arXiv 2504.14489 (v3): eight A100 80 GB, tensor parallel, TBT target 100 ms at p99
for 70B and 50 ms for 8B. What is compared with them here runs on simulated devices; nothing below was measured on
hardware.
"""

RATIO_TEXT = """Goodput of `gang`, the paper's policy, over each rival's, as `measured (published)`; **bold** where
more than 25% apart. Goodput is the highest Poisson rate at which p99 TBT is within target and p99 TTFT within a bound
(10 s for sharegpt and openthoughts, 30 s for conversation and tool-agent, 90 s for loogle) that only tells a growing
queue from a stable one. Every policy runs at most 256 requests at once; chunked prefill and NanoFlow each run the best
of eight token budgets per cell. Devices and tables come from the published latencies alone; nothing was tuned to these
ratios.
"""

ABLATION_TEXT = """`gang` at three quarters of its goodput: what p99 TBT rises by, ms, as `measured (published)`.
"""

WHY_DIFFERENT = """## Where it differs from the paper, and why

**Chunked prefill on 70B comes out slower than published (except openthoughts), and faster on loogle.** The only mixed
passes published are 100 ms at a budget of 256 tokens and 505 ms at 4K, beside 32 decodes of 1K. Against the published
prefill and decode times of the same sizes both are about 52 ms longer, and the table charges those 52 ms to every
mixed pass. A pass of even 64 tokens then takes 80 ms, and beside requests of 8K context no budget above that meets
100 ms. The paper's tuned chunked prefill sustains more on sharegpt and tool-agent, so its small passes must be
cheaper than those two points say; mixed passes at other budgets and contexts are what the model lacks. On loogle most
prompts meet an idle decode lane, run whole, and so hardly pay for chunking; a chunked engine that cuts them even then
would be slower.

**Chunked prefill on 8B comes out faster than published.** No mixed pass of 8B was published, so the 8B table has
none, and a mixed pass costs what its parts cost. With the 52 ms of 70B in proportion to layers (21 ms) it would
sustain what the row "chunked-prefill with dear mixed passes" says. On one A100, where the roofline prices a mixed
pass as one reading of the weights, chunked prefill is slightly ahead at 50 ms; that a loose target favours fused
steps is known, and why `drift` chooses between the two.

**NanoFlow** overlaps what the roofline says can overlap, as a ratio on the same mixed passes, and so inherits both of
the above. On 70B that leaves it next to nothing on short prompts: it reads the weights once per nano-batch, the ratio
applies to the 52 ms as well, and beside 32 decodes no pass of it takes less than 107 ms, where the target is 100 ms.
Its published engine also differs in ways that are not modelled (its own kernels, offloading, batch forming).

**LoongServe** is priced with everyone's kernels here. The paper ran its engine, which decodes without captured graphs
and pays for it most where decode dominates: sharegpt (9.5) and openthoughts (never meets). Neither is a property of
its schedule, which is what is modelled. On tool-agent it suffers from computing whole prompts, as published, and more
so: our generated sessions reuse what the published means imply with an unlimited cache, 57% of a prompt, so a system
without a prefix cache computes 2.3 times the tokens.

**Prefill/decode disaggregation** is within 25% except on tool-agent 70B and openthoughts. On tool-agent its prefix
cache is the prefill group's, a third of the pool of eight accelerators, and the generated sessions continue in random
order over up to 64 live ones, which spreads reuse wider than the real trace's recency; the column of prefix hits
shows the loss. On openthoughts every request ends with thousands of tokens, the decode group holds about 85 of them
and eight accelerators 250, and that ratio is what comes out; the paper's systems do not show it, so they are limited
by something else before memory, perhaps by how many requests a captured graph holds.

**Streams and temporal slicing.** Which workload the published 1.61 belongs to is not stated. The shares of the units
that two streams get are an assumption stated in `drift_scheduler.cost.contention`; it was made before these ratios
were computed and left alone. Temporal slicing is at least 20% worse, as published.

**Ablations.** Slicing: the host launches a whole 70B prefill in 40 ms (the paper: tens of ms), and a decode step that
ends meanwhile waits. That shows in 1 to 3 ms of p99 TBT here and in 10 ms there: a simulated host does nothing else
meanwhile, and few of the steps at three quarters of the load end within those 40 ms. Polling: decode steps that end
under an unsliced prefill wait for its end, hundreds of ms as published; how far that goes depends on how long the
prompts of a run are.

**Bubbles** are fewer than published: a simulated lane starts the instant the other ends, the prompts of these
workloads keep the prefill lane busy, and a bubble is counted only while a partition is in force.

What the simulator leaves out throughout: clock and power throttling, memory fragmentation, tokenisation and network,
and any error of the table itself, most of whose rows are derived (see its `source`), not published.
"""


# ------------------------------------------------------------------------------------------- command


def main() -> None:
    """Run everything and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short trials and two workloads: a smoke test")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--write", default=str(ROOT / "docs" / "validation.md"), help="where the document goes"
    )
    parser.add_argument("--json", default="", help="also write the numbers there")
    parser.add_argument(
        "--resume", default="", help="keep outcomes there, and go on from those of a broken run"
    )
    options = parser.parse_args()
    began = time.monotonic()
    result = validate(options.quick, options.jobs, options.resume)
    Path(options.write).write_text(document(result), encoding="utf-8")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.write} after {time.monotonic() - began:.0f} s", file=sys.stderr)


class Memory:
    """Outcomes of earlier, interrupted runs by search, in order; kept as JSON Lines where a path is given."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._known: dict[str, list[Outcome]] = {}
        lines = (
            self._path.read_text(encoding="utf-8").splitlines() if self._path and self._path.exists() else []
        )
        for name, outcome in (json.loads(line) for line in lines):
            self._known.setdefault(name, []).append(Outcome(**outcome))

    def skip_known(self, name: str, search: Search) -> Search:
        """The search, taken past what is known of it: trials are deterministic, so it would find the same again."""
        trials = next(search)
        for outcome in self._known.get(name, []):
            (trial,) = trials
            whole = trial.criterion is None
            if trial.scenario.rate != outcome.rate or whole != (outcome.report is not None):
                break
            try:
                trials = search.send([outcome])
            except StopIteration as stop:
                return cast(PolicyGoodput, stop.value)
        while True:
            outcomes = yield trials
            for outcome in outcomes:
                self._keep(name, outcome)
            try:
                trials = search.send(outcomes)
            except StopIteration as stop:
                return cast(PolicyGoodput, stop.value)

    def _keep(self, name: str, outcome: Outcome) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, asdict(outcome)]) + "\n")


def validate(quick: bool, jobs: int, resume: str = "") -> dict[str, Any]:
    """Every number of the document."""
    memory = Memory(resume)
    registry = load(installed=False)
    requests, span, lifetimes = (60, 2, 0.5) if quick else (200, SPAN, 1.0)
    plan = SearchPlan(seeds=(0,), requests=requests, lifetimes=lifetimes, tolerance=0.2 if quick else 0.05)
    effort = Effort(plan, span)
    cells = [c for c in RATIOS if not quick or c.workload in ("tool-agent", "loogle")]

    def tell(name: str, outcome: Outcome) -> None:
        print(f"{name} {outcome.rate:g}/s {'holds' if outcome.holds else outcome.reason}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        wanted = searches(cells, effort, registry)
        wanted |= what_if(cells, effort, registry, mixed_8b(Path(folder)))
        wanted = {name: memory.skip_known(name, search) for name, search in wanted.items()}
        found = run_searches(wanted, jobs, registry, tell)
    rates = goodputs(found)
    at = {c.model: rates[f"{c.label}|gang"]["rate"] for c in RATIOS if c.workload == "tool-agent"}
    return {
        "settings": {
            "quick": quick,
            "seeds": [0],
            "tolerance": plan.tolerance,
            "requests": requests,
            "span": span,
        },
        "latencies": latencies(),
        "goodput": rates,
        "ablations": ablations(at, 100 if quick else 1000, registry),
    }


if __name__ == "__main__":
    main()
