from __future__ import annotations

import math

import msgspec
import pytest

from drift_core.sampling_params import SamplingError, SamplingParams
from drift_scheduler.errors import DriftError


def test_the_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (p.seed, p.logit_bias, p.max_tokens, p.min_tokens) == (None, None, 16, 0)
    assert (p.stop_strings, p.stop_token_ids, p.logprobs) == ((), None, None)
    assert not p.ignore_eos
    assert not p.include_stop_str_in_output
    assert p.skip_special_tokens
    assert not p.greedy
    assert SamplingParams(temperature=0).greedy


BAD = [
    ("n", 0, "from 1 to 16"),
    ("n", 17, "from 1 to 16"),
    ("n", True, "whole number"),
    ("n", 1.5, "whole number"),
    ("temperature", -0.1, "from 0 to 100"),
    ("temperature", 101, "from 0 to 100"),
    ("temperature", math.nan, "from 0 to 100, not nan"),
    ("temperature", math.inf, "from 0 to 100, not inf"),
    ("temperature", "hot", "a number from 0 to 100"),
    ("top_p", 0.0, "above 0 and at most 1"),
    ("top_p", 1.01, "from 0 to 1"),
    ("top_p", math.nan, "from 0 to 1"),
    ("top_k", -2, "from -1 to"),
    ("top_k", 10**7, "from -1 to"),
    ("min_p", -0.1, "from 0 to 1"),
    ("min_p", 1.1, "from 0 to 1"),
    ("presence_penalty", 2.1, "from -2 to 2"),
    ("frequency_penalty", -2.1, "from -2 to 2"),
    ("repetition_penalty", 0.0, "from 0.01 to 10"),
    ("repetition_penalty", 11, "from 0.01 to 10"),
    ("seed", 2**64, "whole number"),
    ("seed", "7", "whole number"),
    ("logit_bias", dict.fromkeys(range(301), 1.0), "at most 300 entries, not 301"),
    ("logit_bias", {-1: 1.0}, "token ids"),
    ("logit_bias", [1], "a mapping"),
    ("max_tokens", 0, "from 1 to"),
    ("max_tokens", 10**9, "from 1 to"),
    ("min_tokens", -1, "from 0 to"),
    ("min_tokens", 17, "at most max_tokens, 16"),
    ("stop", [""], "1 to 256 characters"),
    ("stop", ["x" * 257], "1 to 256 characters"),
    ("stop", ["x"] * 17, "at most 16 strings, not 17"),
    ("stop", [3], "strings"),
    ("stop", 3, "a list"),
    ("stop_token_ids", [-1], "token ids"),
    ("stop_token_ids", [0.5], "token ids"),
    ("stop_token_ids", list(range(129)), "at most 128 ids"),
    ("logprobs", -1, "from 0 to 20"),
    ("logprobs", 21, "from 0 to 20"),
    ("ignore_eos", 1, "true or false"),
    ("include_stop_str_in_output", "yes", "true or false"),
]


@pytest.mark.parametrize(("field", "value", "expected"), BAD)
def test_every_value_is_bounded_and_the_error_names_it(field, value, expected):
    with pytest.raises(SamplingError, match=f"^{field}") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert isinstance(caught.value, DriftError)


@pytest.mark.parametrize("bias", [math.nan, math.inf, 100.5, -101, "1", None])
def test_logit_bias_values_are_bounded(bias):
    with pytest.raises(SamplingError, match=r"^logit_bias\[5\] must be "):
        SamplingParams(logit_bias={5: bias})


def test_the_limits_themselves_are_allowed():
    SamplingParams(
        n=16, temperature=100, top_p=1, top_k=10**6, min_p=1, presence_penalty=-2, frequency_penalty=2,
        repetition_penalty=10, seed=-(2**63), logit_bias=dict.fromkeys(range(300), 100), max_tokens=2**20,
        min_tokens=2**20, stop=["x" * 256] * 16, stop_token_ids=list(range(128)), logprobs=20,
    )  # fmt: skip
    SamplingParams(max_tokens=None, min_tokens=40, logprobs=0)


def test_values_of_two_spellings_become_one():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(seed=-1) == SamplingParams()
    assert SamplingParams(stop="end") == SamplingParams(stop=["end"])
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=[], stop_token_ids=[], logit_bias={}) == SamplingParams()


def test_it_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        SamplingParams().n = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[misc]


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
def test_it_survives_the_wire(codec):
    p = SamplingParams(
        temperature=0.5, stop=["a", "b"], stop_token_ids=[3], logit_bias={7: -1.5}, seed=5, logprobs=2
    )
    assert codec.decode(codec.encode(p), type=SamplingParams) == p
    assert codec.decode(codec.encode(SamplingParams()), type=SamplingParams) == SamplingParams()


def test_the_wire_is_held_to_the_same_bounds():
    with pytest.raises(msgspec.ValidationError, match="temperature must be from 0 to 100, not 500"):
        msgspec.json.decode(b'{"temperature": 500.0}', type=SamplingParams)
    with pytest.raises(msgspec.ValidationError, match="unknown field `best_of`"):
        msgspec.json.decode(b'{"best_of": 2}', type=SamplingParams)


def test_token_ids_are_checked_against_the_vocabulary():
    SamplingParams(stop_token_ids=[99], logit_bias={99: 1.0}).validate(100)
    for bad in ({"stop_token_ids": [100]}, {"logit_bias": {100: 1.0}}):
        with pytest.raises(SamplingError, match="token ids of 0 to 99, not 100"):
            SamplingParams(**bad).validate(100)
    with pytest.raises(SamplingError, match="logprobs"):
        SamplingParams(logprobs=5).validate(4)


def test_children_have_one_output_and_their_own_seed():
    p = SamplingParams(n=4, seed=2**64 - 1, temperature=0.5)
    assert [p.child(i).seed for i in range(3)] == [2**64 - 1, 0, 1]
    assert p.child(1).n == 1
    assert p.child(1).temperature == 0.5
    assert SamplingParams(n=2).child(1).seed is None
    assert SamplingParams(n=2, seed=-2).child(1).seed == 2**64 - 1
