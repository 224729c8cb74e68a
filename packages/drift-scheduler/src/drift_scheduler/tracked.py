"""What the scheduler keeps of live requests, of prefill batches under way and of work that a lane was given.

Plain records: the scheduler alone changes them, and knows when it may.
"""

from __future__ import annotations

from dataclasses import dataclass

from drift_scheduler.domain import (
    DecodeShape,
    DecodeStep,
    Gang,
    PrefillBatch,
    PrefillBlock,
    PrefillChunk,
    PrefillShape,
    Request,
    Waiting,
)
from drift_scheduler.lifecycle import State

QueueKey = tuple[int, int, float, int]
"""(0 for who holds pages, priority, arrival, order of arrival)."""


class Tracked:
    """One live request. `known`: prompt and generated tokens; `capacity`: positions that its pages cover. Both are kept
    in the decode rows while it has a row."""

    __slots__ = (
        "batch",
        "cached",
        "capacity",
        "computed",
        "described",
        "described_at",
        "ending",
        "first_token_at",
        "key",
        "known",
        "last_token_at",
        "late",
        "preemptions",
        "recomputed",
        "request",
        "row",
        "scheduled_at",
        "state",
        "tbt_max",
    )

    def __init__(self, request: Request, key: QueueKey) -> None:
        self.request = request
        self.key = key
        self.state = State.WAITING
        self.known = request.prompt_tokens
        self.computed = 0
        self.capacity = 0
        self.cached = 0
        self.described: Waiting | None = (
            None  # what policies were told last, and at which epoch of the KV pool
        )
        self.described_at = -1
        self.recomputed = 0
        self.preemptions = 0
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at = request.arrival
        self.tbt_max = 0.0
        self.late = 0
        self.row = -1
        self.batch: Batch | None = None
        self.ending = False

    @property
    def admitted(self) -> bool:
        """Whether it holds pages."""
        return self.capacity > 0


class Batch:
    """A prefill batch under way."""

    __slots__ = ("batch_id", "chunks", "deadline", "next_layer", "shape", "tracked")

    def __init__(
        self,
        batch_id: int,
        chunks: tuple[PrefillChunk, ...],
        tracked: tuple[Tracked, ...],
        shape: PrefillShape | None = None,
    ) -> None:
        self.batch_id = batch_id
        self.next_layer = 0
        self.set_members(chunks, tracked, shape)

    def set_members(
        self,
        chunks: tuple[PrefillChunk, ...],
        tracked: tuple[Tracked, ...],
        shape: PrefillShape | None = None,
    ) -> None:
        """Take these chunks; used at the start and when a cancelled request drops out. `shape`: theirs, if known."""
        self.chunks = chunks
        self.tracked = tracked
        self.shape = shape or PrefillShape.of((c.stop - c.start, c.start) for c in chunks)
        self.deadline = min((t.request.arrival + t.request.slo.ttft for t in tracked), default=float("inf"))

    def snapshot(self) -> PrefillBatch:
        """What policies see of it."""
        return PrefillBatch(self.batch_id, self.chunks, self.next_layer, self.deadline, self.shape)


@dataclass(slots=True)
class Flight:
    """Work a lane is doing. `beside_*`: what ran on the other lane, first, if anything did."""

    work: PrefillBlock | DecodeStep
    gang: Gang
    started: float
    predicted: float
    overlapped: bool = False
    beside_prefill: PrefillShape | None = None
    beside_decode: DecodeShape | None = None
    batch: Batch | None = None
    rows: int = 0
