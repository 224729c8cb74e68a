"""The partition over time as lines of text: one bar per stretch of time, prefill from the left, decode from the right.

Reads no clock and prints nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds from `start` to `stop` with so many units busy in each lane."""

    start: float
    stop: float
    prefill_units: int
    decode_units: int
    sharing: str


@dataclass(frozen=True, slots=True)
class Bin:
    """Averages over one line's stretch: busy units per lane, and the way of sharing that took most of the time."""

    start: float
    prefill_units: float
    decode_units: float
    sharing: str


def bins(spans: Sequence[Span], count: int) -> list[Bin]:
    """Cut the busy part of the run into `count` equal stretches. Needs at least one busy span for any."""
    busy = [span for span in spans if span.prefill_units or span.decode_units]
    if not busy:
        return []
    start, stop = busy[0].start, busy[-1].stop
    width = (stop - start) / count
    return [_average(spans, start, start + k * width, start + (k + 1) * width) for k in range(count)]


def _average(spans: Sequence[Span], origin: float, start: float, stop: float) -> Bin:
    prefill = decode = 0.0
    times: dict[str, float] = defaultdict(float)
    for span in spans:
        overlap = min(stop, span.stop) - max(start, span.start)
        if overlap <= 0:
            continue
        prefill += span.prefill_units * overlap
        decode += span.decode_units * overlap
        times[span.sharing] += overlap
    length = stop - start
    sharing = max(times, key=lambda name: times[name]) if times else "idle"
    return Bin(start - origin, prefill / length, decode / length, sharing)


def chart(spans: Sequence[Span], units: int, lines: int = 24, width: int = 48) -> list[Text]:
    """One line per stretch of time; `width` characters are the whole device of `units`."""
    drawn = []
    for entry in bins(spans, lines):
        prefill = round(entry.prefill_units / units * width)
        decode = min(round(entry.decode_units / units * width), width - prefill)
        bar = Text.assemble(
            f"{entry.start:6.2f} s ",
            ("█" * prefill, "magenta"),
            ("·" * (width - prefill - decode), "dim"),
            ("▒" * decode, "cyan"),
            f" {entry.prefill_units:4.1f} + {entry.decode_units:.1f} {entry.sharing}",
        )
        drawn.append(bar)
    return drawn
