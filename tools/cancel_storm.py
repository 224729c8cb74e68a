"""A storm of requests that are cancelled at random, against a gateway with a simulated engine, and what it leaves.

Used by a test (some hundred requests) and by bench/gateway_cancellations.py (ten thousand). The gateway runs in this
process, in front of a real engine process, so that tasks and descriptors can be counted; so does the client.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from drift_core.engine import engine_config
from drift_core.frames import LoadItem
from drift_gateway import client as api
from drift_gateway.gate import GateLimits
from drift_gateway.server import Address, Gateway
from drift_gateway.supervisor import ChildProcess, EngineProcess, Supervisor

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Left:
    """What is there when nothing is in flight."""

    free_pages: int
    waiting: int
    running: int
    tasks: int
    descriptors: int


@dataclass
class Storm:
    """A gateway to storm. `ends`: how requests ended, by kind."""

    gateway: Gateway
    supervisor: Supervisor
    total_pages: int
    ends: Counter[str] = field(default_factory=Counter)

    async def blow(self, requests: int, at_once: int, seed: int) -> None:
        """Send requests, `at_once` at a time, each cancelled at a random moment unless it ends before."""
        chance = random.Random(seed)
        turns = asyncio.Semaphore(at_once)
        async with api.AsyncDriftClient(f"127.0.0.1:{self.gateway.port}") as client:

            async def one(number: int) -> None:
                async with turns:
                    prompt = [3 + chance.randrange(3000) for _ in range(chance.randrange(1, 200))]
                    generation = client.generate(
                        token_ids=prompt, n=chance.choice((1, 1, 1, 3)), max_tokens=chance.randrange(1, 60)
                    )
                    self.ends[await _until(generation, chance.choice((0.0, 0.002, 0.02, 0.1, 30.0)))] += 1

            await asyncio.gather(*(one(number) for number in range(requests)))

    async def settled(self) -> Left:
        """Wait until nothing is in flight and the engine says that its pages are free; then count."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            left = self._left()
            clean = left.free_pages == self.total_pages and not left.waiting and not left.running
            if clean and not self._in_flight():
                break
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"after {PATIENCE_S:g} s there is still {left} of {self.total_pages} pages"
                )
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)  # channels and handlers that are done take leave
        gc.collect()
        return self._left()

    def _in_flight(self) -> int:
        assert self.supervisor.served is not None
        return self.supervisor.served.client.in_flight

    def _left(self) -> Left:
        load = self.supervisor.ahead.load or LoadItem(0, 0, self.total_pages)
        descriptors = len(os.listdir("/proc/self/fd"))
        return Left(load.free_pages, load.waiting, load.running, len(asyncio.all_tasks()), descriptors)


async def _until(generation: api.AsyncGeneration, patience: float) -> str:
    """Read for so many seconds at most, then cancel."""
    try:
        async with asyncio.timeout(patience):
            async for _ in generation:
                pass
    except TimeoutError:
        return "cancelled"
    except api.RequestError as error:
        return error.reason or error.code.name
    finally:
        generation.cancel()
    return "finished"


@asynccontextmanager
async def storm(step_ms: float = 2.0, max_running: int = 64) -> AsyncIterator[Storm]:
    """A gateway in front of an engine process with a simulated device."""
    config = engine_config(
        model="demo",
        device="simulated",
        simulate=f"step_ms={step_ms:g}",
        max_running=max_running,
        max_context=512,
        kv_memory_bytes=max_running
        * 128
        * 1024,  # 128 tokens each: not enough for all, so some are preempted
    )

    async def spawn(path: Path) -> EngineProcess:
        return await ChildProcess.spawn(config, path)

    supervisor = Supervisor(spawn)
    gateway = Gateway(supervisor, limits=GateLimits(max_in_flight=65536, kv_promise=1000.0))
    await gateway.open(Address("127.0.0.1", 0))
    try:
        served = await asyncio.wait_for(supervisor.start(), PATIENCE_S)
        yield Storm(gateway, supervisor, served.ready.kv_pages)
    finally:
        await gateway.close(grace=0.0)
