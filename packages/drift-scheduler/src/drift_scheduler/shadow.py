"""Asks a policy what it would have done, decision by decision, while a log decides what is done.

The log's events and gangs drive a real scheduler, so at each decision the other policy sees exactly what the logged one
saw; its proposal is compared with the logged gang and then dropped. Knows nothing of costs or of what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from drift_scheduler.domain import (
    Event,
    Gang,
    Partition,
    PrefillBlock,
    PrefillChunk,
    RequestArrived,
    Waiting,
)
from drift_scheduler.legality import IllegalGangError, PartitionFaultError, check_gang
from drift_scheduler.log_reader import DecisionLogFile, LoggedGang, LoggedStep
from drift_scheduler.protocols import CostModel, DispatchPolicy, PartitionPolicy
from drift_scheduler.scheduler import Scheduler
from drift_scheduler.view import View

KINDS = ("wait", "sharing", "partition", "prefill", "decode", "fault")
"""How a proposal can differ, the first of these that does: one of the two waits, other sharing, other split, other
prefill work, other decode work; or the policy raised or proposed something illegal."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a proposal first differed: the log's line, its step and time, and both gangs in words."""

    line: int
    step: int
    now: float
    kind: str
    logged: str
    other: str


@dataclass(slots=True)
class Agreement:
    """How often a policy agreed with a log. `stopped`: the line and reason where the log could not be followed on."""

    decisions: int = 0
    agreed: int = 0
    differ: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    first: Difference | None = None
    followed: int = 0
    states_differ: int = 0
    stopped: tuple[int, str] | None = None

    @property
    def ratio(self) -> float | None:
        """Share of decisions on which both agree; `None` without decisions."""
        return self.agreed / self.decisions if self.decisions else None


def compare(
    log: DecisionLogFile,
    other: DispatchPolicy,
    scheduler_with: Callable[[DispatchPolicy], Scheduler],
    keys: Mapping[str, tuple[Any, ...]],
) -> Agreement:
    """Follow the log to its end, or to where it cannot be followed, asking `other` at each decision.

    `scheduler_with(policy)` is a fresh scheduler as the log's first line describes it; `keys` are the prefix keys of
    requests' outputs. Raises DriftError for a bad line.
    """
    agreement = Agreement()
    follower = _Follower(other, agreement)
    scheduler = scheduler_with(follower)
    for step in log.steps():
        follower.expect(step)
        events = [_complete(event, keys) for event in step.events]
        try:
            decided = scheduler.step(step.now, events)
        except (AssertionError, KeyError, ValueError, ArithmeticError) as error:
            agreement.stopped = (step.line, f"the scheduler cannot take its events: {error!r}")
            return agreement
        if signature(decided.gang) != logged_signature(step.gang):
            why = decided.faults[0] if decided.faults else f"the scheduler launched {say(decided.gang)}"
            agreement.stopped = (step.line, f"its gang cannot be launched: {say_logged(step.gang)}: {why}")
            return agreement
        follower.settle(scheduler, step)
        agreement.followed += 1
    return agreement


def _complete(event: Event, keys: Mapping[str, tuple[Any, ...]]) -> Event:
    if isinstance(event, RequestArrived) and event.request.id in keys:
        request = event.request
        return RequestArrived(replace(request, prefix_keys=(*request.prefix_keys, *keys[request.id])))
    return event


class _Follower:
    """A dispatch policy that does what the log says and asks `other` what it would have done."""

    def __init__(self, other: DispatchPolicy, agreement: Agreement) -> None:
        self._other = other
        self._agreement = agreement
        self._step: LoggedStep | None = None
        self._asked = False

    def expect(self, step: LoggedStep) -> None:
        """The step that comes next."""
        self._step = step
        self._asked = False

    def settle(self, scheduler: Scheduler, step: LoggedStep) -> None:
        """Take over what the log's scheduler knew and ours could not: whether prompts wait for pages."""
        if not step.view.blocked:
            scheduler.blocked_at = None
        elif scheduler.blocked_at is None:
            scheduler.blocked_at = scheduler.kv.free_pages
        seen = (len(scheduler.queue), scheduler.rows.n, scheduler.running, scheduler.kv.free_pages)
        view = step.view
        self._agreement.states_differ += seen != (view.waiting, view.decoding, view.running, view.free_pages)

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """The logged gang."""
        step = self._step
        assert step is not None, "asked before the first step"
        if not self._asked:
            self._asked = True
            self._compare(view, costs, partitions, step)
        return _rebuild(view, step.gang)

    def _compare(self, view: View, costs: CostModel, partitions: PartitionPolicy, step: LoggedStep) -> None:
        gang, fault = self._ask(view, costs, partitions)
        kind = "fault" if fault else difference(gang, step)
        opens_batch = gang is not None and gang.prefill is not None and gang.prefill.batch_id < 0
        if kind is not None and opens_batch and step.view.blocked:
            # Prompts that lack pages: the scheduler, too, asked again without them.
            again, fault_again = self._ask(cast(View, _NoNewcomers(view)), costs, partitions)
            if not fault_again and difference(again, step) is None:
                kind = None
        found = self._agreement
        found.decisions += 1
        if kind is None:
            found.agreed += 1
            return
        found.differ[kind] += 1
        if found.first is None:
            other = fault or say(gang)
            found.first = Difference(step.line, step.index, step.now, kind, say_logged(step.gang), other)

    def _ask(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> tuple[Gang | None, str]:
        """The other policy's legal proposal, or what was wrong with it."""
        try:
            gang = self._other.choose(view, costs, partitions)
            if gang is not None:
                check_gang(view, gang)
        except IllegalGangError as error:
            return None, f"proposed {error}"
        except PartitionFaultError as error:
            return None, str(error)
        except Exception as error:  # a third party's policy may raise anything; the comparison goes on
            return None, f"raised {type(error).__name__}: {error}"
        return gang, ""


class _NoNewcomers:
    """A view in which no request waits that holds no pages yet."""

    def __init__(self, view: View) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def waiting(self, limit: int) -> tuple[Waiting, ...]:
        """Part-way requests only; they come first in the queue."""
        return tuple(w for w in self._view.waiting(limit) if w.admitted)


def difference(gang: Gang | None, step: LoggedStep) -> str | None:
    """How a proposal differs from the logged gang; `None` where it does not.

    A new batch that goes on beyond the logged one agrees where the logged one was cut for want of pages.
    """
    logged = step.gang
    if gang is None or logged is None:
        return None if gang is None and logged is None else "wait"
    if gang.sharing is not logged.sharing:
        return "sharing"
    if tuple(gang.partition) != logged.partition:
        return "partition"
    ours, theirs = signature(gang), logged_signature(logged)
    assert ours is not None
    assert theirs is not None
    if ours["prefill"] != theirs["prefill"] and not _cut(ours["prefill"], theirs["prefill"], step):
        return "prefill"
    return None if ours["decode"] == theirs["decode"] else "decode"


def _cut(ours: Any, theirs: Any, step: LoggedStep) -> bool:
    if ours is None or theirs is None or not step.view.blocked or ours["layers"] != theirs["layers"]:
        return False
    chunks = theirs["chunks"]
    return bool(ours["chunks"][: len(chunks)] == chunks)


def signature(gang: Gang | None) -> dict[str, Any] | None:
    """A gang without its batch's number, which a proposal has not got, and without starts, which admission settles."""
    if gang is None:
        return None
    block, step = gang.prefill, gang.decode
    return {
        "sharing": gang.sharing,
        "partition": tuple(gang.partition),
        "prefill": None
        if block is None
        else {
            "layers": (block.layer_start, block.layer_stop),
            "chunks": tuple((c.request_id, c.stop) for c in block.chunks),
        },
        "decode": None if step is None else (len(step.request_ids), step.context_tokens),
    }


def logged_signature(gang: LoggedGang | None) -> dict[str, Any] | None:
    """The same of a logged gang."""
    if gang is None:
        return None
    block, step = gang.prefill, gang.decode
    return {
        "sharing": gang.sharing,
        "partition": gang.partition,
        "prefill": None
        if block is None
        else {"layers": block.layers, "chunks": tuple((i, stop) for i, _, stop, _ in block.chunks)},
        "decode": None if step is None else (step.batch, step.context),
    }


def _rebuild(view: View, logged: LoggedGang | None) -> Gang | None:
    """The logged gang as a proposal: a batch that is not under way is new."""
    if logged is None:
        return None
    block = None
    if logged.prefill is not None:
        under_way = {batch.batch_id: batch.chunks for batch in view.prefills}
        batch_id = logged.prefill.batch if logged.prefill.batch in under_way else -1
        chunks = tuple(PrefillChunk(*chunk) for chunk in logged.prefill.chunks)
        if batch_id < 0:
            waiting = {w.request.id: w for w in view.find_waiting([c.request_id for c in chunks])}
            chunks = tuple(
                replace(c, start=waiting[c.request_id].computed) if c.request_id in waiting else c
                for c in chunks
            )
        block = PrefillBlock(batch_id, chunks, *logged.prefill.layers)
    step = view.decode_step() if logged.decode is not None else None
    return Gang(logged.sharing, Partition(*logged.partition), block, step)


def say(gang: Gang | None) -> str:
    """A gang in words."""
    return _words(signature(gang))


def say_logged(gang: LoggedGang | None) -> str:
    """A logged gang in words."""
    return _words(logged_signature(gang))


def _words(found: dict[str, Any] | None) -> str:
    if found is None:
        return "wait"
    prefill, decode = found["prefill"], found["decode"]
    parts = []
    if prefill is not None:
        chunks = prefill["chunks"]
        names = ", ".join(f"{request_id} to {stop}" for request_id, stop in chunks[:3])
        more = f" and {len(chunks) - 3} more" if len(chunks) > 3 else ""
        parts.append(f"prefill {names}{more}, layers {prefill['layers'][0]}-{prefill['layers'][1]}")
    if decode is not None:
        parts.append(f"decode {decode[0]}")
    split = "+".join(str(units) for units in found["partition"])
    return f"{found['sharing'].value} {split}: {'; '.join(parts)}"
