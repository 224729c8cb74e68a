"""Outputs held to a form, over a real socket: by the embedded model, and refused before the engine hears of them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
import uvloop
from gateway_under_test import UnderTest, ready_in, run_with_gateway

from drift_core.sampling_params import Structured
from drift_core.structured import Compiler, Form, Vocabulary
from drift_gateway import admission
from drift_gateway import client as api
from drift_gateway.forms import Forms
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc
from drift_scheduler.errors import DriftError

PATIENCE_S = 120.0
FLAGS = "--model demo --device cpu --dtype float32 --profile none --kv-memory 64MB"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "tags": {"type": "array", "items": {"enum": ["é", "日本", None]}, "maxItems": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-zé]{1,6}: [0-9]{2}(\.[0-9])?"
CHOICES = ["yes", "yes, but", "nö", "日本\n"]


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """The address of a `drift serve` with the embedded model, shared by the tests here."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "drift_gateway", "serve", "--listen", address, *FLAGS.split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with api.DriftClient(address) as client:
            client.wait_ready(PATIENCE_S)
        yield address
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def run(target: str, body: Callable[[api.AsyncDriftClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with api.AsyncDriftClient(target) as client:
            await asyncio.wait_for(body(client), PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_every_kind_of_form_is_kept_beside_free_requests(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        prompt = "Return the"
        objects, matched, chosen, free = await asyncio.gather(
            client.generate(prompt, json_schema=PERSON, n=4, seed=1, max_tokens=300).completions(),
            client.generate(prompt, regex=REGEX, n=4, seed=2, max_tokens=60).completions(),
            client.generate(prompt, choice=CHOICES, n=4, seed=3).completions(),
            client.generate(prompt, max_tokens=20, ignore_eos=True).completions(),
        )
        for completion in objects:
            if completion.finish_reason == "stop":
                jsonschema.validate(json.loads(completion.text), PERSON)
        assert any(completion.finish_reason == "stop" for completion in objects)
        for completion in matched:
            assert completion.finish_reason == "stop"
            assert re.fullmatch(REGEX, completion.text)
        assert len({completion.text for completion in matched}) > 1
        assert all(completion.text in CHOICES and completion.finish_reason == "stop" for completion in chosen)
        assert len(free[0].token_ids) == 20

    run(target, body)


def test_max_tokens_cuts_a_form_and_sampling_still_holds(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        cut = await client.generate("x", choice=["abcdefgh" * 30], max_tokens=7).complete()
        assert cut.finish_reason == "length"
        assert ("abcdefgh" * 30).startswith(cut.text)
        one = await client.generate(
            "x", choice=CHOICES, temperature=0.7, top_p=0.5, top_k=5, min_p=0.05, frequency_penalty=1.0,
            repetition_penalty=1.2, min_tokens=50, logprobs=2, logit_bias={7: 100.0}, seed=9,
        ).complete()  # fmt: skip
        assert one.text in CHOICES
        assert one.finish_reason == "stop"
        assert len(one.logprobs) == len(one.token_ids)
        again = [await client.generate("x", regex=REGEX, seed=4).complete() for _ in range(2)]
        assert again[0].text == again[1].text

    run(target, body)


def test_a_form_that_meets_a_limit_on_the_way_fails_its_output_alone(target: str) -> None:
    ambiguous = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(600)}}

    async def body(client: api.AsyncDriftClient) -> None:
        failed, fine = await asyncio.gather(
            client.generate("x", json_schema=ambiguous, max_tokens=60).complete(),
            client.generate("x", max_tokens=60, ignore_eos=True).complete(),
        )
        assert failed.finish_reason == "failed"
        assert "max is 2000" in failed.message
        assert len(fine.token_ids) == 60

    run(target, body)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a schema of 1 MB": ({"json_schema": {"enum": ["x" * 1000] * 1000}}, "structured.json_schema", "1 to 65536 bytes"),
    "no JSON": ({"json_schema": "{"}, "structured.json_schema", "is not JSON"),
    "deep nesting": ({"json_schema": '{"items":' * 500 + "{}" + "}" * 500}, "structured.json_schema", "64 levels"),
    "a schema of itself": ({"json_schema": {"$ref": "#"}}, "structured.json_schema", "impossible"),
    "an unknown keyword": ({"json_schema": {"not": {}}}, "structured.json_schema", "not"),
    "a huge enum": ({"json_schema": {"enum": list(range(20000))}}, "structured.json_schema", "1 to 65536 bytes"),
    "no regex": ({"regex": "("}, "structured.regex", "unclosed group"),
    "an empty regex": ({"regex": ""}, "structured.regex", "1 to 8192 bytes"),
    "an impossible regex": ({"regex": r"[^\s\S]"}, "structured.regex", "impossible"),
    "too many choices": ({"choice": [str(n) for n in range(1025)]}, "structured.choice", "1 to 1024 texts"),
    "no choices": ({"choice": []}, "structured.choice", "1 to 1024 texts"),
    "a choice twice": ({"choice": ["a", "a"]}, "structured.choice", "no two are the same"),
    "an end ignored": ({"regex": "a", "ignore_eos": True}, "stopping.ignore_eos", "false with"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_form_is_refused_with_its_field(name: str, target: str) -> None:
    options, field, why = REFUSED[name]

    async def body(client: api.AsyncDriftClient) -> None:
        with pytest.raises(api.RequestError) as refusal:
            await client.generate("x", max_tokens=2, **options).complete()
        assert refusal.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert str(refusal.value.args[0]).count(field) >= 1
        assert why in str(refusal.value)

    run(target, body)


def test_a_structured_without_a_form_is_refused(target: str) -> None:
    async def body(client: api.AsyncDriftClient) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = pb.GenerateRequest(text="x", structured=pb.StructuredOutput())
            with pytest.raises(grpc.aio.AioRpcError, match="give one of json_schema, regex, choice"):
                async for _ in stub.Generate(request):
                    pass

    run(target, body)


# ------------------------------------------------------------------------------- with a scripted engine


def test_the_engine_is_asked_for_the_form_once_per_output(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        await under.client.generate(token_ids=[1], regex="[a-c]+", n=3, max_tokens=2).completions()
        await under.client.generate(token_ids=[1], max_tokens=2).completions()
        asked = [submit.sampling.structured for submit in under.engine.submits()]
        assert asked == [Structured("regex", "[a-c]+")] * 3 + [None]

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_a_form_that_only_the_engine_does_not_take_is_the_fields_fault(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        under.engine.reject = "structured.regex: this engine holds no output to a form"
        with pytest.raises(api.InvalidRequest, match="this engine holds no output") as refusal:
            await under.client.generate(token_ids=[1], regex="a").complete()
        assert (refusal.value.reason, list(refusal.value.fields)) == ("INVALID_FIELD", ["structured.regex"])

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_without_a_tokenizer_there_are_no_forms() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(
            api.RequestError, match="has no tokenizer, so no output can be held to a form"
        ) as refusal:
            await under.client.generate(token_ids=[1], regex="a").complete()
        assert refusal.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert under.engine.submits() == []

    run_with_gateway(body)


def test_a_compile_that_takes_too_long_is_given_up_and_the_loop_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Event()

    def slow(vocabulary: Vocabulary, structured: Structured) -> Form:
        begun.set()
        assert go.wait(PATIENCE_S)
        return compile_form(vocabulary, structured)

    from drift_core import structured as forms

    compile_form = forms.compile_form
    monkeypatch.setattr(forms, "compile_form", slow)
    monkeypatch.setattr(admission, "FORMS", Forms(Compiler(threads=1, waiting=2), seconds=0.2))

    async def refusal(under: UnderTest, regex: str) -> api.RequestError:
        with pytest.raises(api.RequestError) as error:
            await under.client.generate(token_ids=[1], regex=regex).complete()
        return error.value

    async def body(under: UnderTest) -> None:
        late = asyncio.ensure_future(refusal(under, "a"))
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        queued = asyncio.ensure_future(refusal(under, "b"))
        free = await under.client.generate(token_ids=[1], max_tokens=5).complete()
        assert len(free.token_ids) == 5
        assert (await late).code is grpc.StatusCode.INVALID_ARGUMENT
        assert "structured.regex: takes longer than 0.2 s to compile" in str(late.result())
        assert (await queued).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        full = await refusal(under, "c")
        assert full.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 forms wait" in str(full)
        assert len(under.engine.submits()) == 1
        go.set()
        done = await under.client.generate(token_ids=[1], regex="b", max_tokens=2).complete()
        assert len(done.token_ids) == 2

    try:
        run_with_gateway(body, ready=ready_in(tmp_path))
    finally:
        go.set()


def test_the_client_takes_one_form_as_text_or_as_data() -> None:
    schema = {"type": "integer"}
    asked = [
        api.build_request("x", json_schema=each).structured.json_schema
        for each in (schema, json.dumps(schema))
    ]
    assert json.loads(asked[0]) == json.loads(asked[1]) == schema
    assert api.build_request("x", json_schema=True).structured.json_schema == "true"
    assert list(api.build_request("x", choice=("a", "b")).structured.choice.choices) == ["a", "b"]
    assert not api.build_request("x").HasField("structured")
    with pytest.raises(DriftError, match="at most one of json_schema, regex, choice"):
        api.build_request("x", regex="a", choice=["a"])
    with pytest.raises(DriftError, match="a list of texts"):
        api.build_request("x", choice="abc")
