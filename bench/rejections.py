"""How long a refusal takes, from the client's call to its status, beside streams that run.

A gateway process in front of a fake engine streams to some clients; others ask for what cannot be: their targets
cannot be met, or the queue is full. Refusals come one after the other, so that each has the server as it is.

    python bench/rejections.py [--refusals N] [--streams N] [--step-ms X]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["GRPC_VERBOSITY"] = "NONE"  # before grpc loads, also in the server process

import msgspec
import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from fake_engine import READY, FakeEngine
from gateway_under_test import FakeProcess

from drift_gateway.client import SLO, AsyncDriftClient, Overloaded
from drift_gateway.event_loop import new_event_loop
from drift_gateway.gate import GateLimits
from drift_gateway.server import Address, Gateway
from drift_gateway.supervisor import EngineProcess, Supervisor

SLOW = msgspec.structs.replace(
    READY, max_context=32768, kv_pages=4096, kv_tokens=65536, prefill_seconds=[(100, 1.0), (1000, 10.0)]
)


def serve(port: Any, step_seconds: float, streams: int) -> None:
    """Body of the gateway's process: a hundred prompt tokens a second are expected of the engine."""

    async def spawn(path: Path) -> EngineProcess:
        return FakeProcess(await asyncio.to_thread(FakeEngine, path, step_seconds=step_seconds, ready=SLOW))

    async def run() -> None:
        supervisor = Supervisor(spawn)
        gateway = Gateway(supervisor, limits=GateLimits(streams + 1))
        await gateway.open(Address("127.0.0.1", 0))
        await supervisor.start()
        port.value = gateway.port
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


async def refusals(client: AsyncDriftClient, count: int, **fields: Any) -> tuple[list[float], set[str]]:
    """Seconds of each of `count` refusals, in order of size, and the reasons given."""
    seconds, reasons = [], set()
    for _ in range(count):
        begun = time.perf_counter()
        try:
            await client.generate(**fields).complete()
        except Overloaded as refused:
            seconds.append(time.perf_counter() - begun)
            reasons.add(str(refused.reason))
    assert len(seconds) == count, f"{count - len(seconds)} were served"
    return sorted(seconds), reasons


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def drive(port: int, pid: int, count: int, streams: int) -> None:
    """Run the streams, and both kinds of refusals beside them."""
    async with AsyncDriftClient(f"127.0.0.1:{port}") as client:
        endless: dict[str, Any] = {"token_ids": [1], "max_tokens": 30_000}
        running = [asyncio.ensure_future(client.generate(**endless).complete()) for _ in range(streams)]
        while (await client.load()).in_flight < streams:
            await asyncio.sleep(0.05)
        asked = {
            "targets, 1000 prompt tokens": {
                "token_ids": [1] * 1000,
                "slo": SLO(ttft=0.5, on_infeasible="reject"),
            },
            "targets, 16000 prompt tokens": {
                "token_ids": [1] * 16000,
                "slo": SLO(ttft=0.5, on_infeasible="reject"),
            },
            "full, 1000 prompt tokens": {"token_ids": [1] * 1000, "n": 2},
        }
        print(f"{count} refusals each beside {streams} streams; load {os.getloadavg()[0]:.1f}")
        for name, fields in asked.items():
            begun = processor_seconds(pid)
            seconds, reasons = await refusals(client, count, **fields)
            worked = (
                f"{(processor_seconds(pid) - begun) / count * 1e3:6.2f} ms of the server's processor each"
            )
            p50, p99 = seconds[count // 2] * 1e3, seconds[count * 99 // 100] * 1e3
            print(f"{name:30s} p50 {p50:7.2f} ms  p99 {p99:7.2f} ms, {worked}  {', '.join(sorted(reasons))}")
        for stream in running:
            stream.cancel()


def main() -> int:
    """Start the server, measure, end it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--refusals", type=int, default=500)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=10.0)
    asked = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    port = context.Value("i", 0)
    server = context.Process(target=serve, args=(port, asked.step_ms / 1e3, asked.streams))
    server.start()
    try:
        deadline = time.monotonic() + 60
        while not port.value and time.monotonic() < deadline:
            time.sleep(0.05)
        uvloop.run(drive(port.value, server.pid or 0, asked.refusals, asked.streams))
    finally:
        server.terminate()
        server.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
