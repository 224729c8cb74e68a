"""Running searches: in this process, or their trials spread over others. Results do not depend on which.

Trials are pure, so processes are spawned, share nothing, and load the installed plugins themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from drift_scheduler.errors import DriftError
from drift_scheduler.goodput import Outcome, Trial, run_trial
from drift_scheduler.plugins import Registry, load

T = TypeVar("T")

OnTrial = Callable[[str, Outcome], None]
"""Told of every outcome with the name of its search."""


def run_searches(
    searches: Mapping[str, Generator[Sequence[Trial], Sequence[Outcome], T]],
    jobs: int = 1,
    registry: Registry | None = None,
    on_trial: OnTrial | None = None,
    on_done: Callable[[str, Any], None] | None = None,
) -> dict[str, T]:
    """Run every search to its end; their results by name. `jobs`: processes. Raises DriftError.

    With one job trials run here, with `registry`'s plugins; else with those installed.
    """
    if jobs < 1:
        raise DriftError(f"jobs is {jobs}, need at least 1")
    tell = on_trial or (lambda name, outcome: None)
    done = on_done or (lambda name, result: None)
    if jobs == 1:
        found = registry if registry is not None else load(strict=False)
        results = {}
        for name, search in searches.items():
            results[name] = _run_here(name, search, found, tell)
            done(name, results[name])
        return results
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare) as pool:
        try:
            return _Spread(pool, searches, tell, done).run(at_once=2 * jobs)
        except BrokenProcessPool as error:
            raise DriftError(f"a worker process ended unexpectedly: {error}") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_here(
    name: str,
    search: Generator[Sequence[Trial], Sequence[Outcome], T],
    registry: Registry,
    tell: OnTrial,
) -> T:
    try:
        trials = next(search)
        while True:
            outcomes = []
            for trial in trials:
                outcomes.append(run_trial(trial, registry))
                tell(name, outcomes[-1])
            trials = search.send(outcomes)
    except StopIteration as stop:
        result: T = stop.value
        return result


@dataclass
class _Round:
    """Trials a search waits for; outcomes in their order."""

    missing: int
    outcomes: list[Outcome | None] = field(default_factory=list)


class _Spread(Generic[T]):
    """Keeps the current trials of a few searches in a pool, so that those named first end first."""

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        searches: Mapping[str, Generator[Sequence[Trial], Sequence[Outcome], T]],
        tell: OnTrial,
        done: Callable[[str, Any], None],
    ) -> None:
        self._pool, self._searches, self._tell, self._done = pool, searches, tell, done
        self._rounds: dict[str, _Round] = {}
        self._places: dict[Future[Outcome], tuple[str, int]] = {}
        self._results: dict[str, T] = {}

    def run(self, at_once: int) -> dict[str, T]:
        """Results by name, in the searches' order; `at_once` searches are under way at any time."""
        names = iter(self._searches)
        while True:
            while len(self._rounds) < at_once and (name := next(names, None)) is not None:
                self._go_on(name, None)
            if not self._places:
                break
            done, _ = wait(self._places, return_when=FIRST_COMPLETED)
            for future in done:
                self._take(future)
        return {name: self._results[name] for name in self._searches}

    def _go_on(self, name: str, outcomes: list[Outcome] | None) -> None:
        search: Generator[Sequence[Trial], Any, T] = self._searches[name]
        try:
            trials = search.send(outcomes)
            while not trials:
                trials = search.send([])
        except StopIteration as stop:
            self._results[name] = stop.value
            self._done(name, stop.value)
            return
        self._rounds[name] = _Round(len(trials), [None] * len(trials))
        for i, trial in enumerate(trials):
            self._places[self._pool.submit(_run, trial)] = (name, i)

    def _take(self, future: Future[Outcome]) -> None:
        name, place = self._places.pop(future)
        outcome = future.result()
        self._tell(name, outcome)
        waiting = self._rounds[name]
        waiting.outcomes[place] = outcome
        waiting.missing -= 1
        if not waiting.missing:
            del self._rounds[name]
            self._go_on(name, [o for o in waiting.outcomes if o is not None])


_registry: Registry | None = None
"""A worker process's own; loaded once."""


def _prepare() -> None:
    global _registry  # noqa: PLW0603 - set once per process, before its first trial
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells workers when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _registry = load(strict=False)


def _end_with_parent() -> None:
    """A pool's workers would wait for work for ever when their parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(trial: Trial) -> Outcome:
    return run_trial(trial, _registry)
