"""Tokens per second through one gateway process when more and more come, beside a bare gRPC echo of the same load.

    nox -s bench -- gateway_most [--streams 512] [--step-ms 5 2 1 0.5] [--rounds 3] [--out PATH]

The gateway is `drift serve`, its engine one that takes next to nothing (`gateway_parts.source`), so that on two cores
it is the gateway that is measured. With shorter steps more tokens come than can be sent one by one, and messages grow.
The echo has as many tokens to send, of steps as long, and its messages hold what the gateway's turned out to hold in
the run just before; where either is late, what came meanwhile goes along. As far as both keep up that says nothing of
what they could send, so the echo runs once more with all its tokens ready (`ready`), in messages as large: its most.
Machines vary: figures are medians over the rounds, and ratios are of neighbours. Processor time per message is over the
whole run, its beginning included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from gateway_parts.processes import Server, start_echo, start_fed_gateway
from gateway_soak import measure, ratio_of, tell

RESULTS = Path(__file__).parent / "results" / "gateway_most.json"


def main() -> None:
    options = _options()
    begun = time.time()
    pairs = [pair(options, step_ms) for _ in range(options.rounds) for step_ms in options.step_ms]
    report = {
        "schema": "drift.bench.gateway_most/1",
        "config": vars(options) | {"out": str(options.out.name)},
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()},
        "began": begun,
        "summary": [
            summarise([each for each in pairs if each["step_ms"] == step_ms]) for step_ms in options.step_ms
        ],
        "pairs": pairs,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    sys.exit(any(each["gateway"]["faults"] for each in pairs))


def pair(options: argparse.Namespace, step_ms: float) -> dict[str, Any]:
    """One run of each at the same load."""
    ours = _run(start_fed_gateway(step_ms, options.streams), options)
    bare = _run(start_echo(step_ms, ours["tokens_per_message"]), options)
    ready = _run(start_echo(step_ms, ours["tokens_per_message"], ready=True), options)
    tell(f"a step every {step_ms:g} ms", ours, bare)
    return {
        "step_ms": step_ms,
        "offered_tokens_per_s": options.streams / step_ms * 1e3,
        "gateway": ours,
        "echo": bare,
        "ready": ready,
    }


def summarise(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs at one load."""

    def median(name: str, value: str) -> float:
        return float(statistics.median(each[name][value] for each in pairs))

    def ratios(other: str) -> list[float]:
        return [ratio_of(each["gateway"]["tokens_per_s"], each[other]["tokens_per_s"]) for each in pairs]

    values = ("tokens_per_s", "tokens_per_message", "server_cpu_us_per_message")
    return {
        "step_ms": pairs[0]["step_ms"],
        "offered_tokens_per_s": pairs[0]["offered_tokens_per_s"],
        **{value: {name: median(name, value) for name in ("gateway", "echo", "ready")} for value in values},
        "ratio": statistics.median(ratios("echo")),
        "ratios": ratios("echo"),
        "ratio_to_ready": statistics.median(ratios("ready")),
        "ratios_to_ready": ratios("ready"),
    }


def _run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    try:
        return measure(server, options, options.seconds, [])
    finally:
        server.end()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[5.0, 2.0, 1.0, 0.5])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    parser.add_argument(
        "--tokens", type=int, default=30_000, help="of one request: more than the run lasts for"
    )
    parser.add_argument("--tbt-ms", type=float, default=100.0, help="the requests' target between tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
