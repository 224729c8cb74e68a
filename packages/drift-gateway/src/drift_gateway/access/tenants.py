"""Who uses the server: tenants with their tokens, roles and limits, as a TOML file describes them.

    [tenants.acme]
    role = "generate"              # info, generate (also info) or admin (everything)
    requests-per-second = 20
    tokens-per-second = 5000       # prompt and output
    max-in-flight = 64             # outputs
    burst-seconds = 2.0            # how much of a rate may be saved up
    certificates = ["acme-client"] # names in clients' certificates (mTLS)

    [[tenants.acme.tokens]]        # written by `drift token new`
    sha256 = "9f86d0…"
    expires = 2027-01-01

Knows no gRPC but the refusals, and no clock: times are arguments, in seconds of a monotonic clock.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from enum import Enum
from hashlib import blake2b, sha256
from math import inf
from pathlib import Path
from typing import Any, Final

from drift_gateway.refusal import Reason, Refusal, invalid
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")

TOKEN_BYTES: Final = 32
RECHECK_S: Final = 1.0
"""A changed file is noticed within this time."""
IN_FLIGHT_RETRY_S: Final = 1.0
MAX_FILE_BYTES: Final = 4 * 1024 * 1024
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_TENANT_KEYS: Final = (
    "role", "requests-per-second", "tokens-per-second", "max-in-flight", "burst-seconds", "certificates", "tokens",
)  # fmt: skip
_TOKEN_KEYS: Final = ("sha256", "expires", "note")


class Role(Enum):
    """What a tenant may call; each role includes those before it."""

    INFO = "info"
    GENERATE = "generate"
    ADMIN = "admin"

    def includes(self, other: Role) -> bool:
        """Whether this role may do what `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


# ---------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one tenant; `None` is no bound. `burst` is in seconds' worth of each rate."""

    requests_per_second: float | None = None
    tokens_per_second: float | None = None
    max_in_flight: int | None = None
    burst: float = 1.0


class Bucket:
    """A token bucket: `rate` a second flow in, at most `capacity` stay. What is taken may exceed what is there.

    Work of unknown size is let in while anything is there and paid for when it is known; the debt is waited off.
    """

    def __init__(self, rate: float, capacity: float) -> None:
        self.rate, self.capacity = rate, capacity
        self._level, self._at = capacity, -1.0

    def wait(self, now: float, need: float) -> float:
        """Seconds until `need` is there; 0 when it is."""
        return max(0.0, (min(need, self.capacity) - self._filled(now)) / self.rate)

    def take(self, now: float, amount: float) -> None:
        """Take so much, into debt if need be."""
        self._level, self._at = self._filled(now) - amount, now

    def _filled(self, now: float) -> float:
        if self._at < 0:
            return self._level
        return min(self.capacity, self._level + (now - self._at) * self.rate)


# --------------------------------------------------------------------------------------------- tenants


@dataclass(slots=True)
class Usage:
    """What a tenant has asked for since the server started; `in_flight`: outputs now."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    in_flight: int = 0

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(*(mine + theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def minus(self, other: Usage) -> Usage:
        """What came on top of the other."""
        return Usage(*(mine - theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        """The counts, in the order of the fields."""
        return self.requests, self.refused, self.prompt_tokens, self.output_tokens, self.in_flight


class Tenant:
    """One tenant: what it may call, and how much of it. The nameless one is everybody when nobody need log in."""

    def __init__(self, name: str, role: Role = Role.GENERATE, limits: Limits = Limits()) -> None:
        self.name, self.role, self.limits = name, role, limits
        self.usage = Usage()
        self.elsewhere = Usage()
        """What it asked of other gateways of the same service, as far as those have told."""
        self._requests, self._tokens = _buckets(limits)

    def change(self, role: Role, limits: Limits) -> None:
        """Set role and limits; buckets of unchanged limits keep their level."""
        self.role = role
        if limits != self.limits:
            self.limits = limits
            self._requests, self._tokens = _buckets(limits)

    def check(self, now: float, outputs: int = 1) -> None:
        """Raises Refusal: RATE_LIMITED when a request of so many outputs is too much now, INVALID_FIELD when it always
        is. Takes nothing."""
        limits, in_flight = self.limits, self.usage.in_flight + self.elsewhere.in_flight
        if limits.max_in_flight is not None and outputs > limits.max_in_flight:
            problem = f"{outputs} outputs at a time are more than tenant '{self.name}' may have, {limits.max_in_flight}"
            raise invalid("sampling.n", problem)
        for bucket, option in ((self._requests, "requests-per-second"), (self._tokens, "tokens-per-second")):
            if bucket is not None and (wait := bucket.wait(now, 1.0)) > 0:
                raise self._refuse(f"more than {bucket.rate:g} {option.replace('-', ' ')}", option, wait)
        if limits.max_in_flight is not None and in_flight + outputs > limits.max_in_flight:
            problem = f"{in_flight} outputs in flight, and at most {limits.max_in_flight} are let in"
            raise self._refuse(problem, "max-in-flight", IN_FLIGHT_RETRY_S)

    def count_request(self, now: float) -> None:
        """One more request, taken from the rate. Raises Refusal when it is used up."""
        self.check(now, outputs=0)
        self._count(now)

    def begin(self, now: float, prompt_tokens: int, outputs: int = 1) -> None:
        """A request that passed `check` goes to the engine."""
        self._count(now)
        self.usage.in_flight += outputs
        self.usage.prompt_tokens += prompt_tokens
        if self._tokens is not None:
            self._tokens.take(now, prompt_tokens)

    def end(self, now: float, output_tokens: int, outputs: int = 1) -> None:
        """So many outputs that began have ended, with so many tokens in all."""
        self.usage.in_flight -= outputs
        self.usage.output_tokens += output_tokens
        if self._tokens is not None:
            self._tokens.take(now, output_tokens)

    def used_elsewhere(self, now: float, use: Usage) -> None:
        """It asked so much more of other gateways; its rates pay for that too."""
        self.elsewhere = self.elsewhere.plus(use)
        if self._requests is not None:
            self._requests.take(now, use.requests)
        if self._tokens is not None:
            self._tokens.take(now, use.prompt_tokens + use.output_tokens)

    @property
    def total(self) -> Usage:
        """What it asked of the whole service."""
        return self.usage.plus(self.elsewhere)

    def _count(self, now: float) -> None:
        self.usage.requests += 1
        if self._requests is not None:
            self._requests.take(now, 1.0)

    def _refuse(self, problem: str, option: str, wait: float) -> Refusal:
        self.usage.refused += 1
        message = f"tenant '{self.name}' has {problem}; try again in {wait:.2f} s"
        return Refusal(Reason.RATE_LIMITED, message, retry_after=wait, metadata={"limit": option})


def _buckets(limits: Limits) -> tuple[Bucket | None, Bucket | None]:
    """Of requests, and of tokens."""
    requests, tokens = (
        None if rate is None else Bucket(rate, max(1.0, rate * limits.burst))
        for rate in (limits.requests_per_second, limits.tokens_per_second)
    )
    return requests, tokens


ANYBODY: Final = Tenant("", Role.ADMIN)
_CURRENT: Final[ContextVar[Tenant]] = ContextVar("drift_tenant", default=ANYBODY)


def current_tenant() -> Tenant:
    """The tenant whose call this task handles; `ANYBODY` (name "") where nobody need log in."""
    return _CURRENT.get()


def set_current_tenant(tenant: Tenant) -> None:
    """From here on this task handles a call of that tenant."""
    _CURRENT.set(tenant)


def cache_salt(tenant: str, salt: str) -> str:
    """What keeps cached prefixes apart: differs for different tenants, and for different salts of one tenant."""
    if not tenant and not salt:
        return ""
    digest = blake2b(len(tenant).to_bytes(2, "big"), digest_size=16, person=b"drift-salt")
    digest.update(tenant.encode() + salt.encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- tokens


def new_token() -> str:
    """A token of 256 random bits. It is shown once and only its digest is kept."""
    return f"drift_{secrets.token_urlsafe(TOKEN_BYTES)}"


def digest_of(token: str) -> str:
    """What is kept of a token.

    Plain SHA-256, once: a slow hash (scrypt) protects passwords, which can be guessed, and would cost every call tens
    of milliseconds. A token here is 256 random bits, so that nobody finds it by guessing whatever the hash costs.
    """
    return sha256(token.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Key:
    """One token of a tenant: its digest, and when it ends (seconds since 1970; `None`: never)."""

    tenant: Tenant
    digest: str
    expires: float | None


@dataclass(frozen=True, slots=True)
class _Register:
    """What one version of the file says. `keys` are found by the first half of their digest."""

    tenants: dict[str, Tenant] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    certificates: dict[str, Tenant] = field(default_factory=dict)


class Tenants:
    """The tenants of a server, from a file that is read again when it changes, or from certificates alone.

    Without a file, each client certificate stands for a tenant of its first name, with the role `generate`. A changed
    file that is wrong is logged, and what was known before stays. Raises DriftError when it is wrong from the start.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._checked = 0.0
        self._seen: tuple[int, int, int] | None = None
        self._register = _Register()
        self._ever: dict[str, Tenant] = {}
        """All that the file ever had: what one asked for goes on when it is taken out, and counts when it is back."""
        if path is not None:
            self._seen = _stamp(path)
            self._take_up(_parse(path, {}))

    @property
    def all(self) -> Mapping[str, Tenant]:
        """By name."""
        return self._register.tenants

    def named(self, name: str) -> Tenant | None:
        """The tenant of this name, also one that the file has no longer; one that only a certificate makes is made here
        too."""
        if self._path is not None:
            return self._ever.get(name)
        return self._register.tenants.setdefault(name, Tenant(name))

    def by_token(self, token: str, now: float, wall: float) -> Tenant | None:
        """Whose token it is; `None` for an unknown or expired one. `wall`: seconds since 1970."""
        if now - self._checked > RECHECK_S:
            self.reload(now)
        digest = digest_of(token)
        key = self._register.keys.get(digest[:32])
        # Half of the digest finds the candidate, which nobody can steer; the whole is compared in constant time.
        if key is None or not hmac.compare_digest(key.digest, digest):
            return None
        return key.tenant if key.expires is None or wall < key.expires else None

    def by_certificate(self, names: Iterable[str], now: float) -> Tenant | None:
        """Whom a verified certificate with these names (subject's first) stands for."""
        if now - self._checked > RECHECK_S:
            self.reload(now)
        register = self._register
        if self._path is not None:
            found = (register.certificates.get(name) for name in names)
            return next((tenant for tenant in found if tenant is not None), None)
        name = next((name for name in names if name.isprintable() and 0 < len(name) <= 128), None)
        if name is None:
            return None
        return register.tenants.setdefault(name, Tenant(name))

    def reload(self, now: float) -> None:
        """Read the file if it changed."""
        self._checked = now
        if self._path is None:
            return
        try:
            stamp = _stamp(self._path)
            if stamp == self._seen:
                return
            self._seen = stamp
            self._take_up(_parse(self._path, self._ever))
        except DriftError as error:
            log.error("the changed tenants are not taken up: %s", error)
            return
        log.info("took up the changed tenants in %s", self._path)

    def _take_up(self, register: _Register) -> None:
        self._register = register
        self._ever |= register.tenants


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DriftError(f"cannot read {path}: {error.strerror or error}") from error
    if status.st_mode & 0o002:
        raise DriftError(
            f"{path} can be written by everybody on this machine; take that away: chmod o-w {path}"
        )
    if status.st_size > MAX_FILE_BYTES:
        raise DriftError(f"{path} has {status.st_size} bytes, more than {MAX_FILE_BYTES}")
    return status.st_ino, status.st_size, status.st_mtime_ns


# ------------------------------------------------------------------------------------------------ file


def _parse(path: Path, known: Mapping[str, Tenant]) -> _Register:
    """The file's tenants; those known already keep their usage. Nothing is changed when it raises DriftError."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DriftError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # such as TOMLDecodeError, but not only
        raise DriftError(f"{path} is not TOML: {error}") from error
    _check_keys(f"{path}", document, ("tenants",))
    entries = _table(f"{path}: tenants", document.get("tenants", {}))
    parsed = {name: _entry(f"{path}: tenants.{name}", name, entry) for name, entry in entries.items()}
    register = _Register({name: known.get(name) or Tenant(name) for name in parsed})
    for name, entry in parsed.items():
        tenant = register.tenants[name]
        for digest, expires in entry.tokens:
            if register.keys.setdefault(digest[:32], Key(tenant, digest, expires)).tenant is not tenant:
                raise DriftError(f"{path}: tenants.{name}.tokens: {digest[:8]}… is another tenant's as well")
        for certificate in entry.certificates:
            if register.certificates.setdefault(certificate, tenant) is not tenant:
                raise DriftError(
                    f"{path}: tenants.{name}.certificates: '{certificate}' is another tenant's as well"
                )
    for name, entry in parsed.items():
        register.tenants[name].change(entry.role, entry.limits)
    return register


@dataclass(frozen=True, slots=True)
class _Entry:
    role: Role
    limits: Limits
    certificates: list[str]
    tokens: list[tuple[str, float | None]]


def _entry(place: str, name: str, entry: Any) -> _Entry:
    if not _NAME.fullmatch(name):
        raise DriftError(
            f"{place}: a tenant's name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit"
        )
    table = _table(place, entry)
    _check_keys(place, table, _TENANT_KEYS)
    role = table.get("role", "generate")
    if role not in [choice.value for choice in Role]:
        raise DriftError(f"{place}.role: no role {role!r}; there are: info, generate, admin")
    in_flight = _number(place, table, "max-in-flight")
    limits = Limits(
        _number(place, table, "requests-per-second"),
        _number(place, table, "tokens-per-second"),
        None if in_flight is None else int(in_flight),
        _number(place, table, "burst-seconds") or Limits().burst,
    )
    certificates = table.get("certificates", [])
    if not isinstance(certificates, list) or not all(isinstance(one, str) and one for one in certificates):
        raise DriftError(f"{place}.certificates: give a list of names, as certificates = ['acme-client']")
    tokens = table.get("tokens", [])
    if not isinstance(tokens, list):
        raise DriftError(f"{place}.tokens: write each as its own [[tenants.{name}.tokens]] with sha256 = '…'")
    return _Entry(Role(role), limits, certificates, [_token(f"{place}.tokens", token) for token in tokens])


def _token(place: str, token: Any) -> tuple[str, float | None]:
    table = _table(place, token)
    _check_keys(place, table, _TOKEN_KEYS)
    digest = table.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise DriftError(f"{place}: sha256 is not 64 hexadecimal digits; `drift token new` writes it")
    expires = table.get("expires")
    if expires is None:
        return digest, None
    if not isinstance(expires, date):
        raise DriftError(f"{place}.expires: {expires!r} is no date; write it as expires = 2027-01-01")
    moment = expires if isinstance(expires, datetime) else datetime.combine(expires, time_of_day())
    return digest, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _table(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DriftError(f"{place} is not a table")
    return value


def _check_keys(place: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            raise DriftError(f"{place}: no key '{key}'; there are: {', '.join(known)}")


def _number(place: str, table: Mapping[str, Any], key: str) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    whole = key == "max-in-flight"
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not good or not 0 < value < inf:
        raise DriftError(f"{place}.{key}: {value!r} is not a {'whole ' if whole else ''}number above 0")
    try:
        return float(value)
    except OverflowError:
        raise DriftError(f"{place}.{key}: a number of {len(str(value))} digits is too large") from None


def token_entry(tenant: str, token: str, expires: datetime | None = None) -> str:
    """The lines of a tenants file that let a token in. Raises DriftError on a name that no tenant can have."""
    if not _NAME.fullmatch(tenant):
        raise DriftError(
            f"'{tenant}' is no name for a tenant; use 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit"
        )
    name = tenant if "." not in tenant else f'"{tenant}"'
    lines = [f"[[tenants.{name}.tokens]]", f'sha256 = "{digest_of(token)}"']
    if expires is not None:
        lines.append(f"expires = {expires.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}")
    return "\n".join(lines) + "\n"


def add_to_file(path: Path, entry: str) -> None:
    """Append an entry to a tenants file, which is made when there is none (mode 0600). Raises DriftError."""
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        tomllib.loads(f"{before}\n{entry}")
        if not before:
            path.touch(mode=0o600)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{chr(10) if before else ''}{entry}")
    except OSError as error:
        raise DriftError(f"cannot write {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DriftError(
            f"{path}: the token cannot be appended, add it by hand ({error}):\n{entry}"
        ) from error
