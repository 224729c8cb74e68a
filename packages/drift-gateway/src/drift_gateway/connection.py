"""How a client reaches a server: address, TLS, token; and the command-line options that say so.

    @connection_options(default="127.0.0.1:50051")
    def command(connection: Connection) -> int: ...

Loads grpc only when a channel is opened, so that commands can be declared without it. Knows no service.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from drift_scheduler.errors import DriftError

TOKEN_VARIABLE: Final = "DRIFT_TOKEN"
_KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS as a client speaks it: PEM files. Without `ca`, the usual public roots are trusted.

    `certificate` and `key` are the client's own, for servers that want one (mTLS). `server_name` is the name that the
    server's certificate must have, where it is not the host in the address.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """One server and how to speak to it. `plaintext_token` allows a token without TLS outside this machine."""

    target: str
    token: str | None = None
    tls: Tls | None = None
    plaintext_token: bool = False

    def check(self) -> None:
        """Raises DriftError where the parts do not go together."""
        if self.token is not None and not _may_be_a_token(self.token):
            raise DriftError(
                "the token is empty or has characters that no token has; is a file name in its place?"
            )
        if self.token and self.tls is None and not self.plaintext_token and not is_local(self.target):
            raise DriftError(
                f"the token would cross the network unencrypted to {self.target}; use --tls or --tls-ca FILE "
                "(in Python: tls=Tls(...)), or --plaintext-token where the network is trusted"
            )
        if self.tls is not None and (self.tls.certificate is None) != (self.tls.key is None):
            raise DriftError("a client's certificate and its key (--tls-cert, --tls-key) go together")

    def open(self, options: Any) -> Any:
        """A grpc.Channel with these channel options. Raises DriftError."""
        import grpc

        self.check()
        if self.tls is None:
            return self._with_token(grpc.insecure_channel(self.target, options=options))
        return self._with_token(grpc.secure_channel(self.target, self._credentials(), self._named(options)))

    def open_async(self, options: Any) -> Any:
        """The same, a grpc.aio.Channel on the running loop."""
        import grpc

        self.check()
        if self.tls is None:
            return self._with_token(grpc.aio.insecure_channel(self.target, options=options))
        return self._with_token(
            grpc.aio.secure_channel(self.target, self._credentials(), options=self._named(options))
        )

    def _with_token(self, channel: Any) -> Any:
        return channel if self.token is None else _AuthorizedChannel(channel, self.token)

    def _credentials(self) -> Any:
        import grpc

        assert self.tls is not None
        return grpc.ssl_channel_credentials(*map(_read, (self.tls.ca, self.tls.key, self.tls.certificate)))

    def _named(self, options: Any) -> Any:
        assert self.tls is not None
        if self.tls.server_name is None:
            return options
        return (*options, ("grpc.ssl_target_name_override", self.tls.server_name))


class _AuthorizedChannel:
    """A channel whose calls carry the token.

    Not a client interceptor: grpc.aio would put a layer around each message of a stream; this one costs once a call.
    """

    def __init__(self, channel: Any, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        if name not in _KINDS:
            return found

        def make(*args: Any, **kwargs: Any) -> Any:
            return functools.partial(self._call, found(*args, **kwargs))

        return make

    def __enter__(self) -> Any:
        self._channel.__enter__()
        return self

    def __exit__(self, *exit: Any) -> Any:
        return self._channel.__exit__(*exit)

    async def __aenter__(self) -> Any:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *exit: Any) -> Any:
        return await self._channel.__aexit__(*exit)

    def _call(self, method: Any, request: Any = None, *, metadata: Any = (), **kwargs: Any) -> Any:
        return method(request, metadata=(*(metadata or ()), *self._metadata), **kwargs)


def is_local(target: str) -> bool:
    """Whether a target is a Unix socket or a loopback address of this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = re.sub(r"^(dns:|ipv4:|ipv6:)?/*", "", target).rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _may_be_a_token(token: str) -> bool:
    return bool(token) and all("!" <= character <= "~" for character in token)


def _read(path: Path | str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DriftError(f"cannot read {path}: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------- command line


class _Refused(click.ClickException):
    exit_code = 2


def connection_options(
    default: str | None = None, required: bool = False, help: str = "A running server."
) -> Callable[[F], F]:
    """Give a click command --target, --token and the TLS options; it gets `connection: Connection`.

    Without a default and not required, `connection` is None when no --target is given. `help` is of --target.
    """
    declared = (
        click.option(
            "--target", metavar="HOST:PORT", default=default, required=required, show_default=default is not None,
            help=help,
        ),
        click.option(
            "--token", envvar=TOKEN_VARIABLE, show_envvar=True, metavar="TOKEN",
            help="Bearer token; better in the variable, where no process list shows it.",
        ),
        click.option("--tls", is_flag=True, help="Speak TLS and trust the usual public roots."),
        click.option("--tls-ca", type=_FILE, help="Speak TLS and trust this root certificate (PEM)."),
        click.option("--tls-cert", type=_FILE, help="The client's own certificate (PEM)."),
        click.option("--tls-key", type=_FILE, help="Its key."),
        click.option("--tls-server-name", metavar="NAME", help="The name in the server's certificate."),
        click.option(
            "--plaintext-token", is_flag=True, help="Allow a token without TLS to other machines."
        ),
    )  # fmt: skip

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def run(*args: Any, target: str | None, **kwargs: Any) -> Any:
            parts = {name: kwargs.pop(name) for name in _PARTS}
            try:
                connection = None if target is None else connection_of(target, **parts)
            except DriftError as error:
                raise _Refused(str(error)) from error
            return command(*args, connection=connection, **kwargs)

        wrapped: Any = run
        for option in reversed(declared):
            wrapped = option(wrapped)
        done: F = wrapped
        return done

    return decorate


_FILE: Final[Any] = click.Path(path_type=Path, dir_okay=False)
_PARTS: Final = ("token", "tls", "tls_ca", "tls_cert", "tls_key", "tls_server_name", "plaintext_token")


def connection_of(
    target: str,
    token: str | None = None,
    tls: bool = False,
    tls_ca: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_server_name: str | None = None,
    plaintext_token: bool = False,
) -> Connection:
    """The Connection that options of these names mean; any of the TLS files means TLS. Raises DriftError."""
    files = (tls_ca, tls_cert, tls_key, tls_server_name)
    spoken = tls or any(given is not None for given in files)
    connection = Connection(target, token, Tls(*files) if spoken else None, plaintext_token)
    connection.check()
    return connection
