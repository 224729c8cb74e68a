"""The options of `drift serve` for those who operate it; docs/operations.md says what they are for.

Option parsing only; what they do is the business of `serving` and the modules it starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from drift_gateway.commands.entry import Refused
from drift_gateway.commands.number import Number
from drift_scheduler.errors import DriftError

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS: Final = ("admin", "trace_dir", "hang_timeout", "lame_duck", "access_log", "spans")


def operations_options(command: F) -> F:
    """Give `drift serve` its options for operators; it gets `operations: OperationsOptions`."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in OPTIONS}
        try:
            operations = _read(**given)
        except DriftError as error:
            raise Refused(str(error)) from error
        return command(*args, operations=operations, **kwargs)

    wrapped: Any = run
    for option in (
        click.option(
            "--spans", type=click.Choice(["otlp", "console"]), metavar="otlp|console",
            help="OpenTelemetry spans (pip install 'drift-gateway[otel]').  [default: off]",
        ),
        click.option(
            "--access-log", metavar="PATH|-", help="Append one JSON line per request.  [default: off]"
        ),
        click.option(
            "--lame-duck", type=Number(0, 600), default=0.0, show_default=True,
            help="Seconds to serve on while health says NOT_SERVING, before new requests are refused.",
        ),
        click.option(
            "--hang-timeout", type=Number(1, 3600), default=10.0, show_default=True,
            help="Seconds without a sign of life after which the engine is started again.",
        ),
        click.option(
            "--trace-dir", metavar="DIR", help="Folder for decision logs that operators start.  [default: none]"
        ),
        click.option(
            "--admin", metavar="HOST:PORT",
            help="Serve AdminService there, a loopback address.  [default: off]",
        ),
    ):  # fmt: skip
        wrapped = option(wrapped)
    done: F = wrapped
    return done


def _read(admin: str | None, trace_dir: str | None, **others: Any) -> Any:
    from drift_gateway.admin import check_traces
    from drift_gateway.serve_options import OperationsOptions
    from drift_gateway.server import parse_address

    where = None if admin is None else parse_address(admin)
    return OperationsOptions(admin=where, traces=check_traces(trace_dir), **others)
