"""Many streams for a long time through one gateway, beside a bare gRPC echo of the same shape, in turns.

    nox -s bench -- gateway_soak [--streams 512] [--minutes 10] [--step-ms 10] [--rounds 5] [--out PATH]

The engine is the real process with a simulated device (`drift serve --device simulated`). Every token is checked:
sequence numbers contiguous, ids those the simulated engine must give. Measured: how long after the engine had a token
the client had it (both clocks are CLOCK_MONOTONIC), tokens per second, CPU time per token and the gateway's memory.
The echo sends the same tokens in messages as large as the gateway's turned out to be in the round before it, so that
both were coalesced alike. The gateway serves `--minutes` in all, in `--rounds` parts; the echo has a quarter of it.
How much both can send at most is for `gateway_most.py`.
The client speaks just the HTTP/2 it needs (`gateway_parts.calls`): with a grpc.aio client on the same cores it was the
client that was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gateway_parts.machine import Stolen, describe
from gateway_parts.processes import (
    PARTS,
    Server,
    Watch,
    cpu_seconds,
    start_echo,
    start_gateway,
)

RESULTS = Path(__file__).parent / "results" / "gateway_soak.json"


def main() -> None:
    options = _options()
    begun, stolen = time.time(), Stolen()
    gateway = start(options, options.step_ms)
    watch = Watch(gateway.pid)
    rounds: list[dict[str, Any]] = []
    try:
        seconds = options.minutes * 60 / options.rounds
        for number in range(options.rounds):
            ours = measure(gateway, options, seconds, ["--check-ids", "--seed", str(number)])
            echo = start_echo(options.step_ms, ours["tokens_per_message"])
            try:
                bare = measure(echo, options, max(5.0, seconds / 4), ["--seed", str(number)])
            finally:
                echo.end()
            rounds.append({"gateway": ours, "echo": bare})
            tell(f"round {number + 1} of {options.rounds}", ours, bare)
    finally:
        watch.end()
        gateway.end()
    report = {
        "schema": "drift.bench.gateway_soak/1",
        "config": vars(options) | {"out": str(options.out.name)},
        "machine": describe(stolen),
        "began": begun,
        "summary": summarise(rounds, watch, options),
        "rounds": rounds,
        "rss_mb": [
            [round(at - watch.samples[0][0], 1), round(size / 1e6, 2)] for at, size in watch.samples[::5]
        ],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    sys.exit(1 if report["summary"]["faults"] else 0)


def start(options: argparse.Namespace, step_ms: float) -> Server:
    """A gateway whose engine has room for every stream's whole output."""
    room = ("--max-context", "32768", "--kv-memory", "16GiB")  # a token takes 1 KiB there
    return start_gateway(f"step_ms={step_ms:g}", options.streams + 64, *room)


def measure(server: Server, options: argparse.Namespace, seconds: float, more: list[str]) -> dict[str, Any]:
    """One client process against a server; its results, and the server's CPU time per token and message."""
    command = [sys.executable, "-m", "gateway_parts.streams", "--target", server.target]
    command += [
        "--streams",
        str(options.streams),
        "--seconds",
        str(seconds),
        "--warm-up",
        str(options.warm_up),
    ]
    command += ["--tokens", str(options.tokens), "--tbt-ms", str(options.tbt_ms)]
    cpu, engine = cpu_seconds(server.pid), cpu_seconds(server.engine) if server.engine else 0.0
    began = time.monotonic()
    done = subprocess.run(
        [*command, *more],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PARTS.parent,
        check=False,
        timeout=seconds + 300,
    )
    if done.returncode:
        raise SystemExit("the client failed; the server said:\n" + "\n".join(server.said))
    result: dict[str, Any] = json.loads(done.stdout)
    elapsed = time.monotonic() - began
    share = (cpu_seconds(server.pid) - cpu) / elapsed
    result["server_cpu_share"] = round(share, 3)
    result["server_cpu_us_per_token"] = round(share * 1e6 / max(1.0, result["all_tokens"] / elapsed), 2)
    result["server_cpu_us_per_message"] = round(share * 1e6 / max(1.0, result["all_messages"] / elapsed), 2)
    if server.engine:
        try:
            result["engine_cpu_share"] = round((cpu_seconds(server.engine) - engine) / elapsed, 3)
        except FileNotFoundError:
            result["faults"].append("the engine ended; the gateway said: " + " | ".join(server.said))
    return result


def summarise(rounds: list[dict[str, Any]], watch: Watch, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, and the ratios that the issue asks for."""

    def median(name: str, *path: str) -> float:
        values = []
        for each in rounds:
            value = each[name]
            for key in path:
                value = value[key]
            values.append(value)
        return float(statistics.median(values))

    summary: dict[str, Any] = {
        "faults": [fault for each in rounds for fault in each["gateway"]["faults"]],
        "tokens_checked": sum(each["gateway"]["all_tokens"] for each in rounds),
        "requests": sum(each["gateway"]["requests"] for each in rounds),
        "rss_slope_mb_per_min": round(watch.slope(skip_s=min(60.0, options.minutes * 15)) * 60 / 1e6, 3),
    }
    for measured in ("delay_ms", "gap_added_ms"):
        for quantile in ("p50", "p99"):
            ours, bare = median("gateway", measured, quantile), median("echo", measured, quantile)
            summary[f"{measured}_{quantile}"] = {"gateway": ours, "echo": bare, "ratio": ratio_of(ours, bare)}
    for unit in (
        "server_cpu_us_per_message",
        "server_cpu_us_per_token",
        "tokens_per_message",
        "tokens_per_s",
    ):
        summary[unit] = {name: median(name, unit) for name in ("gateway", "echo")}
    return summary


def ratio_of(ours: float, bare: float) -> float:
    """Ours over the echo's."""
    return round(ours / bare, 3) if bare else 0.0


def tell(title: str, ours: dict[str, Any], bare: dict[str, Any]) -> None:
    """A line for each on standard error."""
    print(f"{title}; load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    for name, got in (("gateway", ours), ("echo", bare)):
        print(
            f"  {name:8} {got['tokens_per_s']:8.0f} tokens/s in {got['messages_per_s']:7.0f} messages/s, delay ms "
            f"{got['delay_ms']}, gap added {got['gap_added_ms']}, first {got['ttft_ms']}, server "
            f"{got['server_cpu_us_per_message']:.0f} us a message, {got['server_cpu_share']:.2f} of a core, "
            f"client {got['client_cpu_share']:.2f}, faults {len(got['faults'])}",
            file=sys.stderr,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=10.0, help="of streams through the gateway, in all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=3000, help="of one request; then the stream asks again")
    parser.add_argument("--tbt-ms", type=float, default=100.0, help="the requests' target between tokens")
    parser.add_argument("--warm-up", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
