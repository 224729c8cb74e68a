"""Everything a client can get wrong, and everything the server cannot do, has its status and one clear line."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_under_test import PATIENCE_S, UnderTest, ready_in, run_with_gateway

from drift_core.frames import Submit
from drift_core.sampling_params import SamplingParams
from drift_gateway import client as api
from drift_gateway.access.security import Security, SecurityOptions
from drift_gateway.access.tenants import ANYBODY, new_token, token_entry
from drift_gateway.compat.wire import kserve_pb2
from drift_gateway.observe.access_log import line_of
from drift_gateway.observe.request_record import RequestRecord
from drift_gateway.refusal import Reason, Refusal
from drift_gateway.request_errors import error_of
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def status_of(under: UnderTest, request: pb.GenerateRequest) -> tuple[grpc.StatusCode, str]:
    """How the raw stream ends."""
    async with grpc.aio.insecure_channel(under.target) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Generate(request)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""


def submit_of(output_id: str) -> Submit:
    return Submit(output_id, [1], SamplingParams(max_tokens=3), 1.0, 0.1, None, "default", 0, "", 0.0)


def asking(**fields: Any) -> pb.GenerateRequest:
    """A good request but for `fields`."""
    return pb.GenerateRequest(**{"token_ids": pb.TokenIds(ids=[1, 2]), **fields})


def sampling(**fields: Any) -> pb.GenerateRequest:
    return asking(sampling=pb.Sampling(**fields))


def stopping(**fields: Any) -> pb.GenerateRequest:
    return asking(stopping=pb.Stopping(**fields))


WRONG = {
    "input": pb.GenerateRequest(),
    "text": pb.GenerateRequest(text=""),
    "token_ids.ids": asking(token_ids=pb.TokenIds()),
    "token_ids.ids ": asking(token_ids=pb.TokenIds(ids=[5, 300])),
    "chat.messages": pb.GenerateRequest(chat=pb.Chat()),
    "chat.messages[1].role": pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(content="hi")])
    ),
    "request_id": asking(request_id="has space"),
    "request_id ": asking(request_id=""),
    "request_id  ": asking(request_id="child#1"),
    "request_id   ": asking(request_id="x" * 129),
    "priority": asking(priority=1001),
    "labels": asking(labels={f"label{number}": "" for number in range(17)}),
    "labels ": asking(labels={"name": "x" * 129}),
    "slo.ttft_ms": asking(slo=pb.SLO(ttft_ms=0.0)),
    "slo.tbt_ms": asking(slo=pb.SLO(tbt_ms=-1.0)),
    "slo.e2e_ms": asking(slo=pb.SLO(e2e_ms=math.nan)),
    "slo.class": asking(slo=pb.SLO(**{"class": "x" * 65})),  # type: ignore[arg-type]
    "slo.class ": asking(slo=pb.SLO(**{"class": "\x1b]0;name\x07"})),  # type: ignore[arg-type]
    "slo.class  ": asking(slo=pb.SLO(**{"class": "two\nlines"})),  # type: ignore[arg-type]
    "sampling.n": sampling(n=0),
    "sampling.n ": sampling(n=17),
    "sampling.n  ": sampling(n=4_000_000_000),
    "sampling.temperature": sampling(temperature=-0.1),
    "sampling.temperature ": sampling(temperature=math.inf),
    "sampling.top_p": sampling(top_p=0.0),
    "sampling.top_k": sampling(top_k=4_000_000_000),
    "sampling.min_p": sampling(min_p=1.5),
    "sampling.presence_penalty": sampling(presence_penalty=2.5),
    "sampling.frequency_penalty": sampling(frequency_penalty=math.nan),
    "sampling.repetition_penalty": sampling(repetition_penalty=0.0),
    "sampling.logit_bias": sampling(logit_bias={300: 1.0}),
    "sampling.logit_bias ": sampling(logit_bias=dict.fromkeys(range(301), 1.0)),
    "sampling.logit_bias[3]": sampling(logit_bias={3: 101.0}),
    "sampling.logprobs": sampling(logprobs=21),
    "stopping.max_tokens": stopping(max_tokens=0),
    "stopping.min_tokens": stopping(min_tokens=5, max_tokens=4),
    "stopping.stop": stopping(stop=[""]),
    "stopping.stop ": stopping(stop=["x"] * 17),
    "stopping.stop  ": stopping(stop=["x" * 257]),
    "stopping.stop_token_ids": stopping(stop_token_ids=[300]),
    "stopping.stop_token_ids ": stopping(stop_token_ids=[1] * 129),
}


def test_each_wrong_field_is_named_and_nothing_reaches_the_engine(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        for field, request in WRONG.items():
            code, message = await status_of(under, request)
            assert (code, message.split()[0].rstrip(":")) == (INVALID, field.strip()), message
            assert "\n" not in message
        assert under.engine.received == []

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_a_model_that_is_not_served_is_not_found() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.NotServed, match="'other' is not served here; 'fake' is"):
            await under.client.generate(token_ids=[1], model="other").complete()
        await under.client.generate(token_ids=[1], model="fake", max_tokens=1).complete()

    run_with_gateway(body)


def test_prompts_that_can_never_fit(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.NeverFits, match="4096 tokens and the model's context 4096"):
            await under.client.generate(token_ids=[1] * 4096).complete()
        with pytest.raises(api.NeverFits, match="1000 tokens and the whole KV pool 800"):
            await under.client.generate("x" * 1000).complete()
        assert under.engine.received == []

    run_with_gateway(body, ready=ready_in(tmp_path, kv_tokens=800))


def test_text_for_a_model_without_tokenizer_is_refused_with_the_way_out() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.NeverFits, match="has no tokenizer; give token_ids"):
            await under.client.generate("hello").complete()

    run_with_gateway(body)


def test_stop_strings_for_a_model_without_tokenizer_are_not_passed_over() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(
            api.NeverFits, match=r"stopping\.stop: .* no tokenizer.*; give stop_token_ids"
        ) as refused:
            await under.client.generate(token_ids=[1], stop=["END"]).complete()
        assert refused.value.reason == "NO_TOKENIZER"
        assert under.engine.submits() == []

    run_with_gateway(body)


def test_conversations_a_model_cannot_take(tmp_path: Path) -> None:
    hello = [{"role": "user", "content": "hello"}]

    async def picky(under: UnderTest) -> None:
        with pytest.raises(api.InvalidRequest, match=r"chat: .*roles must alternate"):
            await under.client.generate(messages=[*hello, *hello]).complete()

    async def plain(under: UnderTest) -> None:
        with pytest.raises(api.NeverFits, match="'fake' has no chat template; give text or token_ids"):
            await under.client.generate(messages=hello).complete()

    ready = ready_in(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ raise_exception('roles must alternate') }}"}))
    run_with_gateway(picky, ready=ready)
    config.write_text("{}")
    run_with_gateway(plain, ready=ready)


def test_what_the_scheduler_rejects_can_never_fit() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.NeverFits, match="needs 99 pages"):
            await under.client.generate(token_ids=[1]).complete()

    run_with_gateway(body, reject="needs 99 pages, the pool has 10")


def test_more_than_may_be_in_flight_is_refused_and_let_in_later() -> None:
    async def body(under: UnderTest) -> None:
        running = asyncio.ensure_future(under.client.generate(token_ids=[1], max_tokens=3, n=3).completions())
        await under.until(lambda engine: len(engine.submits()) == 3)
        with pytest.raises(api.Overloaded, match="3 outputs are in flight and at most 4"):
            await under.client.generate(token_ids=[1], max_tokens=3, n=2).complete()
        under.engine.step(10)
        await running
        under.engine.paused = False
        await under.client.generate(token_ids=[1], max_tokens=3, n=4).complete()

    run_with_gateway(body, max_in_flight=4, paused=True)


@pytest.mark.parametrize(
    "method",
    [
        "drift.v1.GenerationService/Generate",
        "drift.v1.GenerationService/Tokenize",
        "drift.v1.InfoService/WatchStats",
        "inference.GRPCInferenceService/ModelInfer",
        "inference.GRPCInferenceService/ModelStreamInfer",
        "vllm.grpc.engine.VllmEngine/Generate",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
@pytest.mark.parametrize("secured", [False, True])
def test_what_is_no_message_is_refused_like_all_that_is_wrong(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, method: str, secured: bool
) -> None:
    """As often as it comes, with nothing in the log and no name of ours in the status."""
    token = new_token()
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(token_entry("acme", token))
    security = Security(SecurityOptions(tenants=tenants)) if secured else None

    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            call = channel.stream_stream(f"/{method}")(metadata=(("authorization", f"Bearer {token}"),))
            await call.write(b"\x0a\xff\xff")
            await call.done_writing()
            with pytest.raises(grpc.aio.AioRpcError, match="request: is not the message") as refused:
                async for _ in call:
                    pass
        assert refused.value.code() is INVALID
        assert error_of(refused.value).reason == Reason.INVALID_FIELD
        assert "Traceback" not in caplog.text
        assert (await under.client.generate(token_ids=[1], max_tokens=2).complete()).finish_reason == "length"

    run_with_gateway(body, compat=("kserve", "vllm"), security=security, token=token if secured else None)


def test_requests_before_one_that_is_none_are_answered(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
            await call.write(kserve_pb2.ModelInferRequest(id="first", model_name="other").SerializeToString())
            await call.write(b"\x0a\xff\xff")
            answer = kserve_pb2.ModelStreamInferResponse.FromString(await call.read())
            assert answer.infer_response.id == "first"
            with pytest.raises(grpc.aio.AioRpcError, match="request: is not the message"):
                await call.read()

    run_with_gateway(body, compat=("kserve",))


def test_an_id_in_flight_is_refused() -> None:
    async def body(under: UnderTest) -> None:
        under.client.generate(token_ids=[1], request_id="same")
        await under.until(lambda engine: len(engine.submits()) == 1)
        with pytest.raises(api.RequestError, match="in flight already") as raised:
            await under.client.generate(token_ids=[1], request_id="same").complete()
        assert raised.value.code is grpc.StatusCode.ALREADY_EXISTS

    run_with_gateway(body, paused=True)


def test_an_id_is_in_use_until_its_stream_has_ended_too() -> None:
    """The engine is done with a request while its client has yet to read: what is counted by its id is one's alone."""

    async def body(under: UnderTest) -> None:
        supervisor = under.supervisor
        served, frame = supervisor.serving(), submit_of("same#0")
        before = ANYBODY.usage.in_flight
        unread = supervisor.submit(served, [frame])
        async with asyncio.timeout(PATIENCE_S):
            while unread.requests[0].finished is None:
                await unread.changed()
        assert served.client.in_flight == 0
        with pytest.raises(Refusal, match="'same' is in flight already") as refused:
            supervisor.submit(served, [frame])
        assert refused.value.reason == Reason.REQUEST_ID_IN_USE
        supervisor.ended(unread, {})
        supervisor.ended(supervisor.submit(served, [frame]), {})
        assert ANYBODY.usage.in_flight == before

    run_with_gateway(body)


def test_an_internal_fault_is_opaque_and_has_an_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from drift_gateway import generation

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a secret path")

    monkeypatch.setattr(generation, "_accepted", broken)

    async def body(under: UnderTest) -> None:
        records: list[RequestRecord] = []
        under.gateway.generations.recorders.append(records.append)
        with pytest.raises(api.RequestError) as raised:
            await under.client.generate(token_ids=[1]).complete()
        assert raised.value.code is grpc.StatusCode.INTERNAL
        assert "secret" not in str(raised.value)
        incident = str(raised.value).split()[-1]
        assert incident in caplog.text
        (line,) = (line_of(record, 0.0) for record in records)
        assert (line["code"], line["reason"], line["incident"]) == ("INTERNAL", "INTERNAL", incident)
        assert "a secret path" in caplog.text
        await under.until(lambda engine: bool(engine.cancels()))

    run_with_gateway(body)


def test_messages_and_metadata_have_caps() -> None:
    async def body(under: UnderTest) -> None:
        code, _ = await status_of(under, pb.GenerateRequest(text="x" * (6 * 1024 * 1024)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Generate(asking(), metadata=[("filler", "x" * 64 * 1024)])
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
        assert under.engine.received == []
        await under.client.generate(token_ids=[1], max_tokens=1).complete()

    run_with_gateway(body)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "exactly one of prompt, token_ids, messages"),
        ({"prompt": "a", "token_ids": [1]}, "exactly one"),
        ({"prompt": "a", "temprature": 1.0}, "no generation option 'temprature'; there are: .*temperature"),
        ({"prompt": "a", "max_tokens": "many"}, "not a request"),
        ({"token_ids": [-1]}, "not a request"),
        ({"messages": [{"role": "user", "text": "a"}]}, "not a request"),
    ],
)
def test_the_client_refuses_what_is_no_request(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(api.DriftError, match=complaint):
        api.build_request(**fields)
