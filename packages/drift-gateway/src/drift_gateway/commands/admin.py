"""`drift admin`: what operators do to a running server, one command for each call of AdminService.

Option parsing and printing; grpc loads when a command runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from drift_gateway.commands.entry import entry
from drift_gateway.commands.number import Number
from drift_gateway.connection import Connection, connection_options
from drift_scheduler.errors import DriftError

if TYPE_CHECKING:
    from drift_gateway.client import RequestError

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_TARGET: Final = "127.0.0.1:50052"


@click.group()
def admin() -> None:
    """Operate a running server (`drift serve --admin HOST:PORT`)."""


def _command(group: click.Group, name: str) -> Callable[[F], click.Command]:
    """A command that makes one call: what it decorates returns method, request, and a line about the answer."""

    def decorate(ask: F) -> click.Command:
        @group.command(name)
        @connection_options(default=DEFAULT_TARGET, help="Where the server serves AdminService.")
        @entry
        @functools.wraps(ask)
        def run(connection: Connection, **options: Any) -> int:
            from drift_gateway.v1 import admin_pb2

            method, request, say = ask(admin_pb2, **options)
            click.echo(say(_call(connection, method, request)))
            return 0

        return run

    return decorate


def _call(connection: Connection, method: str, request: Any) -> Any:
    """The answer. Raises RequestError, a DriftError."""
    import grpc

    from drift_gateway.client import error_of
    from drift_gateway.v1 import admin_pb2_grpc

    with connection.open(()) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            return getattr(stub, method)(request)
        except grpc.RpcError as error:
            raise _explained(error_of(error), connection.target) from error


def _explained(error: RequestError, target: str) -> DriftError:
    """The error with what the operator can do about it, where the server itself could not say so."""
    import grpc

    cure = "give --target the address that `drift serve` got with --admin"
    match error.code:
        case grpc.StatusCode.UNAVAILABLE if error.reason is None:
            return DriftError(f"{target}: no answer ({str(error).rpartition(': ')[2]}); {cure}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return DriftError(f"{target} serves no AdminService, which has a port of its own; {cure}")
        case grpc.StatusCode.UNAUTHENTICATED:
            return DriftError(f"{error}; see --token")
    return error


@_command(admin, "drain")
@click.option("--timeout", type=Number(0, 3600), default=30.0, show_default=True, help="Seconds to wait.")
def drain(pb: Any, timeout: float) -> Any:
    """Refuse new requests, and wait for those in flight."""
    request = pb.DrainRequest(timeout_ms=int(timeout * 1e3))
    return "Drain", request, lambda answer: f"{answer.in_flight} outputs left in flight"


@_command(admin, "resume")
def resume(pb: Any) -> Any:
    """Take requests again."""
    return "Resume", pb.ResumeRequest(), lambda answer: "taking requests"


@_command(admin, "abort")
@click.argument("request_ids", nargs=-1, metavar="[REQUEST_ID]...")
@click.option("--all", "everything", is_flag=True, help="All that are in flight.")
def abort(pb: Any, request_ids: tuple[str, ...], everything: bool) -> Any:
    """End requests: their streams end with CANCELLED, ABORTED_BY_ADMIN."""
    if bool(request_ids) == everything:
        raise DriftError("name the requests to end, or give --all")
    request = pb.AbortRequestsRequest(request_ids=request_ids, all=everything or None)

    def say(answer: Any) -> str:
        unknown = f"; not in flight: {', '.join(answer.unknown)}" if answer.unknown else ""
        return f"ended {len(answer.aborted)} requests{unknown}"

    return "AbortRequests", request, say


@_command(admin, "policy")
@click.option("--dispatch", metavar="NAME", help="Dispatch policy: NAME[:option=value].")
@click.option("--partition", metavar="NAME", help="Partition policy, likewise.")
def policy(pb: Any, dispatch: str | None, partition: str | None) -> Any:
    """Show the policies in force, or change them between two steps."""

    def say(answer: Any) -> str:
        return f"dispatch {answer.policies.dispatch}, partition {answer.policies.partition}"

    return "SetPolicy", pb.SetPolicyRequest(dispatch=dispatch, partition=partition), say


@_command(admin, "flush")
def flush(pb: Any) -> Any:
    """Forget all cached prefixes that no running request uses."""
    return "FlushPrefixCache", pb.FlushPrefixCacheRequest(), lambda answer: f"forgot {answer.pages} pages"


@admin.group()
def trace() -> None:
    """Write a decision log, for `drift replay`."""


@_command(trace, "start")
@click.option("--name", help="The file's name in the server's folder.  [default: made of the time]")
def start(pb: Any, name: str | None) -> Any:
    """Begin a decision log."""
    return "StartTrace", pb.StartTraceRequest(name=name), lambda answer: f"writing {answer.path}"


@_command(trace, "stop")
def stop(pb: Any) -> Any:
    """End the decision log."""
    return "StopTrace", pb.StopTraceRequest(), lambda answer: f"wrote {answer.path}: {answer.steps} steps"
