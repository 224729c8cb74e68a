"""One request from its arrival to its status, for those who keep account: the access log, spans.

What a request asked for is held as far as it may be told: names, labels and numbers, never its text or its tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

import grpc

from drift_core.link import EngineGone
from drift_gateway.access.tenants import current_tenant
from drift_gateway.calls import Call
from drift_gateway.observe.service_stats import EndedOutput
from drift_gateway.refusal import CASES, Reason, Refusal, incident_of

if TYPE_CHECKING:
    from drift_gateway.v1 import generation_pb2 as pb

log = logging.getLogger("drift.gateway")

MAX_TOLD: Final = 16
MAX_TOLD_CHARACTERS: Final = 128


@dataclass(slots=True)
class RequestRecord:
    """A request and what became of it. `arrival` and `ended` are on the monotonic clock.

    `code`: name of its gRPC status; `reason`: of its ErrorInfo, where it was refused; `incident`: the id in the message
    of an INTERNAL, under which the log has the details. `request_id` is `None` where it
    brought none and was refused before it got one. `too_slow`: it was ended because its client did not read.
    """

    call: Call
    tenant: str
    request_id: str | None
    session: str
    labels: dict[str, str]
    slo_class: str
    priority: int
    demoted: bool = False
    too_slow: bool = False
    outputs: Sequence[EndedOutput] = ()
    code: str = "OK"
    reason: str | None = None
    incident: str | None = None
    ended: float = field(default=0.0)

    @classmethod
    def begin(cls, request: pb.GenerateRequest, call: Call) -> RequestRecord:
        """Of a request that nobody has looked at yet: everything is cut to a length that can be told."""
        labels = islice(request.labels.items(), MAX_TOLD)
        return cls(
            call=call,
            tenant=current_tenant().name,
            request_id=_told(request.request_id) or None,
            session=_told(request.prefix.session),
            labels={_told(name): _told(value) for name, value in labels},
            slo_class=_told(getattr(request.slo, "class")) or "default",
            priority=request.priority,
        )

    def end(self, error: BaseException | None) -> None:
        """It ends now, with this error if any."""
        self.ended = time.monotonic()
        match error:
            case None:
                pass
            case GeneratorExit() | asyncio.CancelledError() if self.too_slow:
                self.code, self.reason = CASES[Reason.SLOW_READER].code.name, str(Reason.SLOW_READER)
            case GeneratorExit() | asyncio.CancelledError() | grpc.aio.InternalError():
                self.code = "CANCELLED"  # the client left, or nothing could be sent to it any more
            case Refusal():
                self.code, self.reason = error.code.name, str(error.reason)
                self.incident = incident_of(error) or None
            case EngineGone():
                self.code, self.reason = "UNAVAILABLE", str(Reason.WORKER_RESTART)
            case _:
                self.code, self.reason = "INTERNAL", str(Reason.INTERNAL)
                self.incident = incident_of(error)


def _told(text: str) -> str:
    return text[:MAX_TOLD_CHARACTERS]


Recorder = Callable[[RequestRecord], None]


def tell(recorders: Iterable[Recorder], record: RequestRecord) -> None:
    """Tell every recorder; one that raises is logged, and takes no request down with it."""
    for recorder in recorders:
        try:
            recorder(record)
        except Exception:
            log.exception("a request could not be recorded")
