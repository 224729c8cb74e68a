"""What `drift serve` was asked for, as values; and as bytes, for the gateway processes that it starts.

Checked by whoever reads the command line; knows no sockets.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from drift_core.engine import EngineConfig
from drift_gateway.access.security import NO_SECURITY, SecurityOptions
from drift_gateway.gate import DEFAULT_LIMITS, GateLimits
from drift_gateway.heartbeat import DEFAULT_HANG_TIMEOUT
from drift_gateway.observe.access_log import AccessLog
from drift_gateway.observe.spans import Spans, spans_to
from drift_gateway.server import Address


@dataclass(frozen=True, slots=True)
class OperationsOptions:
    """What operators want: see docs/operations.md. Times are seconds.

    `admin`: where AdminService listens, on loopback. `traces`: its folder for decision logs. `hang_timeout`: without a
    sign of life from the engine. `lame_duck`: to serve on, after health said NOT_SERVING, before new requests are
    refused. `access_log`: a path, or "-" for the standard output. `spans`: where OpenTelemetry's go, "otlp" or
    "console".
    """

    admin: Address | None = None
    traces: Path | None = None
    hang_timeout: float = DEFAULT_HANG_TIMEOUT
    lame_duck: float = 0.0
    access_log: str | None = None
    spans: str | None = None


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `drift serve` was asked for.

    `limits`: who is let in. `grace`: seconds that running streams get when the server stops. `http`: where to serve
    metrics and pages.
    `compat`: others' protocols to serve too. `security`: TLS and who may call, for gRPC alone. `gateways`: processes
    that share the address.
    """

    engine: EngineConfig
    address: Address
    insecure_bind: bool = False
    limits: GateLimits = DEFAULT_LIMITS
    grace: float = 10.0
    http: Address | None = None
    compat: tuple[str, ...] = ()
    security: SecurityOptions = NO_SECURITY
    operations: OperationsOptions = OperationsOptions()
    gateways: int = 1


def encoded(options: ServeOptions) -> bytes:
    """As JSON."""
    return msgspec.json.encode(options, enc_hook=os.fspath)


def decoded(data: bytes) -> ServeOptions:
    """What `encoded` made bytes of. Raises msgspec.MsgspecError on anything else."""
    return msgspec.json.decode(data, type=ServeOptions, dec_hook=_path)


def _path(kind: type[Any], value: Any) -> Any:
    assert kind is Path, f"a field of type {kind}"
    return Path(value)


def recorders_of(options: OperationsOptions) -> list[AccessLog | Spans]:
    """Who keeps account of requests. Raises DriftError when one cannot."""
    recorders: list[AccessLog | Spans] = []
    if options.access_log is not None:
        recorders.append(AccessLog(options.access_log))
    if options.spans is not None:
        recorders.append(spans_to(options.spans))
    return recorders
