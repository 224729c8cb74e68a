"""Open-loop serving in one process: requests arrive when they are due, whatever the engine does.

Works on any executor and its clock, so that the stub's virtual time will do. A trial is judged by
`drift_scheduler.goodput.Judge`, which ends it as soon as its outcome is certain.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from drift_core.sampling_params import SamplingParams
from drift_scheduler.domain import SLO, Finished, Request, Step, StepRecord, Tokens
from drift_scheduler.goodput import Criterion, Decided, Judge
from drift_scheduler.loop import serve
from drift_scheduler.partition import TightestDecode
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.workloads.generated import Truncated

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)


@dataclass(frozen=True)
class Lengths:
    """What requests are like, in tokens, and the first token's target in seconds."""

    prompt: Truncated
    output: Truncated
    ttft: float


WORKLOADS = {
    "sharegpt": Lengths(Truncated(4, 226, 1024), Truncated(4, 195, 1838), 1.0),
    "long-context": Lengths(Truncated(2000, 12000, 30000), Truncated(16, 150, 512), 5.0),
}


def requests_of(name: str, rate: float, count: int, tbt: float, vocab: int, seed: int = 0) -> list[Request]:
    """Poisson arrivals. The same seed gives the same requests at every rate, only closer together."""
    lengths, draw = WORKLOADS[name], random.Random(f"{name}/{seed}")
    slo = SLO(lengths.ttft, tbt)
    now, made = 0.0, []
    for index in range(count):
        now += draw.expovariate(1.0) / rate
        prompt, output = lengths.prompt.draw(draw), lengths.output.draw(draw)
        start = draw.randrange(vocab)
        tokens = [(start + 7919 * place) % vocab for place in range(prompt)]
        made.append(Request(f"r{index}", now, prompt, output, slo, prompt=tokens))
    return made


@dataclass
class Outcome:
    """What a trial showed. Times in seconds."""

    rate: float
    holds: bool = False
    reason: str = ""
    finished: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)
    tbt: list[float] = field(default_factory=list)
    sharings: dict[str, int] = field(default_factory=dict)
    step: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {
            "rate": self.rate, "holds": self.holds, "limited_by": self.reason, "finished": self.finished,
            "seconds": self.seconds, "output_tokens_per_s": self.tokens / max(self.seconds, 1e-9),
            "ttft_p50": quantile(self.ttft, 0.5), "ttft_p99": quantile(self.ttft, 0.99),
            "tbt_p50": quantile(self.tbt, 0.5), "tbt_p99": quantile(self.tbt, 0.99), "gangs": self.sharings,
            "scheduler_step_us_p50": quantile(self.step, 0.5) * 1e6,
        }  # fmt: skip


class Feeder:
    """An executor to which requests come when they are due."""

    def __init__(self, executor: Any, requests: Iterable[Request], stop_at: float) -> None:
        self._executor, self._stop_at = executor, stop_at
        self._due = sorted(requests, key=lambda request: request.arrival, reverse=True)
        self.device, self.now, self.submit, self.forget = (
            executor.device, executor.now, executor.submit, executor.forget,
        )  # fmt: skip

    def wait(self, until: float | None) -> Sequence[Any] | None:
        """As the executor's, but back in time for the next arrival, and `None` when the time is up."""
        if self.now() >= self._stop_at:
            return None
        times = [self._stop_at if until is None else min(until, self._stop_at)]
        if self._due:
            times.append(self._due[-1].arrival)
        events = self._executor.wait(min(times))
        while self._due and self._due[-1].arrival <= self.now():
            self._executor.arrive(self._due.pop(), GREEDY)
        return events


def trial(
    executor: Any,
    dispatch: Any,
    costs: Any,
    requests: Sequence[Request],
    rate: float,
    *,
    max_running: int,
    most_seconds: float = 60.0,
    judged: bool = True,
) -> Outcome:
    """Serve `requests` (arrivals counted from now) until the outcome is certain, all is done, or the time is up."""
    scheduler = Scheduler(
        executor.device, executor.kv, dispatch, TightestDecode(), costs,
        Limits(max_running=max_running, max_context_tokens=executor.plan.max_context),
    )  # fmt: skip
    executor.meanwhile = scheduler.plan_ahead
    begun = executor.now() + 0.01
    shifted = [
        replace(request, id=f"{request.id}@{begun:.6f}", arrival=begun + request.arrival)
        for request in requests
    ]
    judge = Judge(shifted, Criterion())
    outcome = Outcome(rate)
    left = len(shifted)

    def deliver(step: Step) -> None:
        nonlocal left
        if watch.certain:
            raise Decided
        for fault in step.faults:
            raise RuntimeError(f"the scheduler noted a fault: {fault}")
        if step.gang is not None:
            name = step.gang.sharing.value
            outcome.sharings[name] = outcome.sharings.get(name, 0) + 1
        for output in step.outputs:
            match output:
                case Tokens(gaps=gaps, first=first):
                    (outcome.ttft if first else outcome.tbt).extend(gaps.tolist())
                    outcome.tokens += len(gaps)
                case Finished():
                    outcome.finished += 1
                    left -= 1
                    if not left:
                        raise Decided
                case _:
                    pass

    watch = _Watch(judge if judged else None, outcome)
    with suppress(Decided):
        serve(
            scheduler,
            Feeder(executor, shifted, begun + most_seconds),
            deliver,
            [watch],
            stopwatch=time.perf_counter,
        )
    judge.close()
    outcome.holds, outcome.reason = watch.certain or (bool(judge.holds), judge.reason)
    outcome.seconds = executor.now() - begun
    clear(executor, scheduler, [request.id for request in shifted])
    return outcome


class _Watch:
    """Passes steps on to the judge and ends the run by its word; `serve` would only drop an observer that raises."""

    def __init__(self, judge: Judge | None, outcome: Outcome) -> None:
        self._judge, self._outcome = judge, outcome
        self.certain: tuple[bool, str] | None = None

    def on_step(self, record: StepRecord) -> None:
        if record.step_seconds is not None:
            self._outcome.step.append(record.step_seconds)
        if self._judge is None:
            return
        try:
            self._judge.on_step(record)
        except Decided:
            self.certain = (bool(self._judge.holds), self._judge.reason)
            self._judge = None


def clear(executor: Any, scheduler: Scheduler, request_ids: list[str]) -> None:
    """Let the lanes end and give everything back, so that the next trial begins with nothing running."""
    deadline = executor.now() + 120.0
    while executor.lanes_now().sharing is not None and executor.now() < deadline:
        executor.wait(executor.now() + 0.05)
    executor.wait(executor.now())  # arrivals that nobody has looked at
    for request_id, tracked in list(scheduler.live.items()):
        if tracked.admitted:
            executor.kv.release(request_id)
    executor.forget(request_ids)


def search(
    run: Callable[[float], Outcome], first: float, *, trials: int, factor: float = 1.6
) -> tuple[float, list[Outcome]]:
    """The highest rate found at which a trial holds (0: none), by bracketing and then halving in the logarithm."""
    low, high = 0.0, 0.0
    rate, found = first, []
    for _ in range(trials):
        outcome = run(rate)
        found.append(outcome)
        if outcome.holds:
            low = rate
        else:
            high = rate
        if low and high:
            rate = (low * high) ** 0.5
        else:
            rate = low * factor if low else high / factor
    return low, found


def quantile(values: Sequence[float], share: float) -> float:
    """0 for none."""
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0
