"""Generated workloads, fitted to published statistics (min/mean/max of each length; arXiv 2504.14489).

The distribution is our choice, as only min, mean and max are published: a lognormal truncated to [min, max]
whose sigma spans the range with six standard deviations (sigma = ln(max/min)/6) and whose mu makes the
truncated mean the published one. Input and output lengths are drawn independently. Arrivals are Poisson.

`conversation` and `tool-agent` are sessions: a request either opens one or continues a random live one with its whole
prompt so far plus new tokens. Continuing has probability p, so the number of turns is about geometric; with m the mean
of new tokens the mean prompt is m / (1 - p) and the mean reused m p / (1 - p), which fixes m and p from the published
means. Reuse is what an unlimited cache would find. A session that would pass the published maximum ends.
Deterministic: the same seed gives the same requests, whatever the rate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType

from drift_scheduler.domain import SLO, Request
from drift_scheduler.errors import OptionError
from drift_scheduler.workloads import DEFAULT_RATE, DEFAULT_REQUESTS

NO_TARGET = SLO(ttft=math.inf, tbt=math.inf)
KEY_TOKENS = 16
SESSION_KEY_TOKENS = 64
LIVE_SESSIONS = 64

_NORMAL = NormalDist()


class Truncated:
    """A lognormal truncated to `[low, high]` with the given mean, in whole tokens."""

    def __init__(self, low: int, mean: float, high: int) -> None:
        if (
            not (1 <= low <= mean <= high)
            or not math.isfinite(mean)
            or (low < high and not low < mean < high)
        ):
            raise OptionError(f"lengths need 1 <= min < mean < max, not {low}/{mean}/{high}")
        self.low, self.mean, self.high = low, mean, high
        self.sigma = math.log(high / low) / 6
        self.mu = self._solve() if low < high else math.log(low)
        self._from, self._to = self._range(self.mu)

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.low == self.high:
            return self.low
        u = rng.uniform(self._from, self._to)
        value = math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(min(max(u, 1e-15), 1 - 1e-15)))
        return min(self.high, max(self.low, round(value)))

    def _range(self, mu: float) -> tuple[float, float]:
        if self.low == self.high:
            return (0.0, 1.0)
        a = (math.log(self.low) - mu) / self.sigma
        b = (math.log(self.high) - mu) / self.sigma
        return _NORMAL.cdf(a), _NORMAL.cdf(b)

    def _mean(self, mu: float) -> float:
        """E[X | low <= X <= high] = exp(mu + s^2/2) * (Phi(b-s) - Phi(a-s)) / (Phi(b) - Phi(a))."""
        s = self.sigma
        a, b = (math.log(self.low) - mu) / s, (math.log(self.high) - mu) / s
        mass = _NORMAL.cdf(b) - _NORMAL.cdf(a)
        if mass < 1e-12:
            return self.low if mu < math.log(self.low) else self.high
        return math.exp(mu + s * s / 2) * (_NORMAL.cdf(b - s) - _NORMAL.cdf(a - s)) / mass

    def _solve(self) -> float:
        """Bisection: the truncated mean grows with mu."""
        low, high = math.log(self.low) - 6 * self.sigma, math.log(self.high) + 6 * self.sigma
        for _ in range(100):
            middle = (low + high) / 2
            if self._mean(middle) < self.mean:
                low = middle
            else:
                high = middle
        return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Lengths:
    """Independent requests; the first `shared_tokens` of every prompt are the same."""

    input: Truncated
    output: Truncated
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sessions:
    """Multi-turn requests: published min/mean/max of the prompt, mean of its reused part, and output lengths."""

    input_min: int
    input_mean: float
    input_max: int
    reused_mean: float
    output: Truncated

    @property
    def new(self) -> Truncated:
        """New tokens of a turn; its mean is what is not reused."""
        return Truncated(self.input_min, self.input_mean - self.reused_mean, self.input_max)

    @property
    def continues(self) -> float:
        """Probability that a request continues a session."""
        return self.reused_mean / self.input_mean


_K = 1000


def _table() -> Mapping[str, Lengths | Sessions]:
    return MappingProxyType(
        {
            "sharegpt": Lengths(Truncated(4, 226, 1024), Truncated(4, 195, 1838)),
            "loogle": Lengths(Truncated(3380, 30 * _K, 81 * _K), Truncated(2, 15, 326)),
            "openthoughts": Lengths(
                Truncated(311, 709, 4633), Truncated(684, 8374, 32 * _K), shared_tokens=243
            ),
            "conversation": Sessions(891, 7538, 123 * _K, 4496, Truncated(1, 342, 2000)),
            "tool-agent": Sessions(891, 8596, 123 * _K, 4905, Truncated(1, 182, 2000)),
        }
    )


def published(
    name: str,
    seed: int,
    rate: float | None,
    requests: int | None,
    slo: SLO | None,
    think: float | None = None,
) -> Iterator[Request]:
    """One of the workloads above by name; `think` is for sessions only."""
    shape = _table()[name]
    if isinstance(shape, Lengths):
        return independent(name, shape, seed, rate, requests, slo)
    return sessions(name, shape, seed, rate, requests, slo, think)


def independent(
    name: str, lengths: Lengths, seed: int, rate: float | None, requests: int | None, slo: SLO | None
) -> Iterator[Request]:
    """Requests that share nothing but an optional common prefix. Raises OptionError at once."""
    if lengths.shared_tokens < 0:
        raise OptionError(f"shared_tokens is {lengths.shared_tokens}, need at least 0")
    arrivals = poisson(seed, rate, requests)
    rng = random.Random(f"{seed}/{name}")
    keys = tuple((name, i) for i in range(lengths.shared_tokens // KEY_TOKENS))
    targets = slo or NO_TARGET

    def draw() -> Iterator[Request]:
        for i, arrival in enumerate(arrivals):
            prompt = max(lengths.input.draw(rng), min(lengths.shared_tokens + 1, lengths.input.high))
            yield Request(
                id=f"{name}-{i}",
                arrival=arrival,
                prompt_tokens=prompt,
                max_output_tokens=lengths.output.high,
                slo=targets,
                prefix_keys=keys[: prompt // KEY_TOKENS],
                key_tokens=KEY_TOKENS,
                output_tokens=lengths.output.draw(rng),
            )

    return draw()


def sessions(
    name: str,
    shape: Sessions,
    seed: int,
    rate: float | None,
    requests: int | None,
    slo: SLO | None,
    think: float | None = None,
) -> Iterator[Request]:
    """Multi-turn requests. Open loop: a turn arrives when the Poisson process says so, whether or not the last one
    ended. With `think`, mean seconds of an exponential distribution, closed loop: sessions open as they would have,
    each further turn arrives so long after the previous one ended. Raises OptionError at once."""
    arrivals = poisson(seed, rate, requests)
    if think is not None and not (think >= 0 and math.isfinite(think)):
        raise OptionError(f"think is {think} seconds, need at least 0")
    pauses = random.Random(f"{seed}/{name}/think")
    rng = random.Random(f"{seed}/{name}")
    new_tokens, continues, targets = shape.new, shape.continues, slo or NO_TARGET

    def draw() -> Iterator[Request]:
        live: list[_Session] = []
        opened = 0
        for i, arrival in enumerate(arrivals):
            added = new_tokens.draw(rng)
            session = rng.choice(live) if live and rng.random() < continues else None
            if session is not None and session.tokens + added > shape.input_max:
                live.remove(session)
                session = None
            if session is None:
                session = _Session(opened)
                opened += 1
                live.append(session)
                if len(live) > LIVE_SESSIONS:
                    live.pop(rng.randrange(LIVE_SESSIONS))
            yield Request(
                id=f"{name}-{i}",
                arrival=arrival,
                prompt_tokens=session.extend(added),
                max_output_tokens=shape.output.high,
                slo=targets,
                prefix_keys=session.keys,
                key_tokens=SESSION_KEY_TOKENS,
                output_tokens=shape.output.draw(rng),
                session=f"{name}-s{session.number}",
                turn=session.turns - 1,
                think=None if think is None else think * pauses.expovariate(1.0),
            )

    return draw()


class _Session:
    """What a conversation's next prompt begins with."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens = 0
        self.turns = 0
        self.keys: tuple[int, ...] = ()

    def extend(self, added: int) -> int:
        """Add a turn's new tokens; the prompt's length. Keys are unique over all sessions of a run."""
        self.tokens += added
        self.turns += 1
        runs = self.tokens // SESSION_KEY_TOKENS
        self.keys += tuple((self.number << 20) + i for i in range(len(self.keys), runs))
        return self.tokens


def poisson(seed: int, rate: float | None, requests: int | None) -> Iterator[float]:
    """`requests` arrival times at `rate` per second. Raises OptionError at once."""
    per_second = DEFAULT_RATE if rate is None else rate
    count = DEFAULT_REQUESTS if requests is None else requests
    if not (per_second > 0 and math.isfinite(per_second)):
        raise OptionError(f"rate is {per_second} requests per second, need more than 0")
    if count < 1:
        raise OptionError(f"{count} requests, need at least 1")
    rng = random.Random(f"{seed}/arrivals")

    def times() -> Iterator[float]:
        now = 0.0
        for _ in range(count):
            now += rng.expovariate(1.0) / per_second
            yield now

    return times()
