"""A lane: one thread pinned to its share of the cores, running one piece of work at a time.

Knows nothing of models or requests. What a piece of work raises goes to its `failed`; the thread lives on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from drift_scheduler.domain import Lane, Partition

Pin = Callable[[Lane, Partition], object]
"""Move the calling thread, and the threads that compute for it, to a lane's cores of a partition."""


class Job(NamedTuple):
    """A piece of work for a lane under a partition."""

    partition: Partition
    run: Callable[[], None]
    failed: Callable[[Exception], None]


class LaneThread:
    """Runs jobs in order of arrival, each under its partition's share of cores."""

    def __init__(self, lane: Lane, pin: Pin) -> None:
        self.lane = lane
        self._pin = pin
        self._pinned: Partition | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"drift-{lane.value}", daemon=True)
        self._thread.start()

    def start(self, job: Job) -> None:
        """Hand over a job; returns at once."""
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what was handed over and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _serve(self) -> None:
        with torch.inference_mode():
            for job in iter(self._jobs.get, None):
                try:
                    if job.partition != self._pinned:
                        self._pin(self.lane, job.partition)
                        self._pinned = job.partition
                    job.run()
                except Exception as error:
                    job.failed(error)
