"""The heart: one loop joins a scheduler and an executor, simulated or real."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from drift_scheduler.domain import Step, StepRecord
from drift_scheduler.protocols import Executor, Observer
from drift_scheduler.scheduler import Scheduler


class OnFault(Protocol):
    """Told once of each observer that raised and was dropped."""

    def __call__(self, observer: Observer, error: Exception) -> None: ...


def serve(
    scheduler: Scheduler,
    executor: Executor,
    deliver: Callable[[Step], None],
    observers: Iterable[Observer] = (),
    *,
    stopwatch: Callable[[], float] | None = None,
    on_fault: OnFault | None = None,
) -> None:
    """Run until the executor says shut down (`wait` returns `None`).

    `deliver` gets every step once, after its gang is on its way: the device is fed before the clients.
    `stopwatch` (monotonic seconds) times each `step` for the records; without it they carry no step time.
    """
    watching = list(observers)
    index = 0
    events = executor.wait(until=None)
    while events is not None:
        now = executor.now()
        begun = stopwatch() if stopwatch is not None else 0.0
        gang = scheduler.begin(now, events)
        seconds = stopwatch() - begun if stopwatch is not None else None
        if gang is not None:
            executor.submit(gang)
        begun = stopwatch() if stopwatch is not None else 0.0
        step = scheduler.complete()
        if seconds is not None and stopwatch is not None:
            seconds += stopwatch() - begun
        if step.ended:
            executor.forget(step.ended)
        deliver(step)
        if watching:
            _tell(watching, StepRecord(index, now, tuple(events), step, seconds), on_fault)
        index += 1
        events = executor.wait(until=step.wake_at)


def _tell(watching: list[Observer], record: StepRecord, on_fault: OnFault | None) -> None:
    for observer in tuple(watching):
        try:
            observer.on_step(record)
        except (
            Exception
        ) as error:  # a third party's observer may raise anything; it is dropped, service goes on
            watching.remove(observer)
            if on_fault is not None:
                on_fault(observer, error)
