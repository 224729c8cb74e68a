"""A call as the services see it: when it came, how long it has, and whose cached prefixes it may share.

Reads the clock once per call. Knows nothing of what is asked.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

TENANT_SALT: Final[ContextVar[str]] = ContextVar("drift_tenant_salt", default="")
"""Set by whoever authenticates a call, before its handler runs: requests share prefixes only under the same salt."""


@dataclass(frozen=True, slots=True)
class Call:
    """`arrival` and `deadline` (`None`: none) are on `time.monotonic()`."""

    arrival: float
    deadline: float | None = None
    tenant_salt: str = ""


def call_of(context: Any) -> Call:
    """The call of a grpc.aio.ServicerContext that has just come in."""
    now = time.monotonic()
    left: float | None = context.time_remaining()
    return Call(now, None if left is None else now + left, TENANT_SALT.get())
