"""Outputs in a form of an engine without a model: they have it, come to their end, and hold up nobody else."""

from __future__ import annotations

import json
import re
import threading
import time
from functools import cache
from itertools import count, islice
from typing import Any

import jsonschema
import pytest

from drift_core.composition import assemble
from drift_core.engine import Engine, engine_config
from drift_core.frames import Submit
from drift_core.model.config import model_directory
from drift_core.sampling_params import SamplingParams, Structured
from drift_core.simulated import token_choices, token_ids
from drift_core.simulated_forms import FormedTokens
from drift_core.structured import Form, Vocabulary, compile_form
from drift_core.tokenizer import Tokenizer
from drift_scheduler.domain import Finished, Step, Tokens

PATIENCE_S = 60.0
EOS, VOCAB = 2, 3072
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "address": {"type": "object", "properties": {"street": {"type": "string", "minLength": 3}},
                    "required": ["street"]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "kind": {"enum": ["new", "old"]},
        "born": {"type": "string", "format": "date"},
        "score": {"type": ["number", "null"]},
    },
    "required": ["name", "age", "address", "tags", "kind", "born", "score"],
}  # fmt: skip
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                side: {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]} for side in ("left", "right")
            },
            "required": ["left", "right"],
        }
    },
}
SCHEMAS: list[dict[str, Any]] = [{}, {"type": "object"}, {"type": "array"}, {"type": "number"}, PERSON, TREE]
PATTERNS = [
    r"[a-z]+@[a-z]+\.com", "[0-9]{4}-[0-9]{2}-[0-9]{2}", "(yes|no)[.]?", ".*", "[a-z]*", "é{2,5}|日本[ab]*",
    "([a-zA-Zé]+ ){3}end",
]  # fmt: skip


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(model_directory("demo"))


@cache
def form(structured: Structured) -> Form:
    return compile_form(Vocabulary.of(tokenizer(), VOCAB, [EOS]), structured)


def schema(value: Any) -> Structured:
    return Structured("json_schema", json.dumps(value))


def drawn(structured: Structured, seed: int, least: int = 0, most: int = 400) -> tuple[list[int], bool]:
    """The tokens up to the end, and whether there is one."""
    numbers = token_ids([5, 6, 7], seed, range(1 << 31))
    source = FormedTokens(form(structured).matcher(), structured.kind, numbers, least, most)
    tokens: list[int] = []
    for token in islice(source, most):
        assert source.matcher.fault is None
        if source.ended:
            assert token == EOS
            return tokens, True
        tokens.append(token)
    return tokens, False


# ------------------------------------------------------------------------------------------- the draws


@pytest.mark.parametrize("value", SCHEMAS, ids=str)
def test_whatever_the_schema_there_soon_is_a_value_of_it(value: dict[str, Any]) -> None:
    lengths, texts = [], set()
    for seed in range(25):
        tokens, ended = drawn(schema(value), seed)
        assert ended
        text = tokenizer().decode(tokens)
        jsonschema.validate(json.loads(text), value, jsonschema.Draft202012Validator)
        lengths.append(len(tokens))
        texts.add(text)
    assert sorted(lengths)[12] <= 120
    assert len(texts) > 3, "seeds differ"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_matched_as_a_whole(pattern: str) -> None:
    for seed in range(25):
        tokens, ended = drawn(Structured("regex", pattern), seed)
        assert ended
        assert tokens, "something is said even where nothing would do"
        assert re.fullmatch(pattern, tokenizer().decode(tokens))


def test_every_choice_is_made_by_some_seed() -> None:
    choices = ("yes", "no", "yes, perhaps", "日本")
    made = set()
    for seed in range(60):
        tokens, ended = drawn(Structured("choice", choices), seed)
        assert ended
        made.add(tokenizer().decode(tokens))
    assert made == set(choices)


def test_there_is_no_end_before_min_tokens_unless_nothing_else_is_left() -> None:
    tokens, ended = drawn(Structured("regex", "[a-z]*"), 1, least=30)
    assert ended
    assert len(tokens) >= 30
    tokens, ended = drawn(Structured("choice", ("yes",)), 1, least=30)
    assert ended
    assert tokenizer().decode(tokens) == "yes"


def test_after_the_end_there_are_only_ends() -> None:
    numbers = token_ids([1], 3, range(1 << 31))
    source = FormedTokens(form(Structured("choice", ("no",))).matcher(), "choice", numbers, 0, None)
    assert list(islice(source, 40))[-20:] == [EOS] * 20
    assert source.ended


# ------------------------------------------------------------------------------------------ the engine


def started(**fields: Any) -> Engine:
    settings = {
        "model": "demo",
        "device": "simulated",
        "simulate": "step_ms=0.5:token_us=1",
        "max_context": 256,
    }
    return assemble(engine_config(**({"max_running": 8} | settings | fields)), lambda phase, fraction: None)


def submit(
    request_id: str, prompt: list[int], structured: Structured | None = None, **sampling: Any
) -> Submit:
    params = SamplingParams(**({"max_tokens": 120, "structured": structured} | sampling))
    return Submit(request_id, prompt, params, 2.0, 0.1, None, "default", 0, "", time.monotonic())


def serve_all(engine: Engine, frames: list[Submit]) -> tuple[dict[str, list[int]], dict[str, Finished]]:
    """Tokens and ends of all requests."""
    tokens: dict[str, list[int]] = {frame.id: [] for frame in frames}
    ends: dict[str, Finished] = {}

    def deliver(step: Step) -> None:
        for output in step.outputs:
            if isinstance(output, Tokens):
                assert output.token_ids is not None
                for request_id, token in zip(output.request_ids, output.token_ids, strict=True):
                    tokens[request_id].append(token)
            elif isinstance(output, Finished):
                ends[output.request_id] = output
        if len(ends) == len(frames):
            engine.shut_down()

    for frame in frames:
        if frame.sampling.structured is not None:
            engine.prepare(frame.sampling)
        engine.submit(frame)
    giving_up = threading.Timer(PATIENCE_S, engine.shut_down)
    giving_up.start()
    engine.run(deliver)
    giving_up.cancel()
    engine.close()
    assert len(ends) == len(frames), "it took too long"
    return tokens, ends


def mixed() -> list[Submit]:
    """Outputs with a form beside outputs without."""
    formed = [submit(f"f{k}", [5, 6], schema(PERSON), seed=k) for k in range(4)]
    plain = [submit(f"p{k}", [7, k], max_tokens=40) for k in range(4)]
    return [frame for pair in zip(formed, plain, strict=True) for frame in pair]


def test_the_engine_keeps_to_forms_beside_free_requests() -> None:
    tokens, ends = serve_all(started(), mixed())
    for frame in mixed():
        if frame.sampling.structured is None:
            assert tokens[frame.id] == list(
                islice(token_ids(frame.prompt, None, token_choices(VOCAB, [EOS])), 40)
            )
            continue
        assert ends[frame.id].reason.value == "stop"
        assert tokens[frame.id][-1] == EOS
        jsonschema.validate(json.loads(tokenizer().decode(tokens[frame.id][:-1])), PERSON)
    assert serve_all(started(), mixed())[0] == tokens, "the same for the same prompt and seed"


def test_preemption_keeps_the_place_in_the_form() -> None:
    frames = [submit(f"r{k}", [5, 6, k], Structured("regex", "[a-z]*"), min_tokens=60) for k in range(8)]
    alone, _ = serve_all(started(), frames)
    engine = started(kv_memory_bytes=256 * 1024)
    tokens, ends = serve_all(engine, frames)
    assert engine.scheduler.preemptions > 0
    assert tokens == alone
    assert {end.reason.value for end in ends.values()} == {"stop"}


def test_max_tokens_stop_tokens_and_log_probabilities_go_with_a_form() -> None:
    word = Structured("choice", ("abcdefghij" * 10,))
    frames = [
        submit("cut", [1], word, max_tokens=5, logprobs=1),
        submit("stopped", [1], Structured("regex", "[0-9]{1,40}x"), stop_token_ids=list(range(20, 30))),
    ]
    tokens, ends = serve_all(started(), frames)
    assert ends["cut"].reason.value == "length"
    assert ("abcdefghij" * 10).startswith(tokenizer().decode(tokens["cut"]))
    assert ends["stopped"].reason.value == "stop"
    assert [token in range(20, 30) for token in tokens["stopped"]].index(True) == len(tokens["stopped"]) - 1


def test_a_form_that_cannot_be_followed_fails_its_request_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = count()

    def lost(self: FormedTokens) -> int:
        if next(steps) == 3:
            self.matcher.fault = "too ambiguous"
        return 9

    monkeypatch.setattr(FormedTokens, "__next__", lost)
    frames = [submit("bad", [1], schema({})), submit("good", [1], max_tokens=20)]
    _, ends = serve_all(started(), frames)
    assert (ends["bad"].reason.value, ends["bad"].message) == ("failed", "too ambiguous")
    assert ends["good"].reason.value == "length"
