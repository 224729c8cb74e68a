"""What is in the lanes at one moment, for people who watch. Data only."""

from __future__ import annotations

from typing import Final, NamedTuple

from drift_scheduler.domain import Partition, Sharing


class LanesNow(NamedTuple):
    """What is in the lanes: the split and sharing in force (`None` when idle) and the requests in each lane."""

    partition: Partition | None
    sharing: Sharing | None
    prefill_requests: int
    decode_requests: int


IDLE: Final = LanesNow(None, None, 0, 0)
