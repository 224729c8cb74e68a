"""Every row of the table of errors, provoked over a real socket: status, reason, details and what helps."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from fake_engine import READY
from gateway_under_test import UnderTest, narrow_client, ready_in, run_with_gateway
from google.rpc import error_details_pb2, status_pb2

from drift_gateway import client as api
from drift_gateway.gate import GateLimits
from drift_gateway.refusal import CASES, DETAILS_KEY, Reason, Refusal, error_table
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc

ROOT = Path(__file__).parent.parent
SLOW = msgspec.structs.replace(READY, prefill_seconds=[(100, 1.0), (1000, 10.0)])
"""An engine whose cost model expects a hundred prompt tokens a second."""

PROVOKED_ELSEWHERE: dict[Reason, str] = {
    Reason.ABORTED_BY_ADMIN: "test_gateway_admin.py",
    Reason.TRACE_STATE: "test_gateway_admin.py",
    Reason.UNAUTHENTICATED: "test_gateway_security.py",
    Reason.PERMISSION_DENIED: "test_gateway_security.py",
    Reason.RATE_LIMITED: "test_gateway_security.py",
}
"""Reasons whose provocation needs more than a gateway and an engine: the test module that provokes each."""


@dataclass(frozen=True)
class Provocation:
    """How to make the server refuse. `body` raises what the client got; `server` as of `run_with_gateway`."""

    body: Callable[[UnderTest], Awaitable[None]]
    server: dict[str, Any]
    fields: frozenset[str] = frozenset()
    words: str = ""


PROVOCATIONS: dict[Reason, Provocation] = {}


def provokes(
    reason: Reason, words: str, *, fields: tuple[str, ...] = (), **server: Any
) -> Callable[[Callable[[UnderTest], Awaitable[None]]], Callable[[UnderTest], Awaitable[None]]]:
    """Marks a coroutine that is refused for `reason`, with a message that has `words` in it."""

    def mark(body: Callable[[UnderTest], Awaitable[None]]) -> Callable[[UnderTest], Awaitable[None]]:
        PROVOCATIONS[reason] = Provocation(body, server, frozenset(fields), words)
        return body

    return mark


@provokes(Reason.INVALID_FIELD, "sampling.top_p: must be", fields=("sampling.top_p",))
async def wrong_field(under: UnderTest) -> None:
    await under.client.generate(token_ids=[1], top_p=2.0).complete()


@provokes(Reason.MODEL_NOT_FOUND, "'other' is not served", fields=("model",))
async def unknown_model(under: UnderTest) -> None:
    await under.client.generate(token_ids=[1], model="other").complete()


@provokes(Reason.REQUEST_ID_IN_USE, "'same' is in flight", paused=True)
async def id_twice(under: UnderTest) -> None:
    under.client.generate(token_ids=[1], request_id="same")
    await under.until(lambda engine: len(engine.submits()) == 1)
    await under.client.generate(token_ids=[1], request_id="same").complete()


@provokes(Reason.NEVER_FITS, "5000 tokens")
async def too_long(under: UnderTest) -> None:
    await under.client.generate(token_ids=[1] * 5000).complete()


@provokes(Reason.NO_TOKENIZER, "has no tokenizer; give token_ids")
async def no_tokenizer(under: UnderTest) -> None:
    await under.client.generate("text").complete()


@provokes(Reason.NO_CHAT_TEMPLATE, "has no chat template; give text or token_ids", tokenizer=True)
async def no_chat_template(under: UnderTest) -> None:
    await under.client.generate(messages=[{"role": "user", "content": "hello"}]).complete()


@provokes(Reason.SLO_INFEASIBLE, "expected after 2.50 s and may take 5.00 s", ready=SLOW, paused=True)
async def infeasible(under: UnderTest) -> None:
    """Behind two seconds of prompts."""
    under.client.generate(token_ids=[1] * 200, max_tokens=2)
    await under.until(lambda engine: len(engine.submits()) == 1)
    slo = api.SLO(on_infeasible="reject")
    await under.client.generate(token_ids=[1] * 50, slo=slo).complete()


@provokes(
    Reason.DEADLINE_EXCEEDED,
    "the first token is expected in 10.00 s and the call's deadline is in",
    ready=SLOW,
)
async def hopeless_deadline(under: UnderTest) -> None:
    await under.client.generate(token_ids=[1] * 1000, timeout=5.0).complete()


@provokes(Reason.KV_CAPACITY, "pages are promised", limits=GateLimits(kv_promise=0.05), paused=True)
async def promised_out(under: UnderTest) -> None:
    """Fifty pages of the thousand may be promised; one request of 32 leaves no room for another."""
    under.client.generate(token_ids=[1] * 500, max_tokens=12)
    await under.until(lambda engine: len(engine.submits()) == 1)
    await under.client.generate(token_ids=[1] * 500, max_tokens=12).complete()


@provokes(Reason.INTERNAL, "internal error; the log has it under")
async def internal(under: UnderTest) -> None:
    served = under.supervisor.served
    assert served is not None
    served.client.submit = None  # type: ignore[assignment, method-assign]
    await under.client.generate(token_ids=[1]).complete()


@provokes(Reason.QUARANTINED, "2 crashes and is quarantined", paused=True)
async def quarantined(under: UnderTest) -> None:
    for crash in range(1, 3):
        doomed = asyncio.ensure_future(under.client.generate(token_ids=[6, 6, 6], max_tokens=2).complete())
        await under.until(lambda engine: len(engine.submits()) == 1)
        under.engine.crash()
        with pytest.raises(api.Unavailable):
            await doomed
        while len(under.engines) == crash or under.supervisor.served is None:
            await asyncio.sleep(0.01)
    await under.client.generate(token_ids=[6, 6, 6], max_tokens=2).complete()


@provokes(Reason.WORKER_RESTART, "the engine", paused=True)
async def engine_crash(under: UnderTest) -> None:
    lost = asyncio.ensure_future(under.client.generate(token_ids=[1]).complete())
    await under.until(lambda engine: len(engine.submits()) == 1)
    under.engine.crash()
    await lost


@provokes(Reason.DRAINING, "the server is stopping")
async def stopping(under: UnderTest) -> None:
    under.supervisor.stop_accepting()
    await under.client.generate(token_ids=[1]).complete()


@provokes(Reason.STARTING, "the server is starting")
async def starting(under: UnderTest) -> None:
    from drift_gateway.supervisor import State

    under.supervisor.engine_state = State.STARTING
    await under.client.generate(token_ids=[1]).complete()


@provokes(Reason.QUEUE_FULL, "in flight", max_in_flight=2, paused=True)
async def queue_full(under: UnderTest) -> None:
    under.client.generate(token_ids=[1], n=2)
    await under.until(lambda engine: len(engine.submits()) == 2)
    await under.client.generate(token_ids=[1]).complete()


@provokes(Reason.SLOW_READER, "too slowly", step_seconds=0.0)
async def slow_reader(under: UnderTest) -> None:
    """What the client's window has room for comes first; then nothing goes, and the tokens pile up."""
    from drift_core import submission

    kept, submission.MAX_LAG_TOKENS = submission.MAX_LAG_TOKENS, 100  # type: ignore[misc]
    async with narrow_client(under.target) as client:
        try:
            generation = client.generate(token_ids=[1], n=16, max_tokens=4000, logprobs=1)
            await under.until(lambda engine: bool(engine.cancels()))
        finally:
            submission.MAX_LAG_TOKENS = kept  # type: ignore[misc]
        await generation.complete()


@pytest.mark.parametrize("reason", list(PROVOCATIONS), ids=str)
def test_each_refusal_says_all_that_the_table_promises(reason: Reason, tmp_path: Path) -> None:
    provocation, case = PROVOCATIONS[reason], CASES[reason]

    async def body(under: UnderTest) -> None:
        with pytest.raises(api.RequestError) as raised:
            await provocation.body(under)
        error = raised.value
        assert (error.reason, error.code) == (reason, case.code), error
        assert provocation.words in str(error)
        assert "\n" not in str(error)
        assert (error.retry_after is None) == (case.retry_after is None)
        assert error.retry_after is None or 0 < error.retry_after <= 3600
        assert frozenset(error.fields) == provocation.fields

    server = dict(provocation.server)
    if server.pop("tokenizer", False):
        server["ready"] = ready_in(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{}")
    run_with_gateway(body, **server)


def test_every_reason_is_provoked_by_some_test() -> None:
    assert set(CASES) == set(Reason)
    missing = set(Reason) - set(PROVOCATIONS) - set(PROVOKED_ELSEWHERE)
    assert not missing, f"no test provokes {sorted(missing)}"
    for reason, module in PROVOKED_ELSEWHERE.items():
        assert reason in (Path(__file__).parent / module).read_text(encoding="utf-8")


def test_the_wire_form_is_googles() -> None:
    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), priority=2000))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            trailers = dict(await call.trailing_metadata())
        status = status_pb2.Status.FromString(trailers[DETAILS_KEY])
        assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert status.message == await call.details() == "priority: 2000 is not from -1000 to 1000"
        info, wrong = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        assert status.details[0].Unpack(info)
        assert (info.domain, info.reason) == ("drift", "INVALID_FIELD")
        assert status.details[1].Unpack(wrong)
        assert [(v.field, v.description) for v in wrong.field_violations] == [
            ("priority", "2000 is not from -1000 to 1000")
        ]
        assert len(status.details) == 2

    run_with_gateway(body)


def test_the_protos_comment_tells_the_same_table() -> None:
    text = (
        (ROOT / "proto/drift_gateway/v1/generation.proto").read_text(encoding="utf-8").partition("syntax")[0]
    )
    told: dict[str, str] = {}
    code = ""
    for line in text.splitlines():
        if (row := re.match(r"//   ([A-Z_]+)  +(.*)", line)) is not None:
            code, line = row[1], row[2]
        if code:
            told |= dict.fromkeys(set(re.findall(r"[A-Z_]+", line)) & set(Reason), code)
    assert told == {reason: case.code.name for reason, case in CASES.items()}


def test_a_message_that_quotes_the_request_is_one_short_line() -> None:
    async def body(under: UnderTest) -> None:
        with pytest.raises(api.NotServed) as raised:
            await under.client.generate(token_ids=[1], model="a\nb" * 100_000).complete()
        assert len(str(raised.value)) <= 1000
        assert "\n" not in str(raised.value)
        assert raised.value.reason == "MODEL_NOT_FOUND"

    run_with_gateway(body)


def test_the_table_has_a_row_per_reason() -> None:
    rows = error_table().splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [str(reason) for reason in Reason]


def test_a_status_without_details_is_an_error_too() -> None:
    async def body(under: UnderTest) -> None:
        nobody = api.AsyncDriftClient("127.0.0.1:1")
        with pytest.raises(api.Unavailable) as raised:
            await nobody.server_info(timeout=20)
        assert (raised.value.reason, raised.value.retry_after) == (None, None)
        await nobody.close()

    run_with_gateway(body)


def test_a_refusal_may_say_more_precisely_when_to_come_back() -> None:
    refusal = Refusal(Reason.QUEUE_FULL, "full", retry_after=0.25, metadata={"class": "batch"})
    retry = error_details_pb2.RetryInfo()
    assert refusal.status().details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250
