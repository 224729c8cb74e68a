"""Goodput: the highest request rate at which the targets hold, found by bracketing, then bisection.

What is measured, for every policy alike: from the first arrival, the ramp included, until every request has its first
token; the drain that follows is left out. A trial ends early only when its outcome is certain, never on a
guess: it fails once more first tokens or gaps are late than the criterion forgives over *all* planned ones, and
a request counts as late as soon as it has waited past its target. A rate's arrivals are one seeded Poisson process
(or trace) scaled in time, so that policies and rates are compared on the same requests.

Knows nothing of processes or files: searches are generators that yield the trials they want run (`workers` runs
them) and get their outcomes back. Deterministic.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from drift_scheduler.domain import (
    SLO,
    DecodeShape,
    Finished,
    FinishReason,
    PrefillShape,
    Request,
    StepRecord,
    Tokens,
)
from drift_scheduler.errors import OptionError
from drift_scheduler.metrics import attains
from drift_scheduler.plugins import Registry, load
from drift_scheduler.report import Report
from drift_scheduler.reporting.recorder import Recorder, Recording
from drift_scheduler.simulation.run import Scenario, Simulation, workload

SCHEMA = "drift.goodput/1"
WINDOW = "first arrival, ramp included, to the last request's first token"
FORGIVEN = 0.01
"""The share of late requests, and of late gaps, that a 99th percentile forgives."""

TAIL_STEPS = 2
"""Decode steps past the last first token, so that a gap under way then still counts."""

MAX_REQUESTS = 200_000
SAMPLE = 400
"""Requests looked at to guess where a search should begin."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """What has to hold: p99 of TTFT over requests and of TBT over tokens (`None`), or a share of requests that meet
    all of their own targets."""

    attainment: float | None = None

    @classmethod
    def parse(cls, text: str) -> Criterion:
        """`p99` or `attainment:SHARE`. Raises OptionError."""
        name, colon, share = text.partition(":")
        if name == "p99" and not colon:
            return cls()
        try:
            value = float(share) if name == "attainment" else math.nan
        except ValueError:
            value = math.nan
        if not 0 < value <= 1:
            raise OptionError(
                f"criterion '{text}': need p99, or attainment:SHARE with a share above 0 and at most 1"
            )
        return cls(value)

    def __str__(self) -> str:
        return "p99" if self.attainment is None else f"attainment:{self.attainment:g}"


# ----------------------------------------------------------------------------------------- one trial


@dataclass(slots=True)
class _Class:
    """One SLO class's counts. `planned_gaps`: an upper bound of the gaps that will count."""

    slo: SLO
    requests: int = 0
    planned_gaps: int = 0
    late_first: int = 0
    lost: int = 0
    gaps: int = 0
    late_gaps: int = 0


class Decided(Exception):
    """Raised out of a run whose outcome is certain; not an error."""


class Judge:
    """An observer that ends a run, by raising `Decided`, as soon as the criterion's outcome is certain.

    `requests`: everything that will arrive. `holds` and `reason` say what was decided; call `close` after a run that
    ended by itself.
    """

    def __init__(self, requests: Sequence[Request], criterion: Criterion) -> None:
        self._criterion = criterion
        self._classes: dict[str, _Class] = {}
        self._class_of: dict[str, _Class] = {}
        for request in requests:
            counts = self._classes.setdefault(request.slo.name, _Class(request.slo))
            counts.requests += 1
            length = request.max_output_tokens
            if request.output_tokens is not None:
                length = min(length, request.output_tokens)
            counts.planned_gaps += max(0, length - 1)
            self._class_of[request.id] = counts
        self._only = next(iter(self._classes.values())) if len(self._classes) == 1 else None
        self._total = len(requests)
        self._awaited = {request.id for request in requests}
        self._due: list[tuple[float, str]] = []  # when a first token would be late; a heap
        self._late: set[str] = set()
        self._missed: set[str] = set()  # requests that fell short of their own targets, for attainment
        self._tail = TAIL_STEPS
        self.holds: bool | None = None
        self.reason = ""

    def on_step(self, record: StepRecord) -> None:
        """Count; raise Decided when there is nothing left to find out."""
        for event in record.events:
            request = getattr(event, "request", None)
            if request is not None:
                heapq.heappush(self._due, (request.arrival + request.slo.ttft, request.id))
        decoded = False
        for output in record.step.outputs:
            if isinstance(output, Tokens):
                if output.first:
                    self._first_tokens(output)
                else:
                    self._count_gaps(output)
                    decoded = True
            elif isinstance(output, Finished):
                self._end(output)
        while self._due and self._due[0][0] < record.now:
            request_id = heapq.heappop(self._due)[1]
            if request_id in self._awaited:
                self._first_late(request_id)
        self._fail_if_certain()
        if not self._awaited and self._criterion.attainment is None and decoded:
            self._tail -= 1
            if self._tail <= 0:
                self.close()
                raise Decided

    def close(self) -> None:
        """Nothing more will be counted."""
        if self.holds is None:
            self.holds, self.reason = self._final()

    @property
    def attainments(self) -> tuple[float, float]:
        """Shares of first tokens and of gaps in time so far, worst class: lower bounds for a run that went on."""
        first = min(
            (1 - (c.late_first + c.lost) / c.requests for c in self._classes.values() if c.requests),
            default=1.0,
        )
        gaps = min((1 - c.late_gaps / c.gaps for c in self._classes.values() if c.gaps), default=1.0)
        return first, gaps

    # ---------------------------------------------------------------------------------------- counting

    def _first_tokens(self, tokens: Tokens) -> None:
        for request_id, gap in zip(tokens.request_ids, tokens.gaps, strict=True):
            self._awaited.discard(request_id)
            if gap > self._class_of[request_id].slo.ttft:
                self._first_late(request_id)

    def _first_late(self, request_id: str) -> None:
        """A first token is late, whether it came or not; it counts once."""
        if request_id not in self._late:
            self._late.add(request_id)
            self._missed.add(request_id)
            self._class_of[request_id].late_first += 1

    def _count_gaps(self, tokens: Tokens) -> None:
        if self._only is not None:
            self._only.gaps += len(tokens.gaps)
            self._only.late_gaps += int(np.count_nonzero(tokens.gaps > self._only.slo.tbt))
            return
        for request_id, gap in zip(tokens.request_ids, tokens.gaps, strict=True):
            counts = self._class_of[request_id]
            counts.gaps += 1
            counts.late_gaps += bool(gap > counts.slo.tbt)

    def _end(self, done: Finished) -> None:
        self._awaited.discard(done.request_id)
        counts = self._class_of[done.request_id]
        if done.reason in (FinishReason.REJECTED, FinishReason.FAILED):
            counts.lost += 1
            if done.request_id in self._late:  # it is lost, and not late as well
                counts.late_first -= 1
            self._missed.add(done.request_id)
        elif not attains(done.timing, done.slo):
            self._missed.add(done.request_id)

    # ---------------------------------------------------------------------------------------- deciding

    def _fail_if_certain(self) -> None:
        reason = self._failure(final=False)
        if reason:
            self.holds, self.reason = False, reason
            raise Decided

    def _final(self) -> tuple[bool, str]:
        reason = self._failure(final=True)
        return not reason, reason

    def _failure(self, final: bool) -> str:
        """Why the criterion cannot hold any more, or does not hold; empty while it can."""
        share = self._criterion.attainment
        if share is not None:
            allowed = (1 - share) * self._total
            return "" if len(self._missed) <= allowed + 1e-9 else "attainment"
        for counts in self._classes.values():
            if counts.late_first + counts.lost > FORGIVEN * counts.requests + 1e-9:
                return "requests lost" if counts.lost > counts.late_first else "TTFT"
            gaps = counts.gaps if final else max(counts.gaps, counts.planned_gaps)
            if counts.late_gaps > FORGIVEN * gaps + 1e-9:
                return "TBT"
        return ""


@dataclass(frozen=True, slots=True)
class Trial:
    """A simulation to run: until its outcome is certain (`criterion`), or whole for its report (`None`) and, with
    `record`, for everything that a page draws of it."""

    scenario: Scenario
    criterion: Criterion | None = None
    record: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial found. `reason`: what kept the criterion from holding. `report`: of a whole run only.

    `ttft_attainment`, `tbt_attainment`: shares in time when the trial ended.
    """

    rate: float
    holds: bool
    reason: str = ""
    requests: int = 0
    simulated_s: float = 0.0
    ttft_attainment: float = 1.0
    tbt_attainment: float = 1.0
    report: Report | None = None
    recording: Recording | None = None


def run_trial(trial: Trial, registry: Registry | None = None) -> Outcome:
    """Run one trial in this process. Raises DriftError as `Simulation` does."""
    simulation = Simulation(trial.scenario, registry)
    rate = trial.scenario.rate or 0.0
    if trial.criterion is None:
        recorder = Recorder() if trial.record else None
        report = simulation.run([recorder] if recorder is not None else [])
        recording = recorder.recording() if recorder is not None else None
        return Outcome(rate, report["slo"]["met"], report=report, recording=recording)
    requests = list(simulation.requests)
    simulation.requests = requests
    judge = Judge(requests, trial.criterion)
    try:
        simulation.run([judge])
    except Decided:
        assert judge.holds is not None
    judge.close()
    first, gaps = judge.attainments
    return Outcome(
        rate, bool(judge.holds), judge.reason, len(requests), simulation.metrics.duration, first, gaps
    )


Trials = Generator[Sequence[Trial], Sequence[Outcome], "Found"]
"""A search: yields trials that may run at once, gets their outcomes in order, returns what it found."""


# ---------------------------------------------------------------------------------------- the search


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """How to search. `requests`: at least so many a trial. `lifetimes`: arrivals span at least so many times the life
    of a mean request whose every gap takes the TBT target, so that long answers reach their steady state, and ten
    times as many TTFT targets, so that a growing queue shows. `tolerance`: the found rate holds, and one at most
    this share higher does not."""

    criterion: Criterion = field(default_factory=Criterion)
    seeds: tuple[int, ...] = (0, 1, 2)
    requests: int = 300
    lifetimes: float = 2.0
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise OptionError(f"seeds {list(self.seeds)}: need at least one, each once")
        if not 1 <= self.requests <= MAX_REQUESTS:
            raise OptionError(f"{self.requests} requests, need 1 to {MAX_REQUESTS}")
        if not 0.5 <= self.lifetimes <= 1000:
            raise OptionError(f"lifetimes is {self.lifetimes}, need 0.5 to 1000")
        if not 0.001 <= self.tolerance <= 1:
            raise OptionError(f"tolerance is {self.tolerance}, need 0.001 to 1")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a search begins: a guessed rate, the seconds that arrivals span at least, and whether seeds matter (a
    trace replayed at its own times without noise is the same under any)."""

    rate: float
    span_s: float
    seeds_matter: bool = True


def begin(scenario: Scenario, plan: SearchPlan, registry: Registry | None = None) -> Start:
    """A guess from the cost model: a mean request's prefill, beyond what a prefix cache could hold, and its share of
    decode steps of 64. Raises DriftError for whatever is wrong with the scenario."""
    simulation = Simulation(replace(scenario, rate=1.0, requests=SAMPLE), registry)
    new = reused = outputs = count = 0
    seen: set[object] = set()
    for request in islice(simulation.requests, SAMPLE):
        cached = 0
        for key in request.prefix_keys:
            cached += request.key_tokens if key in seen else 0
            seen.add(key)
        cached = min(cached, request.prompt_tokens - 1)
        new += request.prompt_tokens - cached
        reused += cached
        outputs += min(request.max_output_tokens, request.output_tokens or request.max_output_tokens)
        count += 1
    if not count:
        raise OptionError(f"workload '{scenario.workload}' holds no requests")
    prompt = PrefillShape.of([(max(1, new // count), reused // count)])
    units, batch = simulation.device.total_units, 64
    context = batch * ((new + reused) // count + outputs // count // 2 + 1)
    seconds = simulation.costs.prefill(prompt, units)
    seconds += simulation.costs.decode(DecodeShape(batch, context), units) / batch * outputs / count
    life = max(scenario.slo.tbt * outputs / count, 10 * scenario.slo.ttft)
    return Start(1.0 / max(seconds, 1e-9), plan.lifetimes * life, _seeds_matter(scenario, registry))


def _seeds_matter(scenario: Scenario, registry: Registry | None) -> bool:
    if scenario.noise > 0:
        return True
    some = replace(scenario, rate=1.0, requests=SAMPLE)
    found = registry if registry is not None else load()
    pair = [
        [(r.arrival, r.prompt_tokens, r.output_tokens) for r in islice(workload(found, s), SAMPLE)]
        for s in (some, replace(some, seed=scenario.seed + 1))
    ]
    return pair[0] != pair[1]


@dataclass(frozen=True, slots=True)
class Found:
    """One seed's goodput. `rate`: 0 where even `fails_at` failed and nothing below was tried.

    `monotone`: whether no rate held above one that failed. `trials`: every rate tried, in order.
    """

    seed: int
    rate: float
    fails_at: float
    reason: str
    monotone: bool
    trials: tuple[Outcome, ...]


FIRST_STEP = 1.5
LOWEST = 1 / 40
"""Of the guess; below, a policy is said never to meet its targets."""
HIGHEST = 1000.0
ABOVE = 1.05
"""A converged search is checked once more this much above the rate that failed."""


def at_rate(scenario: Scenario, rate: float, plan: SearchPlan, start: Start) -> Scenario:
    """The scenario at a rate, long enough by the plan."""
    wanted = max(plan.requests, math.ceil(min(rate * start.span_s, MAX_REQUESTS)))
    return replace(scenario, rate=rate, requests=wanted)


def seed_search(
    scenario: Scenario, plan: SearchPlan, start: Start, near: float | None = None, at_least: float = 0.0
) -> Trials:
    """The goodput of one seed (the scenario's). `near`: another seed's, to begin at. `at_least`: give up, with rate 0,
    when this rate does not hold."""
    trials: list[Outcome] = []
    low, high, reason = 0.0, math.inf, ""
    rate = _tidy(at_least or near or start.rate)
    step = FIRST_STEP if near is None and not at_least else 1.1
    checked = False
    lowest, highest = _tidy(start.rate * LOWEST), _tidy(start.rate * HIGHEST)
    while True:
        (outcome,) = yield [Trial(at_rate(scenario, rate, plan, start), plan.criterion)]
        trials.append(outcome)
        if outcome.holds:
            low = rate
            if rate >= high:  # it holds above a rate that failed: search on from here
                high, step, checked = math.inf, 1.1, False
        elif rate > low and rate < high:
            high, reason = rate, outcome.reason
            if at_least and rate == _tidy(at_least):
                break
        if low and high < math.inf:
            if high / low > 1 + plan.tolerance:
                rate = _tidy(math.sqrt(low * high))
                if low < rate < high:
                    continue
            if checked or plan.tolerance >= ABOVE - 1:
                break
            checked, rate = True, _tidy(high * ABOVE)
            continue
        if low >= highest or high <= lowest:
            break
        rate = _tidy(min(low * step, highest) if low else max(high / step, lowest))
        step = min(step * step, 8.0)
    failed = [outcome.rate for outcome in trials if not outcome.holds]
    monotone = not failed or low < min(failed)
    return Found(scenario.seed, low, high, reason, monotone, tuple(trials))


def _tidy(rate: float) -> float:
    """Four significant digits: what a table prints is what ran."""
    return float(f"{rate:.4g}")


# ------------------------------------------------------------------------------------------- all seeds


@dataclass(frozen=True, slots=True)
class PolicyGoodput:
    """A policy's goodput: mean over seeds, with a 95% confidence interval of that mean (Student's t).

    `dispatch`: what ran, tuned options included; `tuned`: option -> value chosen and rates tried, if any.
    """

    policy: str
    dispatch: str
    seeds: tuple[Found, ...]
    tuned: dict[str, object] | None = None
    report: Report | None = None

    @property
    def rate(self) -> float:
        """Requests per second."""
        return sum(found.rate for found in self.seeds) / len(self.seeds)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean; `None` with one seed."""
        return t_interval([found.rate for found in self.seeds])


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""Student's t, two-sided 95%, by degrees of freedom from 1."""


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% confidence interval of the mean of independent values; `None` with fewer than two."""
    n = len(values)
    if n < 2:
        return None
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96 + 2.4 / (n - 1)
    mean = sum(values) / n
    spread = t * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return max(0.0, mean - spread), mean + spread


def ratios(policy: PolicyGoodput, base: PolicyGoodput) -> tuple[float | None, tuple[float, float] | None]:
    """A policy's goodput over another's, and the 95% interval of the ratio seed by seed (the same requests)."""
    if base.rate <= 0:
        return None, None
    pairs = list(zip(policy.seeds, base.seeds, strict=True))
    interval = t_interval([p.rate / b.rate for p, b in pairs]) if all(b.rate > 0 for _, b in pairs) else None
    return policy.rate / base.rate, interval
