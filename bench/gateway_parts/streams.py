"""A client process of many streams: `python -m gateway_parts.streams`, one JSON line of results on standard output.

Checks every message: sequence numbers contiguous from 0, token ids those that the simulated engine must give
(`drift_core.simulated.token_ids`), one Finished. Measures for each token how long after the engine had it the client
had it, both on CLOCK_MONOTONIC: the Accepted's arrival and the token's offset, against the client's clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import sys
import time
from array import array
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import uvloop

from drift_core.simulated import token_choices, token_ids
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc

BINS = 20_000
BIN_S = 0.0002
CHOICES = token_choices(3072, [2])  # the demo model's vocabulary


class Histogram:
    """Counts of seconds in bins of 0.2 ms up to 4 s."""

    def __init__(self) -> None:
        self.bins = array("Q", bytes(8 * (BINS + 1)))

    def add(self, seconds: float) -> None:
        position = int(seconds / BIN_S)
        self.bins[position if 0 <= position < BINS else (0 if position < 0 else BINS)] += 1

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
        self.faults: list[str] = []
        self.counting = False
        self._random = random.Random(options.seed)

    async def run(self) -> dict[str, Any]:
        options = self.options
        channel_options = (("grpc.use_local_subchannel_pool", 1),)
        channels = [
            grpc.aio.insecure_channel(options.target, options=channel_options)
            for _ in range(options.channels)
        ]
        stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
        ending = time.monotonic() + options.warm_up + options.seconds
        tasks = [
            asyncio.create_task(self._keep_streaming(stubs[k % len(stubs)], k, ending))
            for k in range(options.streams)
        ]
        await asyncio.sleep(options.warm_up)
        self.counting, begun, cpu = True, time.monotonic(), _cpu()
        await asyncio.sleep(options.seconds)
        self.counting, seconds, cpu = False, time.monotonic() - begun, _cpu() - cpu
        await asyncio.gather(*tasks)
        for channel in channels:
            await channel.close()
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
            "client_cpu_share": round(cpu / seconds, 3),
            "faults": self.faults[:20],
        }

    async def _keep_streaming(self, stub: Any, index: int, ending: float) -> None:
        await asyncio.sleep(self.options.warm_up * 0.7 * index / self.options.streams)
        number = 0
        while time.monotonic() < ending:
            # The first is of any length, so that later ones do not begin all at once.
            share = self._random.uniform(0.1, 1.0) if number == 0 else 1.0
            await self._stream(stub, f"{index}-{number}", max(1, int(self.options.tokens * share)), ending)
            number += 1

    async def _stream(self, stub: Any, name: str, count: int, ending: float) -> None:
        prompt = [3 + self._random.randrange(3000) for _ in range(self.options.prompt)]
        expected = token_ids(prompt, 0, CHOICES) if self.options.check_ids else None
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.Sampling(seed=0),
            stopping=pb.Stopping(max_tokens=count, ignore_eos=True),
            slo=pb.SLO(tbt_ms=self.options.tbt_ms, ttft_ms=60_000),
        )
        asked = time.monotonic()
        call = stub.Generate(request)
        arrival, sequence, seen, last = 0.0, 0, 0, 0.0
        finished: pb.Finished | None = None
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                now = time.monotonic()
                if message.HasField("token_delta"):
                    if not seen and self.counting:
                        self.first.add(now - asked)
                    delta = message.token_delta
                    if delta.sequence != sequence:
                        self.faults.append(f"{name}: delta {delta.sequence} came, {sequence} was due")
                    sequence = delta.sequence + 1
                    seen += len(delta.token_ids)
                    self.all_messages += 1
                    self.all_tokens += len(delta.token_ids)
                    if expected is not None:
                        for token in delta.token_ids:
                            if token != next(expected):
                                self.faults.append(f"{name}: token {token} at {seen} is another one")
                    if self.counting:
                        last = self._count(delta.offsets_us, now, arrival, last)
                elif message.HasField("accepted"):
                    arrival = message.accepted.arrival_us * 1e-6
                elif message.HasField("finished"):
                    if finished is not None:
                        self.faults.append(f"{name}: finished twice")
                    finished = message.finished
                if now > ending and finished is None:
                    call.cancel()
                    return
        except grpc.aio.AioRpcError as error:
            self.faults.append(f"{name}: {error.code().name} {error.details()}")
            await asyncio.sleep(0.5)
            return
        self.requests += 1
        if finished is None or seen != count or finished.usage.output_tokens != count:
            self.faults.append(f"{name}: {seen} of {count} tokens")

    def _count(self, offsets: Any, now: float, arrival: float, last: float) -> float:
        """Note the delay of each token; `last` is that of the stream's previous message."""
        self.messages += 1
        self.tokens += len(offsets)
        delay = last
        for offset in offsets:
            delay = now - arrival - offset * 1e-6
            self.delay.add(delay)
        if last:  # how much longer than the engine's the gap was before this message
            self.gap_added.add(max(0.0, now - arrival - offsets[0] * 1e-6 - last) if offsets else 0.0)
        return delay


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
