"""What a load run amounts to: every request's fate as its client saw it, counted by the scheduler's own metrics.

Latency counts from the moment a request was meant to be sent, not from when it was, so that a client or server that
falls behind cannot hide it (coordinated omission). What only the server knows (lanes, sharing, KV pages) comes from
its statistics where it gives any, and is null otherwise. Reads no clock: times are handed in.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import info_pb2
from drift_scheduler.domain import (
    Device,
    Finished,
    FinishReason,
    Request,
    RequestArrived,
    RequestTiming,
    Step,
    StepRecord,
    Tokens,
)
from drift_scheduler.metrics import Distribution, LaneTime, Metrics
from drift_scheduler.report import Report, build_report

REASONS: Final[Mapping[int, FinishReason]] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    pb.FINISH_REASON_REJECTED: FinishReason.REJECTED,
    pb.FINISH_REASON_FAILED: FinishReason.FAILED,
}


@dataclass(slots=True)
class Outcome:
    """One request's story, on the client's clock. `due`: when it was meant to be sent."""

    request: Request
    due: float
    sent: float | None = None
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    gaps: array[float] = field(default_factory=lambda: array("d"))
    server_gaps: array[float] = field(default_factory=lambda: array("d"))
    messages: int = 0
    faults: int = 0
    """Messages lost, repeated or out of order."""
    finished: pb.Finished | None = None
    reason: FinishReason | None = None
    error: str | None = None
    _offset: int | None = None

    def delta(self, delta: pb.TokenDelta, now: float) -> None:
        """A message of tokens; those that come together count as 0 s apart, as that is how their reader sees them."""
        self.faults += delta.sequence != self.messages
        self.messages += 1
        count = len(delta.token_ids)
        if not count:
            return
        if self.last is None:
            self.first = now
            self.gaps.extend([0.0] * (count - 1))
        else:
            self.gaps.append(now - self.last)
            if count > 1:
                self.gaps.extend([0.0] * (count - 1))
        self.last = now
        self.tokens += count
        for offset in delta.offsets_us:
            if self._offset is not None:
                self.server_gaps.append((offset - self._offset) / 1e6)
            self._offset = offset

    def end(self, finished: pb.Finished) -> None:
        """The server's last word."""
        self.finished = finished
        self.reason = REASONS.get(finished.reason, FinishReason.FAILED)
        if self.reason in (FinishReason.REJECTED, FinishReason.FAILED):
            self.error = finished.message or self.reason.value


class Account:
    """Counts a run on a device of `units`."""

    def __init__(self, units: int) -> None:
        self.metrics = Metrics(Device(units, (), 1))
        self.send_lag = Distribution()
        self.server_ttft = Distribution()
        self.server_tbt = Distribution()
        self.gateway = Distribution()
        self.refused_after = Distribution()
        self.errors: Counter[str] = Counter()
        self.faults = 0
        self.cut = 0
        self.done = 0
        self._index = 0

    def due(self, request: Request, due: float, now: float, cut: bool) -> None:
        """A request's time came."""
        self.cut += cut
        self._record(now, events=(RequestArrived(replace(request, arrival=due)),))

    def sent(self, outcome: Outcome, now: float) -> None:
        """It left, perhaps late."""
        outcome.sent = now
        self.send_lag.add(max(0.0, now - outcome.due))

    def ended(self, outcome: Outcome, now: float) -> None:
        """Take a request's story in, whole or as far as it got."""
        self.done += 1
        self.faults += outcome.faults
        if outcome.error is not None:
            self.errors[outcome.error] += 1
        reason = outcome.reason or FinishReason.CANCELLED
        if reason is FinishReason.REJECTED and outcome.sent is not None:
            self.refused_after.add(now - outcome.sent)
        outputs: list[Tokens | Finished] = []
        if outcome.first is not None:
            outputs.append(_tokens(outcome, np.array([outcome.first - outcome.due]), first=True))
            if outcome.gaps:
                outputs.append(_tokens(outcome, np.array(outcome.gaps), first=False))
        ended = outcome.last if outcome.last is not None else now
        outputs.append(
            Finished(ended, outcome.request.id, reason, timing_of(outcome, ended), outcome.request.slo)
        )
        self._server_view(outcome)
        self._record(now, outputs=tuple(outputs))

    def _server_view(self, outcome: Outcome) -> None:
        self.server_tbt.extend(np.array(outcome.server_gaps))
        if outcome.finished is None:
            return
        timing = outcome.finished.timing
        self.gateway.add(timing.gateway_ms / 1e3)
        if timing.HasField("ttft_ms"):
            self.server_ttft.add(timing.ttft_ms / 1e3)

    def _record(
        self,
        now: float,
        events: tuple[RequestArrived, ...] = (),
        outputs: tuple[Tokens | Finished, ...] = (),
    ) -> None:
        step = Step(outputs=outputs)
        self.metrics.on_step(StepRecord(self._index, now, events, step))
        self._index += 1

    def report(self, config: Mapping[str, Any], device: DeviceTime | None) -> Report:
        """The run as `drift.report/1`, with what the client and the server saw apart in `client` and `server`."""
        metrics = self.metrics
        known = device is not None and device.complete and metrics.started is not None
        if known:
            assert device is not None
            assert metrics.started is not None
            device.spend(metrics, metrics.started, metrics.now)
        report = build_report(metrics, config)
        if not known:
            report["lanes"] = dict.fromkeys(report["lanes"])
            report["sharing_s"] = dict.fromkeys(report["sharing_s"])
        report["kv"]["peak_utilisation"] = device.peak_utilisation if device is not None else None
        report["scheduler"] = {
            "steps": None, "step_us": {"p50": None, "p99": None}, "faults": None, "first_fault": None,
        }  # fmt: skip
        report["client"] = {
            "latency_from": "intended send time",
            "send_lag_s": self.send_lag.summary(),
            "shortened_requests": self.cut,
            "sequence_faults": self.faults,
            "refused_after_s": self.refused_after.summary(),
            "errors": dict(self.errors.most_common()),
        }
        report["server"] = {
            "latency_from": "arrival at the gateway",
            "ttft_s": self.server_ttft.summary(),
            "tbt_s": self.server_tbt.summary(),
            "gateway_s": self.gateway.summary(),
        }
        return report


def timing_of(outcome: Outcome, ended: float) -> RequestTiming:
    """How it fared, from its due time on. Prefill's start is the server's word, counted from when it was sent."""
    scheduled: float | None = None
    usage, timing = pb.Usage(), pb.RequestTiming()
    if outcome.finished is not None:
        usage, timing = outcome.finished.usage, outcome.finished.timing
        if timing.HasField("queue_ms") and outcome.sent is not None:
            scheduled = outcome.sent + timing.queue_ms / 1e3
    return RequestTiming(
        arrival=outcome.due,
        finished=ended,
        scheduled=scheduled,
        first_token=outcome.first,
        prompt_tokens=usage.prompt_tokens,
        output_tokens=outcome.tokens,
        cached_tokens=usage.cached_tokens,
        recomputed_tokens=timing.recomputed_tokens,
        preemptions=timing.preemptions,
        tbt_max=max(outcome.gaps, default=0.0),
        late_tokens=sum(gap > outcome.request.slo.tbt for gap in outcome.gaps),
    )


def _tokens(outcome: Outcome, gaps: np.ndarray[Any, np.dtype[np.float64]], first: bool) -> Tokens:
    ids = (outcome.request.id,) * len(gaps)
    return Tokens(outcome.last or 0.0, ids, None, gaps, first)


class DeviceTime:
    """What the server said its device did, from WatchStats. `complete`: nothing was dropped and the end was seen."""

    def __init__(self) -> None:
        self.complete = False
        self.dropped = 0
        self._offset: float | None = None
        self._stretches: list[info_pb2.Stretch] = []
        self._least_free: float | None = None

    def add(self, message: info_pb2.WatchStatsResponse, now: float) -> None:
        """One message, received `now` on the client's clock."""
        offset = now - message.time_us / 1e6
        # The quickest message tells best how the clocks lie to one another.
        self._offset = offset if self._offset is None else min(self._offset, offset)
        self._stretches.extend(message.stretches)
        self.dropped += message.dropped
        load = message.load
        if load.HasField("free_pages") and load.HasField("total_pages") and load.total_pages:
            free = load.free_pages / load.total_pages
            self._least_free = free if self._least_free is None else min(self._least_free, free)

    @property
    def seen_until(self) -> float | None:
        """On the client's clock."""
        if self._offset is None or not self._stretches:
            return None
        return self._stretches[-1].stop_us / 1e6 + self._offset

    @property
    def peak_utilisation(self) -> float | None:
        """Largest share of pages held in any message; what was held only in between is not seen."""
        return None if self._least_free is None else 1 - self._least_free

    def spend(self, metrics: Metrics, start: float, stop: float) -> None:
        """Put the device's time between `start` and `stop` into the metrics, as the simulator's own steps would."""
        metrics.lanes = LaneTime()
        for stretch in self._stretches:
            assert self._offset is not None
            begin = max(start, stretch.start_us / 1e6 + self._offset)
            end = min(stop, stretch.stop_us / 1e6 + self._offset)
            if end > begin:
                _spend(metrics.lanes, stretch, end - begin, metrics.device.total_units)


_SHARINGS: Final = {
    info_pb2.SHARING_SPATIAL: "spatial",
    info_pb2.SHARING_TEMPORAL: "temporal",
    info_pb2.SHARING_FUSED: "fused",
}


def _spend(lanes: LaneTime, stretch: info_pb2.Stretch, seconds: float, units: int) -> None:
    prefill, decode = stretch.prefill_requests > 0, stretch.decode_requests > 0
    if not prefill and not decode:
        lanes.sharing["idle"] += seconds
        return
    lanes.prefill_busy += seconds * prefill
    lanes.decode_busy += seconds * decode
    lanes.busy_unit_seconds += seconds * units
    if stretch.sharing == info_pb2.SHARING_EXCLUSIVE:
        lanes.sharing["exclusive_prefill" if prefill else "exclusive_decode"] += seconds
        return
    lanes.sharing[_SHARINGS.get(stretch.sharing, "streams")] += seconds
    if stretch.sharing == info_pb2.SHARING_SPATIAL and not (prefill and decode):
        idle = stretch.partition.decode_units if prefill else stretch.partition.prefill_units
        lanes.bubble_unit_seconds += seconds * idle
