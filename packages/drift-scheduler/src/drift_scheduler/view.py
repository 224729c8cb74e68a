"""The read-only picture a policy decides from.

The scheduler keeps one `View` and refreshes it before each decision; a policy that holds on to it sees later
states, so it takes what it needs. Nothing here can change the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from drift_scheduler.domain import (
    DecodeStep,
    Device,
    FloatArray,
    LaneView,
    Partition,
    PrefillBatch,
    Sharing,
    Waiting,
)


class View(Protocol):
    """State at the moment of a decision."""

    @property
    def now(self) -> float:
        """Seconds on the executor's clock."""

    @property
    def device(self) -> Device:
        """Units, menu, layers and sharings on offer."""

    @property
    def partition(self) -> Partition | None:
        """The partition under a busy lane; `None` when both lanes are idle."""

    @property
    def sharing(self) -> Sharing | None:
        """The sharing in force under a busy lane; `None` when both lanes are idle."""

    @property
    def last_partition(self) -> Partition | None:
        """The partition of the latest gang, for policies that avoid flapping."""

    @property
    def prefill_lane(self) -> LaneView:
        """What the prefill lane does."""

    @property
    def decode_lane(self) -> LaneView:
        """What the decode lane does."""

    @property
    def prefills(self) -> tuple[PrefillBatch, ...]:
        """Prefill batches under way, the active one last, at most two."""

    @property
    def num_waiting(self) -> int:
        """Requests that need prefill and are in no batch."""

    def waiting(self, limit: int) -> tuple[Waiting, ...]:
        """The first `limit` of them in queue order: part-way ones, then by priority and arrival."""

    def find_waiting(self, request_ids: Sequence[str]) -> tuple[Waiting, ...]:
        """Those of the named requests that are waiting for prefill."""

    def decode_step(self) -> DecodeStep | None:
        """The step over every decoding request, `None` when there are none or one is running."""

    @property
    def num_decoding(self) -> int:
        """Decoding requests, those in a running step included."""

    @property
    def tbt_target(self) -> float:
        """The tightest TBT target among decoding requests, seconds; infinity with none."""

    def tbt_slack(self) -> FloatArray:
        """Seconds each decoding request has until its next token is late (negative: late already)."""

    @property
    def free_pages(self) -> int:
        """Unreferenced KV pages, less the headroom kept for decoding requests."""

    @property
    def total_pages(self) -> int:
        """KV pages in all, at least one."""

    @property
    def max_running(self) -> int:
        """Most requests that may hold pages at once."""

    @property
    def num_running(self) -> int:
        """Requests that hold pages now."""
