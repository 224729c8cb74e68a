"""A call as the services see it: when it came, and how long it has.

Reads the clock once per call. Knows nothing of what is asked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

TRACE_CONTEXT: Final = ("traceparent", "tracestate")


@dataclass(frozen=True, slots=True)
class Call:
    """`arrival` and `deadline` (`None`: none) are on `time.monotonic()`.

    `peer`: who calls, as gRPC says it. `trace`: the W3C trace context that came with it, as `traceparent`.
    """

    arrival: float
    deadline: float | None = None
    peer: str = ""
    trace: tuple[tuple[str, str], ...] = ()


def call_of(context: Any) -> Call:
    """The call of a grpc.aio.ServicerContext that has just come in."""
    now = time.monotonic()
    left: float | None = context.time_remaining()
    trace = tuple(
        (key, value)
        for key, value in context.invocation_metadata() or ()
        if key in TRACE_CONTEXT and isinstance(value, str)
    )
    return Call(now, None if left is None else now + left, context.peer(), trace)
