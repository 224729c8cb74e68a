"""KServe's inference protocol over a real socket: what tritonclient sends and expects, with stubs of our own."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_under_test import END_OF_TEXT, NARROW, UnderTest, ready_in, run_with_gateway

from drift_core import submission
from drift_core.frames import Submit
from drift_gateway.compat.wire import kserve_pb2 as kserve
from drift_gateway.compat.wire import kserve_pb2_grpc

MODEL = "fake"


def say(text: str) -> Any:
    """A script that generates this text byte by byte, whatever was asked, and the end token."""
    return lambda submit: [*text.encode(), END_OF_TEXT]


def packed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def asked(text: str = "hi", raw: bool = True, **inputs: Any) -> kserve.ModelInferRequest:
    """A request as tritonclient makes it (`raw`), or with typed contents as other KServe clients do."""
    request = kserve.ModelInferRequest(model_name=MODEL, id="client-7")
    for name, value in {"text_input": text, **inputs}.items():
        is_bool = isinstance(value, bool)
        tensor = request.inputs.add(name=name, datatype="BOOL" if is_bool else "BYTES", shape=[1])
        value = json.dumps(value) if isinstance(value, dict) else value
        if raw:
            request.raw_input_contents.append(bytes([value]) if is_bool else packed(value))
        elif is_bool:
            tensor.contents.bool_contents.append(value)
        else:
            tensor.contents.bytes_contents.append(value.encode())
    return request


def texts(response: kserve.ModelInferResponse, name: str = "text_output") -> list[str]:
    """The elements of a BYTES tensor, read as tritonclient reads it."""
    (position,) = (k for k, tensor in enumerate(response.outputs) if tensor.name == name)
    raw, found = response.raw_output_contents[position], []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        found.append(raw[4 : 4 + size].decode())
        raw = raw[4 + size :]
    assert list(response.outputs[position].shape) == [len(found)]
    return found


def numbers(response: kserve.ModelInferResponse, name: str, letter: str) -> list[float]:
    (position,) = (k for k, tensor in enumerate(response.outputs) if tensor.name == name)
    raw = response.raw_output_contents[position]
    return list(struct.unpack(f"<{len(raw) // 4}{letter}", raw))


class Triton:
    """The stub, on a channel of its own."""

    def __init__(self, under: UnderTest) -> None:
        self.channel = grpc.aio.insecure_channel(under.target)
        self.stub: Any = kserve_pb2_grpc.GRPCInferenceServiceStub(self.channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Triton:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def infer(self, request: kserve.ModelInferRequest) -> kserve.ModelInferResponse:
        response: kserve.ModelInferResponse = await self.stub.ModelInfer(request)
        return response

    async def stream(
        self, requests: Iterable[kserve.ModelInferRequest]
    ) -> AsyncIterator[kserve.ModelStreamInferResponse]:
        async def sent() -> AsyncIterator[kserve.ModelInferRequest]:
            for request in requests:
                yield request

        async for response in self.stub.ModelStreamInfer(sent()):
            yield response


def run(body: Any, **options: Any) -> None:
    """Run `body(under, triton)` with a gateway that serves KServe's protocol."""

    async def with_stub(under: UnderTest) -> None:
        async with Triton(under) as triton:
            await body(under, triton)

    run_with_gateway(with_stub, compat=("kserve",), **options)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_server_and_model_describe_themselves(tmp_path: Path) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        stub = triton.stub
        assert (await stub.ServerLive(kserve.ServerLiveRequest())).live
        assert (await stub.ServerReady(kserve.ServerReadyRequest())).ready
        assert (await stub.ModelReady(kserve.ModelReadyRequest(name=MODEL))).ready
        assert not (await stub.ModelReady(kserve.ModelReadyRequest(name="other"))).ready
        assert (await stub.ServerMetadata(kserve.ServerMetadataRequest())).name == "drift"
        metadata = await stub.ModelMetadata(kserve.ModelMetadataRequest(name=MODEL, version="1"))
        assert metadata.name == MODEL
        assert {tensor.name: tensor.datatype for tensor in metadata.inputs}["text_input"] == "BYTES"
        config = (await stub.ModelConfig(kserve.ModelConfigRequest(name=MODEL))).config
        assert config.model_transaction_policy.decoupled
        assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
        assert config.output[0].data_type == kserve.TYPE_STRING
        error = await refused(stub.ModelConfig(kserve.ModelConfigRequest(name="other")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "unknown model: 'other'" in (error.details() or "")

    run(body, ready=ready_in(tmp_path))


@pytest.mark.parametrize("raw", [True, False])
def test_infer_answers_with_prompt_and_output_or_output_alone(tmp_path: Path, raw: bool) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        both = await triton.infer(asked("Grüße", raw=raw))
        assert (both.model_name, both.model_version, both.id) == (MODEL, "1", "client-7")
        assert texts(both) == ["Grüße, Welt"]
        alone = await triton.infer(asked("Grüße", raw=raw, exclude_input_in_output=True))
        assert texts(alone) == [", Welt"]

    run(body, ready=ready_in(tmp_path), script=say(", Welt"), end_reason="stop")


def test_sampling_parameters_have_vllms_names_and_defaults(tmp_path: Path) -> None:
    wanted = {
        "temperature": 0.5, "top_p": "0.25", "top_k": -1, "max_tokens": "7", "min_tokens": 2, "seed": 5,
        "stop": "END", "stop_token_ids": [65], "ignore_eos": True, "logit_bias": {"66": -2.5}, "n": 1,
        "presence_penalty": None, "skip_special_tokens": True,
    }  # fmt: skip

    async def body(under: UnderTest, triton: Triton) -> None:
        await triton.infer(asked(sampling_parameters=wanted))
        request = asked()
        request.parameters["max_tokens"].int64_param = 3
        request.parameters["temperature"].double_param = 0.0
        request.parameters["priority"].uint64_param = 4
        request.parameters["timeout"].int64_param = 1_000_000
        await triton.infer(request)
        await triton.infer(asked())
        tensor, parameters, plain = (submit.sampling for submit in under.engine.submits())
        assert (tensor.temperature, tensor.top_p, tensor.top_k, tensor.seed) == (0.5, 0.25, 0, 5)
        assert (tensor.max_tokens, tensor.min_tokens, tensor.ignore_eos) == (7, 2, True)
        assert list(tensor.stop_token_ids or ()) == [65]
        assert dict(tensor.logit_bias or {}) == {66: -2.5}
        assert (parameters.max_tokens, parameters.temperature) == (3, 0.0)
        assert under.engine.submits()[1].priority == 4
        assert (plain.max_tokens, plain.temperature) == (16, 1.0), "vLLM's defaults"

    run(body, ready=ready_in(tmp_path))


def test_additional_outputs_when_asked_for(tmp_path: Path) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        flags = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
        response = await triton.infer(
            asked("abc", sampling_parameters={"logprobs": 1}, **{f"return_{flag}": True for flag in flags})
        )
        assert [tensor.name for tensor in response.outputs] == ["text_output", *flags]
        assert texts(response, "finish_reason") == ["stop"]
        assert numbers(response, "num_input_tokens", "I") == [3]
        assert numbers(response, "num_output_tokens", "I") == [3]
        assert numbers(response, "cumulative_logprob", "f") == [-1.5]
        positions = json.loads(texts(response, "logprobs")[0])
        assert positions[0][str(ord("o"))] == {"logprob": -0.5, "rank": 1, "decoded_token": "o"}
        assert len(positions) == 3
        named = asked("abc")
        named.outputs.add(name="num_output_tokens")
        assert [tensor.name for tensor in (await triton.infer(named)).outputs] == ["num_output_tokens"]

    run(body, ready=ready_in(tmp_path), script=say("ok"), end_reason="stop")


def test_several_outputs_are_elements_of_one_tensor(tmp_path: Path) -> None:
    def script(submit: Submit) -> list[int]:
        return list(f"out{submit.id[-1]}".encode())

    async def body(under: UnderTest, triton: Triton) -> None:
        response = await triton.infer(asked(sampling_parameters={"n": 3}, exclude_input_in_output=True))
        assert texts(response) == ["out0", "out1", "out2"]

    run(body, ready=ready_in(tmp_path), script=script)


def test_targets_go_in_and_the_proof_comes_out_as_parameters(tmp_path: Path) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        request = asked()
        request.parameters["drift_slo_ttft_ms"].int64_param = 60_000
        request.parameters["drift_slo_tbt_ms"].double_param = 1e-3
        request.parameters["drift_slo_class"].string_param = "chat"
        response = await triton.infer(request)
        (submit,) = under.engine.submits()
        assert (submit.slo_ttft, submit.slo_tbt, submit.slo_class) == (60.0, 1e-6, "chat")
        assert response.parameters["drift_ttft_ms"].double_param > 0
        assert response.parameters["drift_ttft_met"].bool_param
        assert not response.parameters["drift_tbt_met"].bool_param

    run(body, ready=ready_in(tmp_path), script=say("some words"))


def test_targets_may_say_what_to_do_when_they_cannot_be_met_and_none_is_ignored(tmp_path: Path) -> None:
    async def refusal(triton: Triton, **parameters: str) -> tuple[grpc.StatusCode, str]:
        request = asked("a long text", sampling_parameters={"max_tokens": 2})
        request.parameters["drift_slo_ttft_ms"].double_param = 1e-3
        for name, value in parameters.items():
            request.parameters[name].string_param = value
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await triton.infer(request)
        return raised.value.code(), raised.value.details() or ""

    async def body(under: UnderTest, triton: Triton) -> None:
        code, said = await refusal(triton, drift_slo_on_infeasible="reject")
        assert (code, "its targets cannot be met" in said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        for name in ("drift_slo_on_infeasible", "drift_slo_ttft"):
            code, said = await refusal(triton, **{name: "perhaps"})
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert said.startswith(f"parameters.{name}: "), said
        assert under.engine.submits() == []

    ready = ready_in(tmp_path, prefill_seconds=[(100, 1.0), (1000, 10.0)])
    run(body, ready=ready)


def test_a_stream_tells_text_as_it_comes_and_which_response_is_the_last(tmp_path: Path) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        request = asked(stream=True, return_finish_reason=True, return_num_output_tokens=True)
        responses = [response.infer_response async for response in triton.stream([request])]
        assert "".join(texts(response)[0] for response in responses) == "hello"
        assert len(responses) > 1
        assert {response.id for response in responses} == {"client-7"}
        finals = [response.parameters["triton_final_response"].bool_param for response in responses]
        assert finals == [False] * (len(responses) - 1) + [True]
        reasons = [texts(response, "finish_reason")[0] for response in responses]
        assert reasons == ["None"] * (len(responses) - 1) + ["stop"]
        assert sum(numbers(response, "num_output_tokens", "I")[0] for response in responses) == 6

    run(body, ready=ready_in(tmp_path), script=say("hello"), end_reason="stop", step_seconds=0.01)


def test_requests_of_one_stream_run_side_by_side_and_fail_alone(tmp_path: Path) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        requests = []
        for number in range(20):
            request = asked(f"prompt {number}", stream=number % 2 == 0, exclude_input_in_output=True)
            request.id = str(number)
            requests.append(request)
        bad = asked(sampling_parameters={"temperature": 1000})
        bad.id = "bad"
        unknown = asked()
        unknown.id, unknown.model_name = "unknown", "other"
        heard: dict[str, str] = {}
        errors: dict[str, str] = {}
        async for response in triton.stream([*requests, bad, unknown]):
            inner = response.infer_response
            if response.error_message:
                errors[inner.id] = response.error_message
            else:
                heard[inner.id] = heard.get(inner.id, "") + texts(inner)[0]
        assert heard == {str(number): "same for all" for number in range(20)}
        assert sorted(errors) == ["bad", "unknown"]
        assert "temperature" in errors["bad"]
        assert under.engine.submits()[0].id != under.engine.submits()[1].id

    run(body, ready=ready_in(tmp_path), script=say("same for all"), end_reason="stop")


def test_requests_of_a_stream_that_is_not_read_are_given_up_and_still_say_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(submission, "MAX_LAG_TOKENS", 100)
    monkeypatch.setattr(submission, "GIVEN_UP_S", 0.05)

    async def body(under: UnderTest, triton: Triton) -> None:
        async with grpc.aio.insecure_channel(under.target, options=NARROW) as channel:
            call = kserve_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()  # type: ignore[no-untyped-call]
            for _ in range(2):
                await call.write(asked(stream=True, sampling_parameters={"max_tokens": 64_000}))
            await under.until(lambda engine: len(engine.cancels()) == 2)
            async with asyncio.timeout(30):
                while under.supervisor.request_ids():
                    await asyncio.sleep(0.01)
            await call.done_writing()
            async with asyncio.timeout(30):
                errors = [response.error_message async for response in call if response.error_message]
            assert errors == ["the client reads too slowly; its tokens were piling up"] * 2

    run(body, ready=ready_in(tmp_path, max_context=65_536), step_seconds=0.0)


def test_leaving_the_stream_ends_its_requests(tmp_path: Path) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        request = asked(stream=True, sampling_parameters={"max_tokens": 4000})
        other = asked(stream=True, sampling_parameters={"max_tokens": 4000})
        call = triton.stub.ModelStreamInfer()
        await call.write(request)
        await call.write(other)
        await call.read()
        await under.until(lambda engine: len(engine.submits()) == 2)
        call.cancel()
        await under.until(lambda engine: len(engine.cancels()) == 2)

    run(body, ready=ready_in(tmp_path))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": ""}, "text: is empty"),
        ({"sampling_parameters": "{"}, "sampling_parameters: is not JSON"),
        ({"sampling_parameters": "[1]"}, "sampling_parameters: is a JSON list, not an object"),
        ({"sampling_parameters": {"beam_width": 3}}, "sampling_parameters.beam_width: is not known here"),
        ({"sampling_parameters": {"top_k": -5}}, "sampling_parameters.top_k: '-5' does not fit"),
        ({"sampling_parameters": {"temperature": [1]}}, "sampling_parameters.temperature: "),
        ({"sampling_parameters": {"best_of": 3}}, "sampling_parameters.best_of: "),
        (
            {"sampling_parameters": {"stop": 3}},
            "sampling_parameters.stop: '3' does not fit: a list of texts is",
        ),
        (
            {"sampling_parameters": {"stop": [3]}},
            "sampling_parameters.stop: '[3]' does not fit: a list of texts",
        ),
        (
            {"sampling_parameters": {"stop_token_ids": "12"}},
            "sampling_parameters.stop_token_ids: '12' does not fit",
        ),
        (
            {"sampling_parameters": {"logit_bias": 3}},
            "sampling_parameters.logit_bias: '3' does not fit: an object",
        ),
        (
            {"sampling_parameters": {"structured_outputs": 3}},
            "sampling_parameters.structured_outputs: '3' does not",
        ),
        (
            {"sampling_parameters": {"structured_outputs": {"choice": "yes"}}},
            "sampling_parameters.structured_outputs: \"{'choice': 'yes'}\" does not fit: a list of texts is wanted",
        ),
        (
            {"sampling_parameters": {"structured_outputs": {"regex": 3}}},
            "sampling_parameters.structured_outputs: \"{'regex': 3}\" does not fit: a text is wanted",
        ),
        ({"sampling_parameters": {"n": 100000000}}, "sampling.n: "),
        ({"stream": True}, "stream: ModelInfer has one response"),
        ({"image": "png"}, "inputs: there is no input 'image'"),
        ({"return_logprobs": "yes"}, "return_logprobs: has type BYTES, not BOOL"),
    ],
)
def test_what_is_wrong_is_an_invalid_argument_that_names_it(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        error = await refused(triton.infer(asked(**change)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith(problem)
        assert under.engine.submits() == []

    run(body, ready=ready_in(tmp_path))


def broken_tensors() -> list[tuple[kserve.ModelInferRequest, str]]:
    short, twice, many, shared, bytes_ = (asked() for _ in range(5))
    short.raw_input_contents[0] = b"\x09\x00\x00\x00abc"
    twice.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    twice.raw_input_contents.append(packed("x"))
    many.inputs[0].shape[0] = 2
    shared.inputs[0].parameters["shared_memory_region"].string_param = "region"
    bytes_.raw_input_contents[0] = b"\x02\x00\x00\x00\xff\xfe"
    missing = kserve.ModelInferRequest(model_name=MODEL)
    uneven = asked()
    uneven.raw_input_contents.append(b"")
    return [
        (short, "text_input: its contents"), (twice, "text_input: is given twice"), (many, "text_input: does not hold"),
        (shared, "text_input: does not hold"), (bytes_, "text_input: is not UTF-8"),
        (missing, "text_input: is missing"), (uneven, "raw_input_contents: 2 contents"),
    ]  # fmt: skip


def test_tensors_that_are_none_are_refused(tmp_path: Path) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        for request, problem in broken_tensors():
            error = await refused(triton.infer(request))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (error.details() or "").startswith(problem)

    run(body, ready=ready_in(tmp_path))


def test_too_many_requests_are_resource_exhausted(tmp_path: Path) -> None:
    async def body(under: UnderTest, triton: Triton) -> None:
        first = asyncio.ensure_future(triton.infer(asked()))
        await under.until(lambda engine: len(engine.submits()) == 1)
        error = await refused(triton.infer(asked()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        await under.until(lambda engine: len(engine.cancels()) == 1)

    run(body, ready=ready_in(tmp_path), paused=True, max_in_flight=1)


def test_nothing_is_served_that_was_not_asked_for() -> None:
    async def body(under: UnderTest) -> None:
        async with Triton(under) as triton:
            error = await refused(triton.stub.ServerLive(kserve.ServerLiveRequest()))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    run_with_gateway(body)
