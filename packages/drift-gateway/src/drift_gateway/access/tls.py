"""The server's TLS: certificate and key from files, checked before anything starts, read again when they change.

What is wrong with a file is said with its name. Clients' certificates are verified here against a CA when one is
given (mTLS); whom they stand for is the business of `auth`. Knows no services and no tokens.
"""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")

SOON_S: Final = 7 * 86_400.0
"""A certificate that ends within this time is warned about."""
_NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python's ssl has no name for: the dates are read and judged here."""
_CERTIFICATE: Final = re.compile(
    r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL | re.ASCII
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the server's certificate (with what its chain needs), its key, and the CA of clients, if any."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        found = (self.certificate, self.key, self.client_ca)
        return tuple(path for path in found if path is not None)


@dataclass(frozen=True, slots=True)
class Identity:
    """What the files held, found good. `expires` is in seconds since 1970."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires: float


def load(files: TlsFiles, now: float) -> Identity:
    """Read and check the files at `now`, seconds since 1970. Raises DriftError, naming the file and its fault."""
    certificate, key = _read(files.certificate), _read(files.key)
    leaf = _first_certificate(files.certificate, certificate)
    server = _server_context(files)
    facts = _as_a_client_sees_it(server, leaf, files.certificate)
    expires = _check_dates(facts, files.certificate, now)
    client_ca = None
    if files.client_ca is not None:
        client_ca = _read(files.client_ca)
        _check_authority(files.client_ca, now)
    return Identity(certificate, key, client_ca, expires)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DriftError(f"cannot read {path}: {error.strerror or error}") from error


def _first_certificate(path: Path, data: bytes) -> str:
    found = _CERTIFICATE.search(data.decode("ascii", errors="replace"))
    if found is None:
        raise DriftError(f"{path} has no certificate in PEM form (-----BEGIN CERTIFICATE-----)")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found[0])
    except (ssl.SSLError, ValueError, TypeError) as error:  # the last of what is not ASCII
        raise DriftError(f"{path} has a damaged certificate: {_reason(error)}") from error
    return found[0]


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    """A context that serves certificate and key, which proves that they belong together."""
    encrypted = False

    def no_password() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key, no_password)
    except (ssl.SSLError, ValueError, OSError) as error:
        if encrypted:
            fault = "is protected by a passphrase; give one that is not, readable by the server alone"
        elif "KEY_VALUES_MISMATCH" in str(error) or "key values mismatch" in str(error):
            fault = f"is not the key of the certificate in {files.certificate}"
        else:
            fault = f"has no key in PEM form that fits {files.certificate}: {_reason(error)}"
        raise DriftError(f"{files.key} {fault}") from error
    return context


def _as_a_client_sees_it(server: ssl.SSLContext, leaf: str, path: Path) -> dict[str, Any]:
    """The certificate as a client that trusts it alone gets it in a handshake, all of it in memory."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    client.load_verify_locations(cadata=leaf)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for _ in range(3):  # a TLS handshake takes two turns of each side
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLError as error:
        raise DriftError(f"no client would accept the certificate in {path}: {_reason(error)}") from error
    return dict(ends[0].getpeercert() or {})


def _check_dates(facts: dict[str, Any], path: Path, now: float) -> float:
    """When the certificate ends. Raises DriftError where that has been, or where it has not begun."""
    try:
        begins = ssl.cert_time_to_seconds(facts["notBefore"])
        expires = ssl.cert_time_to_seconds(facts["notAfter"])
    except ValueError as error:
        raise DriftError(f"{path} has a damaged certificate: {_reason(error)}") from error
    if now >= expires:
        raise DriftError(f"the certificate in {path} expired: it was valid until {facts['notAfter']}")
    if now < begins:
        raise DriftError(f"the certificate in {path} is not valid before {facts['notBefore']}")
    if expires - now < SOON_S:
        log.warning("the certificate in %s expires in %.1f days", path, (expires - now) / 86_400)
    return float(expires)


def _check_authority(path: Path, now: float) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, ValueError) as error:
        raise DriftError(f"{path} has no certificate in PEM form: {_reason(error)}") from error
    authorities = context.get_ca_certs()
    if not authorities:
        raise DriftError(f"{path} has certificates, but none of a CA, so that no client could be verified")
    if all(now >= ssl.cert_time_to_seconds(str(authority["notAfter"])) for authority in authorities):
        raise DriftError(f"the CA certificate in {path} expired: valid until {authorities[0]['notAfter']}")


def _reason(error: Exception) -> str:
    """OpenSSL's reason, without the place in CPython's source that the text of the error ends with."""
    said = getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
    return re.sub(r" *\(_ssl\.c:\d+\)", "", str(said)).replace("_", " ").lower()


class ServerTls:
    """The credentials of a server, which take up changed files at the next handshake.

    Files that are changed into something wrong are logged, and what was served before stays. Raises DriftError when
    they are wrong from the start.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._seen = self._stamp()
        self.identity = load(files, time.time())
        self._lock = threading.Lock()

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`. With a CA for clients, clients without a certificate of it are turned away."""
        initial = _configuration(self.identity)
        required = self.files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(initial, self._fetch, required)

    def reload(self) -> bool:
        """Read the files where they changed; whether that brought something new. Called for every handshake."""
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return False
            self._seen = stamp
            try:
                self.identity = load(self.files, time.time())
            except DriftError as error:
                log.error("the changed TLS files are not taken up: %s", error)
                return False
            log.info("took up the changed certificate in %s", self.files.certificate)
            return True

    def _fetch(self) -> Any:
        """gRPC asks before each handshake, on a thread of its own; `None` goes on with what it has."""
        return _configuration(self.identity) if self.reload() else None

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when a file is written or replaced; `None` for one that is not there."""
        found: list[tuple[int, int, int] | None] = []
        for path in self.files.paths:
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                found.append(None)
        return tuple(found)


def _configuration(identity: Identity) -> Any:
    pairs = [(identity.key, identity.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=identity.client_ca)
