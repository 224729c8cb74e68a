"""The options of `drift serve` that secure it, and `drift token`, which makes tokens for tenants.

Option parsing only; what the files hold is checked by `security` when the command runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from drift_scheduler.errors import DriftError

F = TypeVar("F", bound=Callable[..., Any])

_FILE: Final[Any] = click.Path(path_type=Path)
_OPTIONS: Final = {
    "tls_cert": "certificate", "tls_key": "key", "tls_client_ca": "client_ca", "tenants": "tenants",
}  # fmt: skip


def security_options(command: F) -> F:
    """Give `drift serve` its options for TLS and authentication; it gets `security: SecurityOptions`."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from drift_gateway.access.security import SecurityOptions

        files = {field: kwargs.pop(option) for option, field in _OPTIONS.items()}
        return command(*args, security=SecurityOptions(**files), **kwargs)

    wrapped: Any = run
    for option in (
        click.option("--tenants", type=_FILE, help="Who may call: a TOML file of tenants and their tokens."),
        click.option("--tls-client-ca", type=_FILE, help="Require clients' certificates, of this CA (PEM): mTLS."),
        click.option("--tls-key", type=_FILE, help="The certificate's key (PEM)."),
        click.option("--tls-cert", type=_FILE, help="Serve TLS with this certificate (PEM, with its chain)."),
    ):  # fmt: skip
        wrapped = option(wrapped)
    done: F = wrapped
    return done


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
        raise _Refused(str(error)) from error
    click.echo(made)
    if path is None:
        click.echo(f"\nadd to the tenants file of the server:\n\n{entry}", err=True, nl=False)


class _Refused(click.ClickException):
    exit_code = 2
