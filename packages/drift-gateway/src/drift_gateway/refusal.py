"""Requests that are turned away: why, the gRPC status that says so, and what the client can do about it.

`CASES` is the one table of reasons; docs/api.md and the head of generation.proto are tested against it. A refusal
goes over the wire as a google.rpc.Status in the trailer `grpc-status-details-bin`: an ErrorInfo with the reason, a
BadRequest where a field is wrong, a RetryInfo where trying again can help. Knows no service and no state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from drift_core.link import EngineGone
from drift_core.submission import TOO_SLOW
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")

DOMAIN: Final = "drift"
DETAILS_KEY: Final = "grpc-status-details-bin"
INCIDENT: Final = "incident"
MAX_MESSAGE_CHARACTERS: Final = 1000
"""A message may quote the request, and trailers have a cap; what is longer is cut."""


class Reason(StrEnum):
    """Why a call ended with an error; the `reason` of its google.rpc.ErrorInfo."""

    INVALID_FIELD = "INVALID_FIELD"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    REQUEST_ID_IN_USE = "REQUEST_ID_IN_USE"
    NEVER_FITS = "NEVER_FITS"
    NO_TOKENIZER = "NO_TOKENIZER"
    NO_CHAT_TEMPLATE = "NO_CHAT_TEMPLATE"
    QUARANTINED = "QUARANTINED"
    TRACE_STATE = "TRACE_STATE"
    QUEUE_FULL = "QUEUE_FULL"
    RATE_LIMITED = "RATE_LIMITED"
    SLO_INFEASIBLE = "SLO_INFEASIBLE"
    KV_CAPACITY = "KV_CAPACITY"
    SLOW_READER = "SLOW_READER"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    STARTING = "STARTING"
    DRAINING = "DRAINING"
    WORKER_RESTART = "WORKER_RESTART"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    ABORTED_BY_ADMIN = "ABORTED_BY_ADMIN"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table of errors.

    `retry_after`: seconds after which the same request may be sent again, where nothing better is known; `None`
    where trying again does not help by itself.
    """

    code: grpc.StatusCode
    meaning: str
    retry_after: float | None = None


_CODE: Final = grpc.StatusCode
CASES: Final[Mapping[Reason, Case]] = MappingProxyType(
    {
        Reason.INVALID_FIELD: Case(
            _CODE.INVALID_ARGUMENT, "a field is wrong; the message starts with its path"
        ),
        Reason.MODEL_NOT_FOUND: Case(_CODE.NOT_FOUND, "`model` is not served here"),
        Reason.REQUEST_ID_IN_USE: Case(_CODE.ALREADY_EXISTS, "the tenant has `request_id` in flight"),
        Reason.NEVER_FITS: Case(
            _CODE.FAILED_PRECONDITION, "the prompt can never fit the context or the KV pool"
        ),
        Reason.NO_TOKENIZER: Case(
            _CODE.FAILED_PRECONDITION, "the model has no tokenizer, so it takes token ids only"
        ),
        Reason.NO_CHAT_TEMPLATE: Case(
            _CODE.FAILED_PRECONDITION, "the model has no chat template, so it takes no conversations"
        ),
        Reason.QUARANTINED: Case(
            _CODE.FAILED_PRECONDITION, "the request was in the engine at two crashes and is not tried again"
        ),
        Reason.TRACE_STATE: Case(
            _CODE.FAILED_PRECONDITION, "a decision log is being written already, or none is, or none can be"
        ),
        Reason.QUEUE_FULL: Case(_CODE.RESOURCE_EXHAUSTED, "the queue of the request's class is full", 1.0),
        Reason.RATE_LIMITED: Case(_CODE.RESOURCE_EXHAUSTED, "the tenant's rate is used up", 1.0),
        Reason.SLO_INFEASIBLE: Case(
            _CODE.RESOURCE_EXHAUSTED,
            "its targets cannot be met now, and it asked to be rejected then; without RetryInfo where an idle server "
            "could not meet them either",
            1.0,
        ),
        Reason.KV_CAPACITY: Case(_CODE.RESOURCE_EXHAUSTED, "the KV pool is promised to other requests", 1.0),
        Reason.SLOW_READER: Case(_CODE.RESOURCE_EXHAUSTED, "the client reads its stream too slowly"),
        Reason.DEADLINE_EXCEEDED: Case(
            _CODE.DEADLINE_EXCEEDED, "the call's deadline passed, or could not be met from the start"
        ),
        Reason.STARTING: Case(_CODE.UNAVAILABLE, "the server is starting", 1.0),
        Reason.DRAINING: Case(
            _CODE.UNAVAILABLE, "the server takes no new requests: it drains, or stops", 5.0
        ),
        Reason.WORKER_RESTART: Case(_CODE.UNAVAILABLE, "the engine is gone and is being started again", 1.0),
        Reason.UNAUTHENTICATED: Case(_CODE.UNAUTHENTICATED, "no credentials, or wrong ones"),
        Reason.PERMISSION_DENIED: Case(_CODE.PERMISSION_DENIED, "the credentials do not allow the call"),
        Reason.ABORTED_BY_ADMIN: Case(_CODE.CANCELLED, "an operator ended the request"),
        Reason.INTERNAL: Case(
            _CODE.INTERNAL, "a fault of the server; its log has the details under the id in the message"
        ),
    }
)


def error_table() -> str:
    """The table of errors as Markdown, one row per reason."""
    rows = ["| Status | Reason | Meaning | RetryInfo |", "|---|---|---|---|"]
    for reason, case in CASES.items():
        retry = "no" if case.retry_after is None else "yes"
        rows.append(f"| {case.code.name} | {reason} | {case.meaning} | {retry} |")
    return "\n".join(rows) + "\n"


class Refusal(DriftError):
    """A call that is not served, or no longer.

    `field`: path of the wrong field in the request. `retry_after`: seconds, instead of the table's. `retry`: whether
    trying again can help, where the table says that it can. `metadata` goes into the ErrorInfo.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        retry_after: float | None = None,
        retry: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_one_line(message))
        case = CASES[reason]
        self.reason = reason
        self.code = case.code
        self.field = field
        usual = case.retry_after if retry else None
        self.retry_after = usual if retry_after is None else retry_after
        self.metadata = dict(metadata or {})

    def status(self) -> status_pb2.Status:
        """What goes into the trailer."""
        number: int = self.code.value[0]
        status = status_pb2.Status(code=number, message=str(self))
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=str(self.reason), domain=DOMAIN, metadata=self.metadata)
        ]
        if self.field is not None:
            problem = str(self).removeprefix(f"{self.field}: ")
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=problem)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry_after * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        for detail in details:
            status.details.add().Pack(detail)
        return status

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """The trailing metadata of a call that ends so."""
        return ((DETAILS_KEY, self.status().SerializeToString()),)


def refusal_of(error: Exception) -> Refusal:
    """The refusal that an error ends a call with; one that nobody foresaw is logged and its message kept back."""
    match error:
        case Refusal():
            return error
        case EngineGone():
            return Refusal(Reason.WORKER_RESTART, f"{error}; try again")
        case _:
            incident = incident_of(error)
            log.error("internal error %s", incident, exc_info=error)
            return Refusal(
                Reason.INTERNAL,
                f"internal error; the log has it under {incident}",
                metadata={INCIDENT: incident},
            )


def given_up(error: asyncio.CancelledError) -> Refusal | None:
    """What a call ends with whose reader was given up, though its client is there; `None` where the client left."""
    return Refusal(Reason.SLOW_READER, TOO_SLOW) if error.args == (TOO_SLOW,) else None


def incident_of(error: BaseException) -> str:
    """The id under which the log has an error that nobody foresaw: the same whoever asks; "" for one that is said as
    it is."""
    if isinstance(error, Refusal):
        return error.metadata.get(INCIDENT, "")
    known: dict[str, str] = error.__dict__
    return known.setdefault("_drift_incident", uuid4().hex[:12])


@asynccontextmanager
async def refusals_as_statuses(context: Any) -> AsyncIterator[None]:
    """End the call (a grpc.aio.ServicerContext) with the status of whatever is raised inside."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except asyncio.CancelledError as error:
        refusal = given_up(error)
        if refusal is None:
            raise
        await abort(context, refusal)
    except grpc.aio.InternalError as left:  # a message could not be sent: nobody is there to hear of it
        raise asyncio.CancelledError from left
    except Exception as error:
        await abort(context, refusal_of(error))


async def abort(context: Any, refusal: Refusal) -> None:
    """End a call (a grpc.aio.ServicerContext) with a refusal's status. Always raises."""
    try:
        await context.abort(refusal.code, str(refusal), trailing_metadata=refusal.trailers())
    except grpc.aio.InternalError as left:  # the client did, perhaps long after
        raise asyncio.CancelledError from left


def invalid(field: str, problem: str) -> Refusal:
    """INVALID_ARGUMENT for `field`, a path in the request."""
    return Refusal(Reason.INVALID_FIELD, f"{field}: {problem}", field=field)


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else f"{line[: MAX_MESSAGE_CHARACTERS - 2]} …"
