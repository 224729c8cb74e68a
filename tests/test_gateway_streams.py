"""What a client sees of its stream: over a real socket, with an engine that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import tokenizers
from fake_engine import READY, FakeEngine
from gateway_under_test import END_OF_TEXT, UnderTest, narrow_client, ready_in, run_with_gateway
from tokenizers import decoders, models

from drift_core import submission
from drift_core.frames import Cancel, Submit
from drift_gateway import client as api
from drift_gateway.observe.request_record import RequestRecord
from drift_gateway.request_errors import RequestError
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def say(text: str) -> Any:
    """A script that generates this text byte by byte, whatever was asked."""
    return lambda submit: bytes_of(text)


async def events_of(generation: api.AsyncGeneration) -> list[api.Event]:
    return [event async for event in generation]


async def drain(events: AsyncIterator[api.Event]) -> None:
    async for _ in events:
        pass


def deltas(events: Sequence[api.Event], output: int = 0) -> list[api.TokenDelta]:
    return [event for event in events if isinstance(event, api.TokenDelta) and event.output_index == output]


def text_of(events: Sequence[api.Event], output: int = 0) -> str:
    return "".join(delta.text for delta in deltas(events, output))


def ends(events: Sequence[api.Event]) -> list[api.Finished]:
    return [event for event in events if isinstance(event, api.Finished)]


def test_accepted_then_tokens_in_order_then_one_finished() -> None:
    async def body(under: UnderTest) -> None:
        events = await events_of(under.client.generate(token_ids=[1, 2, 3], max_tokens=150, request_id="r-1"))
        assert events[0] == api.Accepted("r-1", "fake", 3, 0)
        assert isinstance(events[-1], api.Finished)
        tokens = deltas(events)
        assert len(tokens) == len(events) - 2
        assert [token for delta in tokens for token in delta.token_ids] == list(range(150))
        assert [delta.sequence for delta in tokens] == list(range(len(tokens)))
        offsets = [offset for delta in tokens for offset in delta.offsets]
        assert len(offsets) == 150
        assert offsets[0] > 0
        assert all(before <= after for before, after in pairwise(offsets))
        assert events[-1].usage == api.Usage(3, 1, 150)
        assert events[-1].reason == "length"

    run_with_gateway(body)


def test_finished_proves_the_latency() -> None:
    async def body(under: UnderTest) -> None:
        generation = under.client.generate(
            token_ids=[1], max_tokens=20, slo=api.SLO(ttft=60.0, tbt=1e-6, e2e=60.0, name="chat")
        )
        events = await events_of(generation)
        (end,) = ends(events)
        timing = end.timing
        offsets = [offset for delta in deltas(events) for offset in delta.offsets]
        gaps = sorted(after - before for before, after in pairwise(offsets))
        assert timing.ttft == pytest.approx(offsets[0], abs=2e-6)
        assert timing.e2e == pytest.approx(offsets[-1], abs=2e-6)
        assert timing.tbt_max == pytest.approx(gaps[-1], abs=3e-6)
        assert timing.tbt_p99 == pytest.approx(gaps[-1], abs=3e-6)
        assert timing.tbt_p50 == pytest.approx(gaps[9], abs=3e-6)
        assert timing.queue is not None
        assert timing.prefill is not None
        assert timing.queue + timing.prefill == pytest.approx(timing.ttft, abs=1e-6)
        assert (timing.preemptions, timing.recomputed_tokens, timing.late_tokens) == (2, 3, 19)
        assert (timing.ttft_met, timing.tbt_met, timing.e2e_met) == (True, False, True)
        assert timing.slo == api.SLO(60.0, pytest.approx(1e-6), 60.0, "chat")
        assert 0 < timing.gateway < 10

    run_with_gateway(body)


def test_what_is_absent_takes_defaults_and_zero_means_zero() -> None:
    async def body(under: UnderTest) -> None:
        await under.client.generate(token_ids=[1], max_tokens=2).complete()
        await under.client.generate(
            token_ids=[1, 2],
            temperature=0.0,
            top_p=0.3,
            seed=0,
            priority=-2,
            slo=api.SLO(ttft=0.25),
            min_tokens=3,
        ).complete()
        absent, zero = under.engine.submits()
        assert (absent.sampling.temperature, absent.sampling.seed, absent.priority) == (1.0, None, 0)
        assert (absent.slo_ttft, absent.slo_tbt, absent.slo_e2e, absent.slo_class) == (
            2.0,
            0.1,
            None,
            "default",
        )
        assert (zero.sampling.temperature, zero.sampling.top_p, zero.sampling.seed) == (0.0, 0.3, 0)
        assert (zero.priority, zero.slo_ttft, zero.sampling.min_tokens) == (-2, 0.25, 3)
        assert zero.sampling.max_tokens == 4094, "what the context has room for"

    run_with_gateway(body, script=lambda submit: [1, 2])


def test_text_in_and_text_out(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        completion = await under.client.generate("Grüße", max_tokens=40).complete()
        assert completion.text == "héllo wörld"
        assert completion.token_ids == tuple(bytes_of("héllo wörld"))
        assert under.engine.submits()[0].prompt == bytes_of("Grüße")

    run_with_gateway(body, ready=ready_in(tmp_path), script=say("héllo wörld"))


def test_long_texts_are_tokenised_too(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        completion = await under.client.generate("x" * 3900, max_tokens=5).complete()
        assert completion.usage.prompt_tokens == 3900

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_no_delta_ever_holds_half_a_character(tmp_path: Path) -> None:
    spoken = "naïve 日本語 🙂🙃 end"

    async def body(under: UnderTest) -> None:
        events = await events_of(under.client.generate(token_ids=[1]))
        assert text_of(events) == spoken
        assert all("\ufffd" not in delta.text for delta in deltas(events))
        assert [token for delta in deltas(events) for token in delta.token_ids] == bytes_of(spoken)

    run_with_gateway(body, ready=ready_in(tmp_path), script=say(spoken), step_seconds=0.003)


def test_the_first_word_keeps_its_space_where_texts_begin_without_one(tmp_path: Path) -> None:
    """A vocabulary in the manner of Llama 2, whose decoder leaves out a space at the beginning."""
    ready = ready_in(tmp_path)
    backend = tokenizers.Tokenizer(models.BPE({"▁lists": 0, "▁are": 1}, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))

    async def body(under: UnderTest) -> None:
        completion = await under.client.generate(token_ids=[0], max_tokens=40).complete()
        assert completion.text == " are lists"

    run_with_gateway(body, ready=ready, script=lambda submit: [1, 0])


def test_a_conversation_goes_through_the_models_template(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        await under.client.generate(messages=messages, max_tokens=2).complete()
        assert bytes(under.engine.submits()[0].prompt).decode() == "[system]be brief[user]hi[assistant]"

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_a_stop_string_ends_the_output_and_tells_the_engine(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        generation = under.client.generate(token_ids=[1], max_tokens=4000, stop=["never", "END"])
        events = await events_of(generation)
        (end,) = ends(events)
        assert text_of(events) == "some text "
        assert (end.reason, end.stop_string) == ("stop", "END")
        assert end.usage.output_tokens == len("some text END")
        assert [token for delta in deltas(events) for token in delta.token_ids] == bytes_of("some text END")
        assert under.engine.cancels()[0].stop
        assert under.engine.submits()[0].sampling.stop is None

    run_with_gateway(body, ready=ready_in(tmp_path), script=say("some text END" + " more" * 500))


def test_a_stop_string_split_over_tokens_is_never_shown_in_part(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        events = await events_of(under.client.generate(token_ids=[1], stop=["<end>"], max_tokens=500))
        assert text_of(events) == "a <b> <en d "
        kept = await under.client.generate(
            token_ids=[1], stop=["<end>"], max_tokens=500, include_stop_in_text=True
        ).complete()
        assert kept.text == "a <b> <en d <end>"

    run_with_gateway(body, ready=ready_in(tmp_path), script=say("a <b> <en d <end> tail"), step_seconds=0.003)


def test_the_models_end_token_has_no_text(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        completion = await under.client.generate(token_ids=[1]).complete()
        assert completion.text == "done"
        assert completion.token_ids == (*bytes_of("done"), END_OF_TEXT)
        assert (completion.finish_reason, completion.usage.output_tokens) == ("stop", 5)

    run_with_gateway(
        body,
        ready=ready_in(tmp_path),
        script=lambda submit: [*bytes_of("done"), END_OF_TEXT],
        end_reason="stop",
    )


def test_a_stop_token_with_text_is_not_shown(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        completion = await under.client.generate(token_ids=[1], stop_token_ids=[ord("!")]).complete()
        assert (completion.text, completion.finish_reason) == ("wait", "stop")
        assert list(under.engine.submits()[0].sampling.stop_token_ids or ()) == [ord("!")]

    run_with_gateway(body, ready=ready_in(tmp_path), script=say("wait!"), end_reason="stop")


def test_several_outputs_each_with_its_own_order_and_end() -> None:
    def script(submit: Submit) -> list[int]:
        index = int(submit.id.rpartition("#")[2])
        return [index * 10 + step for step in range(5 + index)]

    async def body(under: UnderTest) -> None:
        events = await events_of(under.client.generate(token_ids=[1, 2], n=3, seed=7, request_id="r"))
        assert sum(isinstance(event, api.Accepted) for event in events) == 1
        assert sorted(end.output_index for end in ends(events)) == [0, 1, 2]
        for index in range(3):
            own = deltas(events, index)
            assert [delta.sequence for delta in own] == list(range(len(own)))
            tokens = [token for delta in own for token in delta.token_ids]
            assert tokens == [index * 10 + step for step in range(5 + index)]
        submits = under.engine.submits()
        assert [(submit.id, submit.sampling.n, submit.sampling.seed) for submit in submits] == [
            ("r#0", 1, 7), ("r#1", 1, 8), ("r#2", 1, 9),
        ]  # fmt: skip
        completions = await under.client.generate(token_ids=[1], n=2).completions()
        assert [len(completion.token_ids) for completion in completions] == [5, 6]

    run_with_gateway(body, script=script)


def test_log_probabilities_when_asked_for() -> None:
    async def body(under: UnderTest) -> None:
        asked = await under.client.generate(token_ids=[1], max_tokens=3, logprobs=1).complete()
        assert asked.logprobs == tuple(
            api.Logprobs(-0.5, (api.TopLogprob(token, -0.5),)) for token in range(3)
        )
        assert (await under.client.generate(token_ids=[1], max_tokens=3).complete()).logprobs == ()

    run_with_gateway(body)


def test_a_request_cancelled_here_raises_so_and_a_cancelled_task_stays_one() -> None:
    async def body(under: UnderTest) -> None:
        generation = under.client.generate(token_ids=[1], max_tokens=4000)
        events = aiter(generation)
        await anext(events)
        generation.cancel()
        with pytest.raises(api.Cancelled):
            await drain(events)
        generation = under.client.generate(token_ids=[1], max_tokens=4000)
        waiting = asyncio.ensure_future(generation.complete())
        await under.until(lambda engine: len(engine.submits()) == 2)
        generation.cancel()
        with pytest.raises(api.Cancelled):
            await waiting
        waiting = asyncio.ensure_future(under.client.generate(token_ids=[1], max_tokens=4000).complete())
        await under.until(lambda engine: len(engine.submits()) == 3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run_with_gateway(body, step_seconds=0.01)


def test_streams_are_interleaved() -> None:
    """Neither stream waits for the other: with steps taken one by one, each gets its token of each step."""

    async def body(under: UnderTest) -> None:
        one = under.client.generate(token_ids=[1], max_tokens=4)
        other = under.client.generate(token_ids=[1, 1], max_tokens=4)
        first, second = aiter(one), aiter(other)
        await under.until(lambda engine: len(engine.submits()) == 2)
        under.engine.step()
        assert isinstance(await anext(first), api.Accepted)
        assert isinstance(await anext(second), api.Accepted)
        for token in range(4):
            for events in (first, second):
                delta = await anext(events)
                assert isinstance(delta, api.TokenDelta)
                assert delta.token_ids == (token,)
            under.engine.step()
        for events in (first, second):
            assert isinstance(await anext(events), api.Finished)

    run_with_gateway(body, paused=True)


async def _numbered(responses: Any) -> AsyncIterator[tuple[int, pb.GenerateResponse]]:
    number = 0
    async for response in responses:
        yield number, response
        number += 1


def test_a_reader_that_lags_gets_its_tokens_in_fewer_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one write waits, tokens gather and leave together; none is lost."""
    from drift_gateway import generation

    held = asyncio.Event()
    responses = generation.Generations.responses

    async def slowly(self: Any, request: Any, call: Any, write: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for number, response in _numbered(responses(self, request, call)):
            yield response
            if number == 1:
                await held.wait()

    monkeypatch.setattr(generation.Generations, "responses", slowly)

    async def body(under: UnderTest) -> None:
        generation = aiter(under.client.generate(token_ids=[1], max_tokens=1000))
        assert isinstance(await anext(generation), api.Accepted)
        while under.supervisor.timeline.requests_finished == 0:
            await asyncio.sleep(0.005)
        held.set()
        events = [event async for event in generation]
        assert [token for delta in deltas(events) for token in delta.token_ids] == [
            step % 200 for step in range(1000)
        ]
        assert len(deltas(events)) == 2
        assert len(deltas(events)[1].token_ids) > 900

    run_with_gateway(body, step_seconds=0.0)


def test_tokens_that_come_while_a_message_is_written_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where messages are written without the stream's task being woken."""
    from drift_gateway import generation

    held = asyncio.Event()
    written = 0

    class Slow(generation.DirectWriter):
        def __init__(self, write: Any, sent: Any) -> None:
            async def slowly(message: pb.GenerateResponse) -> None:
                nonlocal written
                written += 1
                await write(message)
                if written == 3:
                    await held.wait()

            super().__init__(slowly, sent)

    monkeypatch.setattr(generation, "DirectWriter", Slow)

    async def body(under: UnderTest) -> None:
        generation = aiter(under.client.generate(token_ids=[1], max_tokens=1000))
        assert isinstance(await anext(generation), api.Accepted)
        while under.supervisor.timeline.requests_finished == 0:
            await asyncio.sleep(0.005)
        assert written == 3
        held.set()
        events = [event async for event in generation]
        found = deltas(events)
        assert [token for delta in found for token in delta.token_ids] == [step % 200 for step in range(1000)]
        assert [delta.sequence for delta in found] == list(range(len(found)))
        assert len(found[-1].token_ids) > 800
        assert isinstance(events[-1], api.Finished)

    run_with_gateway(body, step_seconds=0.001)


def test_a_message_that_cannot_be_written_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from drift_gateway import generation

    class Broken(generation.DirectWriter):
        def __init__(self, write: Any, sent: Any) -> None:
            async def fail(message: pb.GenerateResponse) -> None:
                raise OSError("no way")

            super().__init__(fail, sent)

    monkeypatch.setattr(generation, "DirectWriter", Broken)

    async def body(under: UnderTest) -> None:
        with pytest.raises(RequestError, match="internal error"):
            await under.client.generate(token_ids=[1], max_tokens=4000).complete()
        await under.until(lambda engine: len(engine.cancels()) == 1)

    run_with_gateway(body, step_seconds=0.002)


async def read_into(seen: list[api.Event], generation: Any) -> None:
    async for event in generation:
        seen.append(event)


def asked_for(outputs: int) -> dict[str, Any]:
    """Several outputs are written by the stream's task, a single one without its being woken."""
    return {} if outputs == 1 else {"n": outputs, "logprobs": 1}


@pytest.mark.parametrize("outputs", [1, 16])
def test_a_reader_that_stalls_is_ended_and_its_requests_cancelled_at_once(
    monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    """The engine hears of it while the client still does not read; once it does, it reads why."""
    monkeypatch.setattr(submission, "MAX_LAG_TOKENS", 100)

    async def body(under: UnderTest) -> None:
        async with narrow_client(under.target) as client:
            stalled = client.generate(token_ids=[1], max_tokens=64_000, **asked_for(outputs))
            await under.until(lambda engine: len(engine.cancels()) == outputs)
            assert under.supervisor.served is not None
            assert under.supervisor.served.client.in_flight == 0
            beside = await under.client.generate(token_ids=[2], max_tokens=50).complete()
            assert len(beside.token_ids) == 50
            seen: list[api.Event] = []
            with pytest.raises(api.Overloaded, match="too slowly") as ended:
                await read_into(seen, stalled)
            assert ended.value.reason == "SLOW_READER"
            for output in range(outputs):
                ours = [event for event in deltas(seen) if event.output_index == output]
                assert [event.sequence for event in ours] == list(range(len(ours)))

    run_with_gateway(body, ready=msgspec.structs.replace(READY, max_context=65536), step_seconds=0.0)


@pytest.mark.parametrize("outputs", [1, 16])
def test_a_message_that_does_not_get_through_for_too_long_ends_the_requests(
    monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    monkeypatch.setattr(submission, "MAX_STUCK_S", 0.2)
    monkeypatch.setattr(submission, "MAX_LAG_TOKENS", 1_000_000)

    async def body(under: UnderTest) -> None:
        async with narrow_client(under.target) as client:
            stalled = client.generate(token_ids=[1], max_tokens=64_000, **asked_for(outputs))
            await under.until(lambda engine: len(engine.cancels()) == outputs)
            with pytest.raises(api.Overloaded, match="too slowly"):
                await stalled.complete()

    run_with_gateway(body, ready=msgspec.structs.replace(READY, max_context=65536), step_seconds=0.0005)


@pytest.mark.parametrize("outputs", [1, 16])
def test_one_that_never_comes_to_hear_why_it_was_ended_is_given_up(
    monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    """Nothing is kept for it then, and should it read on after all, it still hears why."""
    monkeypatch.setattr(submission, "MAX_LAG_TOKENS", 100)
    monkeypatch.setattr(submission, "GIVEN_UP_S", 0.05)

    async def body(under: UnderTest) -> None:
        records: list[RequestRecord] = []
        under.gateway.generations.recorders.append(records.append)
        async with narrow_client(under.target) as client:
            stalled = client.generate(token_ids=[1], max_tokens=64_000, **asked_for(outputs))
            await under.until(lambda engine: len(engine.cancels()) == outputs)
            async with asyncio.timeout(30):
                while under.supervisor.request_ids():
                    await asyncio.sleep(0.01)
            async with asyncio.timeout(30):
                with pytest.raises(api.Overloaded, match="too slowly") as ended:
                    await stalled.complete()
            assert ended.value.reason == "SLOW_READER"
            assert [(record.code, record.reason) for record in records] == [
                ("RESOURCE_EXHAUSTED", "SLOW_READER")
            ]

    run_with_gateway(body, ready=msgspec.structs.replace(READY, max_context=65536), step_seconds=0.0)


@pytest.mark.parametrize("how", ["cancel", "leave", "deadline", "disconnect"])
def test_dropping_the_stream_cancels_every_output(how: str) -> None:
    async def body(under: UnderTest) -> None:
        timeout = 1.0 if how == "deadline" else None
        generation = under.client.generate(
            token_ids=[1], max_tokens=4000, n=2, request_id="r", timeout=timeout
        )
        events = aiter(generation)
        for _ in range(3):
            await anext(events)
        if how == "cancel":
            generation.cancel()
        elif how == "leave":
            await events.aclose()  # type: ignore[attr-defined]
        elif how == "deadline":
            with pytest.raises(api.DeadlineExceeded):
                await drain(events)
        else:
            await under.client.close()
        await under.until(lambda engine: len(engine.cancels()) >= 2)
        assert {(cancel.id, cancel.stop) for cancel in under.engine.cancels()} == {
            ("r#0", False),
            ("r#1", False),
        }
        assert under.supervisor.served is not None
        assert under.supervisor.served.client.in_flight == 0

    run_with_gateway(body, step_seconds=0.002)


def test_an_output_that_ended_is_not_cancelled() -> None:
    async def body(under: UnderTest) -> None:
        await under.client.generate(token_ids=[1], max_tokens=3).complete()
        await under.client.generate(token_ids=[1], max_tokens=3).complete()
        assert under.engine.cancels() == []

    run_with_gateway(body)


def test_random_cancellations_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    async def body(under: UnderTest) -> None:
        async def one(number: int) -> None:
            events = aiter(
                under.client.generate(token_ids=[1], max_tokens=2 + number % 7, request_id=f"r{number}")
            )
            for _ in range(number % 5):
                await anext(events, None)
            await events.aclose()  # type: ignore[attr-defined]

        for start in range(0, 300, 30):
            await asyncio.gather(*(one(start + offset) for offset in range(30)))
        served = under.supervisor.served
        assert served is not None
        while served.client.in_flight:
            await asyncio.sleep(0.01)
        await (under.client.generate(token_ids=[1], max_tokens=3)).complete()
        assert under.supervisor._fingerprints == {}

    run_with_gateway(body)
    assert "internal error" not in caplog.text


def test_the_plain_stubs_work_without_our_client() -> None:
    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[1, 2]),
                stopping=pb.Stopping(max_tokens=2),
                sampling=pb.Sampling(n=1),
            )
            kinds = [response.WhichOneof("event") async for response in stub.Generate(request)]
        assert kinds[0] == "accepted"
        assert kinds[-1] == "finished"
        assert set(kinds[1:-1]) == {"token_delta"}

    run_with_gateway(body)


def test_the_blocking_client_streams_and_completes(tmp_path: Path) -> None:
    def blocking(target: str) -> tuple[list[api.Event], api.Completion]:
        with api.DriftClient(target) as client:
            assert client.wait_ready(30).model.name == "fake"
            events = list(client.generate("hello", max_tokens=5))
            return events, client.generate("hello", max_tokens=5).complete()

    async def body(under: UnderTest) -> None:
        events, completion = await asyncio.to_thread(blocking, under.target)
        assert text_of(events) == completion.text == "right"
        assert len(ends(events)) == 1

    run_with_gateway(body, ready=ready_in(tmp_path), script=say("right"))


def test_leaving_a_blocking_stream_cancels_it() -> None:
    def blocking(target: str) -> None:
        with api.DriftClient(target) as client:
            for event in client.generate(token_ids=[1], max_tokens=4000):
                if isinstance(event, api.TokenDelta):
                    break

    async def body(under: UnderTest) -> None:
        await asyncio.to_thread(blocking, under.target)
        await under.until(lambda engine: bool(engine.cancels()))
        assert isinstance(under.engine.cancels()[0], Cancel)

    run_with_gateway(body, step_seconds=0.002)


def test_the_fake_engine_is_itself_in_order() -> None:
    """Guards the tests above: paused, it takes no step on its own."""

    async def body(under: UnderTest) -> None:
        under.client.generate(token_ids=[1], max_tokens=2)
        await under.until(lambda engine: len(engine.submits()) == 1)
        engine: FakeEngine = under.engine
        await asyncio.sleep(0.05)
        assert under.supervisor.timeline.tokens_generated == 0
        engine.step(2)
        while under.supervisor.timeline.tokens_generated < 2:
            await asyncio.sleep(0.005)

    run_with_gateway(body, paused=True)
