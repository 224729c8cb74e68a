"""What one `Scheduler.step` costs, by running requests: `python bench/scheduler_step.py [--json PATH]`.

Steady decoding with prompts arriving as requests end, on a device split like an A100; every step is timed alone. The
counts are interleaved round by round, medians and means over all rounds. Bounds: 100 us at 64 running requests and
250 us at 256.

Twice: *same outputs*, 64 to 319 tokens each, so that with more running more of them begin and end in a step, which
costs something for each; and *same changes*, outputs as much longer as more are running, so that the same number
begins and ends in a step whatever the count (a third), and what is left is what the size of the batch costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence

from drift_scheduler import (
    SLO,
    DecodeDone,
    Device,
    Gang,
    Limits,
    Partition,
    PrefillDone,
    Request,
    RequestArrived,
    Scheduler,
)
from drift_scheduler.conformance import FlatCosts
from drift_scheduler.dispatch import FACTORIES
from drift_scheduler.domain import Event
from drift_scheduler.partition import TightestDecode
from drift_scheduler.simulation.kv import CountingKv

POLICIES = ("drift", "gang", "chunked-prefill")
COUNTS = (16, 64, 128, 256, 512)


def device() -> Device:
    """108 SMs in steps of 16 and 32 layers."""
    menu = [Partition(108, 0), Partition(0, 108), *(Partition(108 - d, d) for d in range(16, 97, 16))]
    return Device(108, tuple(menu), 32, name="a100-like")


class Steady:
    """Keeps `count` requests running: each one that ends is followed by a new arrival."""

    def __init__(self, dispatch: str, count: int, longer: float = 1.0) -> None:
        self.scheduler = Scheduler(
            device(),
            CountingKv(200_000, 16),
            FACTORIES[dispatch](),
            TightestDecode(),
            FlatCosts(),
            Limits(max_running=count),
        )
        self.count = count
        self.longer = longer
        self.now = 0.0
        self.arrived = 0
        self.gang: list[tuple[float, str, Gang]] = []

    def arrive(self) -> RequestArrived:
        """A prompt of 256 tokens with 64 to 319 of output, times `longer`."""
        self.arrived += 1
        length = max(2, round((64 + (self.arrived * 37) % 256) * self.longer))
        slo = SLO(ttft=10.0, tbt=0.05)
        return RequestArrived(Request(f"r{self.arrived}", self.now, 256, length, slo))

    def run(self, steps: int) -> list[float]:
        """Seconds of each step."""
        took = []
        for _ in range(steps):
            events: list[Event] = self._due()
            missing = self.count + 2 - len(self.scheduler.live)
            events += [self.arrive() for _ in range(max(0, missing))]
            begun = time.perf_counter()
            step = self.scheduler.step(self.now, events)
            took.append(time.perf_counter() - begun)
            if step.gang is not None:
                self._start(step.gang)
        return took

    def _start(self, gang: Gang) -> None:
        if gang.decode is not None:
            self.gang.append((self.now + 0.010, "decode", gang))
        if gang.prefill is not None:
            seconds = 0.010 if gang.sharing.value == "fused" else 0.0004 * gang.prefill.layers
            self.gang.append((self.now + seconds, "prefill", gang))
        self.gang.sort(key=lambda item: item[:2])

    def _due(self) -> list[Event]:
        if not self.gang:
            return []
        at, lane, gang = self.gang.pop(0)
        self.now = at
        if lane == "decode":
            assert gang.decode is not None
            return [DecodeDone(0.010, tokens=[1] * len(gang.decode.request_ids))]
        assert gang.prefill is not None
        ended = gang.prefill.layer_stop == 32
        return [PrefillDone(0.001, tokens=[1] * sum(c.last for c in gang.prefill.chunks) if ended else None)]


def measure(dispatch: str, rounds: int, steps: int, same_changes: bool) -> dict[int, dict[str, float]]:
    """Median, mean and p99 microseconds per step for each count."""
    benches = {count: Steady(dispatch, count, count / 64 if same_changes else 1.0) for count in COUNTS}
    for bench in benches.values():
        bench.run(300 + round(4 * bench.count * max(1.0, bench.longer)))
    took: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(rounds):
        for count, bench in benches.items():
            took[count] += bench.run(steps)
    return {
        count: {
            "median_us": statistics.median(values) * 1e6,
            "mean_us": statistics.fmean(values) * 1e6,
            "p99_us": statistics.quantiles(values, n=100)[98] * 1e6,
            "decoding": benches[count].scheduler.rows.n,
        }
        for count, values in took.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    results = {}
    for title, same_changes in (("same outputs", False), ("same changes", True)):
        result = {name: measure(name, options.rounds, options.steps, same_changes) for name in POLICIES}
        results[title] = result
        print(f"{title:<16}{'running':>9}{'median us':>12}{'mean us':>10}{'p99 us':>10}")
        for name, by_count in result.items():
            for count, row in by_count.items():
                numbers = "".join(f"{row[kind]:>11.1f}" for kind in ("median_us", "mean_us", "p99_us"))
                print(f"{name:<16}{count:>9}{numbers}")
    if options.json:
        document = {
            "schema": "drift.bench.step/2",
            "python": platform.python_version(),
            "policies": results["same outputs"],
            "policies_same_changes": results["same changes"],
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
