"""Tells an engine that hangs from one that works long: pings answered by its loop, and how late its lanes are.

The engine's loop waits for its lanes without computing anything, so it answers within milliseconds however long a
prefill takes. A lane may be stuck while the loop is not: what it does is then measured against what was predicted.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from drift_core.frames import Pong

DEFAULT_HANG_TIMEOUT: Final = 10.0
PINGS_TO_MISS: Final = 5
LANE_TIMEOUTS: Final = 3.0
LANE_OVERRUN: Final = 10.0
"""A lane is stuck when its work has taken this many times what was predicted, and LANE_TIMEOUTS timeouts more."""


class Pinged(Protocol):
    """What is asked of `drift_core.link.EngineClient`."""

    pong: Pong | None

    def ping(self, number: int) -> None:
        """Ask for a Pong of this number."""


async def hang_of(engine: Pinged, timeout: float) -> str:
    """Wait until the engine hangs, for ever if it does not; a line that says how."""
    missed = 0
    number = 0
    heard = 0
    while True:
        number += 1
        engine.ping(number)
        await asyncio.sleep(timeout / PINGS_TO_MISS)
        pong = engine.pong
        # Counted by pings, not by the clock: where this process itself was stopped, only one was missed. And an answer
        # to an earlier one is an answer: it may have waited behind steps that this process is late to read.
        missed += 1
        if pong is not None and pong.number > heard:
            heard, missed = pong.number, 0
        if missed >= PINGS_TO_MISS:
            return f"the engine hangs: its loop did not answer for {timeout:g} s"
        if not missed and pong is not None:
            allowed = LANE_TIMEOUTS * timeout + LANE_OVERRUN * pong.predicted
            if pong.busy > allowed:
                return (
                    f"the engine hangs: a lane has been at the same work for {pong.busy:.1f} s, "
                    f"predicted were {pong.predicted:.3f} s"
                )
