"""Who may run after whom, said to the device: each stream waits for what other lanes have finished since it last
did.

Requests pass from the prefill lane to the decode lane when a prefill is done, pages and buffers from any lane
to any other when work is done. So before a lane starts something, its stream waits for the latest finished
work of both lanes, and never for work that still runs: that would make one lane wait for the other. Knows
nothing of what the work is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from drift_core.cuda.device import Accelerator, Event, Stream
from drift_scheduler.domain import Lane

_IN_TURN = 4  # marks of a lane: one runs, one is the latest, the rest is distance


@dataclass(slots=True, eq=False)
class Mark:
    """A piece of work's begin and end on its stream."""

    lane: Lane
    start: Event
    stop: Event
    stream: Stream | None = None
    number: int = 0


class _Latest(NamedTuple):
    number: int
    stop: Event


class Order:
    """The marks of both lanes, and what each stream has waited for."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._marks = {
            lane: [Mark(lane, accelerator.event(), accelerator.event()) for _ in range(_IN_TURN)]
            for lane in Lane
        }
        self._count = dict.fromkeys(Lane, 0)
        self._latest: dict[Lane, _Latest] = {}
        self._known: dict[int, dict[Lane, int]] = {}

    def catch_up(self, stream: Stream) -> None:
        """What the stream is given from now on runs after all that is finished."""
        known = self._known.setdefault(id(stream), {})
        for other, latest in self._latest.items():
            if known.get(other, 0) < latest.number:
                self._accelerator.wait(stream, latest.stop)
                known[other] = latest.number

    def begin(self, lane: Lane, stream: Stream) -> Mark:
        """A lane's next work starts on `stream`, after all that is finished."""
        self.catch_up(stream)
        self._count[lane] += 1
        mark = self._marks[lane][self._count[lane] % _IN_TURN]
        mark.stream, mark.number = stream, self._count[lane]
        self._accelerator.record(mark.start, stream)
        return mark

    def end(self, mark: Mark) -> None:
        """All of it has been handed to the device."""
        assert mark.stream is not None
        self._accelerator.record(mark.stop, mark.stream)

    def reached(self, mark: Mark) -> bool:
        """Whether it is done; from then on others run after it."""
        if not self._accelerator.reached(mark.stop):
            return False
        self.finished(mark)
        return True

    def finished(self, mark: Mark) -> None:
        """Others run after it from now on, whether or not the host has seen its end."""
        self._latest[mark.lane] = _Latest(mark.number, mark.stop)
        self._known[id(mark.stream)][mark.lane] = mark.number

    def seconds(self, mark: Mark) -> float:
        """How long it took on the device, gaps between its launches included."""
        return self._accelerator.elapsed(mark.start, mark.stop)
