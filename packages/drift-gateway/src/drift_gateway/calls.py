"""A call as the services see it: when it came, and how long it has.

Reads the clock once per call. Knows nothing of what is asked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """`arrival` and `deadline` (`None`: none) are on `time.monotonic()`."""

    arrival: float
    deadline: float | None = None


def call_of(context: Any) -> Call:
    """The call of a grpc.aio.ServicerContext that has just come in."""
    now = time.monotonic()
    left: float | None = context.time_remaining()
    return Call(now, None if left is None else now + left)
