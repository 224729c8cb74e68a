"""A client process of many streams: `python -m gateway_parts.streams`, one JSON line of results on standard output.

Checks every message: sequence numbers contiguous from 0, token ids those that the simulated engine must give
(`drift_core.simulated.token_ids`), one Finished. Measures for each token how long after the engine had it the client
had it, both on CLOCK_MONOTONIC: the Accepted's arrival and the token's offset, against the client's clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
import time
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop

from drift_core.simulated import token_choices, token_ids
from drift_gateway.v1 import generation_pb2 as pb
from gateway_parts.calls import Call, Connection

BINS = 20_000
BIN_S = 0.0002
MANY = 16
"""Tokens in a message from which on it pays to reckon with all at once: the client is not to be the bound."""
GENERATE = "/drift.v1.GenerationService/Generate"
CHOICES = token_choices(3072, [2])  # the demo model's vocabulary


class Histogram:
    """Counts of seconds in bins of 0.2 ms up to 4 s."""

    def __init__(self) -> None:
        self.bins = array("Q", bytes(8 * (BINS + 1)))
        self._columns = np.frombuffer(self.bins, np.uint64)

    def add(self, seconds: float) -> None:
        position = int(seconds / BIN_S)
        self.bins[position if 0 <= position < BINS else (0 if position < 0 else BINS)] += 1

    def add_all(self, seconds: npt.NDArray[np.float64]) -> None:
        np.add.at(self._columns, np.clip(seconds / BIN_S, 0, BINS).astype(np.intp), 1)

    def summary(self) -> dict[str, float]:
        """Milliseconds."""
        total, seen, found = sum(self.bins), 0, {}
        wanted = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)]
        for position, count in enumerate(self.bins):
            seen += count
            while wanted and total and seen >= wanted[0][1] * total:
                found[wanted.pop(0)[0]] = round((position + 0.5) * BIN_S * 1e3, 2)
        return found


class Driver:
    """Keeps `streams` streams open until `until`, each of `tokens` tokens and then another one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.messages = self.tokens = self.requests = 0
        self.all_messages = self.all_tokens = 0
        self.delay, self.gap_added, self.first = Histogram(), Histogram(), Histogram()
        self.let_in, self.made = Histogram(), Histogram()
        self.faults: list[str] = []
        self.counting = False
        self._random = random.Random(options.seed)
        self._connections: list[Connection] = []
        self._connecting = asyncio.Lock()

    async def run(self) -> dict[str, Any]:
        options = self.options
        self._connections = [await Connection.connect(options.target) for _ in range(options.channels)]
        ending = time.monotonic() + options.warm_up + options.seconds
        tasks = [asyncio.create_task(self._keep_streaming(k, ending)) for k in range(options.streams)]
        await asyncio.sleep(options.warm_up)
        self.counting, begun, cpu = True, time.monotonic(), _cpu()
        await asyncio.sleep(options.seconds)
        self.counting, seconds, cpu = False, time.monotonic() - begun, _cpu() - cpu
        await asyncio.gather(*tasks)
        for connection in self._connections:
            connection.close()
        return {
            "seconds": round(seconds, 3),
            "requests": self.requests,
            "messages": self.messages,
            "tokens": self.tokens,
            "all_messages": self.all_messages,
            "all_tokens": self.all_tokens,
            "tokens_per_s": round(self.tokens / seconds, 1),
            "messages_per_s": round(self.messages / seconds, 1),
            "tokens_per_message": round(self.tokens / max(1, self.messages), 3),
            "delay_ms": self.delay.summary(),
            "gap_added_ms": self.gap_added.summary(),
            "ttft_ms": self.first.summary(),
            "call_to_server_ms": self.let_in.summary(),
            "server_to_first_token_ms": self.made.summary(),
            "client_cpu_share": round(cpu / seconds, 3),
            "faults": self.faults[:20],
        }

    async def _connection(self, index: int) -> Connection:
        """A stream's; one that the server closed is a fault, and made anew."""
        place = index % len(self._connections)
        async with self._connecting:
            if self._connections[place].closed:
                self.faults.append(f"connection {place} was closed by the server")
                self._connections[place] = await Connection.connect(self.options.target)
        return self._connections[place]

    async def _keep_streaming(self, index: int, ending: float) -> None:
        await asyncio.sleep(self.options.warm_up * 0.7 * index / self.options.streams)
        number = 0
        while time.monotonic() < ending:
            # The first is of any length, so that later ones do not begin all at once.
            share = self._random.uniform(0.1, 1.0) if number == 0 else 1.0
            count = max(1, int(self.options.tokens * share))
            stream = Stream(self, f"{index}-{number}", count, ending)
            await stream.run(await self._connection(index))
            number += 1

    def prompt(self) -> list[int]:
        """Random tokens."""
        return [3 + self._random.randrange(3000) for _ in range(self.options.prompt)]


class Stream:
    """One call: its messages checked and measured as they come."""

    def __init__(self, driver: Driver, name: str, count: int, ending: float) -> None:
        self._driver, self._name, self._count, self._ending = driver, name, count, ending
        self._arrival, self._sequence, self._seen, self._last = 0.0, 0, 0, 0.0
        self._finished: pb.Finished | None = None
        self._left = False
        self._expected: Any = None
        self._call: Call | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, connection: Connection) -> None:
        """From the call to its end."""
        driver, options, prompt = self._driver, self._driver.options, self._driver.prompt()
        if options.check_ids:
            self._expected = token_ids(prompt, 0, CHOICES)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.Sampling(seed=0),
            stopping=pb.Stopping(max_tokens=self._count, ignore_eos=True),
            slo=pb.SLO(tbt_ms=options.tbt_ms, ttft_ms=60_000),
        )
        self._asked = time.monotonic()
        self._call = connection.call(
            GENERATE, request.SerializeToString(), self._message, lambda: self._done.set_result(None)
        )
        await self._done
        if self._left:
            return
        driver.requests += 1
        finished, seen, count = self._finished, self._seen, self._count
        if finished is None or seen != count or finished.usage.output_tokens != count:
            driver.faults.append(f"{self._name}: {seen} of {count} tokens")
            await asyncio.sleep(0.5)

    def _message(self, data: bytes) -> None:
        now = time.monotonic()
        message = pb.GenerateResponse.FromString(data)
        if message.HasField("token_delta"):
            self._delta(message.token_delta, now)
        elif message.HasField("accepted"):
            self._arrival = message.accepted.arrival_us * 1e-6
        elif message.HasField("finished"):
            if self._finished is not None:
                self._driver.faults.append(f"{self._name}: finished twice")
            self._finished = message.finished
        if now > self._ending and self._finished is None and self._call is not None:
            self._left = True
            self._call.cancel()

    def _delta(self, delta: pb.TokenDelta, now: float) -> None:
        driver = self._driver
        if not self._seen and driver.counting:
            driver.first.add(now - self._asked)
            driver.let_in.add(self._arrival - self._asked)
            driver.made.add(delta.offsets_us[0] * 1e-6)
        if delta.sequence != self._sequence:
            driver.faults.append(f"{self._name}: delta {delta.sequence} came, {self._sequence} was due")
        self._sequence = delta.sequence + 1
        ids = delta.token_ids
        self._seen += len(ids)
        driver.all_messages += 1
        driver.all_tokens += len(ids)
        if self._expected is not None and list(ids) != [next(self._expected) for _ in ids]:
            driver.faults.append(f"{self._name}: tokens before {self._seen} are others")
        if driver.counting:
            self._measure(delta.offsets_us, now)

    def _measure(self, offsets: Any, now: float) -> None:
        """Note the delay of each token; `_last` is that of the stream's previous message."""
        driver, arrival = self._driver, self._arrival
        driver.messages += 1
        driver.tokens += len(offsets)
        delays: Sequence[float] | npt.NDArray[np.float64]
        if len(offsets) < MANY:
            delays = [now - arrival - offset * 1e-6 for offset in offsets]
            for delay in delays:
                driver.delay.add(delay)
        else:
            delays = now - arrival - np.fromiter(offsets, np.float64, len(offsets)) * 1e-6
            driver.delay.add_all(delays)
        if self._last:  # how much longer than the engine's the gap was before this message
            driver.gap_added.add(max(0.0, delays[0] - self._last) if len(delays) else 0.0)
        self._last = delays[-1] if len(delays) else self._last


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=5.0)
    parser.add_argument("--tbt-ms", type=float, default=100.0)
    parser.add_argument("--check-ids", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = uvloop.run(Driver(options).run())
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
