"""How outputs fared: totals since the start, and the last minute by SLO class, from submissions and step frames.

One source for metrics, WatchStats, the access log and spans. It does nothing per token: an output's token times are
looked at once, when it ends. Memory: outputs in flight, and a bounded number of classes. Reads no clock; knows no
sockets.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from drift_core.frames import FinishedItem, StepFrame, Submit
from drift_scheduler.domain import FinishReason

Floats = npt.NDArray[np.float64]

WINDOW_S: Final = 60.0
SLOT_S: Final = 2.0
SLOTS: Final = int(WINDOW_S / SLOT_S)
MAX_CLASSES: Final = 32
DEFAULT_CLASS: Final = "default"
OTHER_CLASS: Final = "other"
"""Where classes beyond MAX_CLASSES are counted: their names come from clients."""

SHORTEST_S: Final = 1e-5
PER_OCTAVE: Final = 10
OCTAVES: Final = 33
BUCKETS: Final = PER_OCTAVE * OCTAVES
BUCKET_BOUNDS: Final = SHORTEST_S * 2.0 ** (np.arange(1, BUCKETS) / PER_OCTAVE)
"""Seconds where each bucket but the first begins."""
"""Quantiles of the last minute come from these: from 10 us to a day, within 3.6% of the true value."""

SECONDS_BOUNDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
TOKENS_BOUNDS: Final = tuple(float(4**power) for power in range(11))
SERVED_WELL: Final = (FinishReason.STOP.value, FinishReason.LENGTH.value)
METRICS: Final = ("ttft", "tbt", "e2e")


@dataclass(frozen=True, slots=True)
class EndedOutput:
    """One output that its reader is done with.

    Times are seconds on the monotonic clock, `None` where it never got there. `reason` is a `FinishReason` value;
    `None` when it was dropped, or lost with the engine. `tbt_*` are absent with fewer than two tokens. `*_met`: absent
    without such a target, or where it did not come to that.
    """

    id: str
    slo_class: str
    reason: str | None
    arrival: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int = 0
    tbt_p50: float | None = None
    tbt_p99: float | None = None
    tbt_max: float | None = None
    ttft_met: bool | None = None
    tbt_met: bool | None = None
    e2e_met: bool | None = None
    finished: float = 0.0

    @property
    def met(self) -> dict[str, bool]:
        """Of its targets that it came to, by METRICS, whether each was met."""
        found = zip(METRICS, (self.ttft_met, self.tbt_met, self.e2e_met), strict=True)
        return {name: met for name, met in found if met is not None}

    @property
    def well(self) -> bool:
        """Whether it ran to its own end within all its targets."""
        return self.reason in SERVED_WELL and all(self.met.values())


@dataclass(frozen=True, slots=True)
class ClassReport:
    """One class over the last minute; see `ClassStats` in info.proto. Seconds."""

    name: str
    finished: int
    ttft_attainment: float | None
    tbt_attainment: float | None
    ttft_p50: float | None
    ttft_p99: float | None
    tbt_p50: float | None
    tbt_p99: float | None
    ttft_target: float | None
    tbt_target: float | None
    goodput: float


class Buckets:
    """A histogram: values at or below each of `bounds`, and above them all. Counts and sum since the start."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.total = 0.0
        self._counts = [0] * (len(self.bounds) + 1)
        self._edges = np.array(self.bounds)
        self._many = 0
        self._below = np.zeros(len(self.bounds), dtype=np.int64)

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_sorted(self, values: Floats) -> None:
        """Count all of these, in order of size."""
        self._below += np.searchsorted(values, self._edges, side="right")
        self._many += len(values)
        self.total += float(values.sum())

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, values at or below it), as Prometheus has it."""
        names = [*(repr(bound) for bound in self.bounds), "+Inf"]
        many = [*self._below.tolist(), self._many]
        return [
            (name, float(count + more))
            for name, count, more in zip(names, accumulate(self._counts), many, strict=True)
        ]


class Histograms:
    """What vLLM has histograms of, over outputs (over tokens for `inter_token`)."""

    def __init__(self) -> None:
        self.first_token = Buckets(SECONDS_BOUNDS)
        self.inter_token = Buckets(SECONDS_BOUNDS)
        self.whole = Buckets(SECONDS_BOUNDS)
        self.queue = Buckets(SECONDS_BOUNDS)
        self.prefill = Buckets(SECONDS_BOUNDS)
        self.decode = Buckets(SECONDS_BOUNDS)
        self.prompt_tokens = Buckets(TOKENS_BOUNDS)
        self.output_tokens = Buckets(TOKENS_BOUNDS)

    def add(self, ended: EndedOutput, gaps: Floats) -> None:
        """Count one output."""
        self.prompt_tokens.add(ended.prompt_tokens)
        self.output_tokens.add(ended.output_tokens)
        if ended.scheduled is not None:
            self.queue.add(ended.scheduled - ended.arrival)
        if ended.first_token is None or ended.last_token is None:
            return
        self.first_token.add(ended.first_token - ended.arrival)
        self.whole.add(ended.last_token - ended.arrival)
        self.decode.add(ended.last_token - ended.first_token)
        if ended.scheduled is not None:
            self.prefill.add(ended.first_token - ended.scheduled)
        if len(gaps):
            self.inter_token.add_sorted(gaps)


class Timed(Protocol):
    """What is asked of `drift_core.link.Progress`."""

    @property
    def times(self) -> Sequence[float]:
        """Of the tokens so far, in order."""


@dataclass(slots=True)
class _Tracked:
    """An output in flight, or ended and not yet forgotten."""

    frame: Submit
    progress: Timed
    waiting: bool = True
    ended: EndedOutput | None = None


class ServiceStats:
    """Told of every submission, step and end; asked by whoever reports."""

    def __init__(self) -> None:
        self.histograms = Histograms()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.waiting_prefill_tokens = 0
        """Prompt tokens of outputs in flight that have no token yet."""
        self.ended_by_reason: dict[str, int] = {reason.value: 0 for reason in FinishReason}
        self.by_target: dict[tuple[str, str], list[int]] = {}
        """By class and metric: outputs within the target, and outputs that had one and came to it."""
        self.on_ended: Callable[[EndedOutput, Floats, tuple[float, float]], None] | None = None
        """Told of outputs that ended here, with what `add` takes."""
        self._tracked: dict[str, _Tracked] = {}
        self._classes: set[str] = {DEFAULT_CLASS, OTHER_CLASS}
        self._windows: dict[str, _Window] = {}
        self._since: float | None = None

    def submitted(self, frame: Submit, progress: Timed) -> None:
        """A request was sent to the engine. `progress` has the time of each of its tokens before `step` is told."""
        self._tracked[frame.id] = _Tracked(frame, progress)
        self.waiting_prefill_tokens += len(frame.prompt)
        if self._since is None:
            self._since = frame.arrival

    def step(self, frame: StepFrame) -> None:
        """Take in one frame."""
        for item in frame.tokens:
            if item.first:
                for request_id in item.ids:
                    self._no_longer_waits(self._tracked.get(request_id))
        for finished in frame.finished:
            self._finished(finished)
        for finished in frame.others.finished if frame.others is not None else ():
            self._count(finished)

    def forget(self, request_id: str, stopped_after: int | None = None) -> EndedOutput | None:
        """Its reader is done with it: how it ended, or how far it came. `None` when it was never submitted.

        `stopped_after`: the tokens of it after which a stop string came, whatever the engine made of it until it was
        told.
        """
        output = self._tracked.pop(request_id, None)
        if output is None:
            return None
        if output.ended is not None and stopped_after is not None:
            return _stopped(output, output.ended, stopped_after)
        if output.ended is not None:
            return output.ended
        self._no_longer_waits(output)
        return _ended(output, None)[0]

    def classes(self, now: float) -> list[ClassReport]:
        """Every class with outputs that ended in the minute before `now`, by name."""
        seconds = 1.0 if self._since is None else min(WINDOW_S, max(now - self._since, 1.0))
        reports = (
            window.report(name, _epoch(now), seconds) for name, window in sorted(self._windows.items())
        )
        return [report for report in reports if report is not None]

    def _count(self, item: FinishedItem) -> None:
        self.prompt_tokens += item.prompt_tokens
        self.cached_tokens += item.cached_tokens
        self.ended_by_reason[item.reason] = self.ended_by_reason.get(item.reason, 0) + 1

    def _finished(self, item: FinishedItem) -> None:
        self._count(item)
        output = self._tracked.get(item.id)
        if output is None:
            return
        self._no_longer_waits(output)
        ended, gaps = _ended(output, item)
        output.ended = ended
        self.add(ended, gaps, (output.frame.slo_ttft, output.frame.slo_tbt))
        if self.on_ended is not None:
            self.on_ended(ended, gaps, (output.frame.slo_ttft, output.frame.slo_tbt))

    def add(self, ended: EndedOutput, gaps: Floats, targets: tuple[float, float]) -> None:
        """Count an output that ran to an end, perhaps through another gateway.

        `gaps` between its tokens, in order of size; `targets` of TTFT and TBT. Seconds.
        """
        self.histograms.add(ended, gaps)
        if self._since is None:
            self._since = ended.arrival
        if ended.reason not in (*SERVED_WELL, FinishReason.FAILED.value):
            return  # cancelled or refused: no word on how well it would have been served
        for metric, met in ended.met.items():
            counts = self.by_target.setdefault((self._class(ended.slo_class), metric), [0, 0])
            counts[0] += met
            counts[1] += 1
        epoch = _epoch(ended.finished)
        self._window(ended.slo_class, epoch).add(ended, gaps, epoch, targets)

    def _no_longer_waits(self, output: _Tracked | None) -> None:
        if output is not None and output.waiting:
            output.waiting = False
            self.waiting_prefill_tokens -= len(output.frame.prompt)

    def _class(self, name: str) -> str:
        """The name itself for the first classes that come, OTHER_CLASS for the rest."""
        if name not in self._classes:
            if len(self._classes) >= MAX_CLASSES:
                return OTHER_CLASS
            self._classes.add(name)
        return name

    def _window(self, name: str, epoch: int) -> _Window:
        window = self._windows.get(name)
        if window is None:
            if len(self._windows) >= MAX_CLASSES - 1:
                old = [other for other, kept in self._windows.items() if kept.latest <= epoch - SLOTS]
                for other in old:
                    del self._windows[other]
            if len(self._windows) >= MAX_CLASSES - 1:
                name = OTHER_CLASS
            window = self._windows.setdefault(name, _Window())
        return window


def _ended(output: _Tracked, item: FinishedItem | None) -> tuple[EndedOutput, Floats]:
    """What became of an output, and the gaps between its tokens in order of size."""
    frame = output.frame
    failed = item is not None and item.reason == FinishReason.FAILED.value
    complete = item is not None and item.reason in SERVED_WELL
    timed, gaps = _timed(frame, output.progress.times, complete, failed)
    ended = EndedOutput(
        id=frame.id,
        slo_class=frame.slo_class,
        reason=None if item is None else item.reason,
        arrival=frame.arrival,
        scheduled=None if item is None else item.scheduled,
        prompt_tokens=len(frame.prompt),
        cached_tokens=0 if item is None else item.cached_tokens,
        preemptions=0 if item is None else item.preemptions,
        finished=0.0 if item is None else item.finished,
        **timed,
    )
    return ended, gaps


def _stopped(output: _Tracked, ended: EndedOutput, tokens: int) -> EndedOutput:
    """An output as its client had it: until a stop string, after so many tokens."""
    timed, _ = _timed(output.frame, output.progress.times[:tokens], complete=True, failed=False)
    return replace(ended, reason=FinishReason.STOP.value, **timed)


def _timed(frame: Submit, at: Sequence[float], complete: bool, failed: bool) -> tuple[dict[str, Any], Floats]:
    """What the times of an output's tokens tell of it, and the gaps between them in order of size."""
    times = np.array(at)
    gaps = np.sort(np.diff(times))
    first, last = (float(times[0]), float(times[-1])) if len(times) else (None, None)
    tbt_p99 = nearest_rank(gaps, 0.99)
    timed = {
        "first_token": first,
        "last_token": last,
        "output_tokens": len(times),
        "tbt_p50": nearest_rank(gaps, 0.5),
        "tbt_p99": tbt_p99,
        "tbt_max": float(gaps[-1]) if len(gaps) else None,
        "ttft_met": _met(frame.slo_ttft, None if first is None else first - frame.arrival, failed),
        "tbt_met": _met(frame.slo_tbt, tbt_p99, failed and first is not None),
        "e2e_met": _met(
            frame.slo_e2e, last - frame.arrival if complete and last is not None else None, failed
        ),
    }
    return timed, gaps


def _met(target: float | None, seconds: float | None, failed: bool) -> bool | None:
    """Whether a target was met; work that failed before it came to that missed it."""
    if target is None or not math.isfinite(target):
        return None
    if seconds is None:
        return False if failed else None
    return seconds <= target


def nearest_rank(ordered: Floats, fraction: float) -> float | None:
    """The smallest value with at least `fraction` of all at or below it; `None` of nothing."""
    count = len(ordered)
    return float(ordered[max(0, math.ceil(fraction * count) - 1)]) if count else None


# ------------------------------------------------------------------------------------ the last minute


def _epoch(now: float) -> int:
    return int(now // SLOT_S)


@dataclass(slots=True)
class _Slot:
    """Outputs of one class that ended within one SLOT_S. `ttft` and `tbt` count by logarithmic bucket."""

    epoch: int = -1
    finished: int = 0
    good: int = 0
    ttft_met: int = 0
    ttft_of: int = 0
    tbt_met: int = 0
    tbt_of: int = 0
    ttft: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(BUCKETS, dtype=np.uint32))
    tbt: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(BUCKETS, dtype=np.uint32))

    def restart(self, epoch: int) -> None:
        self.epoch = epoch
        self.finished = self.good = self.ttft_met = self.ttft_of = self.tbt_met = self.tbt_of = 0
        self.ttft[:] = 0
        self.tbt[:] = 0


class _Window:
    """One class: a ring of slots."""

    def __init__(self) -> None:
        self.latest = -1
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._targets: tuple[float | None, float | None] = (None, None)

    def add(self, ended: EndedOutput, gaps: Floats, epoch: int, targets: tuple[float, float]) -> None:
        """Count an output that ended now."""
        slot = self._slots[epoch % SLOTS]
        if slot.epoch != epoch:
            slot.restart(epoch)
        self.latest = max(self.latest, epoch)
        slot.finished += 1
        slot.good += ended.well
        if ended.ttft_met is not None:
            slot.ttft_of += 1
            slot.ttft_met += ended.ttft_met
        if ended.tbt_met is not None:
            slot.tbt_of += 1
            slot.tbt_met += ended.tbt_met
        if ended.first_token is not None:
            octaves = math.log2(max(ended.first_token - ended.arrival, SHORTEST_S) / SHORTEST_S)
            slot.ttft[min(int(octaves * PER_OCTAVE), BUCKETS - 1)] += 1
        if len(gaps):
            slot.tbt += _counts(gaps)
        self._targets = (_finite(targets[0]), _finite(targets[1]))

    def report(self, name: str, epoch: int, seconds: float) -> ClassReport | None:
        """The minute before `epoch`; `None` when nothing ended in it."""
        slots = [slot for slot in self._slots if slot.finished and epoch - SLOTS < slot.epoch <= epoch]
        if not slots:
            return None
        ttft: npt.NDArray[np.uint64] = np.sum([slot.ttft for slot in slots], axis=0, dtype=np.uint64)
        tbt: npt.NDArray[np.uint64] = np.sum([slot.tbt for slot in slots], axis=0, dtype=np.uint64)
        ttft_target, tbt_target = self._targets
        return ClassReport(
            name=name,
            finished=sum(slot.finished for slot in slots),
            ttft_attainment=_share(sum(s.ttft_met for s in slots), sum(s.ttft_of for s in slots)),
            tbt_attainment=_share(sum(s.tbt_met for s in slots), sum(s.tbt_of for s in slots)),
            ttft_p50=_quantile(ttft, 0.5),
            ttft_p99=_quantile(ttft, 0.99),
            tbt_p50=_quantile(tbt, 0.5),
            tbt_p99=_quantile(tbt, 0.99),
            ttft_target=ttft_target,
            tbt_target=tbt_target,
            goodput=sum(slot.good for slot in slots) / seconds,
        )


def _counts(ordered: Floats) -> npt.NDArray[np.uint32]:
    """How many of these, which are in order of size, fall into each bucket."""
    below = np.searchsorted(ordered, BUCKET_BOUNDS)
    return np.diff(below, prepend=0, append=len(ordered)).astype(np.uint32)


def _quantile(counts: npt.NDArray[np.uint64], fraction: float) -> float | None:
    """The middle (geometric) of the bucket in which the nearest-rank quantile lies."""
    total = int(counts.sum())
    if not total:
        return None
    place = int(np.searchsorted(np.cumsum(counts), max(1, math.ceil(fraction * total))))
    return float(SHORTEST_S * 2.0 ** ((place + 0.5) / PER_OCTAVE))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
