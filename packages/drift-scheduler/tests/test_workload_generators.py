"""Generated workloads: the published statistics, reuse, determinism, bad options."""

from __future__ import annotations

import random
from collections.abc import Hashable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.domain import SLO, Request
from drift_scheduler.errors import DriftError
from drift_scheduler.workloads import FACTORIES
from drift_scheduler.workloads.generated import Truncated

# As published (arXiv 2504.14489): min, mean, max of input and of output, mean reused.
PUBLISHED = {
    "sharegpt": ((4, 226, 1024), (4, 195, 1838), 0),
    "loogle": ((3380, 30_000, 81_000), (2, 15, 326), 0),
    "openthoughts": ((311, 709, 4633), (684, 8374, 32_000), 243),
    "conversation": ((891, 7538, 123_000), (1, 342, 2000), 4496),
    "tool-agent": ((891, 8596, 123_000), (1, 182, 2000), 4905),
}


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


def ideal_reuse(requests: list[Request]) -> float:
    """Mean tokens found by an unlimited cache, every earlier prompt being in it."""
    seen: set[Hashable] = set()
    found = []
    for request in requests:
        hits = 0
        for key in request.prefix_keys:
            if key not in seen:
                break
            hits += 1
        seen.update(request.prefix_keys)
        found.append(hits * request.key_tokens)
    return mean(found)


@pytest.mark.parametrize("name", PUBLISHED)
def test_lengths_and_reuse_are_the_published_ones(name: str) -> None:
    (in_low, in_mean, in_high), (out_low, out_mean, out_high), reused = PUBLISHED[name]
    requests = list(FACTORIES[name](7, rate=2.0, requests=8000))
    inputs = [r.prompt_tokens for r in requests]
    outputs = [r.output_tokens or 0 for r in requests]
    assert in_low <= min(inputs)
    assert max(inputs) <= in_high
    assert mean(inputs) == pytest.approx(in_mean, rel=0.05)
    assert out_low <= min(outputs)
    assert max(outputs) <= out_high
    assert mean(outputs) == pytest.approx(out_mean, rel=0.05)
    # Sessions have a heavy tail: over seeds, the mean of 8000 requests has a standard deviation of 3%.
    assert ideal_reuse(requests) == pytest.approx(reused, rel=0.1)
    assert all(len(r.prefix_keys) * r.key_tokens <= r.prompt_tokens for r in requests)
    assert all(r.max_output_tokens == out_high for r in requests)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_seed_fixes_everything_and_the_rate_only_the_times(name: str) -> None:
    def lengths(seed: int, rate: float) -> list[tuple[int, int | None]]:
        return [(r.prompt_tokens, r.output_tokens) for r in FACTORIES[name](seed, rate=rate, requests=50)]

    assert lengths(1, 1.0) == lengths(1, 4.0) != lengths(2, 1.0)
    slow = [r.arrival for r in FACTORIES[name](1, rate=1.0, requests=50)]
    fast = [r.arrival for r in FACTORIES[name](1, rate=4.0, requests=50)]
    assert slow == pytest.approx([4 * t for t in fast])


def test_arrivals_are_poisson_at_the_rate() -> None:
    times = [r.arrival for r in FACTORIES["sharegpt"](3, rate=5.0, requests=20_000)]
    gaps = [b - a for a, b in pairwise(times)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.2, rel=0.03)
    assert sum(g > 0.2 for g in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)  # exp(-1)


def test_sessions_grow_turn_by_turn() -> None:
    last: dict[str, Request] = {}
    for request in FACTORIES["tool-agent"](5, requests=500):
        assert request.session is not None
        before = last.get(request.session)
        assert request.turn == (0 if before is None else before.turn + 1)
        if before is not None:
            assert request.prompt_tokens > before.prompt_tokens
            assert request.prefix_keys[: len(before.prefix_keys)] == before.prefix_keys
        last[request.session] = request
    assert max(r.turn for r in last.values()) >= 3


def test_requests_carry_the_targets_given() -> None:
    slo = SLO(2.0, 0.1, name="chat")
    assert next(iter(FACTORIES["sharegpt"](0, slo=slo))).slo is slo


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.integers(2, 200), st.floats(0.02, 0.6))
def test_a_truncated_lognormal_has_the_mean_asked_for(low: int, factor: int, share: float) -> None:
    high = low * factor
    wanted = low + share * (high - low)
    lengths = Truncated(low, wanted, high)
    assert lengths._mean(lengths.mu) == pytest.approx(wanted, rel=1e-3)
    rng = random.Random(0)
    drawn = [lengths.draw(rng) for _ in range(200)]
    assert low <= min(drawn)
    assert max(drawn) <= high


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.0},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"requests": 0},
        {"input_min": 0},
        {"input_mean": 9000.0},
        {"input_mean": float("nan")},
        {"output_min": 2000},
        {"shared_tokens": -1},
    ],
)
def test_bad_options_are_refused_before_the_first_request(options: dict[str, float]) -> None:
    with pytest.raises(DriftError):
        FACTORIES["synthetic"](0, **options)


def test_a_shared_prefix_is_shared() -> None:
    requests = list(FACTORIES["synthetic"](0, requests=20, shared_tokens=64, input_min=10))
    assert {r.prefix_keys for r in requests if r.prompt_tokens > 64} == {requests[0].prefix_keys}
    assert len(requests[0].prefix_keys) == 4
    assert min(r.prompt_tokens for r in requests) > 64
