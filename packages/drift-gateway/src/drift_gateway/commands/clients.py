"""`drift load`, `drift chat`, `drift top` and `drift demo`: the options of the commands that talk to a running server.

Option parsing only; grpc loads when a command runs.
"""

from __future__ import annotations

from typing import Any

import click

from drift_gateway.commands.entry import entry
from drift_gateway.commands.number import Number
from drift_gateway.connection import Connection, connection_options
from drift_scheduler.cli import emit, writable

DEFAULT_TARGET = "127.0.0.1:50051"
INTERRUPTED = 130


@click.command()
@connection_options(default=DEFAULT_TARGET)
@click.option(
    "--workload", required=True, metavar="NAME|PATH", help="A workload (`drift workloads`) or a trace file."
)
@click.option(
    "--rate", type=float, help="Requests per second: Poisson arrivals, or a trace's own times rescaled."
)
@click.option(
    "--requests", type=click.IntRange(1), help="How many requests.  [default: a whole trace, or 1000]"
)
@click.option("--duration", type=float, help="Send for so many seconds at most.")
@click.option("--slo-ttft", type=float, help="Target for the first token, seconds.  [default: the server's]")
@click.option("--slo-tbt", type=float, help="Target between tokens, seconds.  [default: the server's]")
@click.option("--slo-e2e", type=float, help="Target for the whole request, seconds.  [default: none]")
@click.option("--slo-class", metavar="NAME", help="Names the targets in the server's statistics.")
@click.option(
    "--priority", type=click.IntRange(-1000, 1000),
    help="Of every request; lower is handled earlier.  [default: the workload's]",
)  # fmt: skip
@click.option(
    "--on-infeasible", type=click.Choice(("best-effort", "reject", "demote")),
    help="What the server is to do with a request whose targets it cannot meet.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of workload, prompts and sampling.")
@click.option("--temperature", type=Number(0, 100), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--connections", type=click.IntRange(1, 64), default=4, show_default=True, help="To spread streams over."
)
@click.option(
    "--timeout", type=float, default=600.0, show_default=True, help="Seconds that one request may take."
)
@click.option(
    "--warm",
    is_flag=True,
    help="Let prompts find what earlier runs of the same seed left in the prefix cache.",
)
@click.option(
    "--json",
    "json_path",
    metavar="PATH|-",
    callback=writable,
    help="Write the report as JSON to a file, or with - to stdout in place of the table.",
)
@entry
def load(connection: Connection, json_path: str | None, **settings: Any) -> int:
    """Send a workload at its own pace, whatever the server makes of it, and report as `drift simulate` does.

    Latency counts from the moment each request was meant to be sent. Ctrl-C ends the run and reports what was done.
    """
    from rich.console import Console

    from drift_gateway.terminal.load import LoadOptions, run
    from drift_scheduler.plugins import load as load_plugins

    report = run(LoadOptions(connection, **settings), load_plugins(strict=False), Console(stderr=True))
    emit(report, json_path)
    return INTERRUPTED if report["config"]["interrupted"] else 0


@click.command()
@connection_options(default=DEFAULT_TARGET)
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option("--json", "lines", is_flag=True, help="Print readings as lines of JSON (schema drift.stats/1).")
@click.option(
    "--interval",
    type=Number(0.05, 60),
    default=0.5,
    show_default=True,
    help="Seconds between them.",
)
@entry
def top(connection: Connection, once: bool, lines: bool, interval: float) -> int:
    """Show how a running server is doing: queue, latency against targets, the split of the device, KV pages."""
    from rich.console import Console

    from drift_gateway.terminal.top import run

    return run(connection, Console(highlight=False), once=once, lines=lines, interval=interval)


@click.command()
@connection_options(default=DEFAULT_TARGET)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--slo-ttft", type=float, help="Target for the first token, seconds.  [default: the server's]")
@click.option("--slo-tbt", type=float, help="Target between tokens, seconds.  [default: the server's]")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Most tokens of an answer."
)
@click.option("--temperature", type=Number(0, 100), help="0 always takes the likeliest token.")
@click.option("--seed", type=int, help="Makes answers reproducible.")
@entry
def chat(
    connection: Connection, slo_ttft: float | None, slo_tbt: float | None, system: str | None, **settings: Any
) -> int:
    """Talk to a served model; every answer shows how fast it came against its targets.

    Where input is a pipe, each line is a turn, and only the answers go to standard output.
    """
    import sys

    from rich.console import Console

    from drift_gateway.client import SLO
    from drift_gateway.terminal.chat import ChatOptions, run

    options = ChatOptions(connection, system, SLO(slo_ttft, slo_tbt), **settings)
    piped = not (sys.stdin.isatty() and sys.stdout.isatty())
    return run(options, Console(), Console(stderr=piped))


@click.command()
@connection_options(help="A running server.  [default: starts one with the demo model]")
@entry
def demo(connection: Connection | None) -> int:
    """Stream a handful of concurrent requests of very different lengths, and show how each fared."""
    from drift_gateway.terminal.demo import run

    return run(connection)
