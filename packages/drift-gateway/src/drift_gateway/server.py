"""The gRPC server: services, health, reflection, limits, and the order of starting and stopping.

One grpc.aio loop. The port is taken before the engine starts, so that a port in use is said at once; until the
engine is ready, Generate answers UNAVAILABLE and health NOT_SERVING.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from drift_gateway.access.security import NO_SECURITY, Security, SecurityOptions
from drift_gateway.compat import add_services
from drift_gateway.gate import GateLimits
from drift_gateway.generation import Generations, GenerationService
from drift_gateway.info import InfoService
from drift_gateway.supervisor import State, Supervisor
from drift_gateway.v1 import generation_pb2, generation_pb2_grpc, info_pb2, info_pb2_grpc
from drift_scheduler.errors import DriftError

GENERATION: Final = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
INFO: Final = info_pb2.DESCRIPTOR.services_by_name["InfoService"].full_name
# protoc's grpc plug-in writes no types.
_ADD_GENERATION: Final[Callable[[Any, grpc.aio.Server], None]] = (
    generation_pb2_grpc.add_GenerationServiceServicer_to_server
)
_ADD_INFO: Final[Callable[[Any, grpc.aio.Server], None]] = info_pb2_grpc.add_InfoServiceServicer_to_server

PORT_OF_ONE: Final = ("grpc.so_reuseport", 0)
"""A second server on the port fails instead of taking half of the calls."""
PORT_OF_SEVERAL: Final = ("grpc.so_reuseport", 1)

MAX_RECEIVED_BYTES: Final = 6 * 1024 * 1024
"""Of one message. It is parsed on the event loop, while every stream waits (16 MiB of labels: a third of a second);
a prompt of a million token ids has 3 to 5 MB."""
MAX_SENT_BYTES: Final = 16 * 1024 * 1024
"""Tokenize answers a text of 4 Mi characters with more bytes than it was asked with."""
MAX_METADATA_BYTES: Final = 16 * 1024
"""Of one call, each entry with 32 bytes more. Between its two limits gRPC refuses by chance; this is both."""

SERVER_OPTIONS: Final = (
    PORT_OF_ONE,
    ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
    ("grpc.max_send_message_length", MAX_SENT_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", 4096),
    # Peers that connect and say nothing hold a descriptor for so long, and those that call nothing for so long.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 30 * 60 * 1000),
    # Keepalive alone took 65 s to notice a dead peer, with the ping timeout 9 s. Who stands still for less than that
    # (a paused virtual machine, a client that collects garbage) is not dead.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping while they wait for a long prefill.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)


NOT_SHARED: Final = "several gateway processes need SO_REUSEPORT to share a port, and this system has none"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. `host` may be a name; port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """HOST:PORT, or [HOST]:PORT for IPv6. Raises DriftError."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise DriftError(f"'{text}' is no address to listen on; give HOST:PORT, as 127.0.0.1:50051")
    return Address(host, int(port))


def check_address(
    address: Address, insecure_bind: bool, security: SecurityOptions | None = None, option: str = "--listen"
) -> None:
    """Raises DriftError, saying why, when a server so secured may not or could not listen there.

    `security` is `None` for a port that can have none. `option`: the one that gave the address.
    """
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise DriftError(f"cannot listen on {address}: {error.strerror or error}") from error
    family, _, _, _, where = found[0]
    beyond = not ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback
    missing = (security or NO_SECURITY).missing()
    if beyond and missing is not None and not insecure_bind:
        cure = (
            "give --tls-cert and --tls-key with --tenants or --tls-client-ca, "
            if security is not None
            else ""
        )
        raise DriftError(
            f"{address} can be reached from other machines, and this server has {missing} there; listen on "
            f"127.0.0.1, {cure}or add --insecure-bind where the network is trusted"
        )
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
            probe.listen(1)
        except OSError as error:
            raise DriftError(_why_not(address, error, option)) from error


def reserve_port(address: Address) -> tuple[socket.socket, Address]:
    """Hold a port, on which nobody listens yet, for several processes: the socket to close when it is no longer
    needed, and the address with the port that port 0 became. Raises DriftError, also where ports cannot be shared.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise DriftError(f"{NOT_SHARED}; use --gateways 1")
    family, _, _, _, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        held.close()
        raise DriftError(f"{NOT_SHARED} ({error.strerror or error}); use --gateways 1") from error
    try:
        held.bind(where)
    except OSError as error:
        held.close()
        raise DriftError(_why_not(address, error)) from error
    return held, Address(address.host, int(held.getsockname()[1]))


def _why_not(address: Address, error: OSError, option: str = "--listen") -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {address.port} on {address.host} is in use; stop what listens there or give another {option}"
    return f"cannot listen on {address}: {error.strerror or error}"


class Gateway:
    """A gRPC server in front of a supervised engine. `port` is the one taken, once `open` has returned.

    `compat`: others' protocols to serve beside drift.v1, of `drift_gateway.compat.NAMES`. `limits`: who is let in;
    without, at most `max_in_flight` outputs, and what follows from that. `process`: which of how many gateway processes
    of its service this is, from 1; several share the port.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        max_in_flight: int = 1024,
        security: Security | None = None,
        compat: Sequence[str] = (),
        limits: GateLimits | None = None,
        process: tuple[int, int] = (1, 1),
    ) -> None:
        self.supervisor = supervisor
        self.security = security if security is not None else Security()
        self.port = 0
        self._stopping = asyncio.Event()
        self._reports: set[asyncio.Task[None]] = set()
        supervisor.on_change = self._state_changed
        supervisor.known_tenants = self.security.known_tenants
        self._health = health.aio.HealthServicer()
        options = (PORT_OF_ONE if process[1] == 1 else PORT_OF_SEVERAL, *SERVER_OPTIONS[1:])
        self._server = grpc.aio.server(options=options, interceptors=self.security.interceptors)
        limits = limits if limits is not None else GateLimits(max_in_flight)
        self.generations = Generations(supervisor, limits)
        generation = GenerationService(supervisor, self.generations)
        self.information = InfoService(supervisor, limits.max_in_flight, self._stopping, process)
        _ADD_GENERATION(generation, self._server)
        _ADD_INFO(self.information, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._compat = add_services(compat, self._server, supervisor, self.generations)
        names = (GENERATION, INFO, *self._compat, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def open(self, address: Address) -> None:
        """Take the port and answer. Raises DriftError when the port cannot be had."""
        await self._report_health()
        try:
            self.port = self.security.add_port(self._server, str(address))
        except RuntimeError as error:
            raise DriftError(
                f"cannot listen on {address}: it is in use or not an address of this machine"
            ) from error
        await self._server.start()

    def _state_changed(self) -> None:
        report = asyncio.ensure_future(self._report_health())
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)

    async def _report_health(self) -> None:
        serving = self.supervisor.healthy
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await self._health.set("", status)
        for name in (GENERATION, *self._compat):
            await self._health.set(name, status)
        await self._health.set(INFO, health_pb2.HealthCheckResponse.SERVING)

    async def close(self, grace: float, hurry: asyncio.Event | None = None, lame_duck: float = 0.0) -> None:
        """Say NOT_SERVING, serve on for `lame_duck` seconds, refuse what is new, let streams run for `grace` seconds,
        cancel the rest (each gets its Finished), end engine and server.

        `hurry` ends either time when it is set.
        """
        self.supervisor.retire()
        await self._health.enter_graceful_shutdown()
        if lame_duck and self.supervisor.state is State.READY:
            await _either(hurry or asyncio.Event(), lame_duck)
        self.supervisor.stop_accepting()
        self._stopping.set()
        served = self.supervisor.served
        if served is not None:
            await _drain(self.supervisor, grace, hurry)
            for request_id in served.client.in_flight_ids():
                served.client.cancel(request_id)
            await _drain(self.supervisor, 2.0)
        await self._server.stop(1.0)
        await self.supervisor.stop()


async def _either(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set or the time is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


async def _drain(supervisor: Supervisor, patience: float, hurry: asyncio.Event | None = None) -> None:
    """Wait until all streams have ended, `patience` seconds are over, or `hurry` is set.

    A client may have yet to read what the engine was done with long ago.
    """
    deadline = time.monotonic() + patience
    while (
        supervisor.request_ids()
        and time.monotonic() < deadline
        and not (hurry is not None and hurry.is_set())
    ):
        await asyncio.sleep(0.02)
