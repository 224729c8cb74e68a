"""Tokens per second through one gateway process when more and more come, beside a bare gRPC echo of the same load.

    nox -s bench -- gateway_most [--streams 512] [--step-ms 5 2 1 0.5 0.25] [--rounds 3] [--out PATH]

The gateway is `drift serve`, its engine one that takes next to nothing (`gateway_parts.source`), so that on two cores
it is the gateway that is measured. With shorter steps more tokens come than can be sent one by one, and messages grow.
The echo has as many tokens to send, of steps as long, and its messages hold what the gateway's turned out to hold in
the run just before; where either is late, what came meanwhile goes along. As far as both keep up that says nothing of
what they could send, so the echo runs once more with all its tokens ready (`ready`), in messages as large: its most.
Beside the echo an engine runs as beside the gateway, though it reads none of its steps: on two cores what an engine
takes is what the others lack; `--echo-alone` leaves it out. What the host gives to others meanwhile decides more than
any program: rounds in which it was much (`--most-stolen`) do not count and are run again, as many as `--rounds` at
most; the report has them all.
Machines vary: figures are medians over the rounds, and ratios are of neighbours. Processor time per message is over the
whole run, its beginning included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gateway_parts.machine import Stolen, describe
from gateway_parts.processes import Server, start_echo, start_fed_gateway
from gateway_parts.unread import UnreadEngine
from gateway_soak import measure, ratio_of, tell

RESULTS = Path(__file__).parent / "results" / "gateway_most.json"


def main() -> None:
    options = _options()
    begun, stolen = time.time(), Stolen()
    pairs: list[dict[str, Any]] = []
    for step_ms in _rounds(options, pairs):
        pairs.append(pair(options, step_ms))
        report = {
            "schema": "drift.bench.gateway_most/1",
            "config": vars(options) | {"out": str(options.out.name)},
            "machine": describe(stolen),
            "began": begun,
            "summary": [summarise(each, _that_count(pairs, each)) for each in options.step_ms],
            "pairs": pairs,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    sys.exit(any(each["gateway"]["faults"] for each in pairs))


def _rounds(options: argparse.Namespace, pairs: list[dict[str, Any]]) -> Iterator[float]:
    """The loads to measure, in turns, until enough rounds of each count or twice as many were run."""
    for number in range(2 * options.rounds):
        for step_ms in options.step_ms:
            if number < options.rounds or len(_that_count(pairs, step_ms)) < options.rounds:
                yield step_ms


def pair(options: argparse.Namespace, step_ms: float) -> dict[str, Any]:
    """One run of each at the same load."""
    stolen = Stolen()
    ours = _run(start_fed_gateway(step_ms, options.streams), options)
    with nullcontext() if options.echo_alone else UnreadEngine(step_ms, options.streams):
        bare = _run(start_echo(step_ms, ours["tokens_per_message"]), options)
        ready = _run(start_echo(step_ms, ours["tokens_per_message"], ready=True), options)
    tell(f"a step every {step_ms:g} ms", ours, bare)
    share = stolen.share()
    return {
        "step_ms": step_ms,
        "stolen": share,
        "counts": share is None or share <= options.most_stolen,
        "offered_tokens_per_s": options.streams / step_ms * 1e3,
        "gateway": ours,
        "echo": bare,
        "ready": ready,
    }


def _that_count(pairs: list[dict[str, Any]], step_ms: float) -> list[dict[str, Any]]:
    return [each for each in pairs if each["step_ms"] == step_ms and each["counts"]]


def summarise(step_ms: float, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds at one load that count."""
    if not pairs:
        return {"step_ms": step_ms, "rounds": 0}

    def median(name: str, value: str) -> float:
        return float(statistics.median(each[name][value] for each in pairs))

    def ratios(other: str) -> list[float]:
        return [ratio_of(each["gateway"]["tokens_per_s"], each[other]["tokens_per_s"]) for each in pairs]

    values = ("tokens_per_s", "tokens_per_message", "server_cpu_us_per_message")
    return {
        "step_ms": step_ms,
        "rounds": len(pairs),
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
    parser.add_argument("--step-ms", type=float, nargs="+", default=[5.0, 2.0, 1.0, 0.5, 0.25])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--most-stolen",
        type=float,
        default=0.05,
        help="share of the processors' time that the host may give to others in a round that counts",
    )
    parser.add_argument("--echo-alone", action="store_true", help="no engine runs beside the echo")
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
