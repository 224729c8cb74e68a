"""Who is let in: decided from predicted token work and KV pages, in microseconds, before anything is allocated.

What is refused here has never reached the engine. Running streams that keep their targets are not given up for new
ones: a newcomer that would push them past their TBT target is refused, and so is one whose own targets cannot be met
if it asked for that. Knows no sockets and no tokenizer; the clock is read by the callers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Final

from drift_gateway.refusal import Reason, Refusal, invalid
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.workload_ahead import Forecast, Newcomer, WorkloadAhead
from drift_scheduler.domain import SLO

DEMOTED_PRIORITY: Final = 10_000
"""Added to a demoted request's priority: behind whatever priority a client may give."""
SHORTEST_RETRY_S: Final = 0.05
LONGEST_RETRY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class GateLimits:
    """Bounds of what is let in.

    `max_in_flight`: outputs in all. `max_queued`: outputs of one SLO class that have no token yet; `None` makes it
    half of `max_in_flight`. `kv_promise`: pages that outputs in flight may be expected to need at their ends, as a
    multiple of the pool.
    """

    max_in_flight: int = 1024
    max_queued: int | None = None
    kv_promise: float = 16.0

    @property
    def queue(self) -> int:
        """Outputs of one class that may wait."""
        if self.max_queued is not None:
            return self.max_queued
        return max(min(16, self.max_in_flight), self.max_in_flight // 2)


DEFAULT_LIMITS: Final = GateLimits()


@dataclass(frozen=True, slots=True)
class Asked:
    """What the gate has to know of a request. `arrival` and `deadline` on the engine's clock.

    `prompt_tokens` is 1 while the prompt is not tokenised yet: then the answer may be a refusal too early by nothing.
    `min_tokens`: outputs end no sooner, whatever is drawn.
    """

    slo: SLO
    priority: int
    on_infeasible: int
    arrival: float
    deadline: float | None
    prompt_tokens: int
    max_tokens: int
    outputs: int
    min_tokens: int = 0

    def newcomer(self, demoted: bool = False) -> Newcomer:
        """As the ledger sees it."""
        priority = self.priority + DEMOTED_PRIORITY if demoted else self.priority
        tbt = inf if demoted else self.slo.tbt
        return Newcomer(
            self.prompt_tokens, self.max_tokens, self.outputs, priority, tbt, self.slo.name, self.min_tokens
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """It is let in. `slo` and `priority` are what it runs under."""

    newcomer: Newcomer
    forecast: Forecast
    slo: SLO
    demoted: bool = False

    def predicted_ttft(self, waited: float) -> float | None:
        """Seconds from arrival to the first token, if it waited so long before the verdict."""
        return None if self.forecast.ttft is None else waited + self.forecast.ttft


class Gate:
    """Judges by what the ledger knows."""

    def __init__(self, ahead: WorkloadAhead, limits: GateLimits) -> None:
        self.limits = limits
        self._ahead = ahead

    def judge(self, asked: Asked, in_flight: int, now: float) -> Verdict:
        """Let a request in, demoted if it must be. Raises Refusal."""
        self._check_deadline(asked, now, 0.0)
        newcomer = asked.newcomer()
        self._check_room(newcomer, in_flight, now)
        forecast = self._ahead.forecast(newcomer, now)
        self._check_deadline(asked, now, forecast.ttft or 0.0)
        crowding = self._ahead.crowds_out(newcomer)
        problem, excess = _missed(asked.slo, forecast, now - asked.arrival, self._ahead.caution)
        if crowding and problem is None:
            problem, excess = "running requests would miss theirs", 1.0
        if problem is not None and asked.on_infeasible == pb.ON_INFEASIBLE_REJECT:
            hopeless, _ = _missed(asked.slo, self._ahead.alone(newcomer))
            raise _infeasible(problem, excess, hopeless, asked, forecast, now)
        if crowding:
            raise Refusal(
                Reason.QUEUE_FULL,
                "one more would push running requests past their TBT targets; try again later",
            )
        if problem is None or asked.on_infeasible != pb.ON_INFEASIBLE_DEMOTE:
            return Verdict(newcomer, forecast, asked.slo)
        demoted = asked.newcomer(demoted=True)
        return Verdict(
            demoted, self._ahead.forecast(demoted, now), SLO(inf, inf, None, asked.slo.name), demoted=True
        )

    def _check_deadline(self, asked: Asked, now: float, seconds: float) -> None:
        if asked.deadline is None or now + seconds < asked.deadline:
            return
        left = max(0.0, asked.deadline - now)
        raise Refusal(
            Reason.DEADLINE_EXCEEDED,
            f"the first token is expected in {seconds:.2f} s and the call's deadline is in {left:.2f} s"
            if seconds
            else "the deadline of the call passed",
        )

    def _check_room(self, newcomer: Newcomer, in_flight: int, now: float) -> None:
        """Raises Refusal when one of the bounds is reached."""
        ahead, limits, outputs = self._ahead, self.limits, newcomer.outputs
        if outputs > (most := min(limits.max_in_flight, limits.queue)):
            raise invalid(
                "sampling.n", f"{outputs} outputs at a time are more than the {most} ever let in here"
            )
        if in_flight + outputs > limits.max_in_flight:
            raise Refusal(
                Reason.QUEUE_FULL,
                f"{in_flight} outputs are in flight and at most {limits.max_in_flight} are let in; try again later",
                retry_after=self._drained(now),
            )
        queued = ahead.queued[newcomer.slo_class]
        if queued + outputs > limits.queue:
            raise Refusal(
                Reason.QUEUE_FULL,
                f"{queued} outputs of class '{newcomer.slo_class}' wait and at most {limits.queue} may; "
                "try again later",
                retry_after=self._drained(now),
                metadata={"class": newcomer.slo_class},
            )
        most = int(limits.kv_promise * ahead.total_pages)
        needed = ahead.pages_of(newcomer)
        beyond = ahead.promised_pages + needed - most
        if beyond > 0 and ahead.outputs:
            raise Refusal(
                Reason.KV_CAPACITY,
                f"{ahead.promised_pages} pages are promised to requests in flight and this one needs {needed}; "
                f"at most {most} are promised; try again later",
                retry_after=_retry(ahead.seconds_until_pages(beyond, now)),
            )

    def _drained(self, now: float) -> float | None:
        """Seconds until half of what waits is done, where that can be told."""
        whole = self._ahead.forecast(Newcomer(1, 1), now).ttft
        return None if whole is None else _retry(whole / 2)


def _missed(
    slo: SLO, forecast: Forecast, waited: float = 0.0, caution: float = 1.0
) -> tuple[str | None, float]:
    """Which target cannot be met after having `waited`, and by how many seconds of waiting."""
    if forecast.ttft is not None:
        expected, perhaps = waited + forecast.ttft, waited + forecast.ttft * caution
        if perhaps > slo.ttft:
            may = f" and may take {perhaps:.2f} s" if perhaps > expected else ""
            problem = f"the first token is expected after {expected:.2f} s{may}, the target is {slo.ttft:g} s"
            return problem, perhaps - slo.ttft
    if forecast.gap is not None and forecast.gap > slo.tbt:
        gap, target = forecast.gap * 1e3, slo.tbt * 1e3
        return f"tokens are expected {gap:.1f} ms apart, the target is {target:g} ms", 1.0
    if slo.e2e is not None and forecast.e2e is not None and waited + forecast.e2e > slo.e2e:
        return f"the end is expected after {waited + forecast.e2e:.2f} s, the target is {slo.e2e:g} s", 1.0
    return None, 0.0


def _infeasible(
    problem: str, excess: float, hopeless: str | None, asked: Asked, forecast: Forecast, now: float
) -> Refusal:
    """`hopeless`: what not even an idle server could do, so that trying again does not help."""
    metadata = {"class": asked.slo.name}
    if forecast.ttft is not None and isfinite(forecast.ttft):
        metadata["predicted_ttft_ms"] = f"{(now - asked.arrival + forecast.ttft) * 1e3:.1f}"
    if hopeless is not None:
        message = f"its targets cannot be met even with nothing else to serve: {hopeless}"
        return Refusal(Reason.SLO_INFEASIBLE, message, retry=False, metadata=metadata)
    return Refusal(
        Reason.SLO_INFEASIBLE,
        f"its targets cannot be met now: {problem}",
        retry_after=_retry(excess),
        metadata=metadata,
    )


def _retry(seconds: float) -> float:
    return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, seconds))
