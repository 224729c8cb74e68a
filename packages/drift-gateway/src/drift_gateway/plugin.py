"""What drift-gateway registers: the commands `drift serve` and `drift demo`.

Loaded by every `drift` command, so everything heavy is imported by the commands and not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drift_scheduler.hookspecs import hookimpl


@hookimpl
def drift_cli_commands() -> Mapping[str, Any]:
    """`drift serve` and `drift demo`."""
    from drift_gateway import cli

    return {"serve": cli.serve, "demo": cli.demo}
