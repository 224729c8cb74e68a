"""What the gateway adds: tokens per second and gaps between tokens through it, beside a bare gRPC echo.

The engine is `tools/fake_engine.py` in a process of its own; the echo streams messages of the same shape from a
grpc.aio server that does nothing else. Both are measured in turns, by one client process, on one machine.

    python bench/gateway.py [--streams N] [--tokens N] [--step-ms X] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRPC_VERBOSITY"] = "NONE"  # before grpc loads, also in the server processes

import grpc
import uvloop

from drift_gateway.server import SERVER_OPTIONS, Address, Gateway
from drift_gateway.supervisor import ChildProcess, EngineProcess, Supervisor
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc

FAKE_ENGINE = Path(__file__).parent.parent / "tools" / "fake_engine.py"


class Echo(generation_pb2_grpc.GenerationServiceServicer):
    """Streams as many one-token messages as were asked for, a step apart."""

    def __init__(self, step_seconds: float) -> None:
        self._step = step_seconds

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        begun = time.monotonic()
        for step in range(request.stopping.max_tokens):
            if self._step:
                pause = begun + step * self._step - time.monotonic()
                await asyncio.sleep(max(0.0, pause))
            delta = pb.TokenDelta(sequence=step, text="", token_ids=[step % 200], offsets_us=[step])
            await context.write(pb.GenerateResponse(token_delta=delta))


def serve_echo(port: Any, step_seconds: float) -> None:
    """Body of the echo's process."""

    async def serve() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(Echo(step_seconds), server)
        port.value = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await server.wait_for_termination()

    uvloop.run(serve())


def serve_gateway(port: Any, step_seconds: float) -> None:
    """Body of the gateway's process."""

    async def spawn(path: Path) -> EngineProcess:
        return ChildProcess(
            await asyncio.create_subprocess_exec(
                sys.executable,
                str(FAKE_ENGINE),
                os.fspath(path),
                str(step_seconds),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        )

    async def serve() -> None:
        supervisor = Supervisor(spawn)
        gateway = Gateway(supervisor)
        await gateway.open(Address("127.0.0.1", 0))
        await supervisor.start()
        port.value = gateway.port
        await asyncio.Event().wait()

    uvloop.run(serve())


async def drive(port: int, streams: int, tokens: int) -> tuple[float, int, list[float]]:
    """Seconds, messages and the gaps between messages of all streams."""
    gaps: list[float] = []
    messages = 0

    async def one(stub: Any) -> None:
        nonlocal messages
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), stopping=pb.Stopping(max_tokens=tokens))
        seen, last = 0, 0.0
        async for response in stub.Generate(request):
            if not response.HasField("token_delta"):
                continue
            now = time.monotonic()
            messages += 1
            seen += len(response.token_delta.token_ids)
            if last:
                gaps.append(now - last)
            last = now
        assert seen == tokens, f"{seen} of {tokens} tokens came"

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        begun = time.monotonic()
        await asyncio.gather(*(one(stub) for _ in range(streams)))
        return time.monotonic() - begun, messages, gaps


def measure(
    body: Callable[[Any, float], None], step_seconds: float, streams: int, tokens: int
) -> list[float]:
    """Tokens per second, messages per second, gap p50 and p99 in ms of one run against a server process."""
    context = multiprocessing.get_context("spawn")
    port = context.Value("i", 0)
    process = context.Process(target=body, args=(port, step_seconds))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not port.value:
            assert process.is_alive(), "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        seconds, messages, gaps = uvloop.run(drive(port.value, streams, tokens))
    finally:
        process.terminate()
        process.join()
    gaps.sort()
    p50, p99 = (gaps[int(len(gaps) * fraction)] * 1e3 if gaps else 0.0 for fraction in (0.5, 0.99))
    return [streams * tokens / seconds, messages / seconds, p50, p99]


def main() -> None:
    """Measure in turns and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--step-ms", type=float, default=0.0, help="0: as fast as it goes")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows: dict[str, list[list[float]]] = {"echo": [], "gateway": []}
    for _ in range(options.rounds):
        for name, body in (("echo", serve_echo), ("gateway", serve_gateway)):
            rows[name].append(measure(body, options.step_ms / 1e3, options.streams, options.tokens))
    print(f"{options.streams} streams of {options.tokens} tokens, steps of {options.step_ms:g} ms, "
          f"median of {options.rounds}")  # fmt: skip
    print(f"{'':8} {'tokens/s':>10} {'messages/s':>11} {'gap p50 ms':>11} {'gap p99 ms':>11}")
    for name, runs in rows.items():
        tokens, messages, p50, p99 = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:8} {tokens:10.0f} {messages:11.0f} {p50:11.2f} {p99:11.2f}")


if __name__ == "__main__":
    main()
