"""Replays an event log: gangs run on an executor, but what happened, and when, is what the log says.

So one log can be put to any executor, and a scheduler that decides from events alone decides the same. Knows
nothing of what an executor is; token ids are the executor's own, a log has none that mean anything to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from drift_scheduler.domain import (
    DecodeDone,
    Device,
    Event,
    Gang,
    Lane,
    LaneFailed,
    PrefillDone,
    Request,
    RequestArrived,
    StepRecord,
)
from drift_scheduler.protocols import Executor


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """What a scheduler was told: the events of one step and its time, seconds on the recorded clock."""

    now: float
    events: tuple[Event, ...]


class EventLog:
    """An observer that keeps the events of every step, and the gangs that came of them."""

    def __init__(self) -> None:
        self.steps: list[LoggedStep] = []
        self.gangs: list[Gang] = []

    def on_step(self, record: StepRecord) -> None:
        """See one step."""
        self.steps.append(LoggedStep(record.now, record.events))
        if record.step.gang is not None:
            self.gangs.append(record.step.gang)


class ReplayExecutor:
    """Implements `drift_scheduler.protocols.Executor` over another one and a log.

    A lane event of the log is delivered once the executor has done that work, with the log's times and stops and
    the executor's tokens. `arrive` hands a logged request to an executor that has to know it.
    """

    def __init__(
        self,
        executor: Executor,
        steps: Iterable[LoggedStep],
        arrive: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._executor = executor
        self._steps = iter(steps)
        self._arrive = arrive
        self._now = 0.0
        self._done: dict[Lane, deque[Event]] = {lane: deque() for lane in Lane}

    @property
    def device(self) -> Device:
        """The executor's."""
        return self._executor.device

    def now(self) -> float:
        """The log's clock."""
        return self._now

    def submit(self, gang: Gang) -> None:
        """Run it for real."""
        self._executor.submit(gang)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Pass it on."""
        self._executor.forget(request_ids)

    def wait(self, until: float | None) -> Sequence[Event] | None:
        """The log's next events, as soon as the executor has caught up with them; `None` at the log's end."""
        step = next(self._steps, None)
        if step is None:
            return None
        self._now = step.now
        return [self._caught_up(event) for event in step.events]

    def _caught_up(self, event: Event) -> Event:
        match event:
            case RequestArrived(request):
                self._arrive(request)
                return event
            case PrefillDone():
                real = self._completion(Lane.PREFILL)
                assert isinstance(real, PrefillDone), f"the log has {event}, the executor {real}"
                return replace(event, tokens=real.tokens, details=real.details)
            case DecodeDone():
                real = self._completion(Lane.DECODE)
                assert isinstance(real, DecodeDone), f"the log has {event}, the executor {real}"
                return replace(event, tokens=real.tokens, details=real.details)
            case LaneFailed(lane):
                self._completion(lane)
                return event
            case _:
                return event

    def _completion(self, lane: Lane) -> Event:
        """The next thing that ends on a lane of the executor; waits for it."""
        while not self._done[lane]:
            events = self._executor.wait(None)
            assert events is not None, (
                f"the log has an end of work on the {lane.value} lane that nobody began"
            )
            for event in events:
                match event:
                    case PrefillDone():
                        self._done[Lane.PREFILL].append(event)
                    case DecodeDone():
                        self._done[Lane.DECODE].append(event)
                    case LaneFailed(failed):
                        self._done[failed].append(event)
                    case _:
                        pass
        return self._done[lane].popleft()
