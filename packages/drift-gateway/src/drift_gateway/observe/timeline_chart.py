"""The partition over time as text: one bar per stretch of time, or a strip that runs from left to right.

Reads no clock and prints nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds from `start` to `stop` with so many units busy in each lane; `mixed_units` work for both."""

    start: float
    stop: float
    prefill_units: float
    decode_units: float
    sharing: str
    mixed_units: float = 0.0


@dataclass(frozen=True, slots=True)
class Bin:
    """Averages over one line's stretch: busy units per lane, and the way of sharing that took most of the time."""

    start: float
    prefill_units: float
    decode_units: float
    sharing: str
    mixed_units: float = 0.0


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


def columns(spans: Sequence[Span], start: float, stop: float, count: int) -> list[Bin]:
    """Averages over `count` equal stretches of `[start, stop)`; time that no span covers is idle."""
    width = (stop - start) / count
    sums = [[0.0, 0.0, 0.0] for _ in range(count)]
    times: list[dict[str, float]] = [{} for _ in range(count)]
    for span in spans:
        first = max(0, int((span.start - start) / width)) if span.start > start else 0
        for k in range(first, count):
            left = start + k * width
            overlap = min(span.stop, left + width) - max(span.start, left)
            if overlap <= 0:
                if left >= span.stop:
                    break
                continue
            column = sums[k]
            column[0] += span.prefill_units * overlap
            column[1] += span.decode_units * overlap
            column[2] += span.mixed_units * overlap
            times[k][span.sharing] = times[k].get(span.sharing, 0.0) + overlap
    return [
        Bin(
            k * width,
            prefill / width,
            decode / width,
            max(times[k], key=times[k].__getitem__) if times[k] else "idle",
            mixed / width,
        )
        for k, (prefill, decode, mixed) in enumerate(sums)
    ]


def strip(entries: Sequence[Bin], units: int, rows: int = 6) -> list[Text]:
    """Time from left to right, a character per entry; the whole device is `rows` high, prefill at the top."""
    lines = []
    for row in range(rows):
        middle = (row + 0.5) / rows * units
        line = Text()
        for entry in entries:
            line.append(*_mark(entry, middle, units))
        lines.append(line)
    return lines


def _mark(entry: Bin, at: float, units: int) -> tuple[str, str]:
    """What unit `at`, counted from the top, did."""
    if at < entry.prefill_units:
        return "█", "magenta"
    if at >= units - entry.decode_units:
        return "▒", "cyan"
    if at < entry.prefill_units + entry.mixed_units:
        return "▓", "yellow"
    return "·", "dim"
