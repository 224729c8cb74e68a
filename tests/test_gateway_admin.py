"""AdminService over a real socket: draining, aborting, policies, prefixes, decision logs; and where it is not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from fake_engine import PATIENCE_S
from gateway_under_test import UnderTest, run_with_gateway
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from drift_core.frames import FlushPrefixes, SetPolicy, StartTrace
from drift_core.link import EngineClient
from drift_gateway import client as api
from drift_gateway import generation, serving
from drift_gateway.admin import ADMIN, AdminPort
from drift_gateway.commands.admin import admin as admin_command
from drift_gateway.commands.serve import serve as serve_command
from drift_gateway.refusal import DETAILS_KEY, Reason
from drift_gateway.server import GENERATION, INFO, Address
from drift_gateway.v1 import admin_pb2 as pb
from drift_gateway.v1 import admin_pb2_grpc, info_pb2
from drift_scheduler.errors import DriftError

METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["AdminService"].methods]


@asynccontextmanager
async def admin_of(under: UnderTest, traces: Path | None = None) -> AsyncIterator[Any]:
    """A stub of the AdminService of a running gateway."""
    port = AdminPort(under.supervisor, under.gateway.security, traces)
    await port.open(Address("127.0.0.1", 0))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
    finally:
        await port.close()


def with_admin(
    body: Callable[[UnderTest, Any], Awaitable[None]], traces: Path | None = None, **options: Any
) -> None:
    async def with_port(under: UnderTest) -> None:
        async with admin_of(under, traces) as admin:
            await body(under, admin)

    run_with_gateway(with_port, **options)


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    trailers = dict(raised.value.trailing_metadata() or ())
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(trailers[DETAILS_KEY]).details[0].Unpack(info)
    return raised.value.code(), info.reason, raised.value.details() or ""


async def health_of(under: UnderTest, service: str) -> int:
    async with grpc.aio.insecure_channel(under.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        status: int = answer.status
        return status


def test_the_admin_port_has_a_health_of_its_own() -> None:
    """SERVING while the public port drains, and until it is closed."""

    async def body(under: UnderTest) -> None:
        port = AdminPort(under.supervisor, under.gateway.security)
        await port.open(Address("127.0.0.1", 0))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            under.supervisor.drain(True)
            for name in ("", ADMIN):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=ADMIN))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            await port.close()
            with contextlib.suppress(grpc.aio.AioRpcError):
                last = await watch.read()
                assert last is grpc.aio.EOF or last.status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Check(health_pb2.HealthCheckRequest())

    run_with_gateway(body)


def test_the_public_port_knows_nothing_of_administration() -> None:
    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
            requests = {name: getattr(pb, f"{name}Request")() for name in METHODS}
            assert len(requests) == 7
            for name, request in requests.items():
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await getattr(stub, name)(request)
                assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED, name
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
            async for answer in reflection.ServerReflectionInfo(iter(asked)):
                assert ADMIN not in {service.name for service in answer.list_services_response.service}
        assert not [f for f in under.engine.received if isinstance(f, SetPolicy | FlushPrefixes | StartTrace)]

    run_with_gateway(body)


def test_the_admin_port_is_for_this_machine_alone() -> None:
    async def body(under: UnderTest) -> None:
        port = AdminPort(under.supervisor, under.gateway.security)
        with pytest.raises(DriftError, match="for this machine alone"):
            await port.open(Address("0.0.0.0", 0))
        await port.close()

    run_with_gateway(body)


def test_draining_refuses_what_is_new_and_lets_the_rest_end() -> None:
    async def body(under: UnderTest, admin: Any) -> None:
        running = asyncio.ensure_future(under.client.generate(token_ids=[1], max_tokens=3).complete())
        await under.until(lambda engine: len(engine.submits()) == 1)
        answer = await admin.Drain(pb.DrainRequest(timeout_ms=0))
        assert answer.in_flight == 1
        info = await under.client.server_info()
        assert info.readiness == info_pb2.READINESS_DRAINING
        assert await health_of(under, GENERATION) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await health_of(under, INFO) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(api.Unavailable, match="an operator drains it"):
            await under.client.generate(token_ids=[1]).complete()
        draining = asyncio.ensure_future(admin.Drain(pb.DrainRequest()))
        await asyncio.sleep(0)
        under.engine.step(5)
        assert (await running).finish_reason == "length"
        assert (await draining).in_flight == 0
        assert (await admin.Resume(pb.ResumeRequest())).readiness == info_pb2.READINESS_READY
        assert await health_of(under, GENERATION) == health_pb2.HealthCheckResponse.SERVING
        under.engine.step(5)
        await under.client.generate(token_ids=[1], max_tokens=2).complete()
        code, reason, message = await refused(admin.Drain(pb.DrainRequest(timeout_ms=3_600_001)))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)
        assert message.startswith("timeout_ms: ")

    with_admin(body, paused=True)


def test_what_is_being_tokenized_when_a_server_drains_is_refused_and_not_let_in_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reached, drained = asyncio.Event(), asyncio.Event()
    tokenized = generation.tokenized

    async def late(*arguments: Any) -> Any:
        reached.set()
        await drained.wait()
        return await tokenized(*arguments)

    monkeypatch.setattr(generation, "tokenized", late)

    async def body(under: UnderTest, admin: Any) -> None:
        asked = asyncio.ensure_future(under.client.generate(token_ids=[1], max_tokens=4).complete())
        await reached.wait()
        assert (await admin.Drain(pb.DrainRequest())).in_flight == 0
        drained.set()
        with pytest.raises(api.Unavailable, match="an operator drains it") as refused:
            await asked
        assert refused.value.reason == Reason.DRAINING
        assert under.engine.submits() == []

    with_admin(body)


def test_what_waits_for_its_name_when_a_server_drains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, free = asyncio.Event(), EngineClient.free

    async def told(self: EngineClient, request_ids: list[str]) -> None:
        waits.set()
        await free(self, request_ids)

    async def body(under: UnderTest, admin: Any) -> None:
        first = under.client.generate(token_ids=[1], max_tokens=4, request_id="again")
        await under.until(lambda engine: len(engine.submits()) == 1)
        first.cancel()
        await under.until(lambda engine: len(engine.cancels()) == 1)
        monkeypatch.setattr(EngineClient, "free", told)
        asked = asyncio.ensure_future(
            under.client.generate(token_ids=[1], max_tokens=4, request_id="again").complete()
        )
        await waits.wait()
        assert (await admin.Drain(pb.DrainRequest())).in_flight == 0
        under.engine.step()
        with pytest.raises(api.Unavailable, match="an operator drains it"):
            await asyncio.wait_for(asked, PATIENCE_S)
        assert len(under.engine.submits()) == 1

    with_admin(body, paused=True)


@pytest.mark.parametrize("everything", [False, True])
def test_aborted_requests_end_as_cancelled_and_the_engine_is_told(everything: bool) -> None:
    async def body(under: UnderTest, admin: Any) -> None:
        doomed = under.client.generate(token_ids=[1], max_tokens=4000, n=2, request_id="doomed")
        spared = under.client.generate(token_ids=[1], max_tokens=4000, request_id="spared")
        events = aiter(doomed)
        await anext(events)
        await under.until(lambda engine: len(engine.submits()) == 3)
        if everything:
            answer = await admin.AbortRequests(pb.AbortRequestsRequest(all=True))
            assert sorted(answer.aborted) == ["doomed", "spared"]
        else:
            answer = await admin.AbortRequests(pb.AbortRequestsRequest(request_ids=["doomed", "other"]))
            assert (list(answer.aborted), list(answer.unknown)) == (["doomed"], ["other"])
        with pytest.raises(api.RequestError) as raised:
            async for _ in events:
                pass
        assert raised.value.code is grpc.StatusCode.CANCELLED
        assert raised.value.reason == Reason.ABORTED_BY_ADMIN
        await under.until(lambda engine: {"doomed#0", "doomed#1"} <= {c.id for c in engine.cancels()})
        assert ("spared#0" in {c.id for c in under.engine.cancels()}) == everything
        assert under.supervisor.request_ids() == ([] if everything else ["spared"])
        spared.cancel()

    with_admin(body)


def test_which_requests_to_abort_must_be_said_one_way() -> None:
    async def body(under: UnderTest, admin: Any) -> None:
        for request in (pb.AbortRequestsRequest(), pb.AbortRequestsRequest(request_ids=["a"], all=True)):
            code, reason, _ = await refused(admin.AbortRequests(request))
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)

    with_admin(body)


def test_policies_are_changed_and_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "drift.admin")

    async def body(under: UnderTest, admin: Any) -> None:
        answer = await admin.SetPolicy(pb.SetPolicyRequest(dispatch="chunked-prefill:budget=256"))
        assert answer.policies.dispatch == "chunked-prefill:budget=256"
        info = await under.client.server_info()
        assert info.policies.dispatch == "chunked-prefill:budget=256"
        assert info.policies.partition == "tightest-decode"
        code, reason, message = await refused(admin.SetPolicy(pb.SetPolicyRequest(dispatch="edf")))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)
        assert message == "dispatch: no dispatch policy 'edf'; installed: gang"
        assert (await under.client.server_info()).policies.dispatch == "chunked-prefill:budget=256"

    with_admin(body)
    lines = [record.getMessage() for record in caplog.records]
    assert any("SetPolicy" in line and 'dispatch: "edf"' in line and "127.0.0.1" in line for line in lines)
    assert any("refused: dispatch: no dispatch policy" in line for line in lines)


def test_prefixes_are_flushed() -> None:
    async def body(under: UnderTest, admin: Any) -> None:
        assert (await admin.FlushPrefixCache(pb.FlushPrefixCacheRequest())).pages == 3

    with_admin(body)


def test_decision_logs_go_to_their_folder_and_nowhere_else(tmp_path: Path) -> None:
    async def body(under: UnderTest, admin: Any) -> None:
        for name in ("../out", "a/b", "/etc/passwd", "..", ".hidden", "", "x" * 200, "a\nb", "ä", "nul\0"):
            code, reason, message = await refused(admin.StartTrace(pb.StartTraceRequest(name=name)))
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD), name
            assert message.startswith("name: ")
        assert not [frame for frame in under.engine.received if isinstance(frame, StartTrace)]
        code, reason, _ = await refused(admin.StopTrace(pb.StopTraceRequest()))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.TRACE_STATE)
        started = await admin.StartTrace(pb.StartTraceRequest(name="run-1.jsonl"))
        assert started.path == str(tmp_path / "run-1.jsonl")
        code, reason, _ = await refused(admin.StartTrace(pb.StartTraceRequest()))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.TRACE_STATE)
        stopped = await admin.StopTrace(pb.StopTraceRequest())
        assert (stopped.path, stopped.steps) == (started.path, 7)
        named = await admin.StartTrace(pb.StartTraceRequest())
        assert Path(named.path).parent == tmp_path
        assert named.path.endswith(".jsonl")

    with_admin(body, traces=tmp_path)


def test_without_a_folder_there_are_no_decision_logs() -> None:
    async def body(under: UnderTest, admin: Any) -> None:
        _, reason, message = await refused(admin.StartTrace(pb.StartTraceRequest()))
        assert (reason, "--trace-dir" in message) == (Reason.TRACE_STATE, True)

    with_admin(body)


def test_calls_that_need_an_engine_are_unavailable_without_one() -> None:
    async def body(under: UnderTest, admin: Any) -> None:
        under.supervisor.served = None
        code, _, _ = await refused(admin.FlushPrefixCache(pb.FlushPrefixCacheRequest()))
        assert code is grpc.StatusCode.UNAVAILABLE

    with_admin(body)


# ------------------------------------------------------------------------------------- command line


def test_drift_admin_makes_each_call(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        port = AdminPort(under.supervisor, under.gateway.security, tmp_path)
        await port.open(Address("127.0.0.1", 0))

        async def drift_admin(line: str) -> tuple[int, str]:
            arguments = [*line.split(), "--target", f"127.0.0.1:{port.port}"]
            result = await asyncio.to_thread(CliRunner().invoke, admin_command, arguments)
            return result.exit_code, result.output

        for line, said in (
            ("policy", "dispatch gang, partition tightest-decode"),
            ("policy --dispatch drift", "dispatch drift, partition tightest-decode"),
            ("flush", "forgot 3 pages"),
            ("drain --timeout 1", "0 outputs left in flight"),
            ("resume", "taking requests"),
            ("abort a b", "ended 0 requests; not in flight: a, b"),
            ("abort --all", "ended 0 requests"),
            ("trace start --name t.jsonl", f"writing {tmp_path}/t.jsonl"),
            ("trace stop", f"wrote {tmp_path}/t.jsonl: 7 steps"),
        ):
            assert await drift_admin(line) == (0, said + "\n"), line
        for line, problem in (
            ("policy --dispatch edf", "dispatch: no dispatch policy 'edf'; installed: gang"),
            ("trace stop", "no decision log is being written"),
            ("abort", "name the requests to end, or give --all"),
        ):
            status, output = await drift_admin(line)
            assert (status, output.count("\n")) == (2, 1), line
            assert problem in output
        await port.close()
        for line, problem in (
            (
                f"resume --target {under.target}",
                "serves no AdminService, which has a port of its own; give --target",
            ),
            ("resume --target 127.0.0.1:1", "127.0.0.1:1: no answer (Connection refused); give --target"),
        ):
            result = await asyncio.to_thread(CliRunner().invoke, admin_command, line.split())
            assert (result.exit_code, result.output.count("\n")) == (2, 1), line
            assert problem in result.output

    run_with_gateway(body)


def test_the_options_for_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[serving.ServeOptions] = []
    monkeypatch.setattr(serving, "serve", lambda options, console: asked.append(options) or 0)

    def serve(line: str) -> tuple[int, str]:
        result = CliRunner().invoke(serve_command, line.split())
        return result.exit_code, result.output

    assert serve("") == (0, "")
    assert asked[0].operations == serving.OperationsOptions()
    assert (asked[0].http, asked[0].operations.admin) == (None, None), "off unless asked for"
    line = f"--http 127.0.0.1:1 --admin [::1]:2 --trace-dir {tmp_path} --hang-timeout 3 --lame-duck 4"
    assert serve(f"{line} --access-log - --spans console") == (0, "")
    assert asked[1].http == Address("127.0.0.1", 1)
    assert asked[1].operations == serving.OperationsOptions(
        Address("::1", 2), tmp_path.resolve(), 3.0, 4.0, "-", "console"
    )
    for line, problem in (
        ("--admin nowhere", "is no address to listen on"),
        (f"--trace-dir {tmp_path}/none", "is no folder"),
        ("--hang-timeout 0", "--hang-timeout"),
        ("--spans jaeger", "--spans"),
    ):
        status, output = serve(line)
        assert (status, problem in output) == (2, True), line
