"""Outputs held to a form by the CUDA executor, on the stub device: the CPU executor's tokens, and of the form."""

from __future__ import annotations

import re
import string
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from tokenizers import AddedToken, Tokenizer, decoders, models

from drift_core.cuda.cells import chosen_on_host
from drift_core.cuda.stub import StubDevice
from drift_core.sampler import SamplerState, sample
from drift_core.sampling_params import SamplingParams, Structured
from drift_core.structured import Matcher, Vocabulary, compile_form
from drift_kernels import reference
from drift_scheduler.domain import Finished, FinishReason, Request, Step

sys.path.insert(0, str(Path(__file__).parent))

from cuda_world import GREEDY, UNITS, VOCAB, Load, cpu, run, stub_executor

LETTERS = (string.ascii_letters + string.digits)[: VOCAB - 1]
END = VOCAB - 1
PATTERN = "[a-c]{2,4}(X|YZ)[0-7]*"
WORDS = ("abcabcabc", "abX", "zzz")
FORMED = SamplingParams(structured=Structured("regex", PATTERN), seed=3, frequency_penalty=0.5)
CHOSEN = SamplingParams(structured=Structured("choice", WORDS), temperature=0.0, min_tokens=9, logprobs=1)
LIKELIEST = SamplingParams(structured=Structured("regex", PATTERN), temperature=0.0, min_tokens=7)
FREE = SamplingParams(structured=Structured("regex", PATTERN), temperature=0.9, top_p=0.9, seed=6)
DRAWN = SamplingParams(logit_bias={1: 2.0}, seed=4, ignore_eos=True)


@cache
def vocabulary() -> Vocabulary:
    backend = Tokenizer(models.BPE(vocab={letter: token for token, letter in enumerate(LETTERS)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Vocabulary(backend.to_str(), VOCAB, [END])


class Forming:
    """An executor that gets matchers for forms, as the engine gives them."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def arrive(self, request: Request, params: SamplingParams) -> None:
        form = params.structured
        matcher = None if form is None else compile_form(vocabulary(), form).matcher()
        self._inner.arrive(request, params, matcher)


def text(tokens: list[int]) -> str:
    return "".join(LETTERS[token] for token in tokens if token != END)


def params_of(index: int) -> SamplingParams:
    return (GREEDY, FORMED, CHOSEN, DRAWN, LIKELIEST)[index % 5]


@pytest.mark.parametrize(
    ("policy", "options"), [("gang", {}), ("chunked-prefill", {"token_budget": 24}), ("temporal", {})]
)
def test_forms_are_kept_as_the_cpu_executor_keeps_them(policy: str, options: dict[str, Any]) -> None:
    load = Load(12, output=(12, 16), params=params_of)
    host = cpu()
    try:
        expected = run(Forming(host), load, "alternate")
    finally:
        host.close()
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    executor.warm_up()
    found = run(Forming(executor), load, policy, **options)
    assert found == expected
    assert stub.faults == []
    for index in range(load.count):
        tokens, params = found[f"r{index}"], params_of(index)
        if params is FORMED and tokens[-1] == END:
            assert re.fullmatch(PATTERN, text(tokens))
        if params is CHOSEN:
            assert tokens[-1] == END
            assert text(tokens) in WORDS


@pytest.mark.parametrize(
    ("policy", "options"), [("gang", {}), ("chunked-prefill", {"token_budget": 24}), ("temporal", {})]
)
def test_forms_alone_never_fetch_logits(policy: str, options: dict[str, Any]) -> None:
    """Masks are applied on the device: to greedy rows and drawn ones, beside rows that have none."""

    def mixed(index: int) -> SamplingParams:
        return (LIKELIEST, GREEDY, FREE)[index % 3]

    load = Load(12, output=(12, 16), params=mixed)
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    executor.warm_up()
    found = run(Forming(executor), load, policy, **options)
    assert stub.faults == []
    names = {name for name, *_ in stub.log}
    assert "mask" in names
    assert "logits" not in names
    host = cpu()
    try:
        expected = run(Forming(host), load, "alternate")
    finally:
        host.close()
    for index in range(load.count):
        name = f"r{index}"
        if mixed(index) is not FREE:  # drawn by another stream of numbers than the host's
            assert found[name] == expected[name]
        if mixed(index) is not GREEDY:
            assert re.fullmatch(PATTERN, text(found[name])) or found[name][-1] != END
    again = stub_executor(StubDevice(UNITS), max_running=3)
    again.warm_up()
    assert run(Forming(again), load, "decode-first", max_running=3) == found  # whatever the batches


def test_a_form_that_can_go_no_further_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Matcher._mask
    asked = iter(range(1000))

    def mask(self: Matcher) -> Any:
        if next(asked) == 3:
            self.fault = "too ambiguous"
        return original(self)

    executor = stub_executor(StubDevice(UNITS))
    executor.warm_up()
    load = Load(4, output=(12, 16), params=lambda index: LIKELIEST if index == 2 else GREEDY)
    forming, ended = Forming(executor), {}

    def on_step(step: Step) -> None:
        ended.update({out.request_id: out for out in step.outputs if isinstance(out, Finished)})

    compile_form(vocabulary(), Structured("regex", PATTERN))
    monkeypatch.setattr(Matcher, "_mask", mask)
    run(forming, load, on_step=on_step, ends=tuple(FinishReason))
    assert (ended["r2"].reason, ended["r2"].message) == (FinishReason.FAILED, "too ambiguous")
    assert {ended[f"r{index}"].reason for index in (0, 1, 3)} <= {FinishReason.LENGTH, FinishReason.STOP}


@pytest.mark.parametrize("seed", range(6))
def test_the_masked_choice_is_the_host_samplers_for_the_same_number(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(4, VOCAB)
    if seed == 5:
        logits[:, ::3] = float("nan")
    number = float(torch.rand(()))
    monkeypatch.setattr(SamplerState, "uniform", lambda self: number)
    settings = [LIKELIEST, FREE, replace(FREE, min_tokens=4, top_k=5), replace(FREE, top_p=1.0, min_p=0.05)]
    states = [
        SamplerState(params, [1], (END,), VOCAB, 0, compile_form(vocabulary(), params.structured).matcher())
        for params in settings
        if params.structured is not None
    ]
    for _ in range(6):
        assert all(state.formed and not chosen_on_host(state) for state in states)
        masked = logits.clone()
        words = torch.from_numpy(np.stack([state.form_bits() for state in states]))
        reference.mask_logits(masked, torch.arange(4, dtype=torch.int32), words)
        columns = zip(*[(p.temperature, p.top_k, p.top_p, p.min_p) for p in settings], strict=True)
        temperature, top_k, top_p, min_p = map(torch.tensor, columns)
        tokens = reference.sample(
            masked, temperature, top_k.clamp(min=0), top_p, min_p, torch.full((4,), number)
        )
        assert sample(logits, states).token_ids == tokens.tolist()


@pytest.mark.parametrize("params", [FORMED, FREE])
def test_masks_are_worked_out_while_the_device_runs(params: SamplingParams) -> None:
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    executor.warm_up()
    executor.times.clock = iter(range(1 << 30)).__next__  # type: ignore[assignment]
    steps: list[Step] = []
    run(Forming(executor), Load(4, output=(12, 16), params=lambda index: params), on_step=steps.append)
    assert len(executor.times.spent.get("masks", [])) > len(steps) / 4
    free = stub_executor(StubDevice(UNITS))
    free.warm_up()
    free.times.clock = iter(range(1 << 30)).__next__  # type: ignore[assignment]
    run(free, Load(4, output=(12, 16)))
    assert "masks" not in free.times.spent
