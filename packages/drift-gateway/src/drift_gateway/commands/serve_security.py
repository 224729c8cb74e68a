"""The options of `drift serve` that secure it.

Option parsing only; what the files hold is checked by `security` when the command runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

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
