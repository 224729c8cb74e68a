"""Who may call what, over real sockets: tokens, roles, tenants and their limits, and the caps on every caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_under_test import UnderTest, run_with_gateway

from drift_gateway import client as api
from drift_gateway import server
from drift_gateway.access import auth
from drift_gateway.access.security import Security, SecurityOptions
from drift_gateway.access.tenants import new_token, token_entry
from drift_gateway.admin import AdminPort
from drift_gateway.connection import Connection
from drift_gateway.http.metrics import MetricsPage
from drift_gateway.refusal import Reason
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc, info_pb2, info_pb2_grpc

PATIENCE_S = 30.0


class Registered:
    """Every grpc.aio server of the process: its port, and the methods registered on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.methods: dict[int, set[str]] = {}
        self.ports: dict[int, int] = {}
        kind = grpc.aio._server.Server
        add_handlers, add_port = kind.add_generic_rpc_handlers, kind.add_insecure_port

        def recorded_handlers(this: Any, handlers: Any) -> None:
            for handler in handlers:
                self.methods.setdefault(id(this), set()).update(handler._method_handlers)
            add_handlers(this, handlers)

        def recorded_port(this: Any, address: str) -> int:
            self.ports[id(this)] = add_port(this, address)
            return self.ports[id(this)]

        monkeypatch.setattr(kind, "add_generic_rpc_handlers", recorded_handlers)
        monkeypatch.setattr(kind, "add_insecure_port", recorded_port)


class Keys:
    """A tenants file, and the token of each tenant in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: dict[str, str] = {}

    def add(self, tenant: str, **settings: Any) -> str:
        token = self.tokens[tenant] = new_token()
        lines = [f"{key.replace('_', '-')} = {value!r}" for key, value in settings.items()]
        with self.path.open("a") as file:
            file.write("\n".join([f"[tenants.{tenant}]", *lines, token_entry(tenant, token)]))
        return token

    def security(self) -> Security:
        return Security(SecurityOptions(tenants=self.path))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "tenants.toml")


async def refused(call: Any) -> api.RequestError:
    """The error that an awaitable call ends with."""
    with pytest.raises(api.RequestError) as caught:
        await call
    return caught.value


async def never() -> AsyncIterator[bytes]:
    """A stream of messages that does not begin."""
    await asyncio.sleep(3600)
    yield b""


async def until_the_end(events: AsyncIterator[api.Event]) -> None:
    async for _ in events:
        pass


async def status_of(channel: Any, method: str, metadata: Any = None) -> api.RequestError | None:
    """How a call of any method with an empty message ends; `None` when it goes well or goes on."""
    # Not as a stream of one message: where the refusal is there before the message is sent, grpc.aio calls its own
    # failure to send it INTERNAL, and loses the refusal.
    call = channel.unary_stream(method)(b"", metadata=metadata, timeout=PATIENCE_S)
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return api.error_of(error)
    finally:
        call.cancel()
    return None


def client_of(under: UnderTest, token: str | None) -> api.AsyncDriftClient:
    return api.AsyncDriftClient(under.target, token)


# ------------------------------------------------------------------------------------------ deny by default


def test_every_method_of_every_server_refuses_strangers(monkeypatch: pytest.MonkeyPatch, keys: Keys) -> None:
    registered = Registered(monkeypatch)
    keys.add("acme")

    async def body(under: UnderTest) -> None:
        admin = AdminPort(under.supervisor, under.gateway.security)
        await admin.open(server.Address("127.0.0.1", 0))
        try:
            await every_method(under)
        finally:
            await admin.close()

    async def every_method(under: UnderTest) -> None:
        assert set(registered.methods) == set(registered.ports), "a server that was made listens"
        assert len(registered.ports) == 2
        reached = set()
        for which, methods in registered.methods.items():
            async with grpc.aio.insecure_channel(f"127.0.0.1:{registered.ports[which]}") as channel:
                for method in sorted(methods):
                    error = await status_of(channel, method)
                    reached.add(method)
                    if method in auth.OPEN:
                        assert error is None or error.code is not grpc.StatusCode.UNAUTHENTICATED, method
                    else:
                        assert error is not None, method
                        assert (error.code, error.reason) == (
                            grpc.StatusCode.UNAUTHENTICATED,
                            "UNAUTHENTICATED",
                        ), method
        assert {"/drift.v1.GenerationService/Generate", "/drift.v1.InfoService/WatchStats"} <= reached
        assert {
            "/inference.GRPCInferenceService/ModelInfer",
            "/vllm.grpc.engine.VllmEngine/Generate",
        } <= reached
        assert "/drift.v1.AdminService/Drain" in reached
        assert any("ServerReflection" in method for method in reached)
        assert {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"} == auth.OPEN <= reached
        decided = {method.split("/")[1] for method in reached} <= set(auth._SERVICE_ROLES)
        assert decided, "each service has a role that somebody chose"
        assert not under.engine.submits()

    run_with_gateway(body, security=keys.security(), compat=("kserve", "vllm"))


def test_a_service_nobody_thought_of_is_for_admins_alone() -> None:
    assert auth.role_for("/somebodys.NewService/Do") is auth.Role.ADMIN
    assert auth.role_for("/") is auth.Role.ADMIN
    assert auth.role_for("grpc.health.v1.Health/Check") is not None, "names are compared as they are"
    assert auth.role_for("/grpc.health.v1.Health/List") is auth.Role.INFO


def test_without_tenants_nothing_is_in_between() -> None:
    async def body(under: UnderTest) -> None:
        assert under.gateway.security.authenticator is None
        await under.client.generate(token_ids=[1], max_tokens=2).complete()
        assert under.engine.submits()[0].salt == ""

    run_with_gateway(body)


# ---------------------------------------------------------------------------------------------------- tokens


def test_a_token_lets_in_and_a_wrong_one_does_not(keys: Keys) -> None:
    token = keys.add("acme")

    async def body(under: UnderTest) -> None:
        assert (await under.client.server_info()).model.name == "fake"
        completion = await under.client.generate(token_ids=[1, 2], max_tokens=5).complete()
        assert completion.usage.output_tokens == 5
        for wrong in (None, token[:-1], token + "x", token.upper(), new_token()):
            async with client_of(under, wrong) as stranger:
                for call in (
                    stranger.server_info(),
                    stranger.generate(token_ids=[1]).complete(),
                    anext(aiter(stranger.watch_stats())),
                ):
                    error = await refused(call)
                    assert isinstance(error, api.NotAuthenticated)
                    assert (error.reason, error.retry_after) == ("UNAUTHENTICATED", None)
                    assert token[-8:] not in str(error)
        assert len(under.engine.submits()) == 1

    run_with_gateway(body, security=keys.security(), token=token)


@pytest.mark.parametrize(
    "values",
    [
        ["Basic {token}"],
        ["{token}"],
        ["Bearer"],
        ["Bearer "],
        ["Bearer {token}", "Bearer {token}"],
        ["Bearer {token}", "Bearer nonsense"],
    ],
)
def test_metadata_that_is_not_one_bearer_token(keys: Keys, values: list[str]) -> None:
    token = keys.add("acme")

    async def body(under: UnderTest) -> None:
        metadata = [("authorization", value.format(token=token)) for value in values]
        async with grpc.aio.insecure_channel(under.target) as channel:
            error = await status_of(channel, "/drift.v1.InfoService/GetLoad", metadata)
            assert error is not None
            assert error.reason == "UNAUTHENTICATED"
            assert "Bearer TOKEN" in str(error)
            right = [("authorization", f"bearer  {token}")]
            assert await status_of(channel, "/drift.v1.InfoService/GetLoad", right) is None

    run_with_gateway(body, security=keys.security())


def test_an_expired_token_is_refused(keys: Keys) -> None:
    token = keys.add("acme")
    keys.path.write_text(keys.path.read_text() + "expires = 2020-01-01\n")

    async def body(under: UnderTest) -> None:
        assert "expired" in str(await refused(under.client.server_info()))

    run_with_gateway(body, security=keys.security(), token=token)


def test_tokens_come_and_go_with_the_file_while_streams_run(keys: Keys) -> None:
    old = keys.add("acme")
    security = keys.security()

    async def body(under: UnderTest) -> None:
        running = aiter(under.client.generate(token_ids=[1]))
        under.engine.step()
        await anext(running)
        keys.path.unlink()
        new = keys.add("acme")
        security.reload()
        assert (await refused(under.client.server_info())).reason == "UNAUTHENTICATED"
        async with client_of(under, new) as client:
            await client.server_info()
            keys.path.write_text("[tenants.acme]\nrole = 'king'\n")
            security.reload()
            await client.server_info()  # what is wrong is not taken up
        under.engine.step()
        await anext(running)
        assert security.tenants is not None
        assert security.tenants.all["acme"].usage.in_flight == 1, "it is the same tenant as before"

    run_with_gateway(body, security=security, token=old, paused=True)


def test_the_blocking_client_brings_its_token_too(keys: Keys) -> None:
    token = keys.add("acme")

    async def body(under: UnderTest) -> None:
        def talk() -> int:
            with api.DriftClient(Connection(under.target, token)) as client:
                client.server_info()
                return client.generate(token_ids=[1], max_tokens=7).complete().usage.output_tokens

        assert await asyncio.to_thread(talk) == 7

    run_with_gateway(body, security=keys.security())


# ----------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("info", ["info"]), ("generate", ["info", "generate"]), ("admin", ["info", "generate", "admin"])],
)
def test_roles(keys: Keys, role: str, allowed: list[str]) -> None:
    token = keys.add("acme", role=role)
    methods = {
        "info": ["/drift.v1.InfoService/GetServerInfo", "/grpc.health.v1.Health/List"],
        "generate": ["/drift.v1.GenerationService/Generate", "/inference.GRPCInferenceService/ModelInfer"],
        "admin": ["/drift.v1.AdminService/Drain", "/somebodys.NewService/Do"],
    }

    async def body(under: UnderTest) -> None:
        metadata = [("authorization", f"Bearer {token}")]
        async with grpc.aio.insecure_channel(under.target) as channel:
            for needed, examples in methods.items():
                for method in examples:
                    error = await status_of(channel, method, metadata)
                    denied = error is not None and error.code is grpc.StatusCode.PERMISSION_DENIED
                    assert denied is (needed not in allowed), (method, error)
                    if denied:
                        assert isinstance(error, api.NotAllowed)
                        assert error.reason == "PERMISSION_DENIED"
                        assert f"needs the role '{needed}', and tenant 'acme' has '{role}'" in str(error)

    run_with_gateway(body, security=keys.security())


# --------------------------------------------------------------------------------------------------- tenants


def test_prefixes_are_never_shared_across_tenants(keys: Keys) -> None:
    tokens = [keys.add("acme"), keys.add("globex"), keys.add("acmeglobex")]

    def generate(client: api.AsyncDriftClient, salt: str) -> Any:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]), stopping=pb.Stopping(max_tokens=2))
        request.prefix.cache_salt = salt
        return generation_pb2_grpc.GenerationServiceStub(client._channel).Generate(request)  # type: ignore[no-untyped-call]

    async def body(under: UnderTest) -> None:
        for _ in range(2):
            for token in tokens:
                async with client_of(under, token) as client:
                    for salt in ("", "globex"):
                        async for _ in generate(client, salt):
                            pass
        salts = [submit.salt for submit in under.engine.submits()]
        first, second = salts[:6], salts[6:]
        assert first == second, "the same tenant with the same salt shares"
        assert len(set(first)) == 6, "no others do"
        assert "" not in first

    run_with_gateway(body, security=keys.security())


def test_tenants_do_not_get_in_each_others_way_with_names(keys: Keys) -> None:
    one, other = keys.add("one"), keys.add("other")

    async def body(under: UnderTest) -> None:
        async with client_of(under, one) as first, client_of(under, other) as second:
            calls = [client.generate(token_ids=[1], request_id="same") for client in (first, second)]
            streams = [asyncio.ensure_future(until_the_end(aiter(call))) for call in calls]
            await under.until(lambda engine: len(engine.submits()) == 2)
            assert {submit.id for submit in under.engine.submits()} == {"one same#0", "other same#0"}
            error = await refused(first.generate(token_ids=[1], request_id="same").complete())
            assert error.reason == Reason.REQUEST_ID_IN_USE
            assert under.supervisor.abort_by_admin(["same", "unheard of"]) == ["same"]
            for stream in streams:
                with pytest.raises(api.RequestError) as ended:
                    await stream
                assert ended.value.reason == Reason.ABORTED_BY_ADMIN
        assert under.supervisor.request_ids() == []

    run_with_gateway(body, security=keys.security(), token=one, paused=True)


def test_requests_per_second(keys: Keys) -> None:
    token, other = keys.add("acme", requests_per_second=0.01, burst_seconds=200.0), keys.add("globex")

    async def body(under: UnderTest) -> None:
        for _ in range(2):
            await under.client.generate(token_ids=[1], max_tokens=2).complete()
        error = await refused(under.client.generate(token_ids=[1], max_tokens=2).complete())
        assert isinstance(error, api.Overloaded)
        assert (error.reason, error.metadata) == ("RATE_LIMITED", {"limit": "requests-per-second"})
        assert error.retry_after is not None
        assert 0 < error.retry_after <= 100
        await under.client.server_info()  # to look is free
        async with client_of(under, other) as neighbour:
            await neighbour.generate(token_ids=[1], max_tokens=2).complete()
        assert len(under.engine.submits()) == 3

    run_with_gateway(body, security=keys.security(), token=token)


def test_tokens_per_second_are_paid_when_they_are_known(keys: Keys) -> None:
    token = keys.add("acme", tokens_per_second=1, burst_seconds=10.0)
    security = keys.security()

    async def body(under: UnderTest) -> None:
        assert security.tenants is not None
        usage = security.tenants.all["acme"].usage
        await under.client.generate(token_ids=[1] * 40, max_tokens=60).complete()
        while usage.in_flight:  # the server ends the request a moment after the client has its last event
            await asyncio.sleep(0.001)
        assert (usage.requests, usage.prompt_tokens, usage.output_tokens) == (1, 40, 60)
        error = await refused(under.client.generate(token_ids=[1], max_tokens=2).complete())
        assert (error.reason, error.metadata) == ("RATE_LIMITED", {"limit": "tokens-per-second"})
        assert error.retry_after is not None
        assert 60 < error.retry_after <= 91, "100 tokens at one a second, of which ten were saved up"
        assert usage.refused == 1

    run_with_gateway(body, security=security, token=token)


def test_metrics_know_tenants(keys: Keys) -> None:
    token = keys.add("acme", max_in_flight=1)
    keys.add("globex")

    async def body(under: UnderTest) -> None:
        running = under.client.generate(token_ids=[1] * 4, max_tokens=6)
        await under.until(lambda engine: len(engine.submits()) == 1)
        await refused(under.client.generate(token_ids=[1]).complete())
        under.engine.step(20)
        await running.complete()
        page = MetricsPage(under.supervisor)
        expected = {
            'drift_tenant_requests_total{tenant="acme"} 1.0',
            'drift_tenant_rate_limited_total{tenant="acme"} 1.0',
            'drift_tenant_prompt_tokens_total{tenant="acme"} 4.0',
            'drift_tenant_output_tokens_total{tenant="acme"} 6.0',
            'drift_tenant_outputs_in_flight{tenant="acme"} 0.0',
            'drift_tenant_requests_total{tenant="globex"} 0.0',
        }
        while not expected <= set(page.text(time.monotonic()).decode().splitlines()):
            await asyncio.sleep(
                0.01
            )  # the server ends the request a moment after the client has its last event

    run_with_gateway(body, security=keys.security(), token=token, paused=True)


def test_outputs_in_flight(keys: Keys) -> None:
    token = keys.add("acme", max_in_flight=3)
    security = keys.security()

    async def body(under: UnderTest) -> None:
        assert security.tenants is not None
        usage = security.tenants.all["acme"].usage
        running = aiter(under.client.generate(token_ids=[1], n=3))
        under.engine.step()
        await anext(running)
        error = await refused(under.client.generate(token_ids=[1], max_tokens=2).complete())
        assert (error.reason, error.metadata) == ("RATE_LIMITED", {"limit": "max-in-flight"})
        await running.aclose()  # type: ignore[attr-defined]
        while usage.in_flight:
            await asyncio.sleep(0.001)
        error = await refused(under.client.generate(token_ids=[1], n=4, max_tokens=2).complete())
        assert (error.reason, error.retry_after) == ("INVALID_FIELD", None), "waiting would never help"
        assert error.fields == {"sampling.n": "4 outputs at a time are more than tenant 'acme' may have, 3"}
        under.engine.step(20)
        await under.client.generate(token_ids=[1], n=3, max_tokens=2).completions()

    run_with_gateway(body, security=security, token=token, paused=True)


def test_a_crash_of_the_engine_leaves_nothing_in_flight(keys: Keys) -> None:
    token = keys.add("acme", max_in_flight=1)
    security = keys.security()

    async def body(under: UnderTest) -> None:
        assert security.tenants is not None
        running = aiter(under.client.generate(token_ids=[1]))
        under.engine.step()
        await anext(running)
        under.engine.crash()
        await refused(until_the_end(running))
        assert security.tenants.all["acme"].usage.in_flight == 0

    run_with_gateway(body, security=security, token=token, paused=True)


# ------------------------------------------------------------------------------------------------------ caps


@pytest.mark.parametrize("size", [16 * 1024, 20_000, 40_000])
def test_a_header_that_is_too_large(keys: Keys, size: int) -> None:
    token = keys.add("acme")

    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = info_pb2_grpc.InfoServiceStub(channel)  # type: ignore[no-untyped-call]
            metadata = [("authorization", f"Bearer {token}"), ("x-large", "y" * 15_000)]
            await stub.GetLoad(info_pb2.GetLoadRequest(), metadata=metadata, timeout=PATIENCE_S)
            metadata = [("authorization", f"Bearer {token}"), ("x-large", "y" * size)]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetLoad(info_pb2.GetLoadRequest(), metadata=metadata, timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await under.client.server_info()

    run_with_gateway(body, security=keys.security(), token=token)


def test_a_message_that_is_too_large() -> None:
    async def body(under: UnderTest) -> None:
        error = await refused(under.client.generate("x" * (6 << 20)).complete())
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.reason is None  # gRPC's own refusal: the service never sees it
        error = await refused(under.client.generate(token_ids=[200_000] * 1_000_000).complete())
        assert error.reason == "NEVER_FITS", "a million ids are read"
        await under.client.generate(token_ids=[1], max_tokens=2).complete()

    run_with_gateway(body)


def test_a_small_message_that_unpacks_into_a_large_one() -> None:
    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            request = pb.GenerateRequest(text="x" * (64 << 20))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(request, compression=grpc.Compression.Gzip, timeout=PATIENCE_S).read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not under.engine.submits()

    run_with_gateway(body)


def test_a_connection_has_only_so_many_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(server.SERVER_OPTIONS) | {"grpc.max_concurrent_streams": 3}
    assert dict(server.SERVER_OPTIONS)["grpc.max_concurrent_streams"] == 4096
    monkeypatch.setattr(server, "SERVER_OPTIONS", tuple(options.items()))

    async def body(under: UnderTest) -> None:
        calls = {f"r{k}": under.client.generate(token_ids=[1], request_id=f"r{k}") for k in range(4)}
        streams = {name: asyncio.ensure_future(until_the_end(aiter(call))) for name, call in calls.items()}
        await under.until(lambda engine: len(engine.submits()) == 3)
        own = (("grpc.use_local_subchannel_pool", 1),)  # not the connection that the streams have
        async with grpc.aio.insecure_channel(under.target, options=own) as another:
            assert await status_of(another, "/drift.v1.InfoService/GetLoad") is None
            assert len(under.engine.submits()) == 3
            assert not any(stream.done() for stream in streams.values())
        streams[under.engine.submits()[0].id.removesuffix("#0")].cancel()
        await under.until(lambda engine: len(engine.submits()) == 4)
        for stream in streams.values():
            stream.cancel()
        await asyncio.wait(streams.values())

    run_with_gateway(body, paused=True)


def test_strangers_cannot_fill_the_server_with_calls(monkeypatch: pytest.MonkeyPatch, keys: Keys) -> None:
    token = keys.add("acme")
    monkeypatch.setattr(auth, "MAX_OPEN_CALLS", 2)

    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
            watching = [watch(b"") for _ in range(2)]
            for call in watching:
                await call.read()
            error = await status_of(channel, "/grpc.health.v1.Health/Watch")
            assert error is not None
            assert error.reason == "QUEUE_FULL"
            assert await status_of(channel, "/grpc.health.v1.Health/Check") is None, "probes go on"
            await under.client.server_info()
            for call in watching:
                call.cancel()
            while await status_of(channel, "/grpc.health.v1.Health/Watch") is not None:
                await asyncio.sleep(0.001)

    run_with_gateway(body, security=keys.security(), token=token)


def test_an_open_call_must_send_its_message(monkeypatch: pytest.MonkeyPatch, keys: Keys) -> None:
    keys.add("acme")
    monkeypatch.setattr(auth, "OPEN_CALL_PATIENCE_S", 0.05)

    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            check = channel.stream_stream("/grpc.health.v1.Health/Check")
            for messages in (never(), iter([])):
                assert await check(messages).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            answers = [answer async for answer in channel.unary_stream("/grpc.health.v1.Health/Check")(b"")]
            assert answers == [b"\x08\x01"], "SERVING"

    run_with_gateway(body, security=keys.security())


def test_who_connects_and_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(server.SERVER_OPTIONS) | {"grpc.server_handshake_timeout_ms": 200}
    assert dict(server.SERVER_OPTIONS)["grpc.server_handshake_timeout_ms"] == 10_000
    monkeypatch.setattr(server, "SERVER_OPTIONS", tuple(options.items()))

    async def body(under: UnderTest) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", under.gateway.port)
        await asyncio.wait_for(reader.read(), PATIENCE_S)  # to its end
        writer.close()

    run_with_gateway(body)


def test_what_strangers_send_is_not_read(keys: Keys) -> None:
    """A refused call ends though its message never comes."""
    keys.add("acme")

    async def body(under: UnderTest) -> None:
        async with grpc.aio.insecure_channel(under.target) as channel:
            call = channel.stream_stream("/drift.v1.GenerationService/Generate")(never(), timeout=PATIENCE_S)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    run_with_gateway(body, security=keys.security())
