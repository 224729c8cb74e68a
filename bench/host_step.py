"""What a step costs the host on the CUDA path: `python bench/host_step.py [--running N ...] [--json PATH]`.

The real scheduler and the real CUDA executor, KV pool and lists of attention work for Llama-3.1-8B's shape,
over a stub device whose work takes virtual time and computes nothing. So this is what Drift's own Python
costs; the driver's calls of a step (one copy, one graph launch, two or three events) come on top and are
measured by `bench/gpu.py`.

Two numbers per count of running requests. *Gap*: from the moment a finished step is seen to the moment the
next one is launched, when the device has nothing to decode; the bound aimed for is 300 us at 128. *Total*: the
gap and what is prepared while the device runs. Each twice: *steady*, the same requests step after step, and
*changing*: outputs of 100 to 400 tokens, each that ends replaced by a new request of 200 to 1500 prompt tokens. At 128
running that is half a request ending, half a prompt launched and half a request joining per step, about what ShareGPT's
outputs (195 tokens in the mean) make of a full batch; how many it were is in the table, and steps by what changed in
them are in the JSON. `--stops`: outputs end by a token that nobody foresees, not at their limit, which is known.

Nothing but time differs between runs, so on a machine with other work `--repeats N` takes each step's least
time over N runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(p) for p in (Path(__file__).parent.parent / "packages").glob("*/src")]

import torch  # noqa: E402

from drift_core.cuda.executor import CudaExecutor  # noqa: E402
from drift_core.cuda.kernels import ReferenceKernels, Shape  # noqa: E402
from drift_core.cuda.stub import StubDevice  # noqa: E402
from drift_core.kv import PagedKv, PoolPlan  # noqa: E402
from drift_core.model.config import ModelConfig, Rope  # noqa: E402
from drift_core.model.decoder import Decoder, KvCache  # noqa: E402
from drift_core.model.weights import random_weights  # noqa: E402
from drift_core.sampling_params import SamplingParams  # noqa: E402
from drift_core.sequences import SequenceTable  # noqa: E402
from drift_kernels.ops import ReferenceOps  # noqa: E402
from drift_scheduler.cost.online import OnlineCost  # noqa: E402
from drift_scheduler.dispatch import FACTORIES  # noqa: E402
from drift_scheduler.domain import (  # noqa: E402
    SLO,
    DecodeShape,
    Device,
    Finished,
    Observation,
    Partition,
    PrefillShape,
    Request,
    Sharing,
    Step,
)
from drift_scheduler.loop import serve  # noqa: E402
from drift_scheduler.partition import TightestDecode  # noqa: E402
from drift_scheduler.scheduler import Limits, Scheduler  # noqa: E402

CLOCK = time.thread_time
"""Processor time of the engine's thread: what else runs on the machine does not count."""

COUNTS = (16, 64, 128, 256)
UNITS, LAYERS, PAGE_TOKENS, CONTEXT = 132, 4, 16, 8192
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)
STOP, MEAN_OUTPUT = 1, 250
STOPPING = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None, stop_token_ids=[STOP])
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, ignore_eos=True, max_tokens=None)

# Heads and pages of Llama-3.1-8B, which decide what the host does; widths that it never looks at are small.
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=64,
    num_layers=LAYERS,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_eps=1e-5,
    rope=Rope(500000.0),
    layer_windows=(None,) * LAYERS,
    max_context=CONTEXT,
)


DECODE, LAYER, MIXED = 6e-3, 1e-3, 9e-3
"""Seconds that the stub takes for a decode step, a layer of prefill and a mixed pass."""


class StubCosts:
    """Knows what the stub takes, as a profile knows a device; what learns on top of it does so here, too."""

    def prefill(self, work: PrefillShape, units: int) -> float:
        return LAYER * LAYERS

    def decode(self, work: DecodeShape, units: int) -> float:
        return DECODE

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        return MIXED

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        return 1.0, 1.0

    def observe(self, observation: Observation) -> None:
        return


class Splits:
    """An H200's menu, with nothing behind it."""

    units = UNITS

    def menu(self) -> tuple[tuple[int, int], ...]:
        splits = tuple((UNITS - decode, decode) for decode in range(16, 121, 16))
        return ((UNITS, 0), *splits, (0, UNITS))

    def streams(self, split: tuple[int, int]) -> tuple[int, int]:
        return 0, 0

    def realised(self, split: tuple[int, int]) -> tuple[int, int]:
        return split

    def close(self) -> None:
        return


def build(running: int) -> CudaExecutor:
    """An executor whose device computes nothing: 6 ms a decode step, 1 ms a layer of prefill."""
    stub = StubDevice(
        UNITS,
        lambda work, place: {"decode": DECODE, "prefill": LAYER * work.layers, "mixed": MIXED}.get(
            work.name, 2e-6
        ),
        runs=False,
        checks=False,
    )
    stub.kind = "cuda"  # nobody asks what work touches
    pages = running * (CONTEXT // PAGE_TOKENS) // 2
    sequences = SequenceTable()
    kv = PagedKv(pages, PAGE_TOKENS, sequences.tokens_of, put_off=True)
    cache = KvCache([torch.empty(pages + 1, 0)], [torch.empty(pages + 1, 0)], PAGE_TOKENS)
    decoder = Decoder(MODEL, random_weights(MODEL, torch.float32), ReferenceOps(), CONTEXT)
    menu = tuple(Partition(*entry) for entry in Splits().menu())
    device = Device(UNITS, menu, LAYERS, frozenset(Sharing), name="stub")
    executor = CudaExecutor(
        stub, Splits(), decoder, cache, ReferenceKernels(Shape.of(MODEL, PAGE_TOKENS)), kv,
        PoolPlan(pages, PAGE_TOKENS, 1, CONTEXT), sequences, device, max_running=running, prefill_tokens=8192,
    )  # fmt: skip
    executor.warm_up()
    return executor


class Watch:
    """Times of every pass through the loop in which a decode step ended and the next one was launched."""

    def __init__(self, executor: CudaExecutor, running: int, steps: int, stops: bool = False) -> None:
        self._draw = random.Random(running) if stops else None
        self.gaps: list[float] = []
        self.decided_ahead = 0.0  # share of all decisions
        self.totals: list[float] = []
        self._executor, self._running, self._left = executor, running, steps
        self._seen = 0.0
        self._decoding = 0
        self._before: tuple[str, ...] = ()
        self.changes: list[tuple[int, int, bool]] = []
        """Of each step: requests that left and joined since the one before, whether a prefill began with it."""
        self._submit, self._wait = executor.submit, executor.wait
        self._news = executor._news
        executor.submit = self.submit  # type: ignore[method-assign]
        executor.wait = self.wait  # type: ignore[method-assign]
        executor._news = self.news  # type: ignore[method-assign]

    def news(self) -> list[Any]:
        begun = CLOCK()
        events = self._news()
        if events:
            self._seen = begun
        return events

    def submit(self, gang: Any) -> None:
        self._submit(gang)
        if gang.decode is not None:
            now = CLOCK()
            before, ids = set(self._before), gang.decode.request_ids
            self._before = ids
            if len(gang.decode.request_ids) >= 0.9 * self._running and self._decoding:
                launched = self._executor.times.spent.get("launch decode")
                after = self._executor.times.spent["submit"][-1] - launched[-1] if launched else 0.0
                self.gaps.append(now - self._seen - after)
                spent = self._executor.times.spent
                beside = sum(sum(spent.pop(name, ())) for name in ("prepare", "settle", "decide ahead"))
                self.totals.append(now - self._seen + beside)
                left, joined = len(before.difference(ids)), len(set(ids) - before)
                self.changes.append((left, joined, gang.prefill is not None))
                self._left -= 1
            self._decoding += 1
            self._plant()

    def _plant(self) -> None:
        """Which rows the step that runs will give a stop token."""
        if self._draw is not None:
            chosen = self._executor.decode.outputs.chosen
            for row in range(len(self._executor.decode.rows)):
                chosen[row] = STOP if self._draw.random() < 1 / MEAN_OUTPUT else 0

    def wait(self, until: float | None) -> Sequence[Any] | None:
        if self._left <= 0:
            self._executor.shut_down()
        return self._wait(until)


def measure(
    running: int,
    steps: int,
    policy: str,
    *,
    changing: bool = True,
    sampling: SamplingParams = GREEDY,
    repeats: int = 1,
    ahead: bool = True,
    stops: bool = False,
) -> dict[str, Any]:
    """Times of decoding `running` requests, each step's the least over the repeats."""
    watches = [run(running, steps, policy, changing, sampling, ahead, stops) for _ in range(repeats)]
    gaps = [min(times) for times in zip(*(watch.gaps for watch in watches), strict=True)]
    totals = [min(times) for times in zip(*(watch.totals for watch in watches), strict=True)]
    changes = watches[0].changes
    kinds: dict[str, list[float]] = {}
    for gap, change in zip(gaps, changes, strict=True):
        kinds.setdefault(_described(change), []).append(gap)
    return {
        "steps": len(gaps),
        "decided_ahead": statistics.mean(watch.decided_ahead for watch in watches),
        "left_per_step": statistics.mean(left for left, _, _ in changes),
        "joined_per_step": statistics.mean(joined for _, joined, _ in changes),
        "prefills_begun_per_step": statistics.mean(begun for _, _, begun in changes),
        "gap_us_p10": _quantile(gaps, 0.1) * 1e6,
        "gap_us_p50": statistics.median(gaps) * 1e6,
        "gap_us_p90": _quantile(gaps, 0.9) * 1e6,
        "total_us_p50": statistics.median(totals) * 1e6,
        "by_change": {
            kind: {"steps": len(times), "gap_us_p50": statistics.median(times) * 1e6}
            for kind, times in sorted(kinds.items())
        },
    }


def _described(change: tuple[int, int, bool]) -> str:
    left, joined, begun = change
    named = (("left", left), ("joined", joined), ("prefill begun", begun))
    return ", ".join(name for name, there in named if there) or "nothing"


def run(
    running: int,
    steps: int,
    policy: str,
    changing: bool,
    sampling: SamplingParams,
    ahead: bool = True,
    stops: bool = False,
) -> Watch:
    """Decoding of `running` requests. `changing`: as one ends, another arrives, every other step; else nobody ends.

    `stops`: they end by a stop token.
    """
    stops = stops and changing
    if stops:
        sampling = STOPPING
    draw = random.Random(running)
    executor = build(running)
    executor.times.clock = CLOCK
    scheduler = Scheduler(
        executor.device,
        executor.kv,
        FACTORIES[policy](),
        TightestDecode(),
        OnlineCost(StubCosts(), LAYERS),
        Limits(max_running=running),
    )
    if ahead:
        executor.meanwhile = scheduler.plan_ahead
        executor.planned = lambda: scheduler.planned
    watch = Watch(executor, running, steps, stops)
    gc.collect()
    gc.freeze()  # as the engine does
    made = 0

    def arrive(output: int) -> None:
        nonlocal made
        prompt = [draw.randrange(512) for _ in range(draw.randint(200, 1500))]
        request = Request(f"r{made}", executor.now(), len(prompt), output, SLO(10.0, 0.1), prompt=prompt)
        executor.arrive(request, sampling)
        made += 1

    def deliver(step: Step) -> None:
        for fault in step.faults:
            raise RuntimeError(fault)
        for output in step.outputs:
            if isinstance(output, Finished):
                arrive(4000 if stops else draw.randint(100, 400))

    for _ in range(running):
        arrive(draw.randint(5, 400) if changing and not stops else 4000)
    serve(scheduler, executor, deliver)
    watch.decided_ahead = scheduler.plans_used / scheduler.steps
    gc.unfreeze()
    return watch


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dispatch", default="gang", choices=sorted(FACTORIES))
    parser.add_argument(
        "--sampled", action="store_true", help="draw tokens (temperature, top-p), not the likeliest"
    )
    parser.add_argument("--stops", action="store_true", help="outputs end by a token, not at their limit")
    parser.add_argument("--repeats", type=int, default=1, help="runs, of which each step's least time counts")
    parser.add_argument("--not-ahead", action="store_true", help="decide only when a step has ended")
    parser.add_argument("--json", default=None, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    sampling = DRAWN if options.sampled else GREEDY
    print(f"{'running':>8}{'':>10}{'left/step':>10}{'gap p10':>10}{'p50':>8}{'p90':>8}{'total p50':>12}  us")
    for count in options.running:
        for name, changing in (("steady", False), ("changing", True)):
            row = measure(
                count, options.steps, options.dispatch, changing=changing, sampling=sampling,
                repeats=options.repeats, ahead=not options.not_ahead, stops=options.stops,
            )  # fmt: skip
            found[f"{count} {name}"] = row
            print(
                f"{count:>8}{name:>10}{row['left_per_step']:>10.2f}{row['gap_us_p10']:>10.0f}"
                f"{row['gap_us_p50']:>8.0f}{row['gap_us_p90']:>8.0f}"
                f"{row['total_us_p50']:>12.0f}"
            )
    if options.json:
        report = {
            "schema": "drift.bench.host-step/1", "python": platform.python_version(), "cpus": os.cpu_count(),
            "dispatch": options.dispatch, "sampled": options.sampled, "repeats": options.repeats,
            "ahead": not options.not_ahead, "stops": options.stops, "running": found,
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
