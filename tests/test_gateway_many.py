"""`drift serve --gateways 2`: processes that share a port and an engine, over real sockets, killed and drained."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

from drift_core.engine import engine_config
from drift_gateway import client as api
from drift_gateway.access.security import Security
from drift_gateway.access.tenants import new_token, token_entry
from drift_gateway.client import AsyncDriftClient
from drift_gateway.commands.serve import serve as serve_command
from drift_gateway.connection import Tls
from drift_gateway.fleet import Fleet
from drift_gateway.request_errors import RequestError
from drift_gateway.serve_options import ServeOptions
from drift_gateway.server import Address, reserve_port
from drift_gateway.supervisor import ChildProcess, EngineProcess, Supervisor
from drift_gateway.v1 import admin_pb2, admin_pb2_grpc, info_pb2
from drift_scheduler.errors import DriftError

PATIENCE_S = 60.0
GATEWAYS = 2
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists() or not hasattr(socket, "SO_REUSEPORT"),
    reason="looks for processes in /proc, and for SO_REUSEPORT",
)


# ------------------------------------------------------------------------------------- the service


@dataclass
class Service:
    """A running `drift serve --gateways 2`."""

    process: subprocess.Popen[str]
    token: str | None = None
    tls: Tls | None = None
    said: list[str] = field(default_factory=list)

    def address(self, pattern: str) -> str:
        """Where something is served, by the line of the start-up that says so."""
        found = [match[1] for line in self.said if (match := re.search(pattern, line))]
        assert found, self.said
        return found[0]

    @property
    def target(self) -> str:
        return self.address(r"^serving on ([0-9.:]+)")

    @property
    def admin(self) -> str:
        return self.address(r"^administration on ([0-9.:]+)")

    @property
    def http(self) -> str:
        return self.address(r"metrics on (\S+)/metrics")

    def gateway_pid(self, number: int) -> int:
        """Of one of the gateway processes."""
        member = "drift_gateway.fleet_member"
        (pid,) = [
            pid
            for pid, words in children(self.process.pid).items()
            if member in words and words[words.index(member) + 2] == str(number)
        ]
        return pid

    def engine_pid(self) -> int:
        (pid,) = [
            pid for pid, words in children(self.process.pid).items() if "drift_gateway.engine_child" in words
        ]
        return pid

    def heard(self, pattern: str) -> bool:
        """Whether it has said something like that."""
        return any(re.search(pattern, line) for line in self.said)


def children(parent: int) -> dict[int, list[str]]:
    """Processes started by one, and what each was started with after the interpreter's name."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = status.read_text().rpartition(")")[2].split()[:2]
            words = (status.parent / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if int(ppid) == parent and state != "Z":
            found[int(status.parent.name)] = words[1:]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@contextmanager
def serving(*flags: str, token: str | None = None, tls: Tls | None = None) -> Iterator[Service]:
    """The service, with an engine of 5 ms steps, once it serves."""
    command = [sys.executable, "-m", "drift_gateway", "serve", "--device", "simulated"]
    command += ["--simulate", "step_ms=5", "--listen", "127.0.0.1:0", "--gateways", str(GATEWAYS)]
    process = subprocess.Popen(
        [*command, "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    service = Service(process, token, tls)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            service.said.append(line.rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_until(lambda: service.heard("^  python -c") or process.poll() is not None)
        assert process.poll() is None, service.said
        yield service
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        reader.join(PATIENCE_S)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    """One for all tests that leave it as it was."""
    with serving() as service:
        yield service


@asynccontextmanager
async def clients(service: Service) -> AsyncIterator[dict[int, AsyncDriftClient]]:
    """A client of each gateway process: connections are made until each has one."""
    found: dict[int, AsyncDriftClient] = {}
    opened: list[AsyncDriftClient] = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            while len(found) < GATEWAYS:
                opened.append(own_connection(service))
                try:
                    info = await opened[-1].server_info()
                except api.Unavailable:
                    continue  # it was given to a process that was killed just then
                assert info.gateways == GATEWAYS
                found.setdefault(info.gateway, opened[-1])
        yield found
    finally:
        for client in opened:
            await client.close()


def own_connection(service: Service) -> AsyncDriftClient:
    """A client that shares no connection with others."""
    usual = api.CHANNEL_OPTIONS
    api.CHANNEL_OPTIONS = (*usual, ("grpc.use_local_subchannel_pool", 1))  # type: ignore[misc, assignment]
    try:
        return AsyncDriftClient(service.target, service.token, service.tls)
    finally:
        api.CHANNEL_OPTIONS = usual  # type: ignore[misc]


Body = Callable[[dict[int, AsyncDriftClient]], Coroutine[Any, Any, None]]


def run(service: Service, body: Body) -> None:
    async def whole() -> None:
        async with clients(service) as found:
            await asyncio.wait_for(body(found), PATIENCE_S)

    asyncio.run(whole())


def generate(client: AsyncDriftClient, prompt: list[int], tokens: int, **more: Any) -> api.AsyncGeneration:
    return client.generate(token_ids=prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True, **more)


async def begun(client: AsyncDriftClient, tokens: int, **more: Any) -> Any:
    """A stream that has had its first token."""
    events = aiter(generate(client, [1, 2, 3], tokens, **more))
    async for event in events:
        if isinstance(event, api.TokenDelta):
            return events
    raise AssertionError("it ended without a token")


async def rest(events: Any) -> list[api.Event]:
    return [event async for event in events]


async def load_until(client: AsyncDriftClient, good: Callable[[info_pb2.Load], bool]) -> info_pb2.Load:
    while True:
        load = await client.load()
        if good(load):
            return load
        await asyncio.sleep(0.02)


@asynccontextmanager
async def admin_of(service: Service) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(service.admin) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def metric(service: Service, name: str, labels: str = "") -> float:
    """The sum of a metric's samples with those labels in them."""
    with urllib.request.urlopen(f"{service.http}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if re.match(rf"{name}[{{ ]", line) and labels in line]
    return sum(float(line.split()[-1]) for line in lines)


# -------------------------------------------------------------------------------------- streaming


def test_streams_through_all_processes_at_once_are_right_and_complete(shared: Service) -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        async def one(number: int, k: int) -> None:
            events = await rest(generate(found[number], [k, k + 1], 60 + k))
            tokens = [event for event in events if isinstance(event, api.TokenDelta)]
            assert [delta.sequence for delta in tokens] == list(range(len(tokens)))
            ids[number, k] = [token for delta in tokens for token in delta.token_ids]
            (end,) = [event for event in events if isinstance(event, api.Finished)]
            assert (end.reason, end.usage.output_tokens) == ("length", 60 + k)

        ids: dict[tuple[int, int], list[int]] = {}
        await asyncio.gather(*(one(number, k) for number in found for k in range(20)))
        assert {len(ids[number, k]) - k for number, k in ids} == {60}
        assert all(ids[1, k] == ids[2, k] for k in range(20)), "greedy decoding says the same everywhere"

    run(shared, body)


def test_load_counters_and_classes_are_the_whole_services_wherever_one_asks(shared: Service) -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        streams = [await begun(found[1], 5000), await begun(found[2], 5000)]
        for client in found.values():
            load = await load_until(client, lambda load: load.in_flight == 2 and load.running == 2)
            assert load.max_in_flight == 1024
            assert load.total_pages - load.free_pages >= 2
        assert metric(shared, "drift_outputs_in_flight") == 2
        for events in streams:
            await events.aclose()
        for client in found.values():
            await load_until(client, lambda load: load.in_flight == 0)
        slo = api.SLO(ttft=60.0, tbt=60.0, name="shown")
        await asyncio.gather(
            *(generate(found[number], [7], 10, slo=slo).complete() for number in (1, 1, 2, 2, 2))
        )
        for client in found.values():
            finished = 0
            while finished != 5:
                async for stats in client.watch_stats():
                    shown = [entry for entry in stats.classes if getattr(entry, "class") == "shown"]
                    finished = shown[0].finished if shown else 0
                    break
        assert metric(shared, "drift_slo_outputs_total", 'class="shown",metric="ttft"') == 5
        assert metric(shared, "vllm:time_to_first_token_seconds_count") >= 5
        assert metric(shared, "drift_engine_ready") == 1

    run(shared, body)


def test_a_request_id_that_another_process_has_in_flight_is_refused(shared: Service) -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        events = await begun(found[1], 5000, request_id="mine")
        for client in found.values():
            with pytest.raises(RequestError, match=r"'mine.*is in flight") as raised:
                await generate(client, [5], 3, request_id="mine").complete()
            assert raised.value.code is grpc.StatusCode.ALREADY_EXISTS
        await events.aclose()
        await load_until(found[2], lambda load: load.in_flight == 0)
        events = await rest(generate(found[2], [5], 3, request_id="mine"))
        assert isinstance(events[0], api.Accepted)
        assert events[0].request_id == "mine"

    run(shared, body)


# ------------------------------------------------------------------------------------- operators


def test_operators_reach_all_processes(shared: Service) -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        async with admin_of(shared) as admin:
            await aborts(found, admin)
            answer = await admin.SetPolicy(admin_pb2.SetPolicyRequest(dispatch="chunked-prefill"))
            assert answer.policies.dispatch == "chunked-prefill"
            for client in found.values():
                while (await client.server_info()).policies.dispatch != "chunked-prefill":
                    await asyncio.sleep(0.02)
            await admin.FlushPrefixCache(admin_pb2.FlushPrefixCacheRequest())

    async def aborts(found: dict[int, AsyncDriftClient], admin: Any) -> None:
        streams = [await begun(found[1], 5000, request_id="a"), await begun(found[2], 5000, request_id="b")]
        request = admin_pb2.AbortRequestsRequest(request_ids=["a", "b", "c"])
        answer = await admin.AbortRequests(request)
        assert (sorted(answer.aborted), list(answer.unknown)) == (["a", "b"], ["c"])
        for events in streams:
            with pytest.raises(RequestError, match="an operator ended"):
                await rest(events)
        streams = [await begun(found[number], 5000) for number in (1, 2, 2)]
        answer = await admin.AbortRequests(admin_pb2.AbortRequestsRequest(all=True))
        assert len(answer.aborted) == 3

    run(shared, body)


def test_draining_drains_all_processes_and_health_says_so(shared: Service) -> None:
    async def health(found: dict[int, AsyncDriftClient], wanted: int) -> None:
        for client in found.values():
            stub: Any = health_pb2_grpc.HealthStub(client._channel)
            while (await stub.Check(health_pb2.HealthCheckRequest())).status != wanted:
                await asyncio.sleep(0.02)

    async def body(found: dict[int, AsyncDriftClient]) -> None:
        await health(found, SERVING)
        streams = [await begun(found[1], 40), await begun(found[2], 40)]
        async with admin_of(shared) as admin:
            answer = await admin.Drain(admin_pb2.DrainRequest(timeout_ms=0))
            assert answer.in_flight <= 2
            await health(found, NOT_SERVING)
            for client in found.values():
                with pytest.raises(api.Unavailable, match="drains"):
                    await generate(client, [1], 3).complete()
            for events in streams:
                assert isinstance((await rest(events))[-1], api.Finished)
            assert (await admin.Drain(admin_pb2.DrainRequest())).in_flight == 0
            await admin.Resume(admin_pb2.ResumeRequest())
        await health(found, SERVING)

    run(shared, body)


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_gateway_that_is_killed_comes_back_and_nobody_else_notices(shared: Service) -> None:
    engine = shared.engine_pid()

    async def body(found: dict[int, AsyncDriftClient]) -> None:
        lost = [await begun(found[1], 20_000) for _ in range(3)]
        kept = [asyncio.ensure_future(generate(found[2], [k], 400).complete()) for k in range(3)]
        await load_until(found[2], lambda load: load.in_flight == 6)
        os.kill(shared.gateway_pid(1), signal.SIGKILL)
        for events in lost:
            with pytest.raises(api.Unavailable):
                await rest(events)
        completions = await asyncio.gather(*kept)
        assert [len(completion.token_ids) for completion in completions] == [400] * 3
        load = await load_until(found[2], lambda load: load.in_flight == 0)
        assert load.running == 0
        assert load.free_pages == load.total_pages

    async def again(found: dict[int, AsyncDriftClient]) -> None:
        for client in found.values():
            assert (await client.server_info()).readiness == info_pb2.READINESS_READY
            assert len((await generate(client, [1], 5).complete()).token_ids) == 5

    run(shared, body)
    wait_until(lambda: shared.heard("gateway 1 is gone .signal 9"))
    run(shared, again)
    assert shared.engine_pid() == engine


def test_a_gateway_that_is_asked_to_end_does_so_in_order_and_comes_back(shared: Service) -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        events = await begun(found[2], 200)
        pid = shared.gateway_pid(2)
        os.kill(pid, signal.SIGTERM)
        assert isinstance((await rest(events))[-1], api.Finished)
        await asyncio.to_thread(wait_until, lambda: not alive(pid))

    run(shared, body)
    run(shared, lambda found: asyncio.sleep(0))


def test_a_stopped_gateway_is_ended_and_its_requests_are_freed() -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        lost = await begun(found[1], 20_000)
        pid = service.gateway_pid(1)
        os.kill(pid, signal.SIGSTOP)
        await load_until(found[2], lambda load: load.in_flight == 0)
        assert not alive(pid)
        with pytest.raises(api.Unavailable):
            await rest(lost)

    with serving("--hang-timeout", "1") as service:
        run(service, body)
        wait_until(lambda: service.heard("gateway 1 is gone .its loop did not answer"))


def test_a_gateway_that_hangs_while_it_starts_is_started_again() -> None:
    with serving("--hang-timeout", "1") as service:

        def started(but: int | None = None) -> int:
            """The gateway's process, once it is another one."""
            found: list[int] = []

            def another() -> bool:
                with suppress(ValueError):
                    found.append(service.gateway_pid(1))
                return bool(found) and found[-1] != but

            wait_until(another)
            return found[-1]

        def ended(times: int) -> bool:
            return sum("gateway 1 is gone" in line for line in service.said) >= times

        for times in count(2, 2):
            first = started()
            os.kill(first, signal.SIGKILL)
            os.kill(started(but=first), signal.SIGSTOP)
            wait_until(partial(ended, times))
            if service.heard("gateway 1 is gone .it did not serve within 6 s of the engine"):
                break  # a machine that is busy may have stopped it only when it served
        run(service, lambda found: asyncio.sleep(0))


def test_when_the_engine_crashes_all_fail_alike_and_serve_again_when_it_is_back(shared: Service) -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        streams = [await begun(client, 20_000) for client in found.values()]
        engine = shared.engine_pid()
        os.kill(engine, signal.SIGKILL)
        for events in streams:
            with pytest.raises(api.Unavailable, match="engine") as raised:
                await rest(events)
            assert raised.value.reason == "WORKER_RESTART"
        for client in found.values():
            while (info := await client.server_info()).readiness != info_pb2.READINESS_READY:
                await asyncio.sleep(0.05)
            assert info.engine_restarts == 1
            assert len((await generate(client, [1, 2], 5).complete()).token_ids) == 5
        assert shared.engine_pid() != engine

    run(shared, body)


def test_a_request_that_crashes_engines_is_quarantined_in_all_processes() -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        for client in found.values():
            events = aiter(generate(client, [6, 6, 6], 20_000))
            await anext(events)
            os.kill(service.engine_pid(), signal.SIGKILL)
            with pytest.raises(api.Unavailable):
                await rest(events)
            for each in found.values():
                while (await each.server_info()).readiness != info_pb2.READINESS_READY:
                    await asyncio.sleep(0.05)
        for client in found.values():
            with pytest.raises(api.NeverFits, match="quarantined"):
                await generate(client, [6, 6, 6], 20_000).complete()

    with serving() as service:
        run(service, body)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_however_the_service_ends_no_process_is_left(how: signal.Signals) -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        streams = [asyncio.ensure_future(rest(await begun(client, 300))) for client in found.values()]
        started.update(children(service.process.pid))
        os.kill(service.process.pid, how)
        for outcome in await asyncio.gather(*streams, return_exceptions=True):
            if how is signal.SIGTERM:
                assert isinstance(outcome, list), outcome
                assert isinstance(outcome[-1], api.Finished), "running streams get their time"
                assert outcome[-1].reason == "length"

    started: dict[int, list[str]] = {}
    with serving() as service:
        run(service, body)
        assert len(started) == GATEWAYS + 1
        assert service.process.wait(PATIENCE_S) == (0 if how is signal.SIGTERM else -how)
        wait_until(lambda: not any(alive(pid) for pid in started))


def test_one_that_is_started_again_while_the_service_drains_drains_too(shared: Service) -> None:
    async def drain() -> None:
        async with admin_of(shared) as admin:
            await admin.Drain(admin_pb2.DrainRequest(timeout_ms=0))

    async def body(found: dict[int, AsyncDriftClient]) -> None:
        with pytest.raises(api.Unavailable, match="drains"):
            await generate(found[1], [1], 3).complete()
        async with admin_of(shared) as admin:
            await admin.Resume(admin_pb2.ResumeRequest())
        for client in found.values():
            while (await client.server_info()).readiness != info_pb2.READINESS_READY:
                await asyncio.sleep(0.02)
        await generate(found[1], [1], 3).complete()

    asyncio.run(drain())
    killed = shared.gateway_pid(1)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not alive(killed))
    run(shared, body)


# ------------------------------------------------------------------------------------------ limits


def test_limits_are_the_whole_services() -> None:
    async def body(found: dict[int, AsyncDriftClient]) -> None:
        streams = [await begun(found[number], 20_000) for number in (1, 2, 1)]
        for client in found.values():
            await load_until(client, lambda load: load.in_flight == 3)
            with pytest.raises(api.Overloaded, match="3 outputs are in flight and at most 3"):
                await generate(client, [1], 3).complete()
        await streams[0].aclose()
        await load_until(found[2], lambda load: load.in_flight == 2)
        await generate(found[2], [1], 3).complete()

    with serving("--max-in-flight", "3") as service:
        run(service, body)


def test_tenants_limits_are_the_whole_services_and_outlive_a_killed_gateway(tmp_path: Path) -> None:
    token = new_token()
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(
        f'[tenants.acme]\nrole = "generate"\nmax-in-flight = 2\n\n{token_entry("acme", token)}'
    )
    tenants.chmod(0o600)

    async def refused(client: AsyncDriftClient) -> bool:
        try:
            await generate(client, [1], 3).complete()
        except api.Overloaded as error:
            return error.reason == "RATE_LIMITED"
        return False

    async def body(found: dict[int, AsyncDriftClient]) -> None:
        lost, kept = [await begun(client, 20_000) for client in (found[1], found[2])]
        for client in found.values():
            while not await refused(client):
                await asyncio.sleep(0.02)
        assert metric(service, "drift_tenant_outputs_in_flight") == 2
        os.kill(service.gateway_pid(1), signal.SIGKILL)
        while await refused(found[2]):
            await asyncio.sleep(0.02)
        await kept.aclose()
        await lost.aclose()

    with serving("--tenants", str(tenants), token=token) as service:
        run(service, body)


def test_sighup_has_all_processes_read_the_tenants_again(tmp_path: Path) -> None:
    """Without it a changed file is noticed when calls come, which none does here until all have read it."""
    old, new = new_token(), new_token()
    tenants = tmp_path / "tenants.toml"

    def write(token: str) -> None:
        tenants.write_text(f'[tenants.acme]\nrole = "generate"\n\n{token_entry("acme", token)}')
        tenants.chmod(0o600)

    async def body(found: dict[int, AsyncDriftClient]) -> None:
        for client in found.values():
            assert len((await generate(client, [1], 5).complete()).token_ids) == 5

    write(old)
    with serving("--tenants", str(tenants), token=old) as service:
        run(service, body)
        write(new)
        os.kill(service.process.pid, signal.SIGHUP)
        read = "took up the changed tenants"
        wait_until(lambda: sum(read in line for line in service.said) == GATEWAYS + 1)
        service.token = new
        run(service, body)


def test_certificates_stand_for_the_same_tenant_in_all_processes(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)

    def issue(name: str, *hosts: str) -> tuple[Path, Path]:
        made = authority.issue_cert(*hosts, common_name=name)
        certificate, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(key)
        return certificate, key

    async def body(found: dict[int, AsyncDriftClient]) -> None:
        for client in (found[1], found[2], found[2]):
            assert len((await generate(client, [1], 5).complete()).token_ids) == 5
        while metric(service, "drift_tenant_output_tokens_total", 'tenant="one"') != 15:
            await asyncio.sleep(0.02)
        assert metric(service, "drift_tenant_requests_total", 'tenant="one"') == 3

    server, key = issue("server", "127.0.0.1")
    flags = ["--tls-cert", str(server), "--tls-key", str(key), "--tls-client-ca", str(ca)]
    with serving(*flags, tls=Tls(ca, *issue("one", "one.example"))) as service:
        run(service, body)


# ---------------------------------------------------------------------------------- the command line


def test_a_number_of_gateways_that_makes_no_sense() -> None:
    result = CliRunner().invoke(serve_command, ["--gateways", "0"])
    assert result.exit_code == 2
    assert "'--gateways': 0 is not in the range 1<=x<=64" in " ".join(result.output.split())


def test_what_one_of_the_processes_could_not_do_is_said_before_any_is_started() -> None:
    command = [sys.executable, "-m", "drift_gateway", "serve", "--device", "simulated", "--gateways", "2"]
    command += ["--listen", "127.0.0.1:0", "--access-log", "/no/such/folder/access.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert "/no/such/folder/access.jsonl" in done.stderr.strip().splitlines()[-1]


def test_ended_while_it_starts_no_process_is_left() -> None:
    command = [sys.executable, "-m", "drift_gateway", "serve", "--device", "simulated", "--gateways", "2"]
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: len(children(process.pid)) == GATEWAYS + 1)
        started = children(process.pid)
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
    wait_until(lambda: not any(alive(pid) for pid in started))


def fleet_of_two() -> Fleet:
    """In this process, without an engine."""

    async def spawn(path: Path) -> EngineProcess:
        raise AssertionError("no engine is started here")

    options = ServeOptions(
        engine_config(model="demo", device="simulated"), Address("127.0.0.1", 0), gateways=GATEWAYS
    )
    return Fleet(Supervisor(spawn), options, Security())


def test_a_gateway_process_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(*arguments: Any, **options: Any) -> ChildProcess:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(ChildProcess, "spawn_module", start)

    async def run() -> None:
        fleet = fleet_of_two()
        await fleet.open(Address("127.0.0.1", 0))
        with pytest.raises(
            DriftError, match="ended while starting: no process can be started: Too many open"
        ):
            await asyncio.wait_for(fleet.ready(), PATIENCE_S)
        await fleet.close(grace=0.0)

    asyncio.run(run())


def test_a_gateway_process_that_is_being_started_when_the_service_stops_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        asked, stopping, started = asyncio.Event(), asyncio.Event(), []

        async def start(*arguments: Any, **options: Any) -> ChildProcess:
            asked.set()
            await stopping.wait()
            process = await asyncio.create_subprocess_exec("sleep", "1000", stderr=asyncio.subprocess.PIPE)
            started.append(process)
            return ChildProcess(process)

        monkeypatch.setattr(ChildProcess, "spawn_module", start)
        fleet = fleet_of_two()
        await fleet.open(Address("127.0.0.1", 0))
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        closing = asyncio.ensure_future(fleet.close(grace=10 * PATIENCE_S))
        await asyncio.sleep(0)
        stopping.set()
        await asyncio.wait_for(closing, PATIENCE_S)
        assert [process.returncode for process in started] == [-signal.SIGKILL] * GATEWAYS

    asyncio.run(run())


def test_systems_that_cannot_share_ports_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(DriftError, match=r"need SO_REUSEPORT.*; use --gateways 1"):
        reserve_port(Address("127.0.0.1", 0))


def test_a_held_port_is_shared_and_a_taken_one_is_refused() -> None:
    held, address = reserve_port(Address("127.0.0.1", 0))
    again, same = reserve_port(address)
    assert same == address
    held.close()
    again.close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DriftError, match="is in use"):
            reserve_port(Address("127.0.0.1", taken.getsockname()[1]))
