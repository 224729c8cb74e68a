"""`drift token`: makes the tokens with which tenants call a server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from drift_gateway.commands.entry import Refused
from drift_scheduler.errors import DriftError

_FILE: Final[Any] = click.Path(path_type=Path)


@click.group()
def token() -> None:
    """Tokens with which tenants call a server (`drift serve --tenants FILE`)."""


@token.command("new")
@click.option("--tenant", required=True, metavar="NAME", help="Whose token it is.")
@click.option("--days", type=click.IntRange(1, 36_500), help="Days it is valid.  [default: for ever]")
@click.option(
    "--add", "path", type=_FILE, metavar="FILE",
    help="Append its digest to this tenants file (made if need be) and print the token alone.",
)  # fmt: skip
def new(tenant: str, days: int | None, path: Path | None) -> None:
    """Make a token and print it, this once, with the lines that let it in.

    The tenants file gets its digest only: whoever reads that file learns no token.
    """
    from drift_gateway.access.tenants import add_to_file, new_token, token_entry

    made = new_token()
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    try:
        entry = token_entry(tenant, made, expires)
        if path is not None:
            add_to_file(path, entry)
    except DriftError as error:
        raise Refused(str(error)) from error
    click.echo(made)
    if path is None:
        click.echo(f"\nadd to the tenants file of the server:\n\n{entry}", err=True, nl=False)
