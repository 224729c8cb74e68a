from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_core.sampler import SampleResult, SamplerState, sample
from drift_core.sampling_params import SamplingParams


def state(params: SamplingParams, prompt=(), eos=(), vocab=50, seed=0) -> SamplerState:
    return SamplerState(params, prompt, eos, vocab, fallback_seed=seed)


def one(logits, s: SamplerState) -> int:
    return sample(torch.from_numpy(np.array([logits], np.float32)), [s]).token_ids[0]


def oracle(logits, p: SamplingParams, prompt=(), output=(), barred=()):
    """Probabilities by the definitions, over the whole vocabulary, in float64."""
    x = np.array(logits, np.float64)
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in range(len(x)):
        if token in prompt or token in output:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        x[token] -= p.frequency_penalty * list(output).count(token)
        x[token] -= p.presence_penalty * (token in output)
    x[list(barred)] = -np.inf
    if p.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    probs = np.exp((x - x.max()) / p.temperature)
    probs /= probs.sum()
    probs[probs < p.min_p * probs.max()] = 0
    ranked = np.argsort(-probs, kind="stable")
    if p.top_k:
        probs[ranked[p.top_k :]] = 0
    probs /= probs.sum()
    taken = 0.0
    for token in ranked:
        if taken >= p.top_p:
            probs[token] = 0
        taken += probs[token]
    return probs / probs.sum()


def spread(size: int, seed: int, width: float = 2.0):
    return np.random.default_rng(seed).normal(0, width, size).astype(np.float32)


CASES = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.5),
    SamplingParams(top_k=5),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=0.999),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=1.7, top_k=20, top_p=0.8, min_p=0.02),
    SamplingParams(logit_bias={3: 4.0, 7: -100.0, 9: 2.0}, top_p=0.9),
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.4),
    SamplingParams(repetition_penalty=0.6, top_k=8, temperature=0.8),
]


def drawn(params: SamplingParams, logits, rounds: int, prompt=(), output=()) -> np.ndarray:
    """How often each token came in `rounds` rows, each of its own seed."""
    counts = np.zeros(len(logits))
    states = [state(params, prompt, vocab=len(logits), seed=seed) for seed in range(rounds)]
    for s in states:
        for token in output:
            s.record(token)
    rows = torch.from_numpy(np.tile(logits, (rounds, 1)))
    for token in sample(rows, states).token_ids:
        counts[token] += 1
    return counts


def chi_square_fits(counts, probs) -> bool:
    """Rare tokens pooled; accepts what chance produces in all but about one of 30,000 samples."""
    rounds = counts.sum()
    rare = probs * rounds < 8
    assert not counts[probs == 0].any(), "a token the filters bar was drawn"
    seen = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(probs[~rare], probs[rare].sum()) * rounds
    seen, expected = seen[expected > 0], expected[expected > 0]
    freedom = max(len(seen) - 1, 1)
    return float(((seen - expected) ** 2 / expected).sum()) < freedom + 4 * np.sqrt(2 * freedom) + 6


@pytest.mark.parametrize("params", CASES, ids=[str(i) for i in range(len(CASES))])
def test_frequencies_are_those_of_the_definitions(params):
    logits, prompt, output = spread(40, 1), [1, 2, 3, 4], [2, 2, 9, 11]
    counts = drawn(params, logits, 6000, prompt, output)
    assert chi_square_fits(counts, oracle(logits, params, prompt, output))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_p=0.95),
        SamplingParams(temperature=50.0, top_p=0.6),  # nearly flat: the nucleus is most of the vocabulary
        SamplingParams(temperature=50.0, top_k=2900),
        SamplingParams(temperature=3.0, min_p=1e-5, top_p=0.99),
    ],
    ids=["plain", "top_p", "flat", "top_k", "min_p"],
)
def test_frequencies_over_a_vocabulary_larger_than_one_run(params):
    logits = spread(3001, 2, 3.0)
    counts = drawn(params, logits, 5000)
    bins = np.add.reduceat(counts, range(0, 3001, 100))
    probs = oracle(logits, params)
    assert not counts[probs < 1e-12].any()
    assert chi_square_fits(bins, np.add.reduceat(probs, range(0, 3001, 100)))


def test_the_test_can_fail():
    logits = spread(40, 1)
    counts = drawn(SamplingParams(temperature=1.1), logits, 6000)
    assert not chi_square_fits(counts, oracle(logits, SamplingParams(temperature=0.9)))


FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-12, 1e-5, 0.2, 1.0]),
)


@settings(max_examples=300, deadline=None)
@given(
    params=FILTERS,
    size=st.sampled_from([2, 30, 700]),
    seed=st.integers(0, 2**32),
    width=st.sampled_from([0.1, 3, 30]),
)
def test_what_is_drawn_always_survives_the_filters(params, size, seed, width):
    logits = spread(size, seed, width)
    s = state(params, vocab=size, seed=seed)
    # In float32 the edge of the nucleus may lie one token further, and near equals may become equals.
    edge = logits[oracle(logits, slightly_wider(params)) > 0].min() - 1e-5 * width
    for _ in range(5):
        assert logits[one(logits, s)] >= edge


def slightly_wider(p: SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=min(1.0, p.top_p * (1 + 1e-5)),
        min_p=p.min_p * (1 - 1e-5),
    )


@settings(max_examples=100, deadline=None)
@given(
    levels=st.lists(st.integers(-3, 3), min_size=2, max_size=40),
    k=st.integers(1, 10),
    seed=st.integers(0, 999),
)
def test_equals_are_admitted_together(levels, k, seed):
    """Of ties at the edge all may be drawn, so the set does not depend on how a sort orders them."""
    logits = np.array(levels, np.float32)
    edge = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    assert logits[one(logits, state(SamplingParams(top_k=k), vocab=len(logits), seed=seed))] >= edge


def test_all_of_many_equals_can_be_drawn():
    flat = [one([1.0] * 20, state(SamplingParams(top_k=2), vocab=20, seed=i)) for i in range(200)]
    assert len(set(flat)) > 15


def test_greedy_takes_the_likeliest_and_leaves_the_logits_alone():
    logits = torch.from_numpy(np.stack([spread(50, i) for i in range(8)]))
    before = logits.clone()
    greedy = SamplingParams(temperature=0.0)
    result = sample(logits, [state(greedy) for _ in range(8)])
    assert result == SampleResult(before.argmax(-1).tolist(), [False] * 8, None)
    mixed = [state(SamplingParams(temperature=0, logit_bias={1: 50.0}, logprobs=1)) for _ in range(8)]
    assert sample(logits, mixed).token_ids == [1] * 8
    assert torch.equal(logits, before)


def test_low_temperatures_and_large_logits_do_not_overflow():
    for p in (SamplingParams(temperature=2e-5), SamplingParams(temperature=0.001, top_p=0.5)):
        assert one([3e37, -3e37, 2.9e37], state(p, vocab=3)) == 0


def test_a_row_of_a_broken_model_yields_some_token():
    for bad in ([np.nan] * 5, [-np.inf] * 5, [1.0, np.nan, 2.0, 0.0, 0.0]):
        for p in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(temperature=0)):
            assert 0 <= one(bad, state(p, vocab=5)) < 5


def test_batches_do_not_change_what_a_request_draws():
    rows = [spread(200, i) for i in range(12)]
    params = [
        SamplingParams(seed=i, temperature=0.0 if i % 3 == 0 else 1.3, top_p=0.9 if i % 2 else 1.0)
        for i in range(12)
    ]
    alone = []
    for row, p in zip(rows, params, strict=True):
        s = SamplerState(p, [], [], 200)
        alone.append([one(row, s) for _ in range(6)])
    order = np.random.default_rng(0)
    together: list[list[int]] = [[] for _ in rows]
    states = [SamplerState(p, [], [], 200) for p in params]
    while any(len(tokens) < 6 for tokens in together):
        chosen = [int(i) for i in order.permutation(12)[:5] if len(together[i]) < 6]
        result = sample(torch.from_numpy(np.stack([rows[i] for i in chosen])) if chosen else torch.empty(0, 200),
                        [states[i] for i in chosen])  # fmt: skip
        for i, token in zip(chosen, result.token_ids, strict=True):
            together[i].append(token)
    assert together == alone


def test_a_seed_makes_a_request_repeatable_and_another_seed_another_one():
    logits = spread(500, 3, 1.0)

    def tokens(seed):
        s = SamplerState(SamplingParams(seed=seed), [], [], 500)
        return [one(logits, s) for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)
    assert tokens(-3) == tokens(-3)


def test_the_nth_token_uses_the_nth_number_whatever_came_before():
    p = SamplingParams(seed=1)
    one_way, other = state(p), state(p)
    for token in (3, 4, 5):
        one_way.record(token)
    for token in (9, 9, 9):
        other.record(token)
    assert one_way.uniform() == other.uniform() != state(p).uniform()


def test_min_tokens_bars_ending_and_stop_tokens_end():
    logits = [0.0, 5.0, 4.0, 3.0]
    s = state(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2]), eos=[1], vocab=4)
    results = [sample(torch.tensor([logits]), [s]) for _ in range(3)]
    assert [r.token_ids[0] for r in results] == [3, 3, 1]
    assert [r.stopped[0] for r in results] == [False, False, True]
    s = state(SamplingParams(temperature=0, stop_token_ids=[1], ignore_eos=True), eos=[2], vocab=4)
    assert sample(torch.tensor([logits]), [s]).stopped == [True]
    s = state(SamplingParams(temperature=0, ignore_eos=True), eos=[1], vocab=4)
    result = sample(torch.tensor([logits]), [s])
    assert (result.token_ids, result.stopped) == ([1], [False])


def test_ids_beyond_the_vocabulary_are_no_stop_tokens():
    s = state(SamplingParams(temperature=0, min_tokens=1), eos=[1, 10**6], vocab=4)
    assert one([0.0, 9.0, 1.0, 0.0], s) == 2


def test_penalties_grow_with_the_output():
    params = SamplingParams(
        temperature=0, frequency_penalty=0.4, presence_penalty=0.3, repetition_penalty=1.1
    )
    logits, prompt = spread(60, 4, 0.5), list(range(0, 60, 7))
    s, output = state(params, prompt, vocab=60), []
    for _ in range(100):  # more distinct tokens than the table starts with room for
        token = one(logits, s)
        assert token == oracle(logits, params, prompt, output).argmax()
        output.append(token)
    assert len(set(output)) > 30


def test_logprobs_are_of_the_raw_logits():
    logits = torch.from_numpy(np.stack([spread(30, i) for i in range(3)]))
    params = [
        SamplingParams(temperature=0.3, logit_bias={4: 50.0}, logprobs=3),
        SamplingParams(),
        SamplingParams(temperature=0, logprobs=0),
    ]
    result = sample(logits, [state(p, vocab=30) for p in params])
    expected = logits.double().log_softmax(-1)
    assert result.logprobs is not None
    first, second, third = result.logprobs
    assert second is None
    assert first is not None
    assert result.token_ids[0] == 4
    assert first.logprob == pytest.approx(float(expected[0, 4]), abs=1e-5)
    top = expected[0].topk(3)
    assert [token for token, _ in first.top] == top.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert third is not None
    assert third.top == []
    assert third.logprob == pytest.approx(float(expected[2].max()), abs=1e-5)
    assert type(first.top[0][0]) is int
    assert type(first.top[0][1]) is float


def test_equal_logprobs_come_lowest_id_first():
    s = state(SamplingParams(temperature=0, logprobs=3), vocab=6)
    result = sample(torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0, 3.0]]), [s])
    assert result.logprobs is not None
    assert result.logprobs[0] is not None
    assert [token for token, _ in result.logprobs[0].top] == [5, 1, 2]


def test_lanes_may_sample_at_once():
    rows = torch.from_numpy(np.stack([spread(300, i) for i in range(4)]))
    params = [SamplingParams(seed=i, top_p=0.9, frequency_penalty=0.1) for i in range(4)]

    def run(out):
        states = [SamplerState(p, [1, 2], [], 300) for p in params]
        out.extend(sample(rows, states).token_ids for _ in range(50))

    outs: list[list] = [[] for _ in range(4)]
    threads = [threading.Thread(target=run, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(out == outs[0] and len(out) == 50 for out in outs)
