"""How every command begins and ends: grpc kept quiet before it loads, a fault of the input one line and exit code 2."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Final, NoReturn, ParamSpec

import click

from drift_scheduler.errors import DriftError

P = ParamSpec("P")

BAD_INPUT: Final = 2


class Refused(click.ClickException):
    """Ends a command with one line and exit code 2."""

    exit_code = BAD_INPUT


def entry(command: Callable[P, int]) -> Callable[P, NoReturn]:
    """Exit with the command's status; a DriftError is one line and exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
        quiet_grpc()
        try:
            status = command(*args, **kwargs)
        except DriftError as error:
            raise Refused(str(error)) from error
        click.get_current_context().exit(status)

    return run


def quiet_grpc() -> None:
    """Before grpc loads: what is wrong is said in lines of ours, and its fork handlers are not for fork-and-exec."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
