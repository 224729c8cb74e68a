"""Who may call what: every call of every service is refused unless its credentials allow it.

`Authenticator` stands before all services of a server. A method that no table here names needs the role `admin`, so
that a service added later is closed until somebody decides; what needs no credentials at all is `OPEN`. It costs once
per call, before the request is read where the call brings a token, and nothing per message. Knows no sockets and no
files; which token is whose is the business of `tenants`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc

from drift_gateway.access.tenants import Role, Tenant, Tenants, set_current_tenant
from drift_gateway.access.well_formed import kind_of, told
from drift_gateway.refusal import Reason, Refusal, abort

log = logging.getLogger("drift.gateway")

OPEN: Final = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""What may be called without credentials."""
MAX_OPEN_CALLS: Final = 256
"""Calls of each that run at once; more are refused, so that strangers cannot fill the server."""
OPEN_CALL_PATIENCE_S: Final = 10.0
"""How long such a call may take to send its message."""
_SERVICE_ROLES: Final = {
    "grpc.health.v1.Health": Role.INFO,
    "grpc.reflection.v1alpha.ServerReflection": Role.INFO,
    "grpc.reflection.v1.ServerReflection": Role.INFO,
    "drift.v1.InfoService": Role.INFO,
    "drift.v1.GenerationService": Role.GENERATE,
    "drift.v1.AdminService": Role.ADMIN,
    "inference.GRPCInferenceService": Role.GENERATE,
    "vllm.grpc.engine.VllmEngine": Role.GENERATE,
}
_METHOD_ROLES: Final = {
    "/inference.GRPCInferenceService/RepositoryModelLoad": Role.ADMIN,
    "/inference.GRPCInferenceService/RepositoryModelUnload": Role.ADMIN,
}
_RATED: Final = frozenset({"/drift.v1.GenerationService/Tokenize", "/drift.v1.GenerationService/Detokenize"})
"""Methods that count as a request by themselves; those that generate are counted where they reach the engine."""
_CHALLENGE: Final = "give a token in the metadata, as 'authorization: Bearer TOKEN'"

Details = grpc.HandlerCallDetails
Continuation = Callable[[Details], Awaitable[Any]]


def role_for(method: str) -> Role | None:
    """The role that a method (`/package.Service/Method`) needs; `None` for one that needs no credentials."""
    if method in OPEN:
        return None
    service = method.removeprefix("/").rpartition("/")[0]
    return _METHOD_ROLES.get(method) or _SERVICE_ROLES.get(service, Role.ADMIN)


class Authenticator(grpc.aio.ServerInterceptor):
    """Admits calls by bearer token, or by the client's verified certificate where `certificates` is set.

    A token that is given must be right: a wrong one is refused whatever certificate comes with it. `refused` counts by
    reason. `clock` and `wall`: seconds of a monotonic clock, and since 1970.
    """

    def __init__(
        self,
        tenants: Tenants,
        certificates: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.tenants = tenants
        self.refused: Counter[Reason] = Counter()
        self._certificates = certificates
        self._clock, self._wall = clock, wall
        self._open_calls: Counter[str] = Counter()
        self._complaints = Complaints()

    async def intercept_service(self, continuation: Continuation, details: Details) -> Any:
        """The handler of a call that is allowed, or one that refuses it."""
        method = details.method
        try:
            role = role_for(method)
            if role is None:
                return await self._bounded(continuation, details)
            token = bearer_token(details.invocation_metadata)
            if token is not None:
                self._admit_token(token, role, method)
            elif self._certificates:
                handler = await continuation(details)
                return None if handler is None else self._by_certificate(handler, role, method)
            else:
                raise Refusal(Reason.UNAUTHENTICATED, f"this server wants to know its callers; {_CHALLENGE}")
        except Refusal as refusal:
            self._note(refusal, method)
            return _refusing(refusal)
        return await continuation(details)

    def _admit_token(self, token: str, role: Role, method: str) -> None:
        tenant = self.tenants.by_token(token, self._clock(), self._wall())
        if tenant is None:
            raise Refusal(Reason.UNAUTHENTICATED, "the token is unknown here or has expired")
        self._admit(tenant, role, method)

    def _admit(self, tenant: Tenant, role: Role, method: str) -> None:
        """Raises Refusal; otherwise this task's calls are the tenant's."""
        if not tenant.role.includes(role):
            message = f"the call needs the role '{role.value}', and tenant '{tenant.name}' has '{tenant.role.value}'"
            raise Refusal(Reason.PERMISSION_DENIED, message)
        if method in _RATED:
            tenant.count_request(self._clock())
        elif role is Role.GENERATE:
            tenant.check(self._clock())  # before the request is read; it is counted when it is known
        set_current_tenant(tenant)

    def _by_certificate(self, handler: Any, role: Role, method: str) -> Any:
        """The handler, which first looks at the peer's certificate: only the call's context has it."""

        def admit(context: Any) -> None:
            names = certificate_names(context.auth_context())
            tenant = self.tenants.by_certificate(names, self._clock())
            if tenant is None:
                raise Refusal(
                    Reason.UNAUTHENTICATED,
                    f"no tenant goes by the certificate's name ({', '.join(names) or 'none'}); {_CHALLENGE}",
                )
            self._admit(tenant, role, method)

        async def admitted(context: Any) -> None:
            try:
                admit(context)
            except Refusal as refusal:
                self._note(refusal, method)
                await abort(context, refusal)

        return _preceded(handler, admitted)

    async def _bounded(self, continuation: Continuation, details: Details) -> Any:
        """The handler of an open method, of which only so many run at once, those still to send their message too."""
        handler = await continuation(details)
        if handler is None:
            return None
        kind, method = kind_of(handler), details.method
        behaviour = getattr(handler, kind)

        async def counted(requests: Any, context: Any) -> None:
            if self._open_calls[method] >= MAX_OPEN_CALLS:
                problem = (
                    f"{self._open_calls[method]} such calls without credentials are running; try again later"
                )
                await abort(context, Refusal(Reason.QUEUE_FULL, problem))
            self._open_calls[method] += 1
            try:
                async with asyncio.timeout(OPEN_CALL_PATIENCE_S):
                    request = await anext(requests)
                response = await behaviour(request, context)
                if kind == "unary_unary":
                    await context.write(response)
            except (TimeoutError, StopAsyncIteration):
                await abort(context, Refusal(Reason.DEADLINE_EXCEEDED, "the call brought no message"))
            finally:
                self._open_calls[method] -= 1

        # Declared as taking a stream, it runs before the client's message is read.
        return grpc.stream_stream_rpc_method_handler(
            counted, handler.request_deserializer, handler.response_serializer
        )

    def _note(self, refusal: Refusal, method: str) -> None:
        self.refused[refusal.reason] += 1
        self._complaints.add(f"{method[:128]!a}: {refusal}", self._clock())


def bearer_token(metadata: Any) -> str | None:
    """The token in a call's metadata, `None` when there is none. Raises Refusal on anything but one bearer token."""
    given = [value for key, value in metadata or () if key == "authorization"]
    if not given:
        return None
    kind, _, token = given[0].partition(" ") if isinstance(given[0], str) else ("", "", "")
    if len(given) > 1 or kind.lower() != "bearer" or not token.strip():
        raise Refusal(
            Reason.UNAUTHENTICATED, f"the metadata 'authorization' is not one bearer token; {_CHALLENGE}"
        )
    return str(token.strip())


def certificate_names(peer: Any) -> list[str]:
    """The names in a peer's verified certificate: the subject's common name, then the alternative names."""
    if not peer or peer.get("transport_security_type") != [b"ssl"]:
        return []
    found = (*peer.get("x509_common_name", ()), *peer.get("x509_subject_alternative_name", ()))
    return list(dict.fromkeys(name.decode(errors="replace") for name in found))


def _preceded(handler: Any, first: Callable[[Any], Awaitable[None]]) -> Any:
    """The same handler, run after `first(context)`, which may abort the call."""
    kind = kind_of(handler)
    behaviour = getattr(handler, kind)
    assert inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour), (
        "a grpc.aio handler"
    )

    async def run(request: Any, context: Any) -> Any:
        await first(context)
        return await told(behaviour, request, context)

    return handler._replace(**{kind: run})


def _refusing(refusal: Refusal) -> Any:
    """A handler that ends any call so. Declared as taking a stream, it never reads what the client sends."""

    async def refuse(requests: Any, context: Any) -> None:
        await abort(context, refusal)

    return grpc.stream_stream_rpc_method_handler(refuse)


class Complaints:
    """Refusals in the log: one line at once, then at most one per `pause` seconds with the number of them."""

    def __init__(self, pause: float = 10.0) -> None:
        self._pause = pause
        self._next = float("-inf")
        self._held = 0

    def add(self, line: str, now: float) -> None:
        """One more."""
        if now < self._next:
            self._held += 1
            return
        more = f" (and {self._held} more since the last such line)" if self._held else ""
        log.warning("refused %s%s", line, more)
        self._next, self._held = now + self._pause, 0
