"""What the lanes did over time, from the engine's step frames, and running counts.

Keeps a bounded history that any number of watchers read, each at its own pace. Reads no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Final

from drift_core.frames import LoadItem, StepFrame

KEPT_STRETCHES: Final = 50_000
KEPT_USES: Final = 4096


@dataclass(frozen=True, slots=True)
class Use:
    """How the device is used: partition and sharing in force, requests in each lane. All zero is idle."""

    partition: tuple[int, int] | None = None
    sharing: str | None = None
    prefill_requests: int = 0
    decode_requests: int = 0

    def is_of(self, frame: StepFrame) -> bool:
        """Whether it is the use that a frame tells of: asked at each step, and mostly it is."""
        return (
            self.decode_requests == frame.decode_requests
            and self.prefill_requests == frame.prefill_requests
            and self.partition == frame.partition
            and self.sharing == frame.sharing
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time over which the use did not change, in seconds on the engine's clock."""

    start: float
    stop: float
    use: Use


class Timeline:
    """History of the device's use."""

    def __init__(self, kept: int = KEPT_STRETCHES) -> None:
        self.load: LoadItem | None = None
        self.tokens_generated = 0
        self.requests_finished = 0
        self.partition_switches = 0
        self.sharing_seconds: dict[str | None, float] = {}
        """By sharing (`None` is idle), up to the last `cut`."""
        self._partition: tuple[int, int] | None = None
        self._closed: deque[Stretch] = deque(maxlen=kept)
        self._count = 0
        self._use = Use()
        self._uses: dict[Use, Use] = {}  # the few there are come again and again, and are kept once
        self._since: float | None = None

    @property
    def use(self) -> Use:
        """How the device is used now."""
        return self._use

    def step(self, frame: StepFrame, steps: int = 1) -> None:
        """Take in one frame, the last of so many steps alike."""
        self.load = frame.load or self.load
        for item in frame.tokens:
            self.tokens_generated += steps * len(item.ids)
        self.requests_finished += len(frame.finished)
        if frame.others is not None:
            self.tokens_generated += frame.others.tokens
            self.requests_finished += len(frame.others.finished)
        if self._since is None or not self._use.is_of(frame):
            self.cut(frame.time)
            self._use_as(frame)

    def _use_as(self, frame: StepFrame) -> None:
        use = Use(frame.partition, frame.sharing, frame.prefill_requests, frame.decode_requests)
        if len(self._uses) >= KEPT_USES:
            self._uses.clear()
        self._use = self._uses.setdefault(use, use)
        if use.partition is not None:
            self.partition_switches += self._partition is not None and use.partition != self._partition
            self._partition = use.partition

    def engine_gone(self, now: float) -> None:
        """Nothing runs any more, and what the engine said of its load is void."""
        self.cut(now)
        self._use, self.load = Use(), None

    def cut(self, now: float) -> None:
        """End the current stretch at `now`, so that watchers see it; the same use goes on."""
        if self._since is not None and now > self._since:
            self._closed.append(Stretch(self._since, now, self._use))
            sharing = self._use.sharing
            self.sharing_seconds[sharing] = self.sharing_seconds.get(sharing, 0.0) + now - self._since
            self._count += 1
        if self._since is None or now > self._since:
            self._since = now

    def watch(self, since: float | None = None) -> Watcher:
        """A reader of everything from now on, or of what is kept from `since` on."""
        back = 0
        if since is not None:
            for stretch in reversed(self._closed):
                if stretch.stop <= since:
                    break
                back += 1
        return Watcher(self, self._count - back)

    def after(self, cursor: int) -> tuple[int, list[Stretch], int]:
        """Where to go on, the stretches from `cursor` on, and how many of those are no longer kept."""
        oldest = self._count - len(self._closed)
        dropped = max(0, oldest - cursor)
        start = max(cursor, oldest) - oldest
        return self._count, list(islice(self._closed, start, None)), dropped


class Watcher:
    """One reader's place in the history."""

    def __init__(self, timeline: Timeline, cursor: int) -> None:
        self._timeline = timeline
        self._cursor = cursor

    def take(self, now: float) -> tuple[list[Stretch], int]:
        """Stretches since the last call, up to `now`, and how many were dropped."""
        self._timeline.cut(now)
        self._cursor, stretches, dropped = self._timeline.after(self._cursor)
        return stretches, dropped
