"""Four times the load that a gateway can serve: do those let in keep their targets, and how fast are the others told?

    nox -s bench -- gateway_overload [--burst-seconds 20] [--step-ms 20] [--out PATH]

An open-loop client (Poisson arrivals, whatever the answers) against `drift serve --device simulated`. First the load is
raised phase by phase to find the peak of goodput: requests per second that met their TTFT and TBT targets. Then four
times as much for a while, and at once 0.7 of it. Reported: attainment of those that were let in, goodput in the burst
against the peak, milliseconds until a refusal reached the client, and after how many seconds the load that can be
served is served as before. Requests ask to be rejected when their targets cannot be met. `stolen`: of the processors'
time, what the host of a virtual machine gave to others; with some percent of it everything stands still now and then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import uvloop
from gateway_parts.machine import Stolen, describe
from gateway_parts.processes import Server, start_gateway

from drift_gateway.client import error_of
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc

RESULTS = Path(__file__).parent / "results" / "gateway_overload.json"
WELL = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
SHARES = (0.5, 0.7, 0.8, 0.9, 1.0, 1.15)
OVERLOAD = 4.0
AFTERWARDS = 0.7


@dataclass(slots=True)
class Fate:
    """One request: seconds from the phase's start, and what became of it. `refused`: a reason."""

    sent: float
    seconds: float = 0.0
    refused: str = ""
    met: bool = False
    ttft: float | None = None


class Client:
    """Sends requests at a rate, and waits for none."""

    def __init__(self, target: str, options: argparse.Namespace) -> None:
        self._options = options
        self._random = random.Random(options.seed)
        self._channels = [grpc.aio.insecure_channel(target) for _ in range(4)]
        self._stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in self._channels]

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def phase(self, rate: float, seconds: float) -> list[Fate]:
        """The fates of all requests sent in so many seconds, once each has its end."""
        begun = time.monotonic()
        due, tasks = begun, []
        while (due := due + self._random.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(self._one(due - begun)))
        return list(await asyncio.gather(*tasks))

    async def _one(self, sent: float) -> Fate:
        options, chance = self._options, self._random
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[3 + chance.randrange(3000) for _ in range(chance.randrange(20, 380))]),
            stopping=pb.Stopping(max_tokens=chance.randrange(20, 80), ignore_eos=True),
            slo=pb.SLO(ttft_ms=options.ttft_ms, tbt_ms=options.tbt_ms, on_infeasible=pb.ON_INFEASIBLE_REJECT),
        )
        fate, begun = Fate(sent), time.monotonic()
        try:
            async for message in chance.choice(self._stubs).Generate(request):
                if fate.ttft is None and message.HasField("token_delta"):
                    fate.ttft = time.monotonic() - begun
                if message.HasField("finished"):
                    timing = message.finished.timing
                    fate.met = message.finished.reason in WELL and timing.ttft_met
                    fate.met = fate.met and (timing.tbt_met or not timing.HasField("tbt_met"))
        except grpc.aio.AioRpcError as error:
            known = error_of(error)
            fate.refused = known.reason or known.code.name
        fate.seconds = time.monotonic() - begun
        return fate


def account(fates: list[Fate], seconds: float, rate: float, stolen: float | None) -> dict[str, Any]:
    """Numbers of one phase. Goodput counts what was sent in it, in requests per second of its length."""
    admitted = [fate for fate in fates if not fate.refused]
    refusals = sorted(fate.seconds * 1e3 for fate in fates if fate.refused)
    firsts = sorted(fate.ttft * 1e3 for fate in admitted if fate.ttft is not None)
    met = sum(fate.met for fate in admitted)
    return {
        "rate": round(rate, 2),
        "seconds": seconds,
        "offered": len(fates),
        "admitted": len(admitted),
        "refused": dict(Counter(fate.refused for fate in fates if fate.refused)),
        "attainment": round(met / len(admitted), 4) if admitted else None,
        "goodput": round(met / seconds, 2),
        "refusal_ms": _quantiles(refusals),
        "client_ttft_ms": _quantiles(firsts),
        "stolen": stolen,
    }


def recovery_seconds(fates: list[Fate], seconds: float) -> float | None:
    """Whole seconds since the burst's end from which on at most one request in twenty was refused or missed its
    targets; `None` when that did not come."""
    for start in range(int(seconds) - 1):
        after = [fate for fate in fates if fate.sent >= start]
        if after and sum(not fate.met for fate in after) <= len(after) / 20:
            return float(start)
    return None


async def run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    client = Client(server.target, options)
    await client.phase(4.0, 2.0)
    phases = []
    for share in SHARES:
        rate, stolen = options.capacity * share, Stolen()
        fates = await client.phase(rate, options.phase_seconds)
        phases.append(account(fates, options.phase_seconds, rate, stolen.share()))
        _tell("search", phases[-1])
    best = max(phases, key=lambda phase: float(phase["goodput"]))
    usual = AFTERWARDS * min(float(best["goodput"]), options.capacity)
    rate, stolen = OVERLOAD * float(best["goodput"]), Stolen()
    sending = asyncio.create_task(client.phase(rate, options.burst_seconds))
    await asyncio.sleep(options.burst_seconds)
    in_burst, stolen = stolen.share(), Stolen()
    afterwards = await client.phase(usual, options.phase_seconds + 5)
    burst = account(await sending, options.burst_seconds, rate, in_burst)
    _tell("burst", burst)
    after = account(afterwards, options.phase_seconds + 5, usual, stolen.share())
    after["recovery_s"] = recovery_seconds(afterwards, options.phase_seconds + 5)
    _tell("after", after)
    await client.close()
    return {"search": phases, "peak_goodput": best["goodput"], "burst": burst, "after": after}


def main() -> None:
    options = _options()
    simulate = f"step_ms={options.step_ms:g}:token_us={options.token_us:g}"
    # Slots bound the capacity: an output of 50 tokens on average holds one for 50 steps and a prefill.
    mean_s = (50 * options.step_ms + 2 * options.step_ms + 200 * options.token_us / 1e3) / 1e3
    options.capacity = options.max_running / mean_s
    server = start_gateway(simulate, options.max_running, "--max-context", "2048", "--kv-memory", "1GiB")
    stolen = Stolen()
    try:
        found = uvloop.run(run(server, options))
    finally:
        server.end()
    burst, after = found["burst"], found["after"]
    summary = {
        "attainment_of_admitted": burst["attainment"],
        "goodput_over_peak": round(burst["goodput"] / max(0.01, found["peak_goodput"]), 3),
        "refusal_p99_ms": burst["refusal_ms"].get("p99"),
        "recovery_s": after["recovery_s"],
    }
    verdict = {
        "attainment >= 0.95": (summary["attainment_of_admitted"] or 0) >= 0.95,
        "goodput >= 0.9 of the peak": summary["goodput_over_peak"] >= 0.9,
        "refusals within 20 ms at p99": (summary["refusal_p99_ms"] or 0) <= 20,
        "recovery within 5 s": summary["recovery_s"] is not None and summary["recovery_s"] <= 5,
    }
    config = {name: value for name, value in vars(options).items() if name != "out"}
    machine = describe(stolen)
    report = {
        "schema": "drift.bench.gateway_overload/1",
        "config": config,
        "machine": machine,
        "summary": summary,
        "verdict": verdict,
        **found,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"summary": summary, "verdict": verdict, "machine": machine}, indent=1))


def _quantiles(ordered: list[float]) -> dict[str, float]:
    if len(ordered) < 2:
        return {"p50": round(ordered[0], 1), "p99": round(ordered[0], 1)} if ordered else {}
    cuts = statistics.quantiles(ordered, n=100, method="inclusive")
    return {
        "p50": round(cuts[49], 1),
        "p90": round(cuts[89], 1),
        "p99": round(cuts[98], 1),
        "max": round(ordered[-1], 1),
    }


def _tell(title: str, phase: dict[str, Any]) -> None:
    print(f"{title:7} {json.dumps(phase)}", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--token-us", type=float, default=20.0, help="prefill, per token")
    parser.add_argument("--max-running", type=int, default=32)
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--tbt-ms", type=float, default=60.0)
    parser.add_argument("--phase-seconds", type=float, default=8.0)
    parser.add_argument("--burst-seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
