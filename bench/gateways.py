"""Whether several gateway processes let in what one does under overload, and what they cost in processor time.

`drift serve --gateways N` with a simulated engine, for each N. First a load four times what it can take, over all:
who is let in, how many of those have their first token in time, how long a refusal takes. Then 64 streams of
400 tokens at 5 ms a step: processor seconds of every process. Real sockets and processes; times depend on the machine,
counts hardly.

    python bench/gateways.py [--gateways 1,2,4] [--seconds 12]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drift_gateway import client as api
from drift_gateway.client import AsyncDriftClient
from drift_gateway.request_errors import RequestError

RATE = 40.0
PROMPT_TOKENS = 500
TARGET_S = 1.0
OVERLOADED = "step_ms=5:token_us=200"  # ten such prompts a second
STREAMING = "step_ms=5"
api.CHANNEL_OPTIONS = (*api.CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))  # type: ignore[misc, assignment]


@contextmanager
def serving(gateways: int, simulate: str) -> Iterator[tuple[str, int]]:
    """A running service: its address, and its process id."""
    command = [
        sys.executable,
        "-m",
        "drift_gateway",
        "serve",
        "--device",
        "simulated",
        "--simulate",
        simulate,
    ]
    command += ["--listen", "127.0.0.1:0", "--gateways", str(gateways)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if (found := re.match(r"serving on ([0-9.:]+)", line)) is not None:
                    break
            else:
                raise SystemExit("the service did not start")
            yield found[1], process.pid
        finally:
            process.terminate()
            process.stdout.read()


async def clients(target: str, gateways: int) -> list[AsyncDriftClient]:
    """One for each process: connections are made until all have been met."""
    met: dict[int, AsyncDriftClient] = {}
    while len(met) < gateways:
        client = AsyncDriftClient(target)
        if met.setdefault((await client.server_info()).gateway, client) is not client:
            await client.close()
    return list(met.values())


async def overload(target: str, gateways: int, seconds: float) -> dict[str, Any]:
    """Requests at RATE, each to the next process, that ask to be rejected when they cannot be in time."""
    rng, ttfts, refusals = random.Random(5), list[float](), list[float]()
    slo = api.SLO(ttft=TARGET_S, tbt=0.5, on_infeasible="reject")

    async def one(client: AsyncDriftClient, prompt: list[int]) -> None:
        began = time.monotonic()
        try:
            done = await client.generate(
                token_ids=prompt, max_tokens=20, temperature=0.0, ignore_eos=True, slo=slo
            ).complete()
            ttfts.append(done.timing.ttft or 0.0)
        except RequestError:
            refusals.append(time.monotonic() - began)

    found, due = await clients(target, gateways), time.monotonic()
    requests: list[asyncio.Task[None]] = []
    end = due + seconds
    while due < end:
        due += rng.expovariate(RATE)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        prompt = [rng.randint(0, 900) for _ in range(PROMPT_TOKENS)]
        requests.append(asyncio.ensure_future(one(found[len(requests) % gateways], prompt)))
    await asyncio.gather(*requests)
    return {
        "offered": len(requests),
        "let_in": len(ttfts),
        "in_time": sum(ttft <= TARGET_S for ttft in ttfts) / len(ttfts),
        "refusal_p99_ms": round(sorted(refusals)[int(0.99 * len(refusals))] * 1e3, 1),
    }


async def streaming(target: str, gateways: int, service: int) -> dict[str, float]:
    """Processor seconds, by what the process does, of 64 streams."""
    found = await clients(target, gateways)
    before = processor_seconds(service)
    streams = (
        found[k % gateways].generate(token_ids=[k, 1], max_tokens=400, temperature=0.0, ignore_eos=True)
        for k in range(64)
    )
    began = time.monotonic()
    await asyncio.gather(*(stream.complete() for stream in streams))
    spent = {name: round(now - before[name], 2) for name, now in processor_seconds(service).items()}
    return {"wall": round(time.monotonic() - began, 2), **spent}


def processor_seconds(service: int) -> dict[str, float]:
    """Of the process that was started and of those that it started."""
    spent = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        fields = status.read_text().rpartition(")")[2].split()
        pid = int(status.parent.name)
        if service not in (pid, int(fields[1])):
            continue
        words = (status.parent / "cmdline").read_text().split("\0")
        name = words[2].rpartition(".")[2] + (words[4] if "fleet_member" in words[2] else "")
        spent[name] = (int(fields[11]) + int(fields[12])) / 100
    return spent


def main() -> None:
    """Measure, and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateways", default="1,2,4")
    parser.add_argument("--seconds", type=float, default=12.0)
    options = parser.parse_args()
    for gateways in map(int, options.gateways.split(",")):
        with serving(gateways, OVERLOADED) as (target, _):
            admission = asyncio.run(overload(target, gateways, options.seconds))
        with serving(gateways, STREAMING) as (target, service):
            seconds = asyncio.run(streaming(target, gateways, service))
        print(json.dumps({"gateways": gateways, "overload": admission, "processor_s": seconds}), flush=True)


if __name__ == "__main__":
    main()
