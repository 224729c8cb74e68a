"""vLLM's words for how an output ends, which both protocols use."""

from __future__ import annotations

from typing import Final

from drift_gateway.refusal import Reason, Refusal
from drift_gateway.v1 import generation_pb2 as pb

_REASONS: Final = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
}
_FAULTS: Final = {pb.FINISH_REASON_REJECTED: Reason.KV_CAPACITY, pb.FINISH_REASON_FAILED: Reason.INTERNAL}


def finish_reason(finished: pb.Finished) -> str:
    """vLLM's word for the end of an output. Raises Refusal for ends that are errors to its clients."""
    fault = _FAULTS.get(finished.reason)
    if fault is not None:
        raise Refusal(fault, finished.message or "the request could not be finished")
    return _REASONS.get(finished.reason, "stop")
