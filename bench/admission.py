"""What the gateway's gate does under overload, in virtual time, and how long a judgement takes in real time.

The gate and its ledger stand before the scheduler on a simulated device, as they stand before the engine in
`drift serve`: they see what an engine's frames tell, and nothing else. Every request asks to be rejected when its
targets cannot be met. Deterministic but for the microseconds.

    python bench/admission.py [--device h200] [--model llama-3.1-8b] [--workload sharegpt] [--rates 10,20,40,80]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from drift_core.frames import AcceptedItem, FinishedItem, LoadItem, StepFrame, TokensItem, pack_ids
from drift_gateway.gate import Asked, Gate, GateLimits, Verdict
from drift_gateway.refusal import Refusal
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.workload_ahead import WorkloadAhead
from drift_scheduler.domain import (
    SLO,
    Accepted,
    Event,
    Finished,
    Gang,
    PrefillShape,
    RequestArrived,
    RequestTiming,
    Step,
    Tokens,
)
from drift_scheduler.loop import serve
from drift_scheduler.simulation.executor import SimulatedExecutor
from drift_scheduler.simulation.run import Scenario, Simulation


@dataclass
class Tally:
    """What came of one run's requests."""

    offered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    judged_us: list[float] = field(default_factory=list)
    refusing_us: list[float] = field(default_factory=list)
    ends: list[tuple[RequestTiming, SLO]] = field(default_factory=list)
    gaps: dict[str, list[float]] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)


class Gated:
    """The executor, as seen by the scheduler behind the gate: arrivals that are refused never come."""

    def __init__(
        self, inner: SimulatedExecutor, simulation: Simulation, limits: GateLimits, way: int
    ) -> None:
        self.inner = inner
        self.tally = Tally()
        self._scheduler = simulation.scheduler
        self._way = way
        self.ahead = WorkloadAhead()
        self.gate = Gate(self.ahead, limits)
        units, kv = simulation.device.total_units, simulation.kv
        self.ahead.engine(
            total_pages=kv.total_pages,
            page_tokens=kv.page_tokens,
            max_running=simulation.scenario.max_running,
            prefill_seconds=[
                (length, simulation.costs.prefill(PrefillShape.of([(length, 0)]), units))
                for length in (64, 512, 4096)
            ],
        )

    @property
    def device(self) -> Any:
        return self.inner.device

    def now(self) -> float:
        return self.inner.now()

    def submit(self, gang: Gang) -> None:
        self.inner.submit(gang)

    def forget(self, request_ids: Sequence[str]) -> None:
        self.inner.forget(request_ids)

    def wait(self, until: float | None) -> Sequence[Event] | None:
        events = self.inner.wait(until)
        if events is None:
            return None
        return tuple(
            event for event in events if not isinstance(event, RequestArrived) or self._let_in(event)
        )

    def _let_in(self, event: RequestArrived) -> bool:
        request, tally, now = event.request, self.tally, self.now()
        tally.offered += 1
        asked = Asked(
            slo=request.slo,
            priority=request.priority,
            on_infeasible=self._way,
            arrival=request.arrival,
            deadline=None,
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.max_output_tokens,
            outputs=1,
        )
        begun = time.thread_time()
        try:
            verdict = self.gate.judge(asked, self.ahead.outputs, now)
        except Refusal as refusal:
            took = (time.thread_time() - begun) * 1e6
            tally.refusing_us.append(took)
            tally.judged_us.append(took)
            tally.refused[str(refusal.reason)] += 1
            self.inner.forget((request.id,))
            return False
        tally.judged_us.append((time.thread_time() - begun) * 1e6)
        tally.verdicts[request.id] = verdict
        self.ahead.add((request.id,), verdict.newcomer, now, verdict.forecast)
        return True

    def deliver(self, step: Step) -> None:
        """The step as a frame, if it has something to tell, and the account of what ended."""
        if not step.outputs and step.gang is None:
            return
        scheduler = self._scheduler
        accepted = [
            AcceptedItem(o.request_id, o.queue_position, _cached(scheduler, o.request_id))
            for o in step.outputs
            if isinstance(o, Accepted)
        ]
        tokens = [
            TokensItem(list(o.request_ids), pack_ids([0] * len(o.request_ids)), o.first)
            for o in step.outputs
            if isinstance(o, Tokens)
        ]
        ends = [o for o in step.outputs if isinstance(o, Finished)]
        for output in step.outputs:
            if isinstance(output, Tokens) and not output.first:
                for request_id, gap in zip(output.request_ids, output.gaps.tolist(), strict=True):
                    self.tally.gaps.setdefault(request_id, []).append(gap)
        prefill, decode = scheduler.prefill_flight, scheduler.decode_flight
        load = LoadItem(len(scheduler.queue), scheduler.running, scheduler.kv.free_pages)
        frame = StepFrame(
            self.now(),
            accepted,
            tokens,
            [_finished(end) for end in ends],
            prefill_requests=0 if prefill is None or prefill.batch is None else len(prefill.batch.chunks),
            decode_requests=0 if decode is None else decode.rows,
            load=load,
        )
        self.ahead.step(frame)
        for end in ends:
            self.tally.ends.append((end.timing, end.slo))
            predicted = self.tally.verdicts[end.request_id].forecast.ttft
            if predicted and end.timing.ttft is not None:
                self.tally.ratios.append(end.timing.ttft / predicted)


def _cached(scheduler: Any, request_id: str) -> int | None:
    tracked = scheduler.live.get(request_id)
    if tracked is None:
        return None
    if tracked.scheduled_at is not None:
        return int(tracked.cached)
    return int(scheduler.kv.lookup(tracked.request, tracked.known))


def _finished(end: Finished) -> FinishedItem:
    timing = end.timing
    return FinishedItem(end.request_id, end.reason.value, output_tokens=timing.output_tokens)


def run(scenario: Scenario, limits: GateLimits, way: int) -> dict[str, Any]:
    """One rate: what was let in, how it fared, how long judging took."""
    simulation = Simulation(scenario)
    inner = SimulatedExecutor(
        simulation.device,
        simulation.truth,
        simulation.requests,
        overheads=simulation.overheads,
        seed=scenario.seed,
    )
    gated = Gated(inner, simulation, limits, way)
    serve(simulation.scheduler, gated, gated.deliver)
    tally, seconds = gated.tally, inner.now()
    kept = [_kept(timing, slo) for timing, slo in tally.ends]
    ratios = sorted(tally.ratios)
    return {
        "rate": scenario.rate,
        "offered": tally.offered,
        "admitted": len(tally.ends),
        "refused": dict(tally.refused),
        "ttft_met": statistics.fmean(ttft for ttft, _ in kept) if kept else None,
        "both_met": statistics.fmean(ttft and tbt for ttft, tbt in kept) if kept else None,
        "goodput_per_s": sum(ttft and tbt for ttft, tbt in kept) / seconds,
        "actual_over_predicted": {f"p{q}": _quantile(ratios, q) for q in (10, 50, 90, 99)},
        "caution": gated.ahead.caution,
        "judge_us": {f"p{q}": _quantile(sorted(tally.judged_us), q) for q in (50, 99)},
        "refuse_us": {f"p{q}": _quantile(sorted(tally.refusing_us), q) for q in (50, 99)},
    }


def _kept(timing: RequestTiming, slo: SLO) -> tuple[bool, bool]:
    ttft = timing.ttft is not None and timing.ttft <= slo.ttft
    return ttft, timing.tbt_max <= slo.tbt or timing.late_tokens <= 0.01 * timing.output_tokens


def _quantile(ordered: Sequence[float], percent: int) -> float | None:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else None


def _rows(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "rate   offered admitted ttft met both met goodput/s"
    yield "       of actual/predicted TTFT p10 p50 p90 p99, microseconds of judging p50 p99, refused"
    for r in results:
        ratio, judge = r["actual_over_predicted"], r["judge_us"]
        told = " ".join(f"{v:5.2f}" if v is not None else "    -" for v in ratio.values())
        met = [f"{r[name]:8.3f}" if r[name] is not None else "       -" for name in ("ttft_met", "both_met")]
        yield (
            f"{r['rate']:<6g} {r['offered']:7d} {r['admitted']:8d} {met[0]} {met[1]} {r['goodput_per_s']:9.2f}"
            f"      {told}        {judge['p50']:6.0f} {judge['p99']:6.0f}  {r['refused']}"
        )


def main() -> int:
    """Run every rate and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h200")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--workload", default="sharegpt")
    parser.add_argument("--dispatch", default="drift")
    parser.add_argument("--rates", default="10,20,40,80")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, at every rate")
    parser.add_argument("--slo-ttft", type=float, default=1.0)
    parser.add_argument("--slo-tbt", type=float, default=0.05)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--way", choices=("best_effort", "reject", "demote"), default="reject")
    parser.add_argument("--json", metavar="PATH|-")
    asked = parser.parse_args()
    way = pb.OnInfeasible.Value(f"ON_INFEASIBLE_{asked.way.upper()}")
    results = [
        run(
            Scenario(
                workload=asked.workload, device=asked.device, model=asked.model, dispatch=asked.dispatch,
                slo=SLO(asked.slo_ttft, asked.slo_tbt), rate=float(rate), requests=int(float(rate) * asked.seconds),
                max_running=asked.max_running,
            ),
            GateLimits(100_000, 100_000),
            way,
        )
        for rate in asked.rates.split(",")
    ]  # fmt: skip
    if asked.json == "-":
        json.dump(results, sys.stdout, indent=2)
        return 0
    if asked.json is not None:
        with open(asked.json, "w", encoding="utf-8") as out:
            json.dump(results, out, indent=2)
    print("\n".join(_rows(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
