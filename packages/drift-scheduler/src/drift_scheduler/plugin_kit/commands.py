"""`drift plugins new` and `drift plugins check`: options in, files, tables and exit codes out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from drift_scheduler.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console

    from drift_scheduler.plugin_kit.check import Verdict
    from drift_scheduler.plugins import Registry

NOT_CONFORMING = 1

Clock = Callable[[], float]


def commands(
    registry: Callable[[], Registry],
    write: Callable[[Any, str], None],
    clocks: Callable[[], tuple[Clock, Clock]],
) -> list[click.Command]:
    """Both commands. `write`: a JSON value to a path or `-`; `clocks`: wall and processor time in seconds."""

    @click.command()
    @click.argument("name")
    @click.option(
        "--kind",
        type=click.Choice(["dispatch", "partition"]),
        default="dispatch",
        show_default=True,
        help="What the policy decides.",
    )
    @click.option("--into", default=".", metavar="DIR", help="Where to put the package.  [default: here]")
    def new(name: str, kind: str, into: str) -> None:
        """Write a package with a working policy NAME, its entry point and a test that holds it to the rules."""
        from drift_scheduler.plugin_kit.new import write_plugin

        taken = registry().names[f"{kind} policy"].get(name)
        if taken is not None:
            raise OptionError(f"the {kind} policy '{name}' is there already, in plugin {taken.plugin}")
        folder = write_plugin(name, kind, into)
        click.echo(f"{folder}: policy '{name}'. Next: pip install -e {folder} && drift plugins check {name}")

    @click.command()
    @click.argument("name", metavar="NAME")
    @click.option(
        "--budget-us", type=float, help="Microseconds a decision may take.  [default: 2000]", metavar="US"
    )
    @click.option(
        "--json", "json_path", metavar="PATH|-", help="Write the findings as JSON; - for stdout instead."
    )
    def check(name: str, budget_us: float | None, json_path: str | None) -> None:
        """Hold the policy NAME[:option=value...], or every policy of the plugin NAME, to the scheduler's rules.

        Exit code 1 where one does not conform or takes too long to decide.
        """
        from drift_scheduler.plugin_kit import check as checking

        wall, cpu = clocks()
        budget = checking.BUDGET_US if budget_us is None else budget_us
        verdicts = checking.check(registry(), name, wall=wall, cpu=cpu, budget_us=budget)
        if json_path is not None:
            write(
                {"schema": "drift.check/1", "policies": [_facts(verdict) for verdict in verdicts]}, json_path
            )
        if json_path != "-":
            from rich.console import Console

            for verdict in verdicts:
                _print(verdict, Console(highlight=False, markup=False))
        if not all(verdict.passed for verdict in verdicts):
            sys.exit(NOT_CONFORMING)

    return [new, check]


def _facts(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "in_time": verdict.in_time, "passed": verdict.passed}


def _print(verdict: Verdict, console: Console) -> None:
    from rich.table import Table

    console.print(f"{verdict.kind} '{verdict.name}' of {verdict.plugin}")
    if verdict.refused:
        console.print(f"not checked: {verdict.refused}")
        return
    table = Table("case", "steps", "requests", "faults", "verdict", header_style="bold", box=None)
    for result in verdict.cases:
        cells = (result.case, str(result.steps), str(result.requests), str(result.faults))
        table.add_row(*cells, result.fault or "ok")
    console.print(table)
    console.print(
        f"{verdict.decisions} decisions: {verdict.wall_p50_us:.0f} us at the median, {verdict.cpu_p99_us:.0f} us of "
        f"processor time at p99; allowed {verdict.budget_us:.0f}" + ("" if verdict.in_time else ": TOO SLOW")
    )
    console.print("conforms" if verdict.passed else "does NOT conform")
