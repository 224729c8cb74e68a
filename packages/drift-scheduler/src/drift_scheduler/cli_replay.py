"""`drift replay`: logs in, tables or JSON out. The work is done in `drift_scheduler.replay`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from drift_scheduler.plugins import Registry


def command(registry: Callable[[], Registry], write: Callable[[Any, str], None]) -> click.Command:
    """The command. `write`: a JSON value to a path or `-`."""

    @click.command()
    @click.argument("logs", nargs=-1, required=True, metavar="LOG...")
    @click.option(
        "--dispatch",
        metavar="A,B,...",
        help="What would these dispatch policies have done, NAME[:option=value...]?",
    )
    @click.option("--partition", metavar="NAME", help="Partition policy.  [default: each log's own]")
    @click.option(
        "--json", "json_path", metavar="PATH|-", help="Write the report as JSON; - for stdout instead."
    )
    def replay(
        logs: tuple[str, ...], dispatch: str | None, partition: str | None, json_path: str | None
    ) -> None:
        """Ask what other policies would have done with what a decision log saw.

        LOG is a file that `drift simulate --log` or `drift serve --log` wrote. Each log is also simulated under its own
        policy, which says how far the simulator can be trusted; of several logs, whether policies rank the same.
        """
        from drift_scheduler.replay import replay as run

        names = [name.strip() for name in dispatch.split(",") if name.strip()] if dispatch else []
        report = run(logs, names, partition, registry())
        if json_path is not None:
            write(report, json_path)
        if json_path != "-":
            from rich.console import Console

            _print(report, Console(highlight=False, markup=False))

    return replay


def _print(report: dict[str, Any], console: Console) -> None:
    for log in report["logs"]:
        _print_log(log, console)
    ranking = report["ranking"]
    if ranking is not None:
        from rich.table import Table

        table = Table(
            "statistic", "Kendall's tau", "logged, best first", "simulated", header_style="bold", box=None
        )
        for name, found in ranking["statistics"].items():
            tau = "-" if found["tau"] is None else f"{found['tau']:+.2f}"
            table.add_row(name, tau, ", ".join(found["logged"]), ", ".join(found["simulated"]))
        console.print("Do policies rank as they did?")
        console.print(table)


def _print_log(log: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    requests = log["requests"]
    console.print(
        f"{log['log']}: {log['dispatch']} / {log['partition']} on {log['device']}, {log['steps']} steps, "
        f"{requests['finished']} of {requests['offered']} requests finished"
        + (f"; line {log['truncated_line']} is cut short and left out" if log["truncated_line"] else "")
    )
    table = Table(
        "", "TTFT p50", "TTFT p99", "TBT p50", "TBT p99", "same decisions", header_style="bold", box=None
    )
    table.add_row("logged", *_times(log["logged"]), "")
    table.add_row(f"{log['dispatch']}, simulated", *_times(log["simulated"]), _share(log["decisions"]))
    table.add_row("  simulator's error", *(_signed(log["error"][name]) for name in log["error"]), "")
    for other in log["others"]:
        name = other["dispatch"]
        if other["partition"] != log["partition"]:
            name += f" / {other['partition']}"
        name += ", simulated"
        table.add_row(name, *_times(other["report"]), _share(other["decisions"]))
    console.print(table)
    for other in log["others"]:
        for line in _remarks(other):
            console.print(line)


def _remarks(other: dict[str, Any]) -> list[str]:
    """Where a policy first differed, and what kept it from being compared to the end."""
    found, name = other["decisions"], other["dispatch"]
    lines = []
    if found.get("reason"):
        lines.append(f"{name}: decisions not compared: {found['reason']}")
    first = found.get("first_difference")
    if first is not None:
        lines.append(
            f"{name} first differs at line {first['line']} ({first['kind']}): "
            f"{first['other']}; logged: {first['logged']}"
        )
    if found.get("stopped") is not None:
        lines.append(f"{name}: compared up to line {found['stopped']['line']}: {found['stopped']['reason']}")
    return lines


def _times(report: dict[str, Any]) -> list[str]:
    values = [report[key][q] for key in ("ttft_s", "tbt_s") for q in ("p50", "p99")]
    return ["-" if value is None else f"{value:.4f}" for value in values]


def _share(decisions: dict[str, Any]) -> str:
    return "-" if decisions["ratio"] is None else f"{decisions['ratio']:.1%} of {decisions['compared']}"


def _signed(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"
