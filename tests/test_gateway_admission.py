"""Who is let in and under which targets, over a real socket; hints, tokenising and what is served."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from fake_engine import READY
from gateway_under_test import UnderTest, ready_in, run_with_gateway

from drift_core.frames import Ready
from drift_gateway import client as api
from drift_gateway import prompts
from drift_gateway.admission import check
from drift_gateway.calls import Call
from drift_gateway.gate import DEMOTED_PRIORITY, GateLimits
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc, info_pb2

HUNDRED_A_SECOND = [(100, 1.0), (1000, 10.0)]
LONG = [1] * 1000


def slow(**changes: Any) -> Ready:
    """The facts of an engine that computes a hundred prompt tokens a second."""
    return msgspec.structs.replace(READY, prefill_seconds=HUNDRED_A_SECOND, **changes)


async def accepted_of(generation: api.AsyncGeneration) -> api.Accepted:
    """The first event; the request goes on."""
    event = await anext(aiter(generation))
    assert isinstance(event, api.Accepted)
    return event


# ------------------------------------------------------------------------------------------- targets


def test_a_request_that_may_be_rejected_is_when_its_targets_cannot_be_met() -> None:
    async def body(under: UnderTest) -> None:
        reject = api.SLO(ttft=5.0, name="chat", on_infeasible="reject")
        waiting = under.client.generate(token_ids=LONG, max_tokens=2)
        await under.until(lambda engine: len(engine.submits()) == 1)
        with pytest.raises(api.Overloaded, match=r"cannot be met now: .* target is 5 s") as raised:
            await under.client.generate(token_ids=[1] * 10, slo=reject).complete()
        error = raised.value
        assert (error.reason, error.metadata["class"]) == ("SLO_INFEASIBLE", "chat")
        assert float(error.metadata["predicted_ttft_ms"]) == pytest.approx(10_100, rel=0.05)
        assert error.retry_after == pytest.approx(15.2, rel=0.1), "when the queue would be short enough"
        assert len(under.engine.submits()) == 1
        under.engine.step(2)
        await waiting.complete()
        under.engine.paused = False
        feasible = api.SLO(ttft=1e3, on_infeasible="reject")
        done = await under.client.generate(token_ids=[1] * 10, slo=feasible, max_tokens=2).complete()
        assert done.timing.predicted_ttft is not None

    run_with_gateway(body, ready=slow(), paused=True)


@pytest.mark.parametrize(
    ("slo", "says"),
    [
        (
            api.SLO(ttft=5.0, on_infeasible="reject"),
            "first token is expected after 10.00 s, the target is 5 s",
        ),
        (api.SLO(ttft=99.0, tbt=0.01, on_infeasible="reject"), "20.0 ms apart, the target is 10 ms"),
        (api.SLO(ttft=99.0, e2e=11.0, on_infeasible="reject"), "after 12.00 s, the target is 11 s"),
    ],
)
def test_who_could_not_be_served_in_time_by_an_idle_server_is_not_told_to_come_back(
    slo: api.SLO, says: str
) -> None:
    async def body(under: UnderTest) -> None:
        for already in (0, 2):
            await under.until(lambda engine, already=already: len(engine.submits()) == already)
            with pytest.raises(
                api.Overloaded, match="cannot be met even with nothing else to serve"
            ) as raised:
                await under.client.generate(token_ids=LONG, slo=slo, max_tokens=101).complete()
            error = raised.value
            assert says in str(error)
            assert (error.reason, error.retry_after) == ("SLO_INFEASIBLE", None)
            under.client.generate(token_ids=LONG, n=2)

    run_with_gateway(body, ready=slow(decode_seconds=[(1, 0.02), (8, 0.02)]), paused=True)


def test_a_default_target_counts_as_well() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.Overloaded, match="the target is 2 s"):
            await under.client.generate(token_ids=LONG, slo=api.SLO(on_infeasible="reject")).complete()

    run_with_gateway(body, ready=slow())


def test_the_whole_has_its_target_too() -> None:
    async def body(under: UnderTest) -> None:
        await under.client.generate(token_ids=[1], max_tokens=300).complete()
        hasty = api.SLO(ttft=60.0, e2e=0.02, on_infeasible="reject")
        with pytest.raises(api.Overloaded, match=r"the end is expected after .* s, the target is 0\.02 s"):
            await under.client.generate(token_ids=[1], max_tokens=300, slo=hasty).complete()

    run_with_gateway(body)


def test_the_first_request_of_all_knows_that_tokens_will_not_come_so_fast() -> None:
    async def body(under: UnderTest) -> None:
        hasty = api.SLO(tbt=0.01, on_infeasible="reject")
        with pytest.raises(api.Overloaded, match=r"20.0 ms apart, the target is 10 ms") as raised:
            await under.client.generate(token_ids=[1], slo=hasty, max_tokens=5).complete()
        assert raised.value.reason == "SLO_INFEASIBLE"
        slow_enough = api.SLO(tbt=0.05, on_infeasible="reject")
        await under.client.generate(token_ids=[1], slo=slow_enough, max_tokens=5).complete()

    ready = msgspec.structs.replace(
        READY, prefill_seconds=[(100, 0.01)], decode_seconds=[(1, 0.02), (8, 0.02)]
    )
    run_with_gateway(body, ready=ready)


def test_best_effort_is_served_whatever_is_predicted() -> None:
    async def body(under: UnderTest) -> None:
        for slo in (None, api.SLO(ttft=0.5), api.SLO(ttft=0.5, on_infeasible="best_effort")):
            generation = under.client.generate(token_ids=LONG, slo=slo, max_tokens=2)
            accepted = await accepted_of(generation)
            assert accepted.predicted_ttft is not None
            assert not accepted.demoted
        assert {submit.slo_ttft for submit in under.engine.submits()} == {2.0, 0.5}

    run_with_gateway(body, ready=slow())


def test_a_demoted_request_runs_behind_everyone_and_without_targets() -> None:
    async def body(under: UnderTest) -> None:
        slo = api.SLO(ttft=0.5, name="chat", on_infeasible="demote")
        events = [
            event async for event in under.client.generate(token_ids=LONG, slo=slo, priority=-3, max_tokens=3)
        ]
        accepted, end = events[0], events[-1]
        assert isinstance(accepted, api.Accepted)
        assert isinstance(end, api.Finished)
        assert accepted.demoted
        (submit,) = under.engine.submits()
        assert submit.priority == DEMOTED_PRIORITY - 3
        assert (submit.slo_ttft, submit.slo_tbt, submit.slo_e2e) == (math.inf, math.inf, None)
        assert submit.slo_class == "chat"
        timing = end.timing
        assert timing.slo == api.SLO(name="chat")
        assert (timing.ttft_met, timing.tbt_met, timing.e2e_met, timing.late_tokens) == (None, None, None, 0)
        kept = api.SLO(ttft=60.0, on_infeasible="demote")
        assert not (await accepted_of(under.client.generate(token_ids=LONG, slo=kept))).demoted

    run_with_gateway(body, ready=slow())


def test_what_waits_ahead_is_part_of_the_prediction() -> None:
    async def body(under: UnderTest) -> None:
        slo = api.SLO(ttft=50.0, on_infeasible="reject")
        first = under.client.generate(token_ids=LONG, slo=slo, max_tokens=3)
        await under.until(lambda engine: len(engine.submits()) == 1)
        second = under.client.generate(token_ids=LONG, slo=slo, max_tokens=3)
        await under.until(lambda engine: len(engine.submits()) == 2)
        with pytest.raises(api.Overloaded, match="expected after 30"):
            await under.client.generate(token_ids=LONG, slo=slo).complete()
        under.engine.step(9)
        for generation, expected in ((first, 10.0), (second, 20.0)):
            done = await generation.complete()
            assert done.timing.predicted_ttft == pytest.approx(expected, rel=0.05)

    run_with_gateway(body, ready=slow(), paused=True)


def test_an_unknown_way_out_is_refused() -> None:
    async def body(under: UnderTest) -> None:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), slo=pb.SLO(on_infeasible=9))  # type: ignore[arg-type]
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Generate(request)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "slo.on_infeasible: 9 is none of BEST_EFFORT, REJECT, DEMOTE" in await call.details()
        with pytest.raises(api.DriftError, match="'never' is none of best_effort, reject, demote"):
            api.build_request("a", slo=api.SLO(on_infeasible="never"))

    run_with_gateway(body)


def test_running_streams_are_not_pushed_past_a_target_they_keep() -> None:
    """Every output makes the step longer; one too many is refused, whoever asks, until one has ended."""

    async def body(under: UnderTest) -> None:
        ahead = under.supervisor.ahead
        ahead.crowds_out = lambda newcomer: newcomer.outputs + ahead.outputs > 2  # type: ignore[method-assign]
        running = [under.client.generate(token_ids=[1], max_tokens=9) for _ in range(2)]
        await under.until(lambda engine: len(engine.submits()) == 2)
        for way in ("best_effort", "demote"):
            with pytest.raises(api.Overloaded, match="past their TBT targets") as raised:
                await under.client.generate(token_ids=[1], slo=api.SLO(on_infeasible=way)).complete()
            assert raised.value.reason == "QUEUE_FULL"
        with pytest.raises(api.Overloaded, match="running requests would miss theirs") as raised:
            await under.client.generate(token_ids=[1], slo=api.SLO(on_infeasible="reject")).complete()
        assert raised.value.reason == "SLO_INFEASIBLE"
        under.engine.step(20)
        for generation in running:
            await generation.complete()
        under.engine.paused = False
        await under.client.generate(token_ids=[1], max_tokens=1).complete()

    run_with_gateway(body, paused=True)


# ------------------------------------------------------------------------------------------- deadlines


def test_a_deadline_that_cannot_be_met_is_said_at_once() -> None:
    async def body(under: UnderTest) -> None:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(api.DeadlineExceeded, match="the first token is expected in 10") as raised:
            await under.client.generate(token_ids=LONG, timeout=9.0).complete()
        assert raised.value.reason == "DEADLINE_EXCEEDED"
        assert asyncio.get_running_loop().time() - begun < 8.0
        assert under.engine.submits() == []
        await under.client.generate(token_ids=LONG, timeout=60.0, max_tokens=1).complete()

    run_with_gateway(body, ready=slow())


def test_a_deadline_that_passes_ends_the_request_in_the_engine() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.DeadlineExceeded):
            await under.client.generate(token_ids=[1], timeout=0.3).complete()
        await under.until(lambda engine: len(engine.cancels()) == 1)

    run_with_gateway(body, paused=True)


def test_a_deadline_is_kept_where_no_grpc_keeps_it() -> None:
    """Other services stream by the same way; there the deadline of the call is all there is."""

    async def body(under: UnderTest) -> None:
        import time
        from contextlib import aclosing

        from drift_gateway.calls import Call
        from drift_gateway.refusal import Refusal

        async def drain(call: Call) -> None:
            request = api.build_request(token_ids=[1])
            async with aclosing(under.gateway.generations.responses(request, call)) as events:
                async for _ in events:
                    pass

        now = time.monotonic()
        with pytest.raises(Refusal, match="the deadline of the call passed"):
            await drain(Call(now, now + 0.2))
        await under.until(lambda engine: len(engine.cancels()) == 1)
        with pytest.raises(Refusal, match="the deadline of the call passed"):
            await drain(Call(now, now))
        assert len(under.engine.submits()) == 1

    run_with_gateway(body, paused=True)


# ------------------------------------------------------------------------------------------- bounds


def test_each_class_has_its_own_queue() -> None:
    async def body(under: UnderTest) -> None:
        batch, chat = api.SLO(name="batch"), api.SLO(name="chat")
        events = aiter(under.client.generate(token_ids=[1], n=2, slo=batch))
        await under.until(lambda engine: len(engine.submits()) == 2)
        with pytest.raises(
            api.Overloaded, match="2 outputs of class 'batch' wait and at most 2 may"
        ) as raised:
            await under.client.generate(token_ids=[1], slo=batch).complete()
        assert (raised.value.reason, raised.value.metadata) == ("QUEUE_FULL", {"class": "batch"})
        assert raised.value.retry_after is not None
        other = under.client.generate(token_ids=[1], max_tokens=2, slo=chat)
        await under.until(lambda engine: len(engine.submits()) == 3)
        under.engine.step(1)
        while not isinstance(await anext(events), api.TokenDelta):
            continue  # until it has a token, it waits in its class
        again = under.client.generate(token_ids=[1], max_tokens=2, slo=batch)
        await under.until(lambda engine: len(engine.submits()) == 4)
        under.engine.step(9)
        for generation in (other, again):
            assert len((await generation.complete()).token_ids) == 2

    run_with_gateway(body, paused=True, limits=GateLimits(max_queued=2))


@pytest.mark.parametrize("limits", [GateLimits(max_in_flight=3), GateLimits(max_queued=3)])
def test_more_outputs_than_are_ever_let_in_are_not_told_to_come_back(limits: GateLimits) -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(
            api.InvalidRequest, match="4 outputs at a time are more than the 3 ever"
        ) as raised:
            await under.client.generate(token_ids=[1], n=4, max_tokens=2).complete()
        assert list(raised.value.fields) == ["sampling.n"]
        assert raised.value.retry_after is None
        assert len(await under.client.generate(token_ids=[1], n=3, max_tokens=2).completions()) == 3

    run_with_gateway(body, limits=limits)


def test_pages_are_promised_only_so_many_times_over_and_given_back() -> None:
    async def body(under: UnderTest) -> None:
        first = under.client.generate(token_ids=[1] * 480, max_tokens=5)
        await under.until(lambda engine: len(engine.submits()) == 1)
        with pytest.raises(api.Overloaded, match=r"31 pages are promised .* needs 31; at most 50") as raised:
            await under.client.generate(token_ids=[1] * 480, max_tokens=5).complete()
        assert raised.value.reason == "KV_CAPACITY"
        small = under.client.generate(token_ids=[1], max_tokens=5)
        await under.until(lambda engine: len(engine.submits()) == 2)
        under.engine.step(9)
        await first.complete()
        await small.complete()
        under.engine.paused = False
        await under.client.generate(token_ids=[1] * 480, max_tokens=5).complete()

    run_with_gateway(body, paused=True, limits=GateLimits(kv_promise=0.05))


@pytest.mark.parametrize(
    ("stopping", "least"),
    [
        (pb.Stopping(max_tokens=700), 0),
        (pb.Stopping(max_tokens=700, min_tokens=300), 300),
        (pb.Stopping(max_tokens=700, ignore_eos=True), 700),
        (pb.Stopping(ignore_eos=True), 4095),
        (pb.Stopping(max_tokens=700, ignore_eos=True, stop=["."]), 0),
        (pb.Stopping(max_tokens=700, ignore_eos=True, stop_token_ids=[7], min_tokens=9), 9),
    ],
)
def test_outputs_that_may_not_end_sooner_are_reckoned_with_as_long(stopping: pb.Stopping, least: int) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), stopping=stopping)
    assert check(request, READY).asked(Call(0.0)).newcomer().min_tokens == least


def test_one_request_larger_than_all_that_is_promised_still_runs_alone() -> None:
    async def body(under: UnderTest) -> None:
        await under.client.generate(token_ids=[1] * 2000, max_tokens=5).complete()

    run_with_gateway(body, limits=GateLimits(kv_promise=0.05))


def test_the_ledger_is_empty_again_after_whatever_happened() -> None:
    async def body(under: UnderTest) -> None:
        async def one(number: int) -> None:
            call = under.client.generate(
                token_ids=[1] * (1 + number), max_tokens=1 + number % 7, n=1 + number % 3
            )
            events = aiter(call)
            for _ in range(number % 4):
                await anext(events, None)
            await events.aclose()  # type: ignore[attr-defined]

        await asyncio.gather(*(one(number) for number in range(60)))
        ahead, served = under.supervisor.ahead, under.supervisor.served
        assert served is not None
        splits = under.supervisor.splits
        while served.client.in_flight or ahead.outputs or splits._since or splits._used:
            await asyncio.sleep(0.01)
        assert (ahead.waiting_tokens, ahead.promised_pages, dict(ahead.queued)) == (0, 0, {})

    run_with_gateway(body)


def test_an_overfull_server_refuses_before_it_tokenises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(under: UnderTest) -> None:
        under.client.generate(token_ids=[1], n=2)
        await under.until(lambda engine: len(engine.submits()) == 2)
        served = under.supervisor.served
        assert served is not None
        assert served.tokenizer is not None
        monkeypatch.setattr(served.tokenizer, "encode", lambda *_: pytest.fail("it was tokenised"))
        with pytest.raises(api.Overloaded):
            await under.client.generate("hello").complete()

    run_with_gateway(body, ready=ready_in(tmp_path), max_in_flight=2, paused=True)


# ------------------------------------------------------------------------------------------- hints


def test_hints_reach_the_engine_and_salts_keep_prefixes_apart() -> None:
    async def body(under: UnderTest) -> None:
        generate = under.client.generate
        await generate(token_ids=[1], max_tokens=1).complete()
        await generate(
            token_ids=[1], max_tokens=1, session="run 7", reuse_tokens=0, cache_salt="a"
        ).complete()
        await generate(token_ids=[1], max_tokens=1, reuse_tokens=12, cache_salt="b").complete()
        plain, first, second = under.engine.submits()
        assert (plain.reuse_tokens, first.reuse_tokens, second.reuse_tokens) == (None, 0, 12)
        assert len({plain.salt, first.salt, second.salt}) == 3
        assert plain.salt == ""

    run_with_gateway(body)


@pytest.mark.parametrize(
    ("hints", "field"),
    [
        ({"session": "x" * 129}, "prefix.session"),
        ({"session": "a\nb"}, "prefix.session"),
        ({"cache_salt": "é" * 65}, "prefix.cache_salt"),
    ],
)
def test_wrong_hints_are_named(hints: dict[str, str], field: str) -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.InvalidRequest) as raised:
            await under.client.generate(token_ids=[1], **hints).complete()
        assert list(raised.value.fields) == [field]

    run_with_gateway(body)


# ------------------------------------------------------------------------------------------- proof


def test_the_proof_names_the_split_and_the_prediction() -> None:
    async def body(under: UnderTest) -> None:
        one = await under.client.generate(token_ids=[1], max_tokens=1).complete()
        assert (one.timing.prefill_units, one.timing.decode_units) == (None, None)
        many = await under.client.generate(token_ids=[1], max_tokens=8).complete()
        assert (many.timing.prefill_units, many.timing.decode_units) == (1, 1)
        assert many.timing.predicted_ttft is not None

    run_with_gateway(body, ready=slow())


def test_accepted_says_what_the_engine_said() -> None:
    async def body(under: UnderTest) -> None:
        accepted = await accepted_of(under.client.generate(token_ids=[1, 2], max_tokens=1))
        assert (accepted.cached_tokens, accepted.queue_position, accepted.arrival is not None) == (
            None,
            0,
            True,
        )

    run_with_gateway(body)


# ------------------------------------------------------------------------------------------- tokens


def test_tokenize_makes_what_generate_would_and_detokenize_undoes_it(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        client = under.client
        ids = await client.tokenize("Grüße")
        await client.generate("Grüße", max_tokens=1).complete()
        assert ids == under.engine.submits()[0].prompt == list("Grüße".encode())
        assert await client.detokenize(ids) == "Grüße"
        chat = [{"role": "user", "content": "hi"}]
        templated = await client.tokenize(messages=chat)
        await client.generate(messages=chat, max_tokens=1).complete()
        assert templated == under.engine.submits()[1].prompt
        assert await client.detokenize([104, 256, 105]) == "hi"
        assert await client.detokenize([104, 256, 105], special_tokens=True) == "h<|end|>i"
        assert await client.detokenize([]) == ""
        long = "x" * 50_000
        assert len(await client.tokenize(long)) == 50_000, "longer than any prompt may be, and no prompt"

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_what_is_wrong_with_texts_and_tokens_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(prompts, "MAX_DETOKENIZED", 10)

    async def body(under: UnderTest) -> None:
        client = under.client
        for call, field in (
            (client.tokenize(""), "text"),
            (client.tokenize("x" * 101), "text"),
            (client.tokenize(messages=[]), "chat.messages"),
            (client.detokenize([300]), "token_ids"),
            (client.detokenize([1] * 11), "token_ids"),
            (client.generate("x" * 101).complete(), "text"),
        ):
            with pytest.raises(api.InvalidRequest) as raised:
                await call
            assert list(raised.value.fields) == [field]
        for call in (client.tokenize("a", model="other"), client.detokenize([1], model="other")):
            with pytest.raises(api.NotServed, match="'other' is not served here; 'fake' is"):
                await call

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_too_many_long_texts_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "POOL", prompts.Pool(most=5000))

    async def body(under: UnderTest) -> None:
        with pytest.raises(api.Overloaded, match="wait to be tokenized") as raised:
            await under.client.tokenize("x" * 5001)
        assert raised.value.reason == "QUEUE_FULL"
        assert len(await under.client.tokenize("x" * 4999)) == 4999

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_a_model_without_tokenizer_says_so() -> None:
    async def body(under: UnderTest) -> None:
        for call, problem in (
            (under.client.tokenize("a"), "text: .* has no tokenizer"),
            (under.client.detokenize([1]), "^token_ids: model 'fake' has no tokenizer$"),
        ):
            with pytest.raises(api.NeverFits, match=problem) as raised:
                await call
            assert raised.value.reason == "NO_TOKENIZER"

    run_with_gateway(body)


# ------------------------------------------------------------------------------------------- models and plugins


def test_models_and_plugins_are_listed(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        client = under.client
        (model,) = await client.models()
        assert (model.name, model.vocab_size, model.has_tokenizer, model.has_chat_template) == (
            "fake", 300, True, True,
        )  # fmt: skip
        assert model == await client.model() == await client.model("fake")
        assert model == (await client.server_info()).model
        with pytest.raises(api.NotServed, match="'other' is not served here; 'fake' is") as raised:
            await client.model("other")
        assert list(raised.value.fields) == ["name"]
        plugins = {(plugin.kind, plugin.name): plugin for plugin in await client.plugins()}
        gang = plugins["dispatch policy", "gang"]
        assert (gang.package, gang.version) == ("drift-scheduler", "0.1.0")
        assert "gang scheduling" in gang.summary
        assert ("partition policy", "tightest-decode") in plugins
        assert ("command", "serve") in plugins

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_the_blocking_client_asks_all_that_too(tmp_path: Path) -> None:
    def blocking(target: str) -> None:
        with api.DriftClient(target) as client:
            ids = client.tokenize("abc")
            assert (ids, client.detokenize(ids)) == ([97, 98, 99], "abc")
            assert [model.name for model in client.models()] == [client.model().name] == ["fake"]
            assert client.plugins()
            assert client.load().max_in_flight == 1024
            with pytest.raises(api.InvalidRequest):
                client.tokenize("")
        with pytest.raises(api.DriftError, match="exactly one of text, messages"):
            client.tokenize("a", messages=[])
        with pytest.raises(api.DriftError, match="not token ids"):
            client.detokenize([-1])

    async def body(under: UnderTest) -> None:
        await asyncio.to_thread(blocking, under.target)

    run_with_gateway(body, ready=ready_in(tmp_path))


def test_before_the_engine_was_ready_no_model_is_listed() -> None:
    async def body(under: UnderTest) -> None:
        under.supervisor.last_ready = under.supervisor.served = None
        assert await under.client.models() == []
        for call in (under.client.model(), under.client.tokenize("a")):
            with pytest.raises(api.Unavailable):
                await call
        assert (await under.client.server_info()).readiness == info_pb2.READINESS_READY

    run_with_gateway(body)
