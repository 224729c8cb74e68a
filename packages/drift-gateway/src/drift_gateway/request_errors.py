"""What a failed call raises in a client: one class per gRPC status, with what the server told about it.

Reads google.rpc.Status details; knows nothing of channels or requests. `drift_gateway.client` exports all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from drift_scheduler.errors import DriftError

_DETAILS_KEY: Final = "grpc-status-details-bin"


class RequestError(DriftError):
    """A call ended with a status: `code`; the message is the server's line.

    `reason`: one of the table in docs/api.md ("QUEUE_FULL"), `None` where the status did not come from a Drift
    server. `retry_after`: seconds to wait before trying again, `None` where that does not help. `fields`: what is
    wrong with which field of the request. `metadata`: what else the server says of the reason.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str | None = None,
        retry_after: float | None = None,
        fields: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.retry_after = retry_after
        self.fields = dict(fields or {})
        self.metadata = dict(metadata or {})


class InvalidRequest(RequestError):
    """A field of the request is wrong; the message starts with its path."""


class NotServed(RequestError):
    """The model asked for is not served there."""


class InUse(RequestError):
    """A request of that id is in flight."""


class NeverFits(RequestError):
    """The same request will be refused again: too long for the context or the KV pool, or quarantined."""


class Overloaded(RequestError):
    """Too much is in flight, or the targets cannot be met now; try again later."""


class Unavailable(RequestError):
    """The server cannot be reached, is starting, stopping, or restarting its engine; try again."""


class DeadlineExceeded(RequestError):
    """The call's timeout passed, or could not be met."""


class Cancelled(RequestError):
    """The call was cancelled, here or by an operator of the server."""


class NotAuthenticated(RequestError):
    """The call brought no credentials, or wrong ones."""


class NotAllowed(RequestError):
    """The credentials do not allow the call."""


class ServerFault(RequestError):
    """A fault of the server; its log has the details under the id in the message."""


_ERRORS: Final[Mapping[grpc.StatusCode, type[RequestError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotServed,
    grpc.StatusCode.ALREADY_EXISTS: InUse,
    grpc.StatusCode.FAILED_PRECONDITION: NeverFits,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: NotAuthenticated,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.INTERNAL: ServerFault,
}


def error_of(call: grpc.RpcError) -> RequestError:
    """The exception for a failed call, with what its google.rpc.Status tells."""
    code: grpc.StatusCode = call.code()
    kind = _ERRORS.get(code, RequestError)
    return kind(code, call.details() or code.name, **_details(call.trailing_metadata() or ()))


def _details(trailers: Iterable[Any]) -> dict[str, Any]:
    """`reason`, `retry_after`, `fields` and `metadata` from the trailers of a failed call; none that are not there."""
    found: dict[str, Any] = {}
    packed = next((value for key, value in trailers if key == _DETAILS_KEY), b"")
    try:
        details = status_pb2.Status.FromString(packed if isinstance(packed, bytes) else b"").details
        info, wrong, retry = (
            error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        )  # fmt: skip
        for detail in details:
            if detail.Unpack(info):
                found |= {"reason": info.reason, "metadata": info.metadata}
            elif detail.Unpack(wrong):
                found["fields"] = {entry.field: entry.description for entry in wrong.field_violations}
            elif detail.Unpack(retry):
                found["retry_after"] = retry.retry_delay.ToNanoseconds() / 1e9
    except DecodeError:  # somebody else's trailer; the status itself says enough
        return {}
    return found
