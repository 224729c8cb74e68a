"""Outputs held to a form by the CUDA executor, on the stub device: the CPU executor's tokens, and of the form."""

from __future__ import annotations

import re
import string
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from drift_core.cuda.stub import StubDevice
from drift_core.sampling_params import SamplingParams, Structured
from drift_core.structured import Vocabulary, compile_form
from drift_scheduler.domain import Request, Step

sys.path.insert(0, str(Path(__file__).parent))

from cuda_world import GREEDY, UNITS, VOCAB, Load, cpu, run, stub_executor

LETTERS = (string.ascii_letters + string.digits)[: VOCAB - 1]
END = VOCAB - 1
PATTERN = "[a-c]{2,4}(X|YZ)[0-7]*"
WORDS = ("abcabcabc", "abX", "zzz")
FORMED = SamplingParams(structured=Structured("regex", PATTERN), seed=3, frequency_penalty=0.5)
CHOSEN = SamplingParams(structured=Structured("choice", WORDS), temperature=0.0, min_tokens=9, logprobs=1)
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
    return (GREEDY, FORMED, CHOSEN, DRAWN)[index % 4]


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


def test_masks_are_worked_out_while_the_device_runs() -> None:
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    executor.warm_up()
    executor.times.clock = iter(range(1 << 30)).__next__  # type: ignore[assignment]
    steps: list[Step] = []
    run(Forming(executor), Load(4, output=(12, 16), params=lambda index: FORMED), on_step=steps.append)
    assert len(executor.times.spent.get("masks", [])) > len(steps) / 4
    free = stub_executor(StubDevice(UNITS))
    free.warm_up()
    free.times.clock = iter(range(1 << 30)).__next__  # type: ignore[assignment]
    run(free, Load(4, output=(12, 16)))
    assert "masks" not in free.times.spent
