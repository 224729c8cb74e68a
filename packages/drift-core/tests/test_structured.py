"""Forms: what random tokens make under a form's masks is always of that form; what cannot be one is refused."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drift_core
from drift_core import LLM, SamplingParams
from drift_core.joining import Joining
from drift_core.sampler import SamplerState, sample
from drift_core.sampling_params import MAX_CHOICES, SamplingError, Structured
from drift_core.structured import Compiler, CompilerBusyError, FormError, Matcher, Vocabulary, compile_form
from drift_core.tokenizer import Tokenizer
from drift_scheduler.domain import RequestCancelled
from drift_scheduler.errors import DriftError

DEMO = Path(drift_core.__file__).parent / "demo_model"
VOCAB, EOS = 3072, 2

SCHEMAS: dict[str, Any] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested arrays": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "enum": {"enum": ["é", "日本", None, 1.5, True, {"a": [1, "\n"]}]},
    "numbers": {
        "type": "array",
        "prefixItems": [
            {"type": "number", "minimum": -1.5, "exclusiveMaximum": 3},
            {"type": "integer", "multipleOf": 7, "maximum": 99},
        ],
        "items": False,
        "minItems": 2,
    },
    "any of, by reference": {
        "$defs": {"word": {"type": "string", "pattern": "^[a-zé]{1,5}$"}},
        "anyOf": [
            {"$ref": "#/$defs/word"},
            {"type": "object", "properties": {"w": {"$ref": "#/$defs/word"}}, "required": ["w"],
             "additionalProperties": False},
        ],
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "null"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
    "formats": {"type": "string", "format": "date-time"},
}  # fmt: skip
REGEXES = [
    "[a-z]{1,5}(-[0-9]{2,4})?", "é{2,5}|日本[ab]*|😀", r"a/b\n\"c\\", r"(yes|no)\.?", r"\{\"k\": [0-9]\}",
    "(?i)drift v[0-9]",
]  # fmt: skip
CHOICES = ("a", "ab", "a b", "c/d\n", '"quoted"', "é.*#-~&\x00\t'", "日本", "^$|()[]{}+?\\")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary.of(tokenizer(), VOCAB, [EOS])


def schema(value: Any) -> Structured:
    return Structured("json_schema", json.dumps(value))


def generate(
    structured: Structured, rng: np.random.Generator, most: int = 400, **params: Any
) -> tuple[str, bool]:
    """The text that random logits make of a form, and whether it came to its end."""
    state = SamplerState(
        SamplingParams(max_tokens=most, seed=int(rng.integers(1 << 30)), structured=structured, **params),
        [5, 6, 7], [EOS], VOCAB, matcher=compile_form(vocabulary(), structured).matcher(),
    )  # fmt: skip
    tokens: list[int] = []
    for _ in range(most):
        # Ends are made likely, or random text would rarely come to one.
        logits = rng.normal(scale=2.0, size=VOCAB).astype(np.float32)
        logits[EOS] += 4.0
        result = sample(torch.from_numpy(logits)[None], [state])
        assert result.faults == ()
        if result.stopped[0]:
            return tokenizer().decode(tokens), True
        tokens.append(result.token_ids[0])
    return tokenizer().decode(tokens), False


def plain_json(text: str) -> Any:
    return json.loads(text)


# --------------------------------------------------------------------------- what comes out is of the form


@pytest.mark.parametrize("name", SCHEMAS)
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=12, deadline=None)
def test_a_finished_output_satisfies_its_schema(name: str, seed: int) -> None:
    text, ended = generate(schema(SCHEMAS[name]), np.random.default_rng(seed))
    if ended:
        jsonschema.validate(plain_json(text), SCHEMAS[name], jsonschema.Draft202012Validator)


@pytest.mark.parametrize("pattern", REGEXES)
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=12, deadline=None)
def test_a_finished_output_is_matched_as_a_whole(pattern: str, seed: int) -> None:
    text, ended = generate(Structured("regex", pattern), np.random.default_rng(seed))
    if ended:
        assert re.fullmatch(pattern, text)


FORMS = [
    *(pytest.param(schema(value), id=name) for name, value in SCHEMAS.items()),
    *(pytest.param(Structured("regex", pattern), id=pattern) for pattern in REGEXES),
]


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_each_form_come_to_an_end(form: Structured) -> None:
    assert all(generate(form, np.random.default_rng(seed))[1] for seed in range(8))


@given(
    seed=st.integers(0, 1 << 30),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([0.3, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_an_output_is_one_of_the_choices_whatever_else_was_asked(
    seed: int, temperature: float, top_p: float
) -> None:
    text, ended = generate(
        Structured("choice", CHOICES), np.random.default_rng(seed), temperature=temperature, top_p=top_p,
        top_k=50, repetition_penalty=1.3, presence_penalty=1.0, min_p=0.01, logit_bias={9: 100.0, 11: -100.0},
        min_tokens=20, logprobs=2,
    )  # fmt: skip
    assert ended
    assert text in CHOICES


@given(seed=st.integers(0, 1 << 30), most=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_an_output_cut_short_is_the_beginning_of_one(seed: int, most: int) -> None:
    choice = CHOICES[seed % len(CHOICES)] * 3
    text, ended = generate(Structured("choice", (choice,)), np.random.default_rng(seed), most)
    whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character may be cut, too
    assert text == choice if ended else choice.startswith(whole)


def test_any_json_is_json() -> None:
    rng = np.random.default_rng(1)
    texts = [generate(Structured("json_schema", "{}"), rng, 100) for _ in range(40)]
    assert sum(ended for _, ended in texts) > 5
    for text, ended in texts:
        if ended:
            plain_json(text)


# ------------------------------------------------------------------------------------ ends and samplers


def state_of(structured: Structured, **params: Any) -> SamplerState:
    matcher = compile_form(vocabulary(), structured).matcher()
    return SamplerState(SamplingParams(structured=structured, **params), [5], [EOS], VOCAB, 1, matcher)


def test_the_end_is_allowed_exactly_where_the_form_is_complete() -> None:
    matcher = compile_form(vocabulary(), Structured("regex", "ab?")).matcher()
    (a,), (b,) = tokenizer().encode("a", False), tokenizer().encode("b", False)
    assert not matcher.allowed()[EOS]
    assert matcher.allowed()[a]
    assert not matcher.allowed()[b]
    matcher.accept(a)
    assert matcher.complete
    assert set(np.flatnonzero(matcher.allowed())) == {b, EOS}
    matcher.accept(b)
    assert set(np.flatnonzero(matcher.allowed())) == {EOS}
    assert matcher.fault is None


def test_min_tokens_bars_the_end_while_the_form_can_go_on_and_no_longer() -> None:
    text, ended = generate(Structured("regex", "a{1,9}"), np.random.default_rng(3), 30, min_tokens=30)
    assert ended
    assert text == "a" * 9


def test_logits_that_are_no_numbers_leave_the_form() -> None:
    state = state_of(Structured("choice", ("x", "y")), temperature=0.0)
    broken = torch.full((1, VOCAB), float("nan"))
    result = sample(broken, [state])
    assert tokenizer().decode(result.token_ids) in ("x", "y")


def test_logprobs_are_of_the_raw_logits() -> None:
    state = state_of(Structured("choice", ("x",)), temperature=0.0, logprobs=1)
    logits = torch.zeros((1, VOCAB))
    logits[0, 100] = 5.0
    result = sample(logits, [state])
    assert result.logprobs is not None
    assert result.logprobs[0] is not None
    assert result.logprobs[0].top[0][0] == 100


def test_outputs_of_one_form_go_their_own_ways() -> None:
    form = compile_form(vocabulary(), Structured("regex", "ab|cd"))
    (a,), (c,) = tokenizer().encode("a", False), tokenizer().encode("c", False)
    first, second = form.matcher(), form.matcher()
    first.accept(a)
    second.accept(c)
    assert not (first.allowed() & second.allowed()).any()
    assert form.matcher().allowed()[c]


def test_a_token_outside_the_form_is_a_fault_and_fails_the_row_alone() -> None:
    state, other = state_of(Structured("regex", "ab")), SamplerState(SamplingParams(), [5], [EOS], VOCAB, 1)
    assert state.matcher is not None
    state.matcher.accept(tokenizer().encode("z", False)[0])
    result = sample(torch.zeros((2, VOCAB)), [other, state])
    assert [row for row, _ in result.faults] == [1]
    assert not result.stopped[1]


# ------------------------------------------------------------------------------------------- hostile forms


def laughs(levels: int) -> Any:
    """Each level refers twice to the next, with something of its own."""
    defs: dict[str, Any] = {f"a{levels}": {"type": "string"}}
    for level in range(levels):
        twice = [{"$ref": f"#/$defs/a{level + 1}", side: level} for side in ("minLength", "maxLength")]
        defs[f"a{level}"] = {"anyOf": twice}
    return {"$ref": "#/$defs/a0", "$defs": defs}


def nested(levels: int) -> Any:
    inner: Any = {"type": "integer"}
    for _ in range(levels):
        inner = {"type": "array", "items": inner}
    return inner


PRODUCT = [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(6)]} for i in range(8)]
CIRCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
AMBIGUOUS = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(600)}}

HOSTILE: dict[str, tuple[Any, ...]] = {
    "no JSON": ("json_schema", "{", "not JSON"),
    "no number": ("json_schema", '{"const": NaN}', "not JSON"),
    "no schema": ("json_schema", "[1]", "JSON list"),
    "half a character": ("json_schema", '{"const": "\\ud83d"}', "hex escape"),
    "1 MB": ("json_schema", json.dumps({"enum": ["x" * 1000] * 1000}), "65536 bytes"),
    "deep": ("json_schema", json.dumps(nested(100)), "64 levels"),
    "very deep": ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "64 levels"),
    "unclosed deep": ("json_schema", "[" * 60000, "64 levels"),
    "laughs": ("json_schema", json.dumps(laughs(30)), "too large"),
    "product": ("json_schema", json.dumps({"allOf": PRODUCT}), "too large"),
    "itself": ("json_schema", '{"$ref": "#"}', "impossible"),
    "circle": ("json_schema", json.dumps(CIRCLE), "impossible"),
    "from elsewhere": ("json_schema", '{"$ref": "http://example.com/schema"}', "not present"),
    "nothing": ("json_schema", "false", "nsatisfiable"),
    "unknown": ("json_schema", '{"unevaluatedItems": false}', "unevaluatedItems"),
    "lenience asked for": ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', "not"),
    "a prime": ("json_schema", '{"type": "integer", "multipleOf": 999999937}', "fuel"),
    "no regex": ("regex", "(", "unclosed group"),
    "look-around": ("regex", "(?!a)b", "look-around"),
    "back-reference": ("regex", r"(a)\1", "backreferences"),
    "impossible regex": ("regex", r"[^\s\S]", "impossible"),
    "groups": ("regex", "(" * 4000 + "a" + ")" * 4000, "64 levels"),
    "long regex": ("regex", "a" * 9000, "8192 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_form_is_refused_in_one_line(name: str) -> None:
    kind, value, why = HOSTILE[name]
    with pytest.raises(DriftError, match=re.escape(why)) as refusal:
        compile_form(vocabulary(), Structured(kind, value))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_form_that_meets_a_limit_on_the_way_is_a_fault_then() -> None:
    matcher = compile_form(vocabulary(), schema(AMBIGUOUS)).matcher()
    assert "2000" in (follow(matcher) or "")
    assert set(np.flatnonzero(matcher.allowed())) == {EOS}
    assert not matcher.complete


def follow(matcher: Any, steps: int = 40) -> str | None:
    """Take some way through a form; the fault met on it."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        allowed = np.flatnonzero(matcher.allowed())
        if matcher.fault is not None or list(allowed) == [EOS]:
            break
        matcher.accept(int(rng.choice(allowed[allowed != EOS])))
    return matcher.fault  # type: ignore[no-any-return]


EXPONENTIAL = [
    "(a|a)*b(a|aa)+", "(x+x+)+y", "(a|b)*a(a|b){30}", "(a{1000}){1000}", "x(a{1000}){1000}", "a{100000}",
    "((a{0,100}){0,100}){0,100}x", r"(\w{1,100}){1,100}", "(.{1,300}x){1,300}", "(a?){5000}",
    "(" * 60 + "a" + ")*" * 60,
]  # fmt: skip


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_exponential_patterns_cost_no_more_than_their_limits(pattern: str) -> None:
    """Each either goes well, is refused, or meets a limit; the time-out of the test suite is the watchdog."""
    try:
        form = compile_form(vocabulary(), Structured("regex", pattern))
    except FormError:
        return
    follow(form.matcher(), 200)


def test_sizes_are_checked_where_a_form_is_made() -> None:
    wrong: list[tuple[Any, Any, str]] = [
        ("grammar", "x", "structured must be one of json_schema, regex, choice"),
        ("regex", "", "1 to 8192 bytes"),
        ("regex", ("a",), "a text"),
        ("regex", "\ud800", "UTF-8"),
        ("choice", (), f"1 to {MAX_CHOICES} texts"),
        ("choice", tuple(map(str, range(MAX_CHOICES + 1))), f"1 to {MAX_CHOICES} texts"),
        ("choice", "abc", "a list"),
        ("choice", ("a", ""), "not empty"),
        ("choice", ("a", "b", "a"), "no two are the same, not 'a'"),
        ("choice", ("a" * 70000,), "65536 bytes"),
    ]
    for kind, value, why in wrong:
        with pytest.raises(SamplingError, match=re.escape(why)):
            Structured(kind, value)
    with pytest.raises(SamplingError, match="ignore_eos"):
        SamplingParams(structured=Structured("regex", "a"), ignore_eos=True)
    Structured("regex", "[(]" * 1000)
    Structured("json_schema", json.dumps({"enum": ["[[[[" * 100]}))


def test_a_vocabulary_without_the_letters_or_without_an_end_is_refused(tmp_path: Path) -> None:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    few = Vocabulary(backend.to_str(), 3, [2])
    assert compile_form(few, Structured("regex", "[ab]+")).matcher().allowed().tolist() == [True, True, False]
    with pytest.raises(FormError, match="impossible: no token of this model's vocabulary"):
        compile_form(few, Structured("choice", ("c",)))
    matcher = compile_form(few, Structured("choice", ("ac",))).matcher()
    matcher.accept(0)
    assert not matcher.allowed()[:2].any()
    assert matcher.fault == "no token of this model's vocabulary goes on so"
    with pytest.raises(FormError, match="no end-of-text token"):
        Vocabulary(backend.to_str(), 3, [])
    with pytest.raises(FormError, match="tokenizer cannot be used"):
        Vocabulary("{}", 3, [2])
    padded = Vocabulary(backend.to_str(), 64, [2])
    assert len(compile_form(padded, Structured("regex", "a")).matcher().allowed()) == 64


# ------------------------------------------------------------------------------------ compiling beside


def test_a_form_is_compiled_once_and_forgotten_in_turn() -> None:
    compiler = Compiler(kept=2)
    forms = [Structured("regex", letter) for letter in "abc"]
    first = compiler.start(vocabulary(), forms[0])
    assert compiler.start(vocabulary(), Structured("regex", "a")) is first
    assert first.future.result(30) is compiler.start(vocabulary(), forms[0]).future.result(30)
    for form in forms[1:]:
        compiler.start(vocabulary(), form).future.result(30)
    assert compiler.start(vocabulary(), forms[0]) is not first
    bad = compiler.start(vocabulary(), Structured("regex", "("))
    assert isinstance(bad.future.exception(30), FormError)
    assert compiler.start(vocabulary(), Structured("regex", "(")) is bad, "what is no form is remembered, too"
    compiler.close()


class Held:
    """A vocabulary whose forms are compiled when the test says so."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.vocab_size, self.eos_token_ids = vocabulary().vocab_size, vocabulary().eos_token_ids

    @property
    def tokens(self) -> Any:
        assert self.go.wait(30)
        return vocabulary().tokens


def test_only_so_many_forms_wait() -> None:
    compiler, held = Compiler(threads=1, waiting=2), Held()
    jobs = [compiler.start(held, Structured("regex", letter)) for letter in "ab"]  # type: ignore[arg-type]
    with pytest.raises(CompilerBusyError, match="2 forms"):
        compiler.start(held, Structured("regex", "c"))  # type: ignore[arg-type]
    held.go.set()
    for job in jobs:
        job.future.result(30)
    assert all(job.started is not None for job in jobs)
    compiler.start(held, Structured("regex", "c")).future.result(30)  # type: ignore[arg-type]
    compiler.close()


def test_a_request_joins_when_its_form_is_ready_and_its_cancellation_after_it() -> None:
    held = Held()
    joining = Joining(held)  # type: ignore[arg-type]
    told: list[str] = []
    done = threading.Event()

    def cancelled(event: RequestCancelled) -> None:
        told.append(f"cancelled {event.request_id}")
        done.set()

    form = Structured("regex", "a")
    joining.join(
        "r", form, lambda matcher: told.append("ready"), lambda error: told.append("refused"), cancelled
    )
    assert told == []
    assert joining.hold(RequestCancelled("r"))
    assert not joining.hold(RequestCancelled("another"))
    held.go.set()
    assert done.wait(30)
    assert told == ["ready", "cancelled r"]
    assert not joining.hold(RequestCancelled("r"))
    joining.join("s", form, lambda matcher: told.append("at once"), lambda error: None, cancelled)
    assert told[-1] == "at once"
    joining.close()


def test_a_request_that_cannot_join_for_whatever_reason_is_told_so() -> None:
    joining = Joining(vocabulary())
    told: list[str] = []
    done = threading.Event()

    def broken(matcher: Matcher) -> None:
        raise RuntimeError("out of order")

    def refused(error: DriftError) -> None:
        told.append(str(error))
        done.set()

    joining.join("r", Structured("regex", "a"), broken, refused, lambda event: None)
    assert done.wait(30)
    assert told == ["structured.regex: out of order"]
    assert not joining.hold(RequestCancelled("r"))
    joining.close()


def test_a_form_that_is_none_is_told_to_who_waits() -> None:
    joining = Joining(vocabulary())
    told: list[str] = []
    done = threading.Event()

    def refused(error: DriftError) -> None:
        told.append(str(error))
        done.set()

    joining.join("r", Structured("regex", "("), lambda matcher: None, refused, lambda event: None)
    assert done.wait(30)
    assert told[0].startswith("structured.regex: invalid regex")
    with pytest.raises(DriftError, match=r"structured\.regex"):
        joining.compiled(Structured("regex", "("))
    joining.close()
    nowhere = Joining.of_model(Path("/nowhere"), VOCAB, (EOS,))
    with pytest.raises(DriftError, match="no output can be held to a form here: no model directory"):
        nowhere.compiled(Structured("regex", "a"))
    nowhere.close()


# -------------------------------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", profile="none", max_running=16, kv_memory_bytes=64 << 20) as model:
        yield model


def test_the_model_keeps_to_forms_beside_free_requests(llm: LLM) -> None:
    person = SCHEMAS["object"]
    params = [
        SamplingParams(structured=schema(person), max_tokens=200, seed=1, n=4),
        SamplingParams(structured=Structured("regex", REGEXES[0]), max_tokens=60, seed=2, n=4),
        SamplingParams(structured=Structured("choice", CHOICES), max_tokens=60, seed=3, n=4),
        SamplingParams(max_tokens=20, seed=4, ignore_eos=True),
    ]
    objects, matched, chosen, free = llm.generate(["Return the"] * 4, params)
    for output in objects.outputs:
        if output.finish_reason == "stop":
            jsonschema.validate(plain_json(output.text), person)
    assert all(re.fullmatch(REGEXES[0], output.text) for output in matched.outputs)
    assert all(output.text in CHOICES for output in chosen.outputs)
    assert {output.finish_reason for output in chosen.outputs} == {"stop"}
    assert len({output.text for output in matched.outputs}) > 1, (
        "each output has a matcher and a seed of its own"
    )
    (alone,) = llm.generate(["Return the"], params[3])
    assert free.outputs[0].token_ids == alone.outputs[0].token_ids


def test_max_tokens_cuts_a_form(llm: LLM) -> None:
    word = "abcdefghij" * 10
    (output,) = llm.generate(["x"], SamplingParams(structured=Structured("choice", (word,)), max_tokens=5))
    assert output.outputs[0].finish_reason == "length"
    assert word.startswith(output.outputs[0].text)
    assert output.outputs[0].text


def test_a_form_that_is_none_is_refused_before_anything_starts(llm: LLM) -> None:
    with pytest.raises(DriftError, match=r"structured\.regex: invalid regex.*unclosed group"):
        llm.generate(["x"], SamplingParams(structured=Structured("regex", "(")))


def test_a_form_that_meets_a_limit_fails_its_request_and_no_other(llm: LLM) -> None:
    params = [
        SamplingParams(structured=schema(AMBIGUOUS), max_tokens=50),
        SamplingParams(max_tokens=20, ignore_eos=True),
    ]
    failed, fine = llm.generate(["Return", "Return"], params)
    assert failed.outputs[0].finish_reason == "failed"
    assert "2000" in failed.outputs[0].message
    assert fine.outputs[0].finish_reason == "length"


def test_preemption_keeps_the_place_in_the_form() -> None:
    words = tuple(f"{number:03d}" * 60 for number in range(40))
    params = SamplingParams(structured=Structured("choice", words), max_tokens=200, n=8, seed=5)
    with LLM("demo", profile="none", max_running=8, kv_memory_bytes=1 << 20, max_context=256) as small:
        (output,) = small.generate(["Return the value of the argument"], params)
        preemptions = sum(each.metrics.preemptions for each in output.outputs if each.metrics is not None)
    assert preemptions > 0
    assert all(each.text in words for each in output.outputs)
