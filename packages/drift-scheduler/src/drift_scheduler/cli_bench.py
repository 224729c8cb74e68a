"""`drift goodput` and `drift bench`: settings in, progress bars, tables and files out. The work is done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from drift_scheduler.bench import Grid, Result
    from drift_scheduler.goodput import Outcome, PolicyGoodput
    from drift_scheduler.plugins import Registry

OWN = {"dispatch", "rate", "requests", "seed", "log_path", "timing", "json_path"}
"""Options of `drift simulate` that goodput replaces; it takes the others as they are."""


def commands(
    simulate: click.Command, registry: Callable[[], Registry], write: Callable[[Any, str], None]
) -> list[click.Command]:
    """Both commands. `simulate`: whose options they share; `write`: a JSON value to a path or `-`."""

    def run_goodput(**options: Any) -> None:
        _goodput(registry(), write, **options)

    def run_bench(**options: Any) -> None:
        _bench(registry(), write, **options)

    shared = [parameter for parameter in simulate.params if parameter.name not in OWN]
    json_option = next(p for p in simulate.params if p.name == "json_path")
    goodput = click.Command(
        "goodput",
        params=[*_dispatch_options(), *shared, *_search_options(), _jobs_option(), json_option],
        callback=run_goodput,
        help="Find the highest request rate at which each policy meets the targets, by simulation.",
    )
    bench = click.Command(
        "bench",
        params=[
            click.Argument(["scenario"], metavar="SCENARIO.toml"),
            click.Option(["--out"], metavar="DIR", help="Write a report folder here."),
            _jobs_option(),
            json_option,
        ],
        callback=run_bench,
        help="Search a grid of devices, models, workloads, targets and policies for goodput; write a report.",
    )
    return [goodput, bench]


def _dispatch_options() -> list[click.Option]:
    return [
        click.Option(
            ["--dispatch"], required=True, metavar="A,B,...", help="Dispatch policies, NAME[:option=value...] each."
        ),
        click.Option(
            ["--base"], metavar="NAME", help="Ratios are to this one.  [default: chunked-prefill, else the first]"
        ),
    ]  # fmt: skip


def _search_options() -> list[click.Option]:
    return [
        click.Option(
            ["--criterion"], default="p99", show_default=True, metavar="p99|attainment:X",
            help="p99 of TTFT over requests and of TBT over tokens, or a share of requests within all their targets.",
        ),
        click.Option(
            ["--seeds"], default="0,1,2", show_default=True, metavar="S,S,...", help="Searched one by one."
        ),
        click.Option(
            ["--requests"], type=int, default=300, show_default=True, help="At least so many requests a run."
        ),
        click.Option(
            ["--lifetimes"], type=float, default=2.0, show_default=True,
            help="A run spans at least so many mean lifetimes, and ten times as many TTFT targets.",
        ),
        click.Option(
            ["--tolerance"], type=float, default=0.02, show_default=True, help="Relative, of the found rate."
        ),
    ]  # fmt: skip


def _jobs_option() -> click.Option:
    return click.Option(["--jobs", "-j"], type=int, default=1, show_default=True, help="Processes.")


def _goodput(
    registry: Registry,
    write: Callable[[Any, str], None],
    *,
    dispatch: str,
    base: str | None,
    slo_ttft: float,
    slo_tbt: float,
    criterion: str,
    seeds: str,
    requests: int,
    lifetimes: float,
    tolerance: float,
    jobs: int,
    json_path: str | None,
    **settings: Any,
) -> None:
    from drift_scheduler.domain import SLO
    from drift_scheduler.errors import OptionError
    from drift_scheduler.goodput import Criterion, SearchPlan, begin
    from drift_scheduler.simulation.run import Scenario
    from drift_scheduler.tuning import base_of, policy_search, to_document
    from drift_scheduler.workers import run_searches

    policies = _policies(dispatch)
    if base is not None and base not in policies:
        raise OptionError(f"base '{base}' is not among the policies: {', '.join(policies)}")
    plan = SearchPlan(Criterion.parse(criterion), _seeds(seeds), requests, lifetimes, tolerance)
    scenarios = {
        policy: Scenario(slo=SLO(slo_ttft, slo_tbt), dispatch=policy, **settings) for policy in policies
    }
    starts = {policy: begin(scenario, plan, registry) for policy, scenario in scenarios.items()}
    searches = {
        policy: policy_search(registry, scenario, plan, starts[policy])
        for policy, scenario in scenarios.items()
    }
    with _Bars(len(searches)) as bars:
        found = run_searches(searches, jobs, registry, bars.trial, bars.done)
    chosen = base or base_of(policies)
    document = to_document(scenarios[policies[0]], plan, found, chosen)
    if json_path is not None:
        write(document, json_path)
    if json_path != "-":
        _print_goodput(document, found, chosen)


def _policies(text: str) -> list[str]:
    from drift_scheduler.errors import OptionError

    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise OptionError(f"dispatch '{text}': need policies separated by commas, each once")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    from drift_scheduler.errors import OptionError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"seeds '{text}': need whole numbers separated by commas") from None


def _console() -> Console:
    """For a table; 160 columns where there is no terminal to ask."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


def _print_goodput(document: Mapping[str, Any], found: Mapping[str, PolicyGoodput], base: str) -> None:
    from rich.table import Table

    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("policy")
    for name in ("requests/s", "95% interval", f"to {base}", "limited by"):
        table.add_column(name, justify="right")
    table.add_column("tuned")
    for policy, result in found.items():
        ratio = document["ratio_to"][base][policy]
        interval = result.interval
        tuned = "" if result.tuned is None else f"{result.tuned['option']}={result.tuned['value']}"
        table.add_row(
            policy,
            f"{result.rate:.4g}" if result.rate else "never",
            "-" if interval is None else f"{interval[0]:.4g} - {interval[1]:.4g}",
            "-" if ratio is None else f"{ratio:.2f}x",
            ", ".join(sorted({f.reason for f in result.seeds if f.reason})) or "-",
            tuned,
        )
    console = _console()
    console.print(table)
    for line in _faults(found):
        console.print(line)
    slo, seeds = document["slo"], max(len(result.seeds) for result in found.values())
    console.print(
        f"Targets: TTFT {slo['ttft_s']:g} s, TBT {slo['tbt_s']:g} s, {slo['criterion']}, {seeds} "
        f"seed{'s' if seeds > 1 else ''}; counted from {slo['window']}"
    )


def _faults(found: Mapping[str, PolicyGoodput]) -> list[str]:
    """Whose goodput is the fallback's, in part or in whole."""
    from drift_scheduler.report import faults_line

    reports = {policy: result.report for policy, result in found.items() if result.report is not None}
    lines = (faults_line(policy, report["scheduler"]) for policy, report in reports.items())
    return [line for line in lines if line is not None]


# ------------------------------------------------------------------------------------------------- bench


def _bench(
    registry: Registry,
    write: Callable[[Any, str], None],
    *,
    scenario: str,
    out: str | None,
    jobs: int,
    json_path: str | None,
) -> None:
    from drift_scheduler.bench import read_grid, to_run_json
    from drift_scheduler.reporting.folder import prepare_folder, write_folder

    grid = read_grid(scenario, registry)
    if out is not None:
        prepare_folder(out)
    result = run_grid(grid, jobs, registry)
    if json_path is not None:
        write(to_run_json(result), json_path)
    if json_path != "-":
        print_table(result)
    if out is not None:
        written = write_folder(result, out)
        click.echo(f"{len(written)} files in {out}, report.html among them", err=json_path == "-")


def run_grid(grid: Grid, jobs: int, registry: Registry) -> Result:
    """Search every cell, then run the details, with a progress bar on a terminal."""
    from drift_scheduler.bench import Result, cell_searches, collect, detail_search, detailed
    from drift_scheduler.workers import run_searches

    searches = cell_searches(grid, registry)
    with _Bars(len(searches), lines=True) as bars:
        goodput = collect(grid, run_searches(searches, jobs, registry, bars.trial, bars.done))
    details = {cell.key: detail_search(grid, cell, goodput[cell.key]) for cell in detailed(grid)}
    with _Bars(len(details), "details") as bars:
        found = run_searches(details, jobs, registry, bars.trial, bars.done)
    return Result(grid, goodput, tuple(found.values()))


def print_table(result: Result) -> None:
    """Policies x workloads: goodput and its ratio to the base; with many cells, cells x policies."""
    from rich.table import Table

    grid = result.grid
    policies, cells = grid.file.policies, grid.cells
    titles = _titles(result)
    console = _console()
    console.print(f"{grid.file.title}: goodput in requests/s, and its ratio to {grid.base}")
    table = Table(header_style="bold", box=None, pad_edge=False)
    sideways = len(cells) > 6
    table.add_column("cell" if sideways else "policy")
    for name in policies if sideways else titles:
        table.add_column(name, justify="right")
    if sideways:
        for cell, title in zip(cells, titles, strict=True):
            table.add_row(title, *(_cell_text(result, cell.key, policy) for policy in policies))
        table.add_row("ratio, mean (min-max)", *(_spread_text(result, policy) for policy in policies))
    else:
        table.add_column("ratio, mean (min-max)", justify="right")
        for policy in policies:
            row = [_cell_text(result, cell.key, policy) for cell in cells]
            table.add_row(policy, *row, _spread_text(result, policy))
    console.print(table)
    for line in _notes(result):
        console.print(line)


def _titles(result: Result) -> list[str]:
    """Cells by what tells them apart."""
    cells = result.grid.cells
    many_systems = len({cell.system_title for cell in cells}) > 1
    many_targets = len({cell.tbt for cell in cells}) > 1
    return [
        " ".join(
            [
                cell.workload.title,
                *([cell.system_title] if many_systems else []),
                *([f"{cell.tbt * 1e3:g} ms"] if many_targets else []),
            ]
        )
        for cell in cells
    ]


def _cell_text(result: Result, key: str, policy: str) -> str:
    from drift_scheduler.goodput import ratios

    found = result.goodput[key]
    if found[policy].rate <= 0:
        return "never"
    ratio, _ = ratios(found[policy], found[result.grid.base])
    return f"{found[policy].rate:.3g}" + ("" if ratio is None else f" {ratio:.2f}x")


def _spread_text(result: Result, policy: str) -> str:
    from drift_scheduler.bench import spread

    found = spread(result, policy)
    return "-" if found is None else f"{found[1]:.2f}x ({found[0]:.2f}-{found[2]:.2f})"


def _notes(result: Result) -> list[str]:
    """What was tuned to what, who was at fault, and cells whose search was not monotone."""
    notes = []
    for policy in result.grid.file.policies:
        values = [
            f"{cell.workload.title} {tuned['value']}"
            for cell in result.grid.cells
            if (tuned := result.goodput[cell.key][policy].tuned) is not None
        ]
        if values:
            option = result.goodput[result.grid.cells[0].key][policy].tuned or {}
            notes.append(f"{policy} tuned, {option.get('option')}: {', '.join(values)}")
    notes += [
        f"{cell.workload.title}: {line}"
        for cell in result.grid.cells
        for line in _faults(result.goodput[cell.key])
    ]
    odd = [
        f"{policy} in {cell.key}"
        for cell in result.grid.cells
        for policy, found in result.goodput[cell.key].items()
        if not all(seed.monotone for seed in found.seeds)
    ]
    if odd:
        notes.append(f"Not monotone in the rate (the highest rate that held is given): {'; '.join(odd)}")
    return notes


class _Bars:
    """Searches done of all, trials so far and the last outcome, on a terminal's stderr; elsewhere silent, or lines."""

    def __init__(self, total: int, what: str = "searches", lines: bool = False) -> None:
        self._total, self._lines, self._done = total, lines, 0
        self._stack = ExitStack()
        self._trials = 0
        self._progress: Any = None
        if sys.stderr.isatty() and total:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn(what),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task("", total=total)

    def trial(self, name: str, outcome: Outcome) -> None:
        """One trial ended."""
        self._trials += 1
        if self._progress is not None:
            verdict = "holds" if outcome.holds else "fails"
            self._progress.update(
                self._task, description=f"{self._trials} runs; {name} at {outcome.rate:.4g}/s {verdict}"
            )

    def done(self, name: str, result: Any) -> None:
        """One search ended; where there is no bar and many of them, a line says so."""
        self._done += 1
        if self._progress is not None:
            self._progress.advance(self._task)
        elif self._lines:
            rate = getattr(result, "rate", 0.0)
            click.echo(f"{self._done}/{self._total} {name}: {rate:.4g} requests/s", err=True)

    def __enter__(self) -> _Bars:
        if self._progress is not None:
            self._stack.enter_context(self._progress)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
