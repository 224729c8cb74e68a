"""The command `drift`. Subcommands of installed packages join through the hook `drift_cli_commands`.

A DriftError becomes one line on stderr, `drift: ...`, and exit code 2. Imports wait until a command needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import click

from drift_scheduler import cli_bench, cli_replay
from drift_scheduler.errors import DriftError
from drift_scheduler.plugin_kit import commands as plugin_commands

if TYPE_CHECKING:
    from drift_scheduler.domain import StepRecord
    from drift_scheduler.plugins import Registry
    from drift_scheduler.protocols import Observer

BAD_INPUT = 2


class DriftGroup(click.Group):
    """A group whose commands are ours and the plugins'; a plugin that cannot be loaded is named, and left out."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Ours, then whatever plugins add."""
        return sorted({*super().list_commands(ctx), *self._plugin_commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of ours without loading plugins, or a plugin's."""
        own = super().get_command(ctx, cmd_name)
        return own if own is not None else self._plugin_commands().get(cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a DriftError is a line for people."""
        try:
            return super().invoke(ctx)
        except DriftError as error:
            click.echo(f"drift: {error}", err=True)
            ctx.exit(BAD_INPUT)

    def _plugin_commands(self) -> dict[str, click.Command]:
        """Commands by name. Problems go to stderr once, so that the rest stays usable."""
        found: dict[str, click.Command] | None = getattr(self, "_found", None)
        if found is not None:
            return found
        found = {}
        try:
            registry = _registry()
            for name, command in registry.of("command").items():
                plugin = registry.plugin_of("command", name)
                if not isinstance(command, click.Command):
                    line = f"command '{name}' is no click command but {type(command).__name__}"
                    click.echo(f"drift: plugin '{plugin}': {line}", err=True)
                elif name in self.commands:
                    click.echo(f"drift: plugin '{plugin}': drift has a command '{name}' already", err=True)
                else:
                    found[name] = command
        except DriftError as error:
            click.echo(f"drift: {error}", err=True)
        self._found = found
        return found


def _registry() -> Registry:
    """What is installed; a plugin that cannot be loaded is a line on stderr and left out."""
    from drift_scheduler.plugins import load

    registry = load(strict=False)
    for problem in registry.problems:
        click.echo(f"drift: {problem}", err=True)
    return registry


@click.group(cls=DriftGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("drift-scheduler"), prog_name="drift", message="%(prog)s %(version)s")
def drift() -> None:
    """Serve language models with prefill and decode side by side on one device, or simulate it."""


def writable(_context: click.Context, _option: click.Parameter, path: str | None) -> str | None:
    """Where a file or `-` is to go, looked at before an hour of work is done for it: an option's callback.

    Raises DriftError.
    """
    from pathlib import Path

    if path is not None and path != "-":
        if not Path(path).parent.is_dir():
            raise DriftError(f"{path}: No such file or directory")
        if Path(path).is_dir():
            raise DriftError(f"{path}: Is a directory")
    return path


json_option = click.option(
    "--json",
    "json_path",
    metavar="PATH|-",
    callback=writable,
    help="Write the report as JSON to a file, or with - to stdout in place of the table.",
)


@drift.command()
@click.option(
    "--workload", required=True, metavar="NAME|PATH", help="A workload (`drift workloads`) or a trace file."
)
@click.option(
    "--rate", type=float, help="Requests per second: Poisson arrivals, or a trace's own times rescaled."
)
@click.option("--requests", type=int, help="How many requests.  [default: a whole trace, or 1000]")
@click.option(
    "--device", required=True, help="A built-in device, Nx one for tensor parallel, or a TOML file."
)
@click.option("--model", required=True, help="A built-in model or a TOML file.")
@click.option("--dispatch", required=True, metavar="NAME", help="Dispatch policy, NAME[:option=value...].")
@click.option(
    "--partition", default="tightest-decode", show_default=True, metavar="NAME", help="Partition policy."
)
@click.option(
    "--cost", metavar="NAME", help="Cost model.  [default: fitted where a built-in table fits, or roofline]"
)
@click.option("--truth", metavar="NAME", help="Cost model the device follows.  [default: the same as --cost]")
@click.option(
    "--slo-ttft", type=float, default=1.0, show_default=True, help="Target for the first token, seconds."
)
@click.option(
    "--slo-tbt", type=float, default=0.05, show_default=True, help="Target between tokens, seconds."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of workload and noise.")
@click.option(
    "--noise", type=float, default=0.0, show_default=True, help="Spread of durations (sigma of their log)."
)
@click.option("--kv-pages", type=int, help="Pages of the KV pool.  [default: what fits beside the weights]")
@click.option("--page-tokens", type=int, default=16, show_default=True, help="Token positions of a page.")
@click.option(
    "--max-running", type=int, default=256, show_default=True, help="Requests that may hold pages at once."
)
@click.option("--log", "log_path", metavar="PATH", help="Write one JSON line per scheduler step.")
@click.option(
    "--timing", is_flag=True, help="Also measure scheduler steps; the JSON then differs from run to run."
)
@json_option
def simulate(
    slo_ttft: float,
    slo_tbt: float,
    log_path: str | None,
    timing: bool,
    json_path: str | None,
    **settings: Any,
) -> None:
    """Run a policy on a simulated device and report what its users would have seen."""
    from drift_scheduler.domain import SLO
    from drift_scheduler.simulation.run import Scenario, Simulation

    registry = _registry()
    simulation = Simulation(Scenario(slo=SLO(slo_ttft, slo_tbt), **settings), registry)
    with ExitStack() as stack:
        observers: list[Observer] = [_Guarded(o) for o in registry.observers(simulation.scenario.config())]
        if log_path is not None:
            from drift_scheduler.decision_log import DecisionLog

            observers.append(
                stack.enter_context(
                    DecisionLog(log_path, simulation.scheduler, simulation.scenario.config(), "simulation")
                )
            )
        if sys.stderr.isatty():
            observers.append(stack.enter_context(_Progress(settings["requests"])))
        report = simulation.run(observers, _stopwatch() if timing else None)
    emit(report, json_path)


def _stopwatch() -> Callable[[], float]:
    from time import perf_counter

    return perf_counter


def _clocks() -> tuple[Callable[[], float], Callable[[], float]]:
    from time import perf_counter, thread_time

    return perf_counter, thread_time


def emit(report: dict[str, Any], json_path: str | None) -> None:
    """A report as a table, as JSON in place of it (`-`), or as both (a path). Raises DriftError."""
    from drift_scheduler.report import print_report, to_json

    if json_path == "-":
        click.echo(to_json(report), nl=False)
        return
    if json_path is not None:
        _write(json_path, to_json(report))
    from rich.console import Console

    print_report(report, Console(highlight=False))


class _Guarded:
    """A plugin's observer: when it raises it is named, dropped, and the run goes on."""

    def __init__(self, inner: Observer) -> None:
        self._inner: Observer | None = inner

    def on_step(self, record: StepRecord) -> None:
        """Hand the step on."""
        if self._inner is None:
            return
        try:
            self._inner.on_step(record)
        except Exception as error:  # a third party's observer may raise anything
            name = type(self._inner).__name__
            click.echo(
                f"drift: observer {name} is dropped: it raised {type(error).__name__}: {error}", err=True
            )
            self._inner = None


class _Progress:
    """Requests finished so far, on a terminal's stderr."""

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("requests", total=total)
        self._done = 0

    def on_step(self, record: StepRecord) -> None:
        """Count the ends; draw every hundredth step."""
        self._done += len(record.step.ended)
        if record.index % 100 == 0:
            self._progress.update(self._task, completed=self._done)

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@drift.command()
@json_option
def workloads(json_path: str | None) -> None:
    """List the workloads that can be named; any trace file's path works as well."""
    registry = _registry()
    found = {
        name: {"plugin": registry.plugin_of("workload", name), "summary": _summary(factory)}
        for name, factory in registry.workloads.items()
    }
    if json_path is not None:
        _dump(found, json_path)
        return
    _print_table(
        ("workload", "what it is", "from"), [(n, w["summary"], w["plugin"]) for n, w in found.items()]
    )
    click.echo("Traces by path: JSON Lines (plain or gzip), Mooncake JSONL, Azure and BurstGPT CSV.")


@drift.group()
def plugins() -> None:
    """What is installed; start a policy of your own, and hold it to the rules."""


@plugins.command("list")
@json_option
def list_plugins(json_path: str | None) -> None:
    """List every registered name with the plugin it comes from."""
    registry = _registry()
    found = {
        kind: {
            name: {"plugin": entry.plugin, "summary": _summary(entry.factory)}
            for name, entry in names.items()
        }
        for kind, names in registry.names.items()
    }
    if json_path is not None:
        _dump({"names": found, "problems": [str(problem) for problem in registry.problems]}, json_path)
    else:
        rows = [(k, n, e["summary"], e["plugin"]) for k, names in found.items() for n, e in names.items()]
        _print_table(("kind", "name", "what it is", "from"), rows)
    if registry.problems:
        sys.exit(BAD_INPUT)


def _summary(factory: Any) -> str:
    """The first line of a factory's documentation, or of what it is."""
    if isinstance(factory, click.Command):
        return factory.get_short_help_str(100)
    text = (getattr(factory, "__doc__", None) or "").strip()
    if not text or text.startswith(
        "`"
    ):  # it begins with its options: the module's first line says what it is
        text = (getattr(sys.modules.get(factory.__module__), "__doc__", None) or "").strip()
    return text.splitlines()[0].strip() if text else ""


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, header_style="bold", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def _dump(value: Any, path: str) -> None:
    import json

    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        click.echo(text, nl=False)
    else:
        _write(path, text)


def _write(path: str, text: str) -> None:
    from pathlib import Path

    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DriftError(f"{path}: {error.strerror or error}") from error


for _command in cli_bench.commands(simulate, _registry, _dump):
    drift.add_command(_command)
drift.add_command(cli_replay.command(_registry, _dump))
for _command in plugin_commands.commands(_registry, _dump, _clocks):
    plugins.add_command(_command)


def main() -> None:
    """The console script."""
    drift(prog_name="drift")


if __name__ == "__main__":
    main()
