"""What makes a server safe to reach: TLS, who may call, and what it takes to listen beyond this machine.

Made from the options of `drift serve` before anything is started, so that what is wrong with a file is said at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from drift_gateway.access.auth import Authenticator
from drift_gateway.access.tenants import Tenant, Tenants
from drift_gateway.access.tls import ServerTls, TlsFiles
from drift_gateway.access.well_formed import WellFormed
from drift_scheduler.errors import DriftError


@dataclass(frozen=True, slots=True)
class SecurityOptions:
    """Files of `drift serve`: the server's certificate and key, the CA of clients' certificates, the tenants."""

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    tenants: Path | None = None

    def missing(self) -> str | None:
        """What a server that other machines reach lacks: TLS, authentication, or `None`."""
        tls = self.certificate is not None
        authentication = self.tenants is not None or self.client_ca is not None
        match (tls, authentication):
            case (False, False):
                return "neither TLS nor authentication"
            case (False, True):
                return "no TLS"
            case (True, False):
                return "no authentication"
            case _:
                return None

    def summary(self) -> str:
        """In words, after "serving on ADDRESS"; empty where there is none."""
        parts = ["with TLS"] if self.certificate is not None else []
        if self.client_ca is not None:
            parts.append("for clients with certificates")
        if self.tenants is not None:
            parts.append(f"for the tenants in {self.tenants}")
        return "".join(f", {part}" for part in parts)

    def tls_files(self) -> TlsFiles | None:
        """The files of TLS, if any. Raises DriftError when one comes without those it needs."""
        if self.certificate is not None and self.key is not None:
            return TlsFiles(self.certificate, self.key, self.client_ca)
        if self.certificate is not None or self.key is not None:
            given, lacking = ("--tls-cert", "--tls-key") if self.key is None else ("--tls-key", "--tls-cert")
            raise DriftError(f"{given} needs {lacking}: TLS takes a certificate and its key")
        if self.client_ca is not None:
            raise DriftError(
                "--tls-client-ca needs --tls-cert and --tls-key: clients show certificates within TLS"
            )
        return None


NO_SECURITY: Final = SecurityOptions()


class Security:
    """TLS and authentication of one server, both perhaps absent. Raises DriftError on what is wrong with a file."""

    def __init__(self, options: SecurityOptions = NO_SECURITY) -> None:
        files = options.tls_files()
        self.tls = None if files is None else ServerTls(files)
        self.tenants: Tenants | None = None
        self.authenticator: Authenticator | None = None
        self._well_formed = WellFormed()
        if options.tenants is not None or options.client_ca is not None:
            self.tenants = Tenants(options.tenants)
            self.authenticator = Authenticator(self.tenants, certificates=options.client_ca is not None)

    @property
    def absent(self) -> bool:
        """Whether there is neither TLS nor authentication."""
        return self.tls is None and self.authenticator is None

    @property
    def interceptors(self) -> Sequence[grpc.aio.ServerInterceptor]:
        """For every grpc.aio.server of this process, on whatever port."""
        return (self._well_formed,) if self.authenticator is None else (self.authenticator, self._well_formed)

    def known_tenants(self) -> tuple[Tenant, ...]:
        """Those who may call, as the file or the certificates seen say now."""
        return () if self.tenants is None else tuple(self.tenants.all.values())

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Have a server listen there, with TLS if there is any; the port taken. Raises RuntimeError."""
        if self.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self.tls.credentials())

    def reload(self) -> None:
        """Take up changed files now (they are noticed by themselves as well, when calls come)."""
        if self.tls is not None:
            self.tls.reload()
        if self.tenants is not None:
            self.tenants.reload(time.monotonic())
