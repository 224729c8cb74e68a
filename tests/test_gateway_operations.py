"""What operators rely on: the order of stopping, hung engines, dead clients, the access log, spans."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine
from gateway_under_test import UnderTest, ready_in, run_with_gateway
from grpc_health.v1 import health_pb2, health_pb2_grpc

from drift_core.frames import Pong
from drift_gateway import client as api
from drift_gateway import server
from drift_gateway.calls import Call
from drift_gateway.heartbeat import hang_of
from drift_gateway.observe.access_log import AccessLog
from drift_gateway.observe.request_record import RequestRecord
from drift_gateway.observe.spans import Spans, spans_to
from drift_gateway.server import GENERATION, INFO
from drift_gateway.supervisor import Supervisor
from drift_scheduler.errors import DriftError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PATIENCE_S = 60.0


async def health_of(under: UnderTest, service: str) -> int:
    async with grpc.aio.insecure_channel(under.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        status: int = answer.status
        return status


# -------------------------------------------------------------------------------------- stopping


def test_stopping_goes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """NOT_SERVING while requests are still taken, then refusals, then the end of what runs, each with its Finished."""
    lame_duck_over = asyncio.Event()

    async def until_over(hurry: asyncio.Event, seconds: float) -> None:
        assert (hurry.is_set(), seconds) == (False, 7.0)
        await lame_duck_over.wait()

    monkeypatch.setattr(server, "_either", until_over)

    async def body(under: UnderTest) -> None:
        early = asyncio.ensure_future(under.client.generate(token_ids=[1], max_tokens=4).complete())
        await under.until(lambda engine: len(engine.submits()) == 1)
        hurry = asyncio.Event()
        closing = asyncio.ensure_future(under.gateway.close(PATIENCE_S, hurry, lame_duck=7.0))
        while await health_of(under, "") != NOT_SERVING:
            await asyncio.sleep(0.01)
        assert [await health_of(under, name) for name in (GENERATION, INFO)] == [NOT_SERVING] * 2
        assert not under.supervisor.healthy
        late = asyncio.ensure_future(under.client.generate(token_ids=[1, 2], max_tokens=4000).complete())
        await under.until(lambda engine: len(engine.submits()) == 2)  # taken by the lame duck
        lame_duck_over.set()
        while under.supervisor.state.value != "stopping":
            await asyncio.sleep(0.01)
        with pytest.raises(api.Unavailable, match="stopping"):
            await under.client.generate(token_ids=[1]).complete()
        under.engine.step(10)
        assert (await early).finish_reason == "length"
        assert not closing.done()
        hurry.set()
        await under.until(lambda engine: bool(engine.cancels()))
        under.engine.step(3)
        assert (await late).finish_reason == "cancelled"
        await asyncio.wait_for(closing, PATIENCE_S)
        assert under.engine.ended.is_set()

    run_with_gateway(body, paused=True)


# ---------------------------------------------------------------------------------- hung engines


def test_a_hung_engine_is_started_again_like_one_that_crashed() -> None:
    async def body(under: UnderTest) -> None:
        first = under.engine
        lost = asyncio.ensure_future(under.client.generate(token_ids=[1]).complete())
        await under.until(lambda engine: len(engine.submits()) == 1)
        first.hung = True
        with pytest.raises(api.Unavailable, match=r"did not answer for 0\.5 s"):
            await asyncio.wait_for(lost, PATIENCE_S)
        while len(under.engines) == 1 or under.supervisor.served is None:
            await asyncio.sleep(0.01)
        assert first.ended.is_set()
        under.engine.step(10)
        await under.client.generate(token_ids=[1, 2], max_tokens=2).complete()
        assert under.supervisor.restarts == 1

    run_with_gateway(body, paused=True, hang_timeout=0.5)


class Stubborn:
    """An engine process that ends when it is killed, and not before."""

    def __init__(self) -> None:
        self.dead = asyncio.Event()
        self.asked = asyncio.Event()

    async def wait(self) -> str:
        await self.dead.wait()
        return "signal 9"

    def terminate(self) -> None:
        self.asked.set()

    def kill(self) -> None:
        self.dead.set()


def test_stopping_while_a_hung_engine_is_being_ended_leaves_no_process() -> None:
    async def body() -> None:
        processes: list[Stubborn] = []

        async def spawn(path: Path) -> Stubborn:
            await asyncio.to_thread(FakeEngine, path, hung=True)
            processes.append(Stubborn())
            return processes[-1]

        supervisor = Supervisor(spawn, hang_timeout=0.2)
        await asyncio.wait_for(supervisor.start(), PATIENCE_S)
        keeping = asyncio.ensure_future(supervisor.keep_running())
        await asyncio.wait_for(processes[0].asked.wait(), PATIENCE_S)
        keeping.cancel()
        await asyncio.wait((keeping,))
        assert not processes[0].dead.is_set()
        await asyncio.wait_for(supervisor.stop(), PATIENCE_S)
        assert processes[0].dead.is_set()

    asyncio.run(body())


class Pinged:
    """Answers pings as told, each so many pings later."""

    def __init__(self, answers: list[Pong | None], on_end: asyncio.Event, late: int = 0) -> None:
        self.pong: Pong | None = None
        self._answers = iter([None] * late + answers)
        self._on_end = on_end
        self._late = late

    def ping(self, number: int) -> None:
        try:
            answer = next(self._answers)
        except StopIteration:
            self._on_end.set()
            return
        if answer is not None:
            self.pong = Pong(number - self._late, answer.busy, answer.predicted)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([None] * 5, "its loop did not answer"),
        ([Pong(0), None, None, None, None, None], "its loop did not answer"),
        ([Pong(0, 0.4, 0.0)], "a lane has been at the same work for 0.4 s"),
        ([Pong(0, 0.4, 0.03)] * 3 + [Pong(0, 0.7, 0.03)], "a lane has been at the same work for 0.7 s"),
        ([None] * 4 + [Pong(0)] + [None] * 4 + [Pong(0)], None),
        ([Pong(0, 1000.0, 200.0)] * 3, None),
    ],
)
@pytest.mark.parametrize("late", [0, 2], ids=["at once", "behind steps that are still unread"])
def test_a_hang_is_told_from_long_work(answers: list[Pong | None], reason: str | None, late: int) -> None:
    if late and answers[0] is None:
        answers = [Pong(0), *answers]  # else these pings are missed, too

    async def body() -> str | None:
        over = asyncio.Event()
        hanging = asyncio.ensure_future(hang_of(Pinged(answers, over, late), 0.1))
        waiting = asyncio.ensure_future(over.wait())
        await asyncio.wait((hanging, waiting), timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        hanging.cancel()
        return hanging.result() if hanging.done() else None

    found = asyncio.run(body())
    assert (found is None) == (reason is None)
    assert reason is None or reason in (found or "")


# ---------------------------------------------------------------------------------- dead clients


@contextmanager
def client_process(target: str, request_id: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that reads a long stream, once it has begun to."""
    program = (
        "from drift_gateway.client import DriftClient, TokenDelta\n"
        f"for event in DriftClient('{target}').generate(token_ids=[1], max_tokens=4000, request_id='{request_id}'):\n"
        "    if isinstance(event, TokenDelta) and event.sequence == 0: print('reading', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(("how", "at_most"), [(signal.SIGKILL, 9.0), (signal.SIGSTOP, 15.0)])
def test_a_client_that_is_dead_or_stopped_is_noticed_and_its_pages_freed(how: int, at_most: float) -> None:
    """Killed: as its socket closes, before pings could tell. Stopped: its kernel acknowledges, so only they do."""

    async def body(under: UnderTest) -> None:
        with client_process(under.target, "r") as process:
            assert process.stdout is not None
            line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), PATIENCE_S)
            assert line == b"reading\n"
            os.kill(process.pid, how)
            begun = time.monotonic()
            await under.until(lambda engine: any(cancel.id == "r#0" for cancel in engine.cancels()))
            took = time.monotonic() - begun
        assert under.supervisor.request_ids() == []
        assert took < at_most

    run_with_gateway(body, step_seconds=0.02)


# ------------------------------------------------------------------------------------ access log


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def ended(records: list[Any], count: int) -> None:
    """Wait until so many requests were recorded: the client hears of the end a little earlier."""
    async with asyncio.timeout(PATIENCE_S):
        while len(records) < count:
            await asyncio.sleep(0.005)


def test_the_access_log_has_one_line_per_request_and_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"

    async def body(under: UnderTest) -> None:
        log, records = AccessLog(str(path)), list[RequestRecord]()
        under.gateway.generations.recorders += [log, records.append]
        slo = api.SLO(ttft=60.0, tbt=1e-9, name="chat")
        await under.client.generate(
            token_ids=[7, 7, 7], max_tokens=5, n=2, slo=slo, request_id="good", priority=3,
            labels={"app": "line\nbreak"},
        ).complete()  # fmt: skip
        with pytest.raises(api.InvalidRequest):
            await under.client.generate(token_ids=[1], max_tokens=5, top_p=9.0, request_id="bad").complete()
        left = under.client.generate(token_ids=[1], max_tokens=4000, request_id="left")
        await anext(aiter(left))
        left.cancel()
        await ended(records, 3)
        log.close()

    run_with_gateway(body, step_seconds=0.002)
    good, bad, left = lines_of(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (good["request_id"], good["code"], good["reason"]) == ("good", "OK", None)
    assert (good["class"], good["priority"], good["labels"]) == ("chat", 3, {"app": "line\nbreak"})
    assert good["peer"].startswith("ipv4:127.0.0.1:")
    assert len(good["outputs"]) == 2
    output = good["outputs"][0]
    assert (output["reason"], output["prompt_tokens"], output["output_tokens"]) == ("length", 3, 5)
    assert output["met"] == {"ttft": True, "tbt": False}
    assert 0 <= output["queue_s"] <= output["ttft_s"] <= output["e2e_s"] <= good["seconds"]
    assert 0 < output["tbt_p50_s"] <= output["tbt_p99_s"] <= output["tbt_max_s"]
    assert (bad["request_id"], bad["code"], bad["reason"]) == ("bad", "INVALID_ARGUMENT", "INVALID_FIELD")
    assert bad["outputs"] == []
    assert (left["request_id"], left["code"]) == ("left", "CANCELLED")
    assert left["outputs"][0]["reason"] is None
    assert "[7, 7, 7]" not in path.read_text(encoding="utf-8")
    assert "token_ids" not in path.read_text(encoding="utf-8")


def test_the_access_log_has_an_output_as_its_client_was_told_of_it(tmp_path: Path) -> None:
    """The engine says LENGTH where a stop string came with the last token it may make."""

    async def body(under: UnderTest) -> None:
        records = list[RequestRecord]()
        under.gateway.generations.recorders.append(records.append)
        completion = await under.client.generate(token_ids=[1], stop=["END"]).complete()
        assert (completion.finish_reason, completion.usage.output_tokens) == ("stop", 8)
        await ended(records, 1)
        (output,) = records[0].outputs
        assert (output.reason, output.output_tokens) == ("stop", 8)

    run_with_gateway(body, ready=ready_in(tmp_path), script=lambda submit: list(b"some END"))


def test_an_access_log_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DriftError, match=r"access log .*nowhere"):
        AccessLog(str(tmp_path / "nowhere" / "log"))


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A FIFO, and the descriptor to read it with; it has room for 4 KiB where that can be said."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    yield str(path), reader
    os.close(reader)


def until_its_end(reader: int) -> list[bytes]:
    with os.fdopen(reader, "rb", closefd=False) as file:
        return file.readlines()


def test_a_pipe_that_nobody_reads_holds_nobody_up(
    pipe: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """All requests are served; what the pipe has no room for is dropped, and how much is said once it is read."""
    path, reader = pipe
    count, lines = 300, list[bytes]()

    async def body(under: UnderTest) -> None:
        log, records = AccessLog(path, most=3), list[RequestRecord]()
        under.gateway.generations.recorders += [log, records.append]
        labels = {f"label-{k}": "x" * 100 for k in range(5)}
        for _ in range(count):
            await under.client.generate(token_ids=[1], max_tokens=1, labels=labels).complete()
        await ended(records, count)
        reading = asyncio.create_task(asyncio.to_thread(until_its_end, reader))
        async with asyncio.timeout(PATIENCE_S):
            while "lines were dropped" not in caplog.text:
                await asyncio.sleep(0.005)
        log.close()
        lines.extend(await reading)

    run_with_gateway(body)
    assert all(json.loads(line)["code"] == "OK" for line in lines)
    found = re.findall(r"access log \S+fifo: (\d+) lines were dropped", caplog.text)
    assert len(lines) > 3
    assert len(lines) + sum(map(int, found)) == count


def test_a_server_ends_though_nobody_reads_its_access_log(
    pipe: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    log = AccessLog(pipe[0], most=3)
    record = RequestRecord(Call(0.0), "", "r", "", {"filler": "x" * 70_000}, "default", 0)
    for _ in range(9):
        log(record)
    log.close()
    (line,) = [line for line in caplog.messages if "nobody reads it" in line]
    assert int(re.findall(r"(\d+) lines are lost", line)[0]) >= 8


def test_a_fifo_without_a_reader_is_said_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DriftError, match=r"access log .*fifo: nobody reads it"):
        AccessLog(str(tmp_path / "fifo"))


def test_a_recorder_that_raises_takes_no_request_down() -> None:
    async def body(under: UnderTest) -> None:
        records: list[RequestRecord] = []

        def broken(record: RequestRecord) -> None:
            raise ValueError("planted")

        under.gateway.generations.recorders += [broken, records.append]
        await under.client.generate(token_ids=[1], max_tokens=2).complete()
        await ended(records, 1)

    run_with_gateway(body)


# ----------------------------------------------------------------------------------------- spans


def test_spans_continue_the_callers_trace() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra 'otel' is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    async def body(under: UnderTest) -> None:
        from drift_gateway.v1 import generation_pb2 as pb
        from drift_gateway.v1 import generation_pb2_grpc

        records: list[RequestRecord] = []
        under.gateway.generations.recorders += [Spans(provider), records.append]
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            request = pb.GenerateRequest(request_id="r", token_ids=pb.TokenIds(ids=[1, 2]))
            request.stopping.max_tokens = 5
            metadata = (("traceparent", f"00-{trace_id}-{parent}-01"),)
            async for _ in stub.Generate(request, metadata=metadata):
                pass
            bad = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), priority=9999)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(bad).read()
        await ended(records, 2)

    run_with_gateway(body, step_seconds=0.002)
    spans = {
        span.name: span for span in kept.get_finished_spans() if span.context.trace_id == int(trace_id, 16)
    }
    assert set(spans) == {"drift.generate", "queue", "prefill", "decode"}
    whole = spans["drift.generate"]
    assert whole.parent is not None
    assert whole.parent.span_id == int(parent, 16)
    assert whole.attributes is not None
    assert (whole.attributes["drift.request_id"], whole.attributes["gen_ai.usage.output_tokens"]) == ("r", 5)
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == whole.context.span_id
    assert whole.start_time == spans["queue"].start_time
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert spans["decode"].end_time <= whole.end_time
    (refused,) = [span for span in kept.get_finished_spans() if span.context.trace_id != int(trace_id, 16)]
    assert refused.attributes is not None
    assert refused.attributes["drift.reason"] == "INVALID_FIELD"
    assert not refused.status.is_ok


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="the extra 'otel' is not installed")
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    received: list[Any] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc, no-any-unimported]
        def Export(self, request: Any, context: Any) -> Any:
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    spans = spans_to("otlp")

    async def body(under: UnderTest) -> None:
        records: list[RequestRecord] = []
        under.gateway.generations.recorders += [spans, records.append]
        await under.client.generate(token_ids=[1, 2], max_tokens=5, request_id="r").complete()
        await ended(records, 1)

    try:
        run_with_gateway(body)
        spans.close()
    finally:
        server.stop(None).wait()
    (resource,) = [each for request in received for each in request.resource_spans]
    named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert named["service.name"] == "drift"
    told = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert set(told) == {"drift.generate", "queue", "prefill", "decode"}
    of_request = {each.key: each.value for each in told["drift.generate"].attributes}
    assert of_request["drift.request_id"].string_value == "r"
    assert of_request["gen_ai.usage.output_tokens"].int_value == 5
    assert told["decode"].parent_span_id == told["drift.generate"].span_id
