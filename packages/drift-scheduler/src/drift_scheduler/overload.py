"""Whether TTFT targets are lost for certain, which is what admission has to hear.

Every guess here flatters the device: prompts alone, on all of it, at their solo cost, work that a lane has in hand for
nothing, in order of deadline, which serves all in time if any order does. So a target that is lost here is lost
under every policy, as far as the cost model tells the truth. That nothing is lost says little. Each request is held
against its own target; one that was never possible is no overload. Knows neither decode nor KV pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drift_scheduler.domain import PrefillShape, Waiting
from drift_scheduler.protocols import CostModel
from drift_scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Overload:
    """`lost`: waiting requests that could have met their TTFT targets and cannot any more. `excess`: seconds by which
    one of the others will miss its own at best. `backlog`: seconds that all prompts looked at take at best."""

    lost: int = 0
    excess: float = 0.0
    backlog: float = 0.0

    @property
    def certain(self) -> bool:
        """Whether a target is lost, or will be."""
        return self.lost > 0 or self.excess > 0


NONE = Overload()


def overload(now: float, begun: float, waiting: Sequence[Waiting], costs: CostModel, units: int) -> Overload:
    """Of these prompts, when prompts under way take `begun` more seconds."""
    lost, backlog = 0, begun
    open_work: list[tuple[float, float]] = []
    for prompt in waiting:
        took = costs.prefill(PrefillShape.of([(prompt.uncomputed, prompt.computed)]), units)
        backlog += took
        if now + took <= prompt.deadline:
            open_work.append((prompt.deadline, took))
        elif took <= prompt.request.slo.ttft:
            lost += 1
    excess, until = 0.0, now + begun
    for deadline, took in sorted(open_work):
        until += took
        excess = max(excess, until - deadline)
    return Overload(lost, excess, backlog)


class OverloadWatch:
    """What a scheduler's queue comes to, reckoned anew at most every `every` seconds from its first `scan` prompts."""

    def __init__(self, scheduler: Scheduler, every: float = 0.1, scan: int = 64) -> None:
        self._scheduler = scheduler
        self._every = every
        self._scan = scan
        self._said = NONE
        self._said_at = float("-inf")

    def now(self) -> Overload:
        """At the scheduler's latest step. Raises what the cost model raises."""
        scheduler = self._scheduler
        if not scheduler.queue:
            self._said_at = float("-inf")
            return NONE
        if scheduler.now - self._said_at >= self._every:
            units = scheduler.device.total_units
            waiting = scheduler.first_waiting(self._scan)
            self._said = overload(scheduler.now, self._begun(), waiting, scheduler.costs, units)
            self._said_at = scheduler.now
        return self._said

    def _begun(self) -> float:
        """Seconds for the layers that batches under way have before them, those in a lane's hands left out."""
        scheduler = self._scheduler
        total, flight = scheduler.device.num_layers, scheduler.prefill_flight
        seconds = 0.0
        for batch in scheduler.batches:
            left = total - batch.next_layer
            if flight is not None and flight.batch is batch and flight.gang.prefill is not None:
                left = total - flight.gang.prefill.layer_stop
            seconds += scheduler.costs.prefill(batch.shape, scheduler.device.total_units) * left / total
        return seconds
