"""vLLM's engine protocol over a real socket: what smg sends and expects, with stubs of our own."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_under_test import END_OF_TEXT, UnderTest, ready_in, run_with_gateway

from drift_core.frames import Submit
from drift_core.tokenizer import Tokenizer
from drift_gateway.access.security import Security, SecurityOptions
from drift_gateway.access.tenants import new_token, token_entry
from drift_gateway.compat import vllm_engine
from drift_gateway.compat.messages import Messages
from drift_gateway.compat.wire import vllm_engine_pb2 as vllm
from drift_gateway.compat.wire import vllm_engine_pb2_grpc
from drift_gateway.v1 import generation_pb2 as pb


def asked(ids: tuple[int, ...] = (1, 2, 3), stream: bool = True, **params: Any) -> vllm.GenerateRequest:
    """A request as smg makes it: token ids, and zeroes for what nobody said."""
    request = vllm.GenerateRequest(request_id="chatcmpl-1", stream=stream)
    request.tokenized.input_ids.extend(ids)
    request.sampling_params.CopyFrom(vllm.SamplingParams(skip_special_tokens=True, **params))
    return request


class Smg:
    """The stub, on a channel of its own."""

    def __init__(self, under: UnderTest) -> None:
        self.channel = grpc.aio.insecure_channel(under.target)
        self.stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)  # type: ignore[no-untyped-call]

    async def generate(self, request: vllm.GenerateRequest) -> list[vllm.GenerateResponse]:
        return [response async for response in self.stub.Generate(request)]

    async def refused(self, request: vllm.GenerateRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(request)
        return caught.value


def run(body: Any, **options: Any) -> None:
    """Run `body(under, smg)` with a gateway that serves vLLM's protocol."""

    async def with_stub(under: UnderTest) -> None:
        smg = Smg(under)
        try:
            await body(under, smg)
        finally:
            await smg.channel.close()

    run_with_gateway(with_stub, compat=("vllm",), **options)


def chunks(responses: list[vllm.GenerateResponse], index: int = 0) -> list[vllm.GenerateStreamChunk]:
    return [r.chunk for r in responses if r.HasField("chunk") and r.chunk.index == index]


def completes(responses: list[vllm.GenerateResponse]) -> list[vllm.GenerateComplete]:
    return [response.complete for response in responses if response.HasField("complete")]


def test_a_stream_is_chunks_of_new_tokens_and_one_complete() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        responses = await smg.generate(asked(max_tokens=50))
        assert [token for chunk in chunks(responses) for token in chunk.token_ids] == list(range(50))
        assert all(chunk.completion_tokens == len(chunk.token_ids) for chunk in chunks(responses))
        assert {chunk.prompt_tokens for chunk in chunks(responses)} == {3}
        (complete,) = completes(responses)
        assert responses[-1].complete == complete
        assert (complete.finish_reason, complete.prompt_tokens, complete.cached_tokens) == ("length", 3, 1)
        assert list(complete.output_ids) == [], "smg has added the chunks up"
        assert under.engine.submits()[0].id == "chatcmpl-1#0"

    run(body)


def test_without_a_stream_the_complete_has_it_all() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        (response,) = await smg.generate(asked(stream=False, max_tokens=50, logprobs=1))
        complete = response.complete
        assert list(complete.output_ids) == list(range(50))
        assert complete.completion_tokens == 50
        assert list(complete.output_logprobs.token_ids) == list(range(50))
        assert set(complete.output_logprobs.token_logprobs) == {-0.5}
        assert len(complete.output_logprobs.top_logprobs) == 50

    run(body)


def test_zero_means_absent_where_the_protocol_cannot_say_so() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        await smg.generate(asked(max_tokens=2))
        await smg.generate(
            asked(
                temperature=0.0, top_p=0.5, top_k=4, min_p=0.1, frequency_penalty=0.5, presence_penalty=-0.5,
                repetition_penalty=1.5, max_tokens=3, min_tokens=1, stop_token_ids=[9], ignore_eos=True, seed=7,
                logit_bias={5: 1.5},
            )
        )  # fmt: skip
        absent, given = (submit.sampling for submit in under.engine.submits())
        assert (absent.temperature, absent.top_p, absent.top_k, absent.n) == (1.0, 1.0, 0, 1)
        assert (absent.repetition_penalty, absent.seed, absent.logprobs) == (1.0, None, None)
        assert (given.temperature, given.top_p, given.top_k, given.seed) == (0.0, 0.5, 4, 7)
        assert given.min_p == pytest.approx(0.1)
        assert (given.frequency_penalty, given.presence_penalty, given.repetition_penalty) == (0.5, -0.5, 1.5)
        assert (given.max_tokens, given.min_tokens, given.ignore_eos) == (3, 1, True)
        assert list(given.stop_token_ids or ()) == [9]
        assert dict(given.logit_bias or {}) == {5: 1.5}

    run(body)


def test_each_output_has_its_own_chunks_and_its_own_end() -> None:
    def script(submit: Submit) -> list[int]:
        index = int(submit.id[-1])
        return [index * 10 + step for step in range(3 + index)]

    async def body(under: UnderTest, smg: Smg) -> None:
        responses = await smg.generate(asked(n=3))
        for index in range(3):
            tokens = [token for chunk in chunks(responses, index) for token in chunk.token_ids]
            assert tokens == [index * 10 + step for step in range(3 + index)]
        assert sorted(complete.index for complete in completes(responses)) == [0, 1, 2]

    run(body, script=script)


def test_the_end_says_which_stop_it_was(tmp_path: Path) -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        (by_text,) = completes(await smg.generate(asked(stop=["END"], max_tokens=100)))
        assert (by_text.finish_reason, by_text.matched_stop_str) == ("stop", "END")

    run(body, ready=ready_in(tmp_path), script=lambda submit: list(b"some END more" * 9))


def test_the_end_says_which_token_it_was() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        (by_token,) = completes(await smg.generate(asked(stop_token_ids=[9])))
        assert (by_token.finish_reason, by_token.matched_token_id) == ("stop", 9)
        (by_model,) = completes(await smg.generate(asked()))
        assert by_model.finish_reason == "stop"
        assert by_model.WhichOneof("matched_stop") is None

    run(body, script=lambda submit: [7, 8, 9], end_reason="stop")


def test_without_a_tokenizer_here_stop_strings_are_smgs_to_find() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        (complete,) = completes(await smg.generate(asked(stop=["END"], max_tokens=5)))
        assert complete.finish_reason == "length"

    run(body)


def test_text_is_tokenized_here_when_it_comes_as_text(tmp_path: Path) -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        await smg.generate(vllm.GenerateRequest(text="Grüße", stream=True))
        assert under.engine.submits()[0].prompt == list("Grüße".encode())

    run(body, ready=ready_in(tmp_path), script=lambda submit: [END_OF_TEXT], end_reason="stop")


def test_abort_ends_a_request_by_its_name() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        waiting = asyncio.ensure_future(smg.generate(asked(max_tokens=1000)))
        await under.until(lambda engine: len(engine.submits()) == 1)
        under.engine.step()
        await smg.stub.Abort(vllm.AbortRequest(request_ids=["unknown", "chatcmpl-1"]))
        await under.until(lambda engine: len(engine.cancels()) == 1)
        (complete,) = completes(await waiting)
        assert complete.finish_reason == "abort"

    run(body, paused=True)


@pytest.mark.parametrize("stream", [True, False])
def test_an_aborted_request_counts_what_it_told(stream: bool) -> None:
    generation = pb.GenerateRequest(sampling=pb.Sampling(n=2))
    answer = vllm_engine._Answer(generation, stream)
    for event in (
        pb.GenerateResponse(accepted=pb.Accepted(prompt_tokens=9, cached_tokens=4)),
        pb.GenerateResponse(token_delta=pb.TokenDelta(output_index=1, token_ids=[5, 6], offsets_us=[1, 2])),
    ):
        answer.take(event)
    first, second = (response.complete for response in answer.aborted())
    assert (first.finish_reason, first.completion_tokens, first.cached_tokens) == ("abort", 0, 4)
    assert list(second.output_ids) == ([] if stream else [5, 6])
    assert (second.completion_tokens, second.prompt_tokens, second.cached_tokens) == (
        0 if stream else 2,
        9,
        4,
    )


def test_a_write_under_way_when_a_request_is_aborted_is_finished_first() -> None:
    """gRPC takes no second message beside the first: the call would never end."""

    async def body() -> None:
        begun: list[vllm.GenerateResponse] = []
        gone_out = asyncio.Event()

        async def write(response: vllm.GenerateResponse) -> None:
            begun.append(response)
            await gone_out.wait()

        messages = Messages(write)
        first, second = vllm.GenerateResponse(), vllm.GenerateResponse()
        answering = asyncio.ensure_future(messages.write(first))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        answering.cancel()
        await asyncio.wait((answering,))
        assert answering.cancelled()
        aborted = asyncio.ensure_future(messages.write(second))
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(begun) == 1
        gone_out.set()
        await aborted
        assert [id(response) for response in begun] == [id(first), id(second)]

    asyncio.run(body())


def test_leaving_the_stream_ends_the_request() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        call = smg.stub.Generate(asked(max_tokens=1000))
        await call.read()
        call.cancel()
        await under.until(lambda engine: len(engine.cancels()) == 1)

    run(body)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"grammar": "root ::= 'a'"}, "sampling_params.grammar: is not served"),
        ({"prompt_logprobs": 1}, "sampling_params.prompt_logprobs: is not served"),
        ({"truncate_prompt_tokens": 5}, "sampling_params.truncate_prompt_tokens: is not served"),
        ({"logprobs": -1}, "sampling_params.logprobs: all of"),
        ({"logit_bias": {-1: 1.0}}, "sampling_params.logit_bias: -1"),
        ({"temperature": 1000.0}, "sampling.temperature: "),
        ({"n": 1_000_000_000}, "sampling.n: "),
        ({"max_tokens": 0}, "stopping.max_tokens: "),
    ],
)
def test_what_cannot_be_served_is_named(params: dict[str, Any], problem: str) -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        error = await smg.refused(asked(**params))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith(problem)
        assert under.engine.submits() == []

    run(body)


def test_an_empty_prompt_and_one_that_never_fits_are_refused() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        assert (await smg.refused(asked(ids=()))).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await smg.refused(asked(ids=(1,) * 5000))).code() is grpc.StatusCode.FAILED_PRECONDITION
        assert (await smg.refused(vllm.GenerateRequest())).code() is grpc.StatusCode.INVALID_ARGUMENT

    run(body)


def test_structured_output_is_passed_on() -> None:
    from drift_gateway.compat.vllm_engine import translated

    forms = [
        (vllm.SamplingParams(json_schema='{"type": "integer"}'), ("json_schema", '{"type": "integer"}')),
        (vllm.SamplingParams(regex="[ab]+"), ("regex", "[ab]+")),
        (vllm.SamplingParams(json_object=True), ("json_schema", '{"type": "object"}')),
    ]
    for params, (form, content) in forms:
        request = vllm.GenerateRequest(text="x", sampling_params=params)
        structured = translated(request).structured
        assert (structured.WhichOneof("form"), getattr(structured, form)) == (form, content)
    choice = vllm.SamplingParams(choice=vllm.ChoiceConstraint(choices=["yes", "no"]))
    request = vllm.GenerateRequest(text="x", sampling_params=choice)
    assert list(translated(request).structured.choice.choices) == ["yes", "no"]


def test_what_smg_asks_before_it_routes(tmp_path: Path) -> None:
    ready = ready_in(tmp_path)

    async def body(under: UnderTest, smg: Smg) -> None:
        stub = smg.stub
        assert (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy
        model = await stub.GetModelInfo(vllm.GetModelInfoRequest())
        assert (model.served_model_name, model.is_generation, model.vocab_size) == ("fake", True, 300)
        assert (model.max_context_length, list(model.eos_token_ids)) == (4096, [END_OF_TEXT])
        assert str(tmp_path) not in str(model), "no path of the server's"
        server = await stub.GetServerInfo(vllm.GetServerInfoRequest())
        assert (server.server_type, server.data_parallel_size, server.max_num_seqs) == ("vllm-grpc", 1, 64)
        await smg.generate(asked(max_tokens=2))
        loads = await stub.GetLoads(vllm.GetLoadsRequest())
        assert loads.dp_rank_count == 1
        (load,) = loads.loads
        assert load.max_total_num_tokens in (0, ready.kv_tokens)

    run(body, ready=ready)


def test_smg_is_told_to_ask_again_while_nothing_is_served() -> None:
    """It takes any answer for a server that knows its model."""

    async def body(under: UnderTest, smg: Smg) -> None:
        under.supervisor.stop_accepting()
        health = smg.stub.HealthCheck(vllm.HealthCheckRequest())
        model = smg.stub.GetModelInfo(vllm.GetModelInfoRequest())
        for call in (health, model):
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await call

    run(body)


def test_the_tokenizer_can_be_fetched_and_nothing_else(tmp_path: Path) -> None:
    ready = ready_in(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 100_000)

    async def body(under: UnderTest, smg: Smg) -> None:
        pieces = [piece async for piece in smg.stub.GetTokenizer(vllm.GetTokenizerRequest())]
        data = b"".join(piece.data for piece in pieces)
        assert [piece.sha256 for piece in pieces[:-1]] == [""] * (len(pieces) - 1)
        assert pieces[-1].sha256 == hashlib.sha256(data).hexdigest()
        copy = tmp_path / "copy"
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert sorted(archive.namelist()) == ["tokenizer.json", "tokenizer_config.json"]
            archive.extractall(copy)
        assert Tokenizer.load(copy).encode("Grüße") == list("Grüße".encode())

    run(body, ready=ready)


def test_a_model_without_a_tokenizer_says_so() -> None:
    async def body(under: UnderTest, smg: Smg) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await smg.stub.GetTokenizer(vllm.GetTokenizerRequest()).read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    run(body)


def test_abort_reaches_the_callers_own_requests_only(tmp_path: Path) -> None:
    tokens = {tenant: new_token() for tenant in ("acme", "other")}
    entries = [f"[tenants.{tenant}]\n{token_entry(tenant, token)}" for tenant, token in tokens.items()]
    (tmp_path / "tenants.toml").write_text("\n".join(entries))

    async def body(under: UnderTest, smg: Smg) -> None:
        own, others = ([("authorization", f"Bearer {tokens[tenant]}")] for tenant in ("acme", "other"))
        call = smg.stub.Generate(asked(max_tokens=1000), metadata=own)
        await under.until(lambda engine: len(engine.submits()) == 1)
        await smg.stub.Abort(vllm.AbortRequest(request_ids=["chatcmpl-1"]), metadata=others)
        under.engine.step()
        assert (await call.read()).HasField("chunk")
        assert under.engine.cancels() == []
        await smg.stub.Abort(vllm.AbortRequest(request_ids=["chatcmpl-1"]), metadata=own)
        await under.until(lambda engine: len(engine.cancels()) == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await smg.stub.Abort(vllm.AbortRequest())

    security = Security(SecurityOptions(tenants=tmp_path / "tenants.toml"))
    run(body, paused=True, security=security, token=tokens["acme"])
