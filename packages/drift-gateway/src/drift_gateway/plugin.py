"""What drift-gateway registers: the commands `drift serve` and its tokens, and what talks to a running server.

Loaded by every `drift` command, so everything heavy is imported by the commands and not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drift_scheduler.hookspecs import hookimpl


@hookimpl
def drift_cli_commands() -> Mapping[str, Any]:
    """`drift serve`, `drift demo`, `drift token`, `drift admin`, and the commands that talk to a running server."""
    from drift_gateway.commands import admin, clients, entry, serve, token

    entry.quiet_grpc()  # here, because what reads the options of a command may load grpc before the command runs
    return {
        "serve": serve.serve,
        "demo": clients.demo,
        "chat": clients.chat,
        "load": clients.load,
        "top": clients.top,
        "token": token.token,
        "admin": admin.admin,
    }
