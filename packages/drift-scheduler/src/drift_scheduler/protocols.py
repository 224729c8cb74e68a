"""The seams: what a policy, a cost model, a KV pool and an executor must answer.

Structural types only; nobody inherits from them. Built-ins and plugins are held to the same contracts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from drift_scheduler.domain import (
    DecodeShape,
    DecodeStep,
    Device,
    Event,
    FloatArray,
    Gang,
    IntArray,
    Observation,
    Partition,
    PrefillShape,
    Request,
    StepRecord,
)
from drift_scheduler.view import View

PrefillEach = Callable[[IntArray, IntArray, int], FloatArray]
"""Optional `prefill_each(new, reused, units)` of a cost model: seconds of each of many single prompts."""


class KvPool(Protocol):
    """Pages of one shared KV cache. Questions change nothing; reservations are all-or-nothing.

    Optional: `grow(request_ids, tokens) -> int` does what a `commit` of all but the last of `tokens` and an `extend`
    to them do for each request in order, and returns how many it did before pages ran out. Optional:
    `withdraw(request_id, known_tokens)` is a `release` of a request that was just admitted with so many tokens and of
    which nothing was computed: as if it had not been asked for, but for what had to be evicted.
    """

    @property
    def page_tokens(self) -> int:
        """Token positions per page."""

    @property
    def total_pages(self) -> int:
        """Pages in the pool."""

    @property
    def free_pages(self) -> int:
        """Pages no request references, those that still cache a prefix included (they can be evicted)."""

    def lookup(self, request: Request, known_tokens: int) -> int:
        """Leading positions of the request's `known_tokens` whose KV is cached: a multiple of `page_tokens`,
        below `known_tokens` (at least one position is always computed)."""

    def admit(self, request: Request, known_tokens: int, reserve_tokens: int) -> int | None:
        """Share the cached prefix and take pages so that `reserve_tokens` positions are covered.

        Returns the cached positions, or `None` with nothing changed when the pages are not there.
        Raises ValueError when the request already holds pages.
        """

    def extend(self, request_id: str, tokens: int) -> bool:
        """Cover `tokens` positions in all; `False` with nothing changed when pages run out."""

    def commit(self, request_id: str, tokens: int) -> None:
        """Positions `[0, tokens)` hold computed KV: publish their full pages for reuse."""

    def release(self, request_id: str) -> None:
        """Drop every page reference of the request; published pages stay cached until evicted."""


class CostModel(Protocol):
    """Predicted lane seconds. Solo predictions; `slowdown` is the worst case of running side by side.

    Optional attributes, seconds: `block_seconds`, launching one more prefill block, and `switch_seconds`, changing the
    partition; the scheduler adds them to what it predicts of a gang. Optional: `prefill_each(new, reused, units)`, what
    `prefill` says of each of many single requests, integer arrays in and seconds out; saves a policy time with long
    queues.
    """

    def prefill(self, work: PrefillShape, units: int) -> float:
        """Seconds for all layers of a prefill on `units` units with the rest of the device idle."""

    def decode(self, work: DecodeShape, units: int) -> float:
        """Seconds for one decode step on `units` units with the rest of the device idle."""

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """Seconds for one mixed forward pass over both."""

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """Worst-case factors (prefill, decode), each at least 1, when both run under `partition`.

        Under one that is all one lane's: those of passes that have the device for themselves, 1 where nothing but the
        prediction is known.
        """

    def observe(self, observation: Observation) -> None:
        """Learn from one measured piece of work; a model that does not learn does nothing."""


@runtime_checkable
class PartitionPolicy(Protocol):
    """Chooses how many units each lane gets when both have work."""

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """A menu entry with units for both lanes."""


@runtime_checkable
class DispatchPolicy(Protocol):
    """Decides the next gang from a read-only view.

    It may follow another policy while requests are in flight: batches part-way through the layers (`view.prefills`)
    are then its to finish.

    Optional: `refuses(device) -> str | None`, asked once by the scheduler; a line it returns is why the policy cannot
    run on that device, and ends the start. Optional: `arrange(setting) -> Setting`, for a policy of another system
    that simulates on a cluster laid out its own way (see `drift_scheduler.simulation.cluster`). Optional: `ahead`, true
    where `choose` may be asked while the device still works about the state that is expected when a lane ends; what was
    answered may then not be launched, so nothing may depend on its having been asked.
    """

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """The next gang for the idle lanes, or `None` to leave things as they are until the next event."""


class Executor(Protocol):
    """Runs gangs and is the only one who waits. Its clock is the only clock."""

    @property
    def device(self) -> Device:
        """What it offers."""

    def now(self) -> float:
        """Seconds on its clock."""

    def submit(self, gang: Gang) -> None:
        """Start the gang; returns at once."""

    def wait(self, until: float | None) -> Sequence[Event] | None:
        """Block until events are there or the clock reaches `until`; `None` says shut down."""

    def forget(self, request_ids: Sequence[str]) -> None:
        """These requests ended: drop what is kept for them."""


class Observer(Protocol):
    """Told of every step after it was applied; one that raises is dropped."""

    def on_step(self, record: StepRecord) -> None:
        """See one step."""
