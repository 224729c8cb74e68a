"""The work an engine has before it, in tokens and KV pages, and what that means for a request that comes now.

A ledger of the outputs in flight, told of submissions, step frames and ends; rates are learned from the frames. From
both it predicts when a newcomer's first token would come. Pure: times are arguments (seconds on the engine's clock),
and it decides nothing.

The prediction is a fluid one. Prompt tokens that go before it are computed at the rate at which prompts were computed
lately, whatever ran beside them; if the places or pages do not suffice, it waits until enough of those that decode
have ended, each expected to write as much as outputs did lately, at the gap they were written with lately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil, exp, inf
from typing import Final

from drift_core.frames import AcceptedItem, FinishedItem, LoadItem, OtherItem, Others, StepFrame

MEMORY_S: Final = 20.0
"""Seconds of decode over which the gap between tokens is forgotten."""
MEMORY_PREFILLS: Final = 50.0
PRIOR_WEIGHT: Final = 2.0
"""Observations that a point of the engine's own cost model counts as, or what is assumed of the length of outputs."""
PRIOR_OUTPUT_TOKENS: Final = 256.0
MEMORY_OUTPUTS: Final = 50.0
MEMORY_STEPS: Final = 500.0
STEPS_TO_TRUST: Final = 50
OUTLIER: Final = 3.0
EXTRAPOLATION: Final = 1.25
"""How far beyond the largest batch seen the length of a decode step is believed."""
FIRST_CAUTION: Final = 2.0
CAUTION_STEP: Final = 0.05
CAUTION_QUANTILE: Final = 0.98
MAX_CAUTION: Final = 4.0
NO_OTHERS: Final = Others()


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A request that asks to be let in: `outputs` of `prompt_tokens`, each of at most `max_tokens`.

    Lower `priority` goes first, among equals who came first. `tbt`: its target, `inf` for none. `min_tokens`: each
    has at least so many.
    """

    prompt_tokens: int
    max_tokens: int
    outputs: int = 1
    priority: int = 0
    tbt: float = inf
    slo_class: str = "default"
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of a newcomer, in seconds from now; `None` where nothing is known yet.

    `ttft`: until its first token. `gap`: between its tokens with nothing but decode running. `e2e`: until its last.
    """

    ttft: float | None = None
    gap: float | None = None
    e2e: float | None = None


@dataclass(slots=True)
class _Ahead:
    """One output in flight. `uncomputed`: prompt tokens, as far as is known."""

    newcomer: Newcomer
    submitted: float
    forecast: float | None
    uncomputed: float
    expected: float
    pages: int
    prompt_pages: int
    cached: int = 0
    first_token: float | None = None


@dataclass(slots=True)
class _Decayed:
    """A ratio of two sums that forget."""

    top: float = 0.0
    bottom: float = 0.0

    def keep(self, share: float) -> None:
        self.top *= share
        self.bottom *= share

    @property
    def value(self) -> float | None:
        return self.top / self.bottom if self.bottom > 0 else None


class Line:
    """Seconds as a line in some size, by least squares of the relative error over what was seen; it forgets.

    `prior`: points that count PRIOR_WEIGHT observations each, and are forgotten like them.
    """

    def __init__(self, memory: float, prior: Sequence[tuple[float, float]] = ()) -> None:
        self.seen = 0
        self.largest = 0.0
        self._share = 1 - 1 / memory
        # Sums of 1, size; and with weights 1/size^2 of 1, size, seconds, size*size, size*seconds.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        for size, seconds in prior:
            self._count(size, seconds, PRIOR_WEIGHT)

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return self._sums[0] > 0

    def add(self, size: float, seconds: float) -> None:
        """One observation; sizes are positive."""
        self.seen += 1
        self.largest = max(self.largest, size)
        self._count(size, seconds, 1.0, self._share)

    def fit(self) -> tuple[float, float, float]:
        """Fixed part, seconds per size, and the mean size. Sizes all alike make it a line through the origin."""
        count, total, n, x, y, xx, xy = self._sums
        mean = total / count
        spread = n * xx - x * x
        if spread > 1e-6 * n * xx:
            slope = max(0.0, (n * xy - x * y) / spread)
            fixed = (y - slope * x) / n
            if fixed >= 0:
                return fixed, slope, mean
        return 0.0, xy / xx, mean

    def _count(self, size: float, seconds: float, weight: float, keep: float = 1.0) -> None:
        """Weigh in one observation, and `keep` a share of what was there."""
        count, total, n, x, y, xx, xy = self._sums
        relative = weight / (size * size)
        self._sums = (
            count * keep + weight, total * keep + weight * size,
            n * keep + relative, x * keep + relative * size, y * keep + relative * seconds,
            xx * keep + weight, xy * keep + weight * seconds / size,
        )  # fmt: skip


@dataclass(slots=True)
class _Rates:
    """What was learned; outlives an engine, as the next one is alike."""

    prefill: Line = field(default_factory=lambda: Line(MEMORY_PREFILLS))  # seconds by tokens
    gap: _Decayed = field(default_factory=_Decayed)  # seconds over steps
    output: _Decayed = field(  # tokens over outputs
        default_factory=lambda: _Decayed(PRIOR_WEIGHT * PRIOR_OUTPUT_TOKENS, PRIOR_WEIGHT)
    )
    cached: _Decayed = field(default_factory=_Decayed)  # prompt tokens found in the cache over all of them
    steps: Line = field(default_factory=lambda: Line(MEMORY_STEPS))  # seconds by batch
    caution: float = FIRST_CAUTION


class WorkloadAhead:
    """The ledger. `engine` first; then `add`, `step` and `remove` as they happen, and `forecast` whenever asked."""

    def __init__(self) -> None:
        self.load: LoadItem | None = None
        self.queued: Counter[str] = Counter()
        """Outputs without a token yet, by SLO class."""
        self._rates = _Rates()
        self._waiting: dict[str, _Ahead] = {}
        self._decoding: dict[str, _Ahead] = {}
        self._tokens: Counter[int] = Counter()
        self._counts: Counter[int] = Counter()
        self._promised = 0
        self._prompt_pages = 0
        self._known_ends: list[tuple[float, int]] | None = None
        self._last: StepFrame | None = None
        self._mark = 0.0
        self.engine(total_pages=1, page_tokens=1, max_running=1)

    # ------------------------------------------------------------------------------------- what happens

    def engine(
        self,
        *,
        total_pages: int,
        page_tokens: int,
        max_running: int,
        prefill_seconds: Sequence[tuple[float, float]] = (),
        decode_seconds: Sequence[tuple[float, float]] = (),
    ) -> None:
        """A new engine, with nothing in it. By its cost model, `prefill_seconds` of some numbers of tokens, and
        `decode_seconds` of steps over some numbers of requests."""
        self.total_pages, self.page_tokens, self.max_running = total_pages, page_tokens, max_running
        self.queued.clear()
        self._waiting.clear()
        self._decoding.clear()
        self._tokens.clear()
        self._counts.clear()
        self._promised = self._prompt_pages = 0
        self._known_ends = None
        self._pending = 0.0
        self.load = self._last = None
        if prefill_seconds and not self._rates.prefill.known:
            self._rates.prefill = Line(MEMORY_PREFILLS, prefill_seconds)
        self._expected_prefill = Line(MEMORY_PREFILLS, prefill_seconds)
        self._expected_steps = Line(MEMORY_STEPS, decode_seconds)

    def add(
        self, output_ids: Iterable[str], newcomer: Newcomer, now: float, forecast: Forecast = Forecast()
    ) -> None:
        """A request's outputs go to the engine."""
        expected = self._expected(newcomer)
        pages = self._pages(newcomer.prompt_tokens + expected)
        prompt_pages = self._pages(newcomer.prompt_tokens + 1)
        if not self._waiting:
            self._mark = now
        for output_id in output_ids:
            uncomputed = self._uncomputed(newcomer)
            ahead = _Ahead(newcomer, now, forecast.ttft, uncomputed, expected, pages, prompt_pages)
            self._waiting[output_id] = ahead
            self._tokens[newcomer.priority] += ceil(uncomputed)
            self._counts[newcomer.priority] += 1
            self._promised += pages
            self._prompt_pages += prompt_pages
            self.queued[newcomer.slo_class] += 1

    def remove(self, output_id: str) -> None:
        """An output ended, or is given up; unknown ones are no fault."""
        self._known_ends = None
        ahead = self._waiting.get(output_id)
        if ahead is not None:
            self._leave_queue(output_id, ahead)
            self._promised -= ahead.pages
        elif (ahead := self._decoding.pop(output_id, None)) is not None:
            self._promised -= ahead.pages

    def step(self, frame: StepFrame, steps: int = 1) -> None:
        """Take in what the engine told, of other gateways' requests too: they are ahead of a newcomer all the same.

        `steps`: of so many steps alike, the frame is the last.
        """
        self._known_ends = None
        others = frame.others or NO_OTHERS
        for other in others.accepted:
            self._add_other(other, frame.time)
        self._learn_time(frame)
        for accepted in frame.accepted:
            self._accepted(accepted)
        computed = sum(self._began(output_id, frame.time) for output_id in others.first)
        decoded = others.tokens > len(others.first)
        for item in frame.tokens:
            if item.first:
                computed += sum(self._began(output_id, frame.time) for output_id in item.ids)
            else:
                decoded = True
        if computed:
            if self._pending > 0:
                self._rates.prefill.add(computed, self._pending)
            self._pending, self._mark = 0.0, frame.time
        if decoded:
            self._learn_gap(frame, steps)
        for finished in (*frame.finished, *others.finished):
            self._finished(finished)
        self.load = frame.load or self.load
        self._last = frame

    def _add_other(self, other: OtherItem, now: float) -> None:
        newcomer = Newcomer(
            other.prompt_tokens,
            other.max_tokens,
            priority=other.priority,
            tbt=other.slo_tbt,
            slo_class=other.slo_class,
            min_tokens=other.min_tokens,
        )
        self.add((other.id,), newcomer, now)
        self._accepted(AcceptedItem(other.id, cached_tokens=other.cached_tokens))

    def _accepted(self, item: AcceptedItem) -> None:
        ahead = self._waiting.get(item.id)
        if ahead is None or item.cached_tokens is None:
            return
        self._forget_tokens(ahead)
        ahead.cached = item.cached_tokens
        ahead.uncomputed = max(1, ahead.newcomer.prompt_tokens - item.cached_tokens)
        self._tokens[ahead.newcomer.priority] += ceil(ahead.uncomputed)
        cached = self._rates.cached
        cached.keep(1 - 1 / MEMORY_OUTPUTS)
        cached.top += item.cached_tokens
        cached.bottom += ahead.newcomer.prompt_tokens

    def _began(self, output_id: str, now: float) -> float:
        """Its first token came: the tokens of its prompt that were computed."""
        ahead = self._waiting.get(output_id)
        if ahead is None:
            return 0.0
        self._leave_queue(output_id, ahead)
        ahead.first_token = now
        self._decoding[output_id] = ahead
        if ahead.forecast is not None:
            self._learn_caution(now - ahead.submitted, ahead.forecast)
        return ahead.uncomputed

    def _finished(self, item: FinishedItem) -> None:
        if item.output_tokens and item.reason in ("stop", "length"):
            self._rates.output.keep(1 - 1 / MEMORY_OUTPUTS)
            self._rates.output.top += item.output_tokens
            self._rates.output.bottom += 1
        self.remove(item.id)

    def _leave_queue(self, output_id: str, ahead: _Ahead) -> None:
        del self._waiting[output_id]
        self._forget_tokens(ahead)
        self._prompt_pages -= ahead.prompt_pages
        priority, slo_class = ahead.newcomer.priority, ahead.newcomer.slo_class
        self._counts[priority] -= 1
        if not self._counts[priority]:
            del self._counts[priority], self._tokens[priority]
        self.queued[slo_class] -= 1
        if not self.queued[slo_class]:
            del self.queued[slo_class]

    def _forget_tokens(self, ahead: _Ahead) -> None:
        self._tokens[ahead.newcomer.priority] -= ceil(ahead.uncomputed)

    # ------------------------------------------------------------------------------------- what is learned

    def _learn_time(self, frame: StepFrame) -> None:
        """Count the time since the last frame as prefill time if prompts were computed in it, or could have been."""
        last = self._last
        if not self._waiting:
            self._pending = 0.0
            return
        held_back = False
        if last is not None and not last.prefill_requests and last.load is not None:
            short = last.load.free_pages * 20 < self.total_pages
            held_back = last.load.running >= self.max_running or short
        if not held_back:
            since = self._mark if last is None else max(last.time, self._mark)
            self._pending += max(0.0, frame.time - since)

    def _learn_gap(self, frame: StepFrame, steps: int) -> None:
        last = self._last
        if last is None or not last.decode_requests or not _told_tokens(last):
            return
        seconds = frame.time - last.time
        gap = self._rates.gap
        gap.keep(exp(-seconds / MEMORY_S))
        gap.top += seconds
        gap.bottom += steps
        if last.prefill_requests or frame.accepted or (frame.others or NO_OTHERS).accepted:
            return
        known = self._step_seconds(last.decode_requests)
        if known is None or seconds < steps * OUTLIER * known:  # the machine may have been busy otherwise
            self._rates.steps.add(last.decode_requests, seconds / steps)

    def _learn_caution(self, took: float, forecast: float) -> None:
        """Follow the factor that CAUTION_QUANTILE of first tokens come within."""
        rates = self._rates
        late = took > forecast * rates.caution + 0.01
        change = CAUTION_QUANTILE if late else CAUTION_QUANTILE - 1
        rates.caution = min(MAX_CAUTION, max(1.0, rates.caution + CAUTION_STEP * change))

    # ------------------------------------------------------------------------------------------ questions

    @property
    def outputs(self) -> int:
        """In flight."""
        return len(self._waiting) + len(self._decoding)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens still to be computed."""
        return sum(self._tokens.values())

    @property
    def promised_pages(self) -> int:
        """Pages that all outputs in flight are expected to need at their ends."""
        return self._promised

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second, in batches as they were lately."""
        if not self._rates.prefill.known:
            return None
        fixed, slope, mean = self._rates.prefill.fit()
        seconds = fixed + slope * mean
        return mean / seconds if seconds > 0 else None

    @property
    def caution(self) -> float:
        """The factor by which to multiply a forecast so that it nearly always holds."""
        return self._rates.caution

    def pages_of(self, newcomer: Newcomer) -> int:
        """Pages that the newcomer is expected to need at its end."""
        return newcomer.outputs * self._pages(newcomer.prompt_tokens + self._expected(newcomer))

    def forecast(self, newcomer: Newcomer, now: float) -> Forecast:
        """What the newcomer may expect if it is let in now."""
        rate = self.prefill_rate
        if not rate:
            return Forecast()
        ahead_tokens, ahead_count = self._ahead_of(newcomer.priority, now, rate)
        own = newcomer.outputs * self._uncomputed(newcomer)
        wait = max(self._wait_for_place(newcomer, ahead_count, now), self._wait_for_pages(newcomer, now))
        fixed, slope, _ = self._rates.prefill.fit()
        ttft = max(ahead_tokens / rate, wait, self._told(newcomer)) + fixed + slope * own
        batch = min(len(self._decoding) + ahead_count + newcomer.outputs, self.max_running)
        gap = self._gap(batch)
        usual = self._rates.gap.value
        e2e = None
        if usual is not None or gap is not None:
            e2e = ttft + (self._expected(newcomer) - 1) * max(usual or 0.0, gap or 0.0)
        return Forecast(ttft, gap, e2e)

    def alone(self, newcomer: Newcomer) -> Forecast:
        """The soonest that an engine with nothing else to do would serve the newcomer, as far as that is known."""
        ttft = None
        if self._expected_prefill.known:  # what was learned may be so because of what ran beside
            own = self._uncomputed(newcomer)
            fits = (line.fit() for line in (self._expected_prefill, self._rates.prefill))
            ttft = min(fixed + slope * own for fixed, slope, _ in fits)
        gap = self._gap(min(newcomer.outputs, self.max_running))
        e2e = None if gap is None else (ttft or 0.0) + (self._expected(newcomer) - 1) * gap
        return Forecast(ttft, gap, e2e)

    def crowds_out(self, newcomer: Newcomer) -> bool:
        """Whether decoding with the newcomer would take a running output past a TBT target that it keeps now."""
        running = len(self._decoding)
        batch = min(self.outputs + newcomer.outputs, self.max_running)
        now_seconds, then_seconds = self._step_seconds(running), self._step_seconds(batch)
        if now_seconds is None or then_seconds is None or batch <= running:
            return False
        targets = (ahead.newcomer.tbt for ahead in self._decoding.values())
        return any(now_seconds <= target < then_seconds for target in targets)

    def seconds_until_pages(self, pages: int, now: float) -> float:
        """How long until so many of the promised pages are expected to be given back; 1 where nothing is known."""
        if pages <= 0:
            return 0.0
        wait = 1.0
        for end, held in self._ends(now):
            wait = end - now
            pages -= held
            if pages <= 0:
                break
        return max(0.0, wait)

    # ------------------------------------------------------------------------------------- how it is reckoned

    def _pages(self, tokens: float) -> int:
        return -(-ceil(tokens) // self.page_tokens)

    def _expected(self, newcomer: Newcomer) -> float:
        """Tokens that an output will probably have."""
        usual = self._rates.output.value or PRIOR_OUTPUT_TOKENS
        return max(1.0, min(float(newcomer.max_tokens), max(usual, newcomer.min_tokens)))

    def _uncomputed(self, newcomer: Newcomer) -> float:
        """Prompt tokens that the prefix cache will probably not have."""
        cached = self._rates.cached.value or 0.0
        return max(1.0, newcomer.prompt_tokens * (1.0 - cached))

    def _ahead_of(self, priority: int, now: float, rate: float) -> tuple[float, int]:
        """Prompt tokens and outputs that are computed before one of this priority."""
        tokens = sum(count for level, count in self._tokens.items() if level <= priority)
        count = sum(count for level, count in self._counts.items() if level <= priority)
        done = 0.0
        if self._last is not None and self._last.prefill_requests:
            under_way = islice(self._waiting.values(), self._last.prefill_requests)
            done = min((now - self._mark) * rate, sum(ahead.uncomputed for ahead in under_way))
        return max(0.0, tokens - max(0.0, done)), count

    def _ends(self, now: float) -> list[tuple[float, int]]:
        """When each decoding output is expected to end, in order, and the pages it then gives back.

        Reckoned once per step: newcomers ask much oftener.
        """
        if self._known_ends is not None:
            return self._known_ends
        gap = self._rates.gap.value or 0.0
        ends = []
        for ahead in self._decoding.values():
            since = 0.0 if ahead.first_token is None else now - ahead.first_token
            written = since / gap if gap else 0.0
            left = max(1.0, ahead.expected - written)
            if written > ahead.expected:  # longer than usual: as much again, up to its own limit
                left = max(1.0, min(ahead.newcomer.max_tokens - written, ahead.expected))
            ends.append((now + left * gap, ahead.pages))
        ends.sort()
        self._known_ends = ends
        return ends

    def _told(self, newcomer: Newcomer) -> float:
        """Seconds of prompts before it that the engine reports once targets are lost for certain; whoever goes before
        others does not wait for those."""
        if self.load is None or any(priority > newcomer.priority for priority in self._counts):
            return 0.0
        return self.load.overload_s

    def _wait_for_place(self, newcomer: Newcomer, ahead_count: int, now: float) -> float:
        """Seconds until so many have ended that it may run; beyond those that run, ends keep coming as now."""
        running = len(self._decoding)
        lacking = running + ahead_count + newcomer.outputs - self.max_running
        if lacking <= 0 or not running:
            return 0.0
        ends = self._ends(now)
        rounds, place = divmod(lacking - 1, running)
        return max(0.0, ends[place][0] - now + rounds * (ends[-1][0] - now))

    def _wait_for_pages(self, newcomer: Newcomer, now: float) -> float:
        """Seconds until its prompt's pages are there, and those of the prompts before it."""
        if self.load is None:
            return 0.0
        prefilling = max(0, self.load.running - len(self._decoding))  # they have theirs
        have = sum(ahead.prompt_pages for ahead in islice(self._waiting.values(), prefilling))
        own = newcomer.outputs * self._pages(newcomer.prompt_tokens + 1)
        lacking = self._prompt_pages - have + own - self.load.free_pages
        if lacking <= 0:
            return 0.0
        wait = 0.0
        for end, pages in self._ends(now):
            lacking -= pages
            wait = end - now
            if lacking <= 0:
                break
        return max(0.0, wait)

    def _gap(self, batch: int) -> float | None:
        """As `_step_seconds`, or by the cost model's word until there is better."""
        gap = self._step_seconds(batch)
        if gap is None and self._rates.steps.seen < STEPS_TO_TRUST and self._expected_steps.known:
            fixed, slope, _ = self._expected_steps.fit()
            gap = fixed + slope * batch
        return gap

    def _step_seconds(self, batch: int) -> float | None:
        """Of a decode step over `batch` that runs alone; `None` where too little is known to say."""
        steps = self._rates.steps
        if steps.seen < STEPS_TO_TRUST or batch > EXTRAPOLATION * steps.largest + 1:
            return None
        fixed, slope, _ = steps.fit()
        return fixed + slope * batch


def _told_tokens(frame: StepFrame) -> bool:
    return bool(frame.tokens) or (frame.others or NO_OTHERS).tokens > 0
