"""drift.v1.AdminService, and the loopback port of its own that it is served on.

Acts through the supervisor and the engine's operations; every call is logged with who made it before anything is
done. The public port never knows of this service.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from drift_core.frames import Answer, Call, FlushPrefixes, SetPolicy, StartTrace, StopTrace
from drift_gateway.access.security import Security
from drift_gateway.access.tenants import current_tenant
from drift_gateway.info import READINESS
from drift_gateway.refusal import Reason, Refusal, invalid, refusals_as_statuses
from drift_gateway.server import SERVER_OPTIONS, Address, check_address
from drift_gateway.supervisor import Supervisor
from drift_gateway.v1 import admin_pb2 as pb
from drift_gateway.v1 import admin_pb2_grpc, info_pb2
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.admin")

ADMIN: Final = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
DEFAULT_DRAIN_S: Final = 30.0
MAX_DRAIN_MS: Final = 3_600_000
MAX_LOGGED_CHARACTERS: Final = 500
_TRACE_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
# protoc's grpc plug-in writes no types.
_ADD_ADMIN: Final[Callable[[Any, grpc.aio.Server], None]] = admin_pb2_grpc.add_AdminServiceServicer_to_server

Context = grpc.aio.ServicerContext[Any, Any]


class Operated(Protocol):
    """The gateways that serve the public port, as operators act on them: one, or several processes."""

    async def drain(self, draining: bool) -> None:
        """Refuse new requests, or take them again."""

    async def in_flight(self) -> int:
        """Outputs that have not ended."""

    async def abort(self, request_ids: Sequence[str] | None) -> list[str]:
        """End these requests, or all; those that were in flight."""

    async def policies_changed(self, dispatch: str, partition: str) -> None:
        """The running engine decides by other policies now."""


class OneGateway:
    """This process serves the public port itself."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def drain(self, draining: bool) -> None:
        """As `Operated`."""
        self._supervisor.drain(draining)

    async def in_flight(self) -> int:
        """As `Operated`."""
        return self._supervisor.in_flight

    async def abort(self, request_ids: Sequence[str] | None) -> list[str]:
        """As `Operated`."""
        return self._supervisor.abort_by_admin(request_ids)

    async def policies_changed(self, dispatch: str, partition: str) -> None:
        """As `Operated`."""
        self._supervisor.policies_changed(dispatch, partition)


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """See proto/drift_gateway/v1/admin.proto. `traces`: the folder for decision logs, `None` where there is none."""

    def __init__(self, supervisor: Supervisor, operated: Operated, traces: Path | None) -> None:
        self._supervisor = supervisor
        self._operated = operated
        self._traces = traces

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Refuse new requests and wait for those in flight."""
        async with _called("Drain", request, context):
            seconds = DEFAULT_DRAIN_S
            if request.HasField("timeout_ms"):
                if request.timeout_ms > MAX_DRAIN_MS:
                    raise invalid("timeout_ms", f"{request.timeout_ms} is more than {MAX_DRAIN_MS}")
                seconds = request.timeout_ms / 1e3
            await self._operated.drain(True)
            return pb.DrainResponse(in_flight=await self._wait_for_none(seconds))
        raise AssertionError("the call was aborted")

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        """Take requests again."""
        async with _called("Resume", request, context):
            await self._operated.drain(False)
            return pb.ResumeResponse(readiness=READINESS[self._supervisor.state])
        raise AssertionError("the call was aborted")

    async def AbortRequests(
        self, request: pb.AbortRequestsRequest, context: Context
    ) -> pb.AbortRequestsResponse:
        """End requests."""
        async with _called("AbortRequests", request, context):
            if bool(request.request_ids) == request.all:
                raise invalid("request_ids", "give either request_ids or all")
            names = None if request.all else list(dict.fromkeys(request.request_ids))
            aborted = await self._operated.abort(names)
            unknown = [name for name in names or () if name not in aborted]
            return pb.AbortRequestsResponse(aborted=aborted, unknown=unknown)
        raise AssertionError("the call was aborted")

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Context) -> pb.SetPolicyResponse:
        """Put other policies in force."""
        async with _called("SetPolicy", request, context):
            dispatch = request.dispatch if request.HasField("dispatch") else None
            partition = request.partition if request.HasField("partition") else None
            answer = await self._ask(lambda call: SetPolicy(call, dispatch, partition))
            if answer.error:
                field = "partition" if "partition policy" in answer.error or dispatch is None else "dispatch"
                raise invalid(field, answer.error)
            policies = info_pb2.Policies(dispatch=answer.dispatch, partition=answer.partition)
            await self._operated.policies_changed(answer.dispatch, answer.partition)
            return pb.SetPolicyResponse(policies=policies)
        raise AssertionError("the call was aborted")

    async def FlushPrefixCache(
        self, request: pb.FlushPrefixCacheRequest, context: Context
    ) -> pb.FlushPrefixCacheResponse:
        """Forget cached prefixes."""
        async with _called("FlushPrefixCache", request, context):
            answer = await self._ask(FlushPrefixes)
            if answer.error:
                raise DriftError(answer.error)
            return pb.FlushPrefixCacheResponse(pages=answer.pages)
        raise AssertionError("the call was aborted")

    async def StartTrace(self, request: pb.StartTraceRequest, context: Context) -> pb.StartTraceResponse:
        """Begin a decision log."""
        async with _called("StartTrace", request, context):
            path = str(self._trace_path(request))
            answer = await self._ask(lambda call: StartTrace(call, path))
            if answer.error:
                raise Refusal(Reason.TRACE_STATE, answer.error)
            return pb.StartTraceResponse(path=answer.path)
        raise AssertionError("the call was aborted")

    async def StopTrace(self, request: pb.StopTraceRequest, context: Context) -> pb.StopTraceResponse:
        """End the decision log."""
        async with _called("StopTrace", request, context):
            answer = await self._ask(StopTrace)
            if answer.error:
                raise Refusal(Reason.TRACE_STATE, answer.error)
            return pb.StopTraceResponse(path=answer.path, steps=answer.steps)
        raise AssertionError("the call was aborted")

    def _trace_path(self, request: pb.StartTraceRequest) -> Path:
        """Where the log goes. The name has no folders, so it cannot lead out of the one for traces."""
        if self._traces is None:
            raise Refusal(
                Reason.TRACE_STATE, "this server has no folder for decision logs; start it with --trace-dir"
            )
        if not request.HasField("name"):
            return self._traces / f"drift-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.jsonl"
        if not _TRACE_NAME.fullmatch(request.name):
            shown = request.name[:128]
            raise invalid(
                "name", f"'{shown}' is not 1 to 128 letters, digits, '-', '_' and '.', the first no '.'"
            )
        return self._traces / request.name

    async def _ask(self, make: Callable[[int], Call]) -> Answer:
        """What the engine answers. Raises Refusal or EngineGone when there is none to ask."""
        served = self._supervisor.served
        if served is None:
            self._supervisor.serving()
            raise Refusal(Reason.STARTING, "there is no engine yet; try again")
        return await served.client.ask(make)

    async def _wait_for_none(self, seconds: float) -> int:
        """Outputs in flight when there are none, or when the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            left = await self._operated.in_flight()
            if not left or time.monotonic() >= deadline:
                return left
            await asyncio.sleep(0.02)


@asynccontextmanager
async def _called(method: str, request: Message, context: Context) -> AsyncIterator[None]:
    """Log a call and how it ends; what is raised inside becomes its status."""
    tenant = current_tenant().name
    who = f"{context.peer()}, {tenant}" if tenant else context.peer()
    asked = " ".join(str(request).split())[:MAX_LOGGED_CHARACTERS]
    log.info("admin: %s(%s) by %s", method, asked, who)
    async with refusals_as_statuses(context):
        try:
            yield
        except DriftError as error:
            log.info("admin: %s by %s refused: %s", method, who, error)
            raise


class AdminPort:
    """The server of AdminService, with its health. `port` is the one taken, once `open` has returned.

    `operated`: the gateways that it acts on; without, the one in this process.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        security: Security,
        traces: Path | None = None,
        operated: Operated | None = None,
    ) -> None:
        self.port = 0
        self._security = security
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=security.interceptors)
        service = AdminService(supervisor, operated or OneGateway(supervisor), traces)
        _ADD_ADMIN(service, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def open(self, address: Address) -> None:
        """Take the port and answer. Raises DriftError when it is not on loopback or cannot be had."""
        check_admin_address(address)
        try:
            self.port = self._security.add_port(self._server, str(address))
        except RuntimeError as error:
            raise DriftError(f"cannot listen on {address}: it is in use") from error
        for name in ("", ADMIN):  # it answers operators in every state of the engine
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def close(self) -> None:
        """Say NOT_SERVING, and stop answering."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(None)


def check_admin_address(address: Address) -> None:
    """Raises DriftError, saying why, when administration may not or could not be served there."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise DriftError(f"cannot listen on {address}: {error.strerror or error}") from error
    where = str(found[0][4][0]).partition("%")[0]
    if not ipaddress.ip_address(where).is_loopback:
        raise DriftError(f"administration is for this machine alone, not on {address}; give 127.0.0.1:PORT")
    check_address(address, insecure_bind=False, option="--admin")


def check_traces(folder: str | None) -> Path | None:
    """The folder for decision logs. Raises DriftError when it is none that can be written to."""
    if folder is None:
        return None
    path = Path(folder).resolve()
    if not path.is_dir():
        raise DriftError(f"--trace-dir {folder} is no folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise DriftError(f"--trace-dir {folder} cannot be written to")
    return path
