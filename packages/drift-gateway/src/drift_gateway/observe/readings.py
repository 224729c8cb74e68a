"""What people are shown of a running server: WatchStats messages as readings, plain values ready to draw or print.

`drift top` and the dashboard show the same readings. Times in seconds, shares from 0 to 1, `None` where the server does
not say. Knows nothing of terminals, browsers or sockets, and reads no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from drift_gateway.observe.timeline_chart import Span, columns
from drift_gateway.v1 import info_pb2 as pb

SCHEMA: Final = "drift.stats/1"
RATE_WINDOW_S: Final = 5.0
SPLIT_S: Final = 1.0
STRIP_LIMIT: Final = 60
"""Most spans of one reading; a busier stretch of time is averaged down to so many."""

Reading = dict[str, Any]


class Readings:
    """Turns messages into readings; keeps what rates need."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int, int, int]] = deque()

    def take(
        self, info: pb.GetServerInfoResponse, message: pb.WatchStatsResponse, limit: int = STRIP_LIMIT
    ) -> Reading:
        """The reading of one message, with at most `limit` spans; `info` as the server last gave it."""
        now = message.time_us / 1e6
        spans = compact([span_of(stretch) for stretch in message.stretches], limit)
        return {
            "schema": SCHEMA,
            "time_s": now,
            "server": server_of(info),
            "load": _load(info, message.load),
            "rates": self._rates(now, message.load),
            "goodput": sum(entry.goodput for entry in message.classes),
            "classes": [_class(entry) for entry in message.classes],
            "split": split_of(latest(spans)),
            "strip": [
                [s.start, s.stop, s.prefill_units, s.decode_units, s.mixed_units, s.sharing] for s in spans
            ],
            "dropped": message.dropped,
        }

    def _rates(self, now: float, load: pb.Load) -> dict[str, float | None]:
        """Per second over the last few seconds; counters that fell were those of an engine that is gone."""
        counts = (now, load.tokens_generated, load.requests_finished, load.prompt_tokens)
        if self._counts and any(new < old for new, old in zip(counts, self._counts[-1], strict=True)):
            self._counts.clear()
        self._counts.append(counts)
        while len(self._counts) > 2 and now - self._counts[0][0] > RATE_WINDOW_S:
            self._counts.popleft()
        names = ("output_tokens_per_s", "requests_per_s", "prompt_tokens_per_s")
        seconds = now - self._counts[0][0]
        if seconds <= 0:
            return dict.fromkeys(names)
        first = self._counts[0]
        return {name: (counts[i] - first[i]) / seconds for i, name in enumerate(names, 1)}


def server_of(info: pb.GetServerInfoResponse) -> dict[str, Any]:
    """Who serves what."""
    starting = info.HasField("start_up")
    return {
        "version": info.version,
        "readiness": pb.Readiness.Name(info.readiness).removeprefix("READINESS_").lower(),
        "phase": info.start_up.phase if starting else None,
        "fraction": info.start_up.fraction if starting else None,
        "model": info.model.name or None,
        "device": info.device.name or None,
        "units": info.device.units or None,
        "menu": [[p.prefill_units, p.decode_units] for p in info.device.partition_menu],
        "dispatch": info.policies.dispatch or None,
        "partition": info.policies.partition or None,
        "max_running": info.kv_pool.max_running or None,
        "page_tokens": info.kv_pool.page_tokens or None,
        "restarts": info.engine_restarts,
    }


def _load(info: pb.GetServerInfoResponse, load: pb.Load) -> dict[str, Any]:
    def known(name: str) -> int | None:
        return getattr(load, name) if load.HasField(name) else None

    free, total = known("free_pages"), known("total_pages") or info.kv_pool.total_pages or None
    used = total - free if total is not None and free is not None else None
    return {
        "in_flight": load.in_flight,
        "max_in_flight": load.max_in_flight,
        "waiting": known("waiting"),
        "running": known("running"),
        "waiting_prefill_tokens": known("waiting_prefill_tokens"),
        "used_pages": used,
        "total_pages": total,
        "kv_share": used / total if used is not None and total else None,
        "tokens_generated": load.tokens_generated,
        "requests_finished": load.requests_finished,
        "preemptions": load.preemptions,
        "prompt_tokens": load.prompt_tokens,
        "cached_tokens": load.cached_tokens,
        "prefix_hit_share": load.cached_tokens / load.prompt_tokens if load.prompt_tokens else None,
    }


def _class(entry: pb.ClassStats) -> dict[str, Any]:
    def known(name: str, factor: float = 1.0) -> float | None:
        return getattr(entry, name) * factor if entry.HasField(name) else None

    return {
        "name": getattr(entry, "class"),
        "finished": entry.finished,
        "goodput": entry.goodput,
        "ttft_attainment": known("ttft_attainment"),
        "tbt_attainment": known("tbt_attainment"),
        **{
            f"{metric}_{what}_s": known(f"{metric}_{what}_ms", 1e-3)
            for metric in ("ttft", "tbt")
            for what in ("p50", "p99", "target")
        },
    }


# ---------------------------------------------------------------------------------------- the device


def span_of(stretch: pb.Stretch) -> Span:
    """Units busy in each lane alone, and those that both share, one after the other or in one pass."""
    prefill, decode = stretch.partition.prefill_units, stretch.partition.decode_units
    sharing = pb.Sharing.Name(stretch.sharing).removeprefix("SHARING_").lower()
    start, stop = stretch.start_us / 1e6, stretch.stop_us / 1e6
    both = stretch.prefill_requests > 0 and stretch.decode_requests > 0
    if both and stretch.sharing != pb.SHARING_SPATIAL:
        return Span(start, stop, 0, 0, sharing, max(prefill, decode))
    return Span(
        start,
        stop,
        prefill if stretch.prefill_requests else 0,
        decode if stretch.decode_requests else 0,
        sharing,
    )


def latest(spans: Sequence[Span], seconds: float = SPLIT_S) -> list[Span]:
    """The spans of the last `seconds` at most."""
    start = spans[-1].stop - seconds if spans else 0.0
    recent = [span for span in spans if span.stop > start]
    return [replace(span, start=max(span.start, start)) for span in recent]


def compact(spans: Sequence[Span], limit: int = STRIP_LIMIT) -> list[Span]:
    """At most `limit` spans, over the same time, averaged where there were more."""
    if len(spans) <= limit:
        return list(spans)
    start, stop = spans[0].start, spans[-1].stop
    edges = [start + k * (stop - start) / limit for k in range(limit + 1)]
    bins = columns(spans, start, stop, limit)
    return [
        Span(a, b, entry.prefill_units, entry.decode_units, entry.sharing, entry.mixed_units)
        for (a, b), entry in zip(pairwise(edges), bins, strict=True)
    ]


def split_of(spans: Iterable[Span]) -> dict[str, Any]:
    """Mean units of each lane over the time of the spans, and how the device was shared for most of it."""
    spans = list(spans)
    seconds = sum(span.stop - span.start for span in spans)
    if seconds <= 0:
        return {"prefill_units": 0.0, "decode_units": 0.0, "mixed_units": 0.0, "sharing": "idle"}
    (entry,) = columns(spans, spans[0].start, spans[-1].stop, 1)
    return {
        "prefill_units": entry.prefill_units,
        "decode_units": entry.decode_units,
        "mixed_units": entry.mixed_units,
        "sharing": entry.sharing,
    }
