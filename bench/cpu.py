"""Serve the demo model and a 0.5B-shaped one on CPU cores under each dispatch policy, same arrivals, interleaved.

    nox -s bench -- cpu [--quick] [--model demo|0.5b] [--out PATH]

Two loads per model. *Paced*: Poisson arrivals at a share of what the device can do, for latency. *Saturated*: more
than it can do, for throughput. Every round runs all policies one after another, starting with another one each time,
so that a slow minute of the machine hits all alike. Writes JSON and prints a table.

The decision logs of each load's first round are replayed in the simulator, with costs fitted to their lane times: its
error in what requests saw, and whether it ranks the policies as the cores did (Kendall's tau).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drift_kernels.process import prepare_process

prepare_process()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from drift_core import profile_cache  # noqa: E402
from drift_core.assembly import cpu_device, cpu_executor, pin_with  # noqa: E402
from drift_core.executor import CpuExecutor  # noqa: E402
from drift_core.kv import plan_pool  # noqa: E402
from drift_core.model.config import ModelConfig, Rope, load_config  # noqa: E402
from drift_core.model.decoder import Decoder, KvCache  # noqa: E402
from drift_core.model.weights import DTYPES, load_weights, random_weights  # noqa: E402
from drift_core.profile import measure, plan_grid  # noqa: E402
from drift_core.sampling_params import SamplingParams  # noqa: E402
from drift_kernels.affinity import CpuAffinity  # noqa: E402
from drift_kernels.ops import select_ops  # noqa: E402
from drift_scheduler import plugins  # noqa: E402
from drift_scheduler.cost.fitted import FittedCost  # noqa: E402
from drift_scheduler.cost.table import CostTable  # noqa: E402
from drift_scheduler.decision_log import DecisionLog  # noqa: E402
from drift_scheduler.domain import (  # noqa: E402
    SLO,
    DecodeShape,
    Finished,
    FinishReason,
    Gang,
    PrefillShape,
    Request,
    Step,
    StepRecord,
    Tokens,
)
from drift_scheduler.loop import serve  # noqa: E402
from drift_scheduler.protocols import CostModel, Observer  # noqa: E402
from drift_scheduler.replay import replay  # noqa: E402
from drift_scheduler.scheduler import Limits, Scheduler  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "cpu.json"
POLICIES = ("drift", "gang", "chunked-prefill", "alternate", "prefill-first")
MAX_RUNNING = 16
PACED, SATURATED = 0.6, 1.5  # arrivals, as a share of what the whole device can do by the cost table
SECONDS = {"demo": (6.0, 3.0), "0.5b": (14.0, 6.0)}  # of arrivals in a run, in full and quick
ROUNDS = {"demo": 3, "0.5b": 2}
BUDGETS = (32, 64, 128, 256, 512)
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)

HALF_BILLION = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=32768,  # of 151936: the head would otherwise be a third of the model
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    rms_eps=1e-6,
    rope=Rope(1000000.0),
    layer_windows=(None,) * 24,
    max_context=2048,
    qkv_bias=True,
    tied_embeddings=True,
    dtype="bfloat16",
)


@dataclass(frozen=True)
class Subject:
    """A model to serve and the lengths of its requests (lowest, highest), uniform on a log scale."""

    name: str
    config: ModelConfig
    decoder: Decoder
    cache: KvCache
    table: CostTable
    prompt: tuple[int, int]
    output: tuple[int, int]

    def costs(self) -> FittedCost:
        return FittedCost(self.table)


@dataclass
class Outcome:
    """What requests saw under one policy and load, over all rounds. Times in seconds."""

    ttft: list[float] = field(default_factory=list)
    tbt: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    submit: list[float] = field(default_factory=list)
    seconds: float = 0.0
    requests: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0

    def summary(self) -> dict[str, float]:
        return {
            "requests": self.requests,
            "seconds": self.seconds,
            "ttft_p50": _quantile(self.ttft, 50),
            "ttft_p99": _quantile(self.ttft, 99),
            "tbt_p50": _quantile(self.tbt, 50),
            "tbt_p99": _quantile(self.tbt, 99),
            "tbt_max": max(self.tbt, default=float("nan")),
            "output_tokens_per_s": self.output_tokens / self.seconds,
            "total_tokens_per_s": (self.output_tokens + self.prompt_tokens) / self.seconds,
            "requests_per_s": self.requests / self.seconds,
            "scheduler_step_us_p50": _quantile(self.step, 50) * 1e6,
            "submit_us_p50": _quantile(self.submit, 50) * 1e6,
        }


def timed_submit(executor: CpuExecutor, seconds: list[float]) -> None:
    """Note how long the engine's thread takes to build and hand over each gang."""
    submit = executor.submit

    def timed(gang: Gang) -> None:
        begun = time.perf_counter()
        submit(gang)
        seconds.append(time.perf_counter() - begun)

    executor.submit = timed  # type: ignore[method-assign]


class Watcher:
    """Collects what requests see, step by step, and ends the run after the last of them."""

    def __init__(self, outcome: Outcome, expected: int, end: Any) -> None:
        self._outcome, self._left, self._end = outcome, expected, end

    def deliver(self, step: Step) -> None:
        for fault in step.faults:
            raise RuntimeError(f"the scheduler noted a fault: {fault}")
        for output in step.outputs:
            match output:
                case Tokens(gaps=gaps, first=first):
                    (self._outcome.ttft if first else self._outcome.tbt).extend(gaps.tolist())
                    self._outcome.output_tokens += len(gaps)
                case Finished(reason=reason, timing=timing):
                    if reason is not FinishReason.LENGTH:
                        raise RuntimeError(
                            f"request '{output.request_id}' ended as {reason}: {output.message}"
                        )
                    self._outcome.prompt_tokens += timing.prompt_tokens
                    self._outcome.requests += 1
                    self._left -= 1
                    if not self._left:
                        self._end()
                case _:
                    pass

    def on_step(self, record: StepRecord) -> None:
        if record.step_seconds is not None:
            self._outcome.step.append(record.step_seconds)


def main() -> None:
    options = _options()
    console = Console(stderr=True)
    affinity = CpuAffinity()
    if affinity.units < 2:
        sys.exit("one core cannot be split: this benchmark needs two")
    results: dict[str, Any] = {
        "schema": "drift.bench.cpu/1",
        "config": _machine(affinity, options),
        "models": {},
    }
    for name in options.model:
        console.print(f"[bold]{name}[/]: load and profile")
        subject = _subject(name, affinity, console)
        with tempfile.TemporaryDirectory() as folder:
            results["models"][name] = _bench(subject, affinity, options, console, Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, model in results["models"].items():
        _print(name, model)
    print(f"written to {options.out}")


def _bench(
    subject: Subject, affinity: CpuAffinity, options: argparse.Namespace, console: Console, folder: Path
) -> dict[str, Any]:
    seconds = options.seconds or SECONDS[subject.name][options.quick]
    rounds = options.rounds or (1 if options.quick else ROUNDS[subject.name])
    budget = _budget(subject)
    capacity = _capacity(subject)
    console.print(
        f"  {capacity:.2f} requests/s on the whole device by the table; chunked prefill with {budget} tokens"
    )
    choices = {
        name: f"{name}:token_budget={budget}" if name == "chunked-prefill" else name for name in POLICIES
    }
    loads: dict[str, Any] = {}
    simulator: dict[str, Any] = {}
    for load, share in (("paced", PACED), ("saturated", SATURATED)):
        outcomes = {name: Outcome() for name in POLICIES}
        for round_ in range(rounds):
            arrivals = _arrivals(subject, capacity * share, seconds, seed=round_)
            for name in POLICIES[round_ % len(POLICIES) :] + POLICIES[: round_ % len(POLICIES)]:
                console.print(f"  {load}, round {round_ + 1} of {rounds}: {name}, {len(arrivals)} requests")
                log = None if round_ else folder / f"{load}-{name}.jsonl"
                _run(subject, affinity, choices[name], arrivals, outcomes[name], log)
        loads[load] = {name: outcome.summary() for name, outcome in outcomes.items()}
        simulator[load] = _simulated([folder / f"{load}-{name}.jsonl" for name in POLICIES])
    return {
        "shape": {"layers": subject.config.num_layers, "hidden": subject.config.hidden_size,
                  "vocab": subject.config.vocab_size, "dtype": str(subject.decoder.weights.dtype)},
        "ops": subject.decoder.ops.description,
        "prompt_tokens": subject.prompt,
        "output_tokens": subject.output,
        "token_budget": budget,
        "rounds": rounds,
        "capacity_requests_per_s": capacity,
        "ideal_work_ratio_by_the_table": _ideal(subject),
        "slowdown": [list(row) for row in ((r.prefill_factor, r.decode_factor) for r in subject.table.slowdown)],
        "loads": loads,
        "simulator": simulator,
        "found": _found(loads),
    }  # fmt: skip


def _simulated(logs: Sequence[Path]) -> dict[str, Any]:
    """The simulator's relative errors by policy, and how its ranking of the policies agrees, per statistic."""
    report = replay([str(log) for log in logs], [], None, plugins.load(installed=False))
    return {
        "error": {found["dispatch"]: found["error"] for found in report["logs"]},
        "tau": {name: found["tau"] for name, found in report["ranking"]["statistics"].items()},
    }


def _found(loads: dict[str, Any]) -> dict[str, float]:
    """The ratios that the benchmark is about."""
    paced, saturated = loads["paced"], loads["saturated"]
    return {
        "work_of_gang_over_alternate": saturated["gang"]["total_tokens_per_s"]
        / saturated["alternate"]["total_tokens_per_s"],
        "tbt_p99_of_unchunked_prefill_over_gang": paced["prefill-first"]["tbt_p99"]
        / paced["gang"]["tbt_p99"],
        "saturated_tbt_p99_of_unchunked_prefill_over_gang": saturated["prefill-first"]["tbt_p99"]
        / saturated["gang"]["tbt_p99"],
        "tbt_p99_of_chunked_prefill_over_gang": paced["chunked-prefill"]["tbt_p99"]
        / paced["gang"]["tbt_p99"],
    }


def _run(
    subject: Subject,
    affinity: CpuAffinity,
    policy: str,
    arrivals: Sequence[Request],
    outcome: Outcome,
    log: Path | None,
) -> None:
    """Serve the arrivals once, from an empty cache; `log`: where the decision log goes."""
    plan = plan_pool(_pool_bytes(subject), _page_bytes(subject), 16, subject.config.max_context)
    executor = cpu_executor(subject.decoder, subject.cache, plan, affinity)
    timed_submit(executor, outcome.submit)
    executor.warm_up()
    name, _, option = policy.partition(":")
    fields = {key: int(value) for key, value in [option.split("=")] if option} if option else {}
    registry = plugins.load(installed=False)
    dispatch = registry.create("dispatch policy", name, **fields)
    partitions = registry.create("partition policy", "tightest-decode")
    costs: CostModel = subject.costs()
    limits = Limits(max_running=MAX_RUNNING, max_context_tokens=subject.config.max_context)
    scheduler = Scheduler(executor.device, executor.kv, dispatch, partitions, costs, limits)
    watcher = Watcher(outcome, len(arrivals), executor.shut_down)
    settings = {"dispatch": policy, "partition": "tightest-decode"}
    decisions = None if log is None else DecisionLog(log, scheduler, settings)
    observers: list[Observer] = [watcher] if decisions is None else [watcher, decisions]
    begun = time.monotonic() + 0.05

    def generate() -> None:
        for request in _shifted(arrivals, begun):
            time.sleep(max(0.0, request.arrival - time.monotonic()))
            executor.arrive(request, GREEDY)

    generator = threading.Thread(target=generate, daemon=True)
    generator.start()
    try:
        serve(scheduler, executor, watcher.deliver, observers, stopwatch=time.perf_counter)
        outcome.seconds += time.monotonic() - begun
    finally:
        generator.join()
        executor.close()
        if decisions is not None:
            decisions.close()


def _shifted(arrivals: Sequence[Request], begun: float) -> Iterator[Request]:
    for request in arrivals:
        yield Request(
            id=request.id,
            arrival=begun + request.arrival,
            prompt_tokens=request.prompt_tokens,
            max_output_tokens=request.max_output_tokens,
            slo=request.slo,
            prompt=request.prompt,
        )


def _ideal(subject: Subject) -> float:
    """What splitting could gain by the table if no lane ever idled: the shares of its speed that each side keeps."""
    costs = subject.costs()
    prompt = PrefillShape.of([(round(_mean_length(subject.prompt)), 0)])
    step = DecodeShape(8, round(8 * _mean_length(subject.prompt)))
    whole, row = subject.table.total_units, subject.table.slowdown[0]
    prefill = costs.prefill(prompt, whole) / (costs.prefill(prompt, row.prefill_units) * row.prefill_factor)
    decode = costs.decode(step, whole) / (costs.decode(step, row.decode_units) * row.decode_factor)
    return prefill + decode


def _arrivals(subject: Subject, rate: float, seconds: float, seed: int) -> list[Request]:
    """Poisson arrivals for `seconds`, of prompts that share nothing."""
    draw = random.Random(f"{subject.name}/{seed}")
    slo = SLO(ttft=2.0, tbt=_target(subject))
    requests: list[Request] = []
    now = draw.expovariate(rate)
    while now < seconds or len(requests) < 4:
        prompt = [draw.randrange(3, subject.config.vocab_size) for _ in range(_length(draw, subject.prompt))]
        output = _length(draw, subject.output)
        requests.append(Request(f"r{len(requests)}", now, len(prompt), output, slo, prompt=prompt))
        now += draw.expovariate(rate)
    return requests


def _length(draw: random.Random, bounds: tuple[int, int]) -> int:
    low, high = np.log(bounds)
    return round(float(np.exp(draw.uniform(low, high))))


def _mean_length(bounds: tuple[int, int]) -> float:
    low, high = bounds
    return float((high - low) / np.log(high / low))


def _capacity(subject: Subject) -> float:
    """Requests per second that the whole device serves one phase at a time, decoding eight together."""
    costs, units = subject.costs(), subject.table.total_units
    prompt, output = _mean_length(subject.prompt), _mean_length(subject.output)
    prefill = costs.prefill(PrefillShape.of([(round(prompt), 0)]), units)
    decode = costs.decode(DecodeShape(8, round(8 * (prompt + output / 2))), units)
    return 1.0 / (prefill + output * decode / 8)


def _target(subject: Subject) -> float:
    """A TBT target that leaves room beside decoding: three times a step of eight requests on the whole device."""
    costs, units = subject.costs(), subject.table.total_units
    return 3.0 * costs.decode(DecodeShape(8, round(8 * _mean_length(subject.prompt))), units)


def _budget(subject: Subject) -> int:
    """Chunked prefill at its best: the largest token budget whose step stays within the TBT target."""
    costs, units, target = subject.costs(), subject.table.total_units, _target(subject)
    context = round(8 * _mean_length(subject.prompt))
    fitting = [
        budget
        for budget in BUDGETS
        if costs.fused(PrefillShape.of([(budget - 8, 0)]), DecodeShape(8, context), units) <= target
    ]
    return max(fitting, default=BUDGETS[0])


# ------------------------------------------------------------------------------------------------ set-up


def _subject(name: str, affinity: CpuAffinity, console: Console) -> Subject:
    config = load_config("demo") if name == "demo" else HALF_BILLION
    dtype = DTYPES[config.dtype]
    weights = load_weights("demo", config, dtype) if name == "demo" else random_weights(config, dtype, seed=0)
    decoder = Decoder(config, weights, select_ops("cpu", dtype), config.max_context)
    pages = MAX_RUNNING * -(-config.max_context // 16)
    cache = KvCache.allocate(config, pages, 16, dtype)
    device = cpu_device(affinity, config.num_layers)
    grid = plan_grid(device, max_context=config.max_context, max_running=MAX_RUNNING, full=False)
    begun = time.perf_counter()
    table = measure(decoder, cache, device, pin_with(affinity), grid, model=name)
    console.print(f"  {decoder.ops.description}; profiled in {time.perf_counter() - begun:.1f} s")
    lengths = ((16, min(700, config.max_context // 2)), (16, 64)) if name == "demo" else ((32, 512), (16, 64))
    return Subject(name, config, decoder, cache, table, *lengths)


def _page_bytes(subject: Subject) -> int:
    return KvCache.bytes_per_page(subject.config, 16, subject.decoder.weights.dtype)


def _pool_bytes(subject: Subject) -> int:
    return subject.cache.num_pages * _page_bytes(subject)


def _machine(affinity: CpuAffinity, options: argparse.Namespace) -> dict[str, Any]:
    names = ("drift-scheduler", "drift-kernels", "drift-core", "torch", "numpy")
    return {
        "quick": options.quick,
        "processor": profile_cache.processor(),
        "cores": affinity.description,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": _commit(),
        "load_average_before": list(os.getloadavg()),
    }


def _commit() -> str:
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _quantile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


def _print(name: str, model: dict[str, Any]) -> None:
    table = Table(
        title=f"{name}: {model['shape']['layers']} layers, {model['shape']['dtype']}, {model['ops']}"
    )
    for heading in (
        "load",
        "policy",
        "TTFT p50",
        "p99",
        "TBT p50",
        "p99",
        "output tok/s",
        "all tok/s",
        "step",
        "submit",
    ):
        table.add_column(heading, justify="left" if heading in ("load", "policy") else "right")
    for load, policies in model["loads"].items():
        for policy, row in policies.items():
            times = [f"{row[key] * 1e3:,.1f} ms" for key in ("ttft_p50", "ttft_p99", "tbt_p50", "tbt_p99")]
            rates = [f"{row[key]:,.0f}" for key in ("output_tokens_per_s", "total_tokens_per_s")]
            host = [f"{row[key]:.0f} us" for key in ("scheduler_step_us_p50", "submit_us_p50")]
            table.add_row(load, policy, *times, *rates, *host)
        table.add_section()
    Console(width=140).print(table)
    for load, simulated in model["simulator"].items():
        worst = {name: max(map(abs, error.values())) for name, error in simulated["error"].items()}
        tau = ", ".join(f"{name} {value:.2f}" for name, value in simulated["tau"].items())
        print(
            f"{load}: the simulator's worst error {max(worst.values()):.0%}; Kendall's tau of its ranking: {tau}"
        )
    found = model["found"]
    print(
        f"by the profile, splitting could do {model['ideal_work_ratio_by_the_table']:.2f}x the work at best; "
        f"gang does {found['work_of_gang_over_alternate']:.2f}x the work of strict alternation (saturated); "
        f"p99 TBT of unchunked prefill is {found['tbt_p99_of_unchunked_prefill_over_gang']:.1f}x (paced) and "
        f"{found['saturated_tbt_p99_of_unchunked_prefill_over_gang']:.1f}x (saturated) that of gang, "
        f"of chunked prefill {found['tbt_p99_of_chunked_prefill_over_gang']:.1f}x (paced)\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark dispatch policies on CPU cores.")
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--model", action="append", choices=("demo", "0.5b"), help="default: both")
    parser.add_argument("--seconds", type=float, help="of arrivals in each run")
    parser.add_argument("--rounds", type=int, help="over all policies")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.model = options.model or ["demo", "0.5b"]
    return options


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
