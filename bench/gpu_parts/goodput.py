"""Goodput of each dispatch policy: the highest rate at which p99 of TTFT and of TBT hold, searched on the
device.

Open loop, in process, the same requests for every policy. Chunked prefill gets the token budgets around the
largest whose step fits the target by the cost table, and the best of them counts. Cells (workload and TBT
target) come in order of interest; one that does not fit the time left is skipped and says so. `--cells`
chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gpu_parts.findings import Findings, Options, need_cuda
from gpu_parts.profiling import JOURNAL, TABLE
from gpu_parts.subject import executor_of, model_of, weights_of

ESTIMATE = (240.0, 540.0)
CELLS = tuple(f"{workload}:{tbt}" for tbt in (15, 25, 50) for workload in ("sharegpt", "long-context"))
POLICIES = ("chunked-prefill", "drift", "gang", "streams")
BUDGETS = (32, 64, 128, 256, 512, 1024, 2048)
MAX_RUNNING = {"sharegpt": 128, "long-context": 64}
TRIALS, TRIAL_SECONDS, REQUESTS = (3, 5), (8.0, 15.0), (120, 240)
ABOVE, NEVER_BELOW = 1.3, 0.98


def run(options: Options) -> Findings:
    """Needs a device."""
    need_cuda()
    found = Findings()
    config = model_of(options.model)
    executor = executor_of(
        config, weights_of(config), max_running=max(MAX_RUNNING.values()), max_context=32768
    )
    executor.warm_up(mixed_tokens=2048)
    table = cost_table(executor, options)
    executor.times.clock = time.perf_counter
    for cell in options.cells or CELLS:
        longest = (1 + TRIALS[not options.quick]) * TRIAL_SECONDS[not options.quick] * (len(POLICIES) + 1)
        left = options.deadline - time.monotonic()
        if left < 0.7 * longest:
            found.lines.append(f"skipped {cell}: {left:.0f} s are left, it may take {longest:.0f}")
            continue
        found.data[cell] = results = {"policies": {}}
        try:
            one_cell(executor, table, cell, options, config.vocab_size, results, found.keep)
        except Exception as error:  # the policies before it have their rates
            results["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found.lines.append(f"FAILED {cell}: {results['failed']}")
            found.at_least(f"{cell} ran", 0, 1)
        judge(found, cell)
    found.data["host us"] = {
        name: sorted(times)[len(times) // 2] * 1e6 for name, times in executor.times.spent.items() if times
    }
    return found


def cost_table(executor: Any, options: Options) -> Any:
    """What the part `profiling` measured, or the short profile."""
    from drift_scheduler.cost.table import read_table

    if (options.folder / TABLE).is_file():
        return read_table(options.folder / TABLE)
    grid = executor.plan_grid(max_running=128, full=False)
    return executor.profile(grid, options.model, lambda done: None, options.folder / JOURNAL)


def one_cell(
    executor: Any,
    table: Any,
    cell: str,
    options: Options,
    vocab: int,
    results: dict[str, Any],
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Every policy's goodput for one workload and target, into `results` as it is found."""
    from drift_scheduler.cost.fitted import FittedCost
    from drift_scheduler.dispatch import FACTORIES
    from gpu_parts.serving import requests_of, search, trial

    workload, _, target = cell.partition(":")
    tbt, full = float(target) / 1e3, not options.quick
    first = capacity(FittedCost(table), executor.device.total_units, workload, tbt)
    choices = [(name, {}) for name in POLICIES if name != "chunked-prefill"]
    budgets = tuned_budgets(FittedCost(table), executor.device.total_units, workload, tbt)
    choices = [("chunked-prefill", {"token_budget": budget}) for budget in budgets] + choices
    results["first_rate"] = first

    def one(name: str, given: dict[str, int], rate: float) -> Any:
        requests = requests_of(
            workload, rate, max(8, min(REQUESTS[full], int(rate * TRIAL_SECONDS[full]))), tbt, vocab
        )
        return trial(
            executor, FACTORIES[name](**given), FittedCost(table), requests, rate,
            max_running=MAX_RUNNING[workload], most_seconds=3 * TRIAL_SECONDS[full],
        )  # fmt: skip

    for name, given in choices:
        one(name, given, first / 2)  # whatever is captured or allocated on first use
        if time.monotonic() > options.deadline:
            results["policies"].setdefault(name, {"rate": None, "skipped": "no time left"})
            continue
        rate, trials = search(lambda r, n=name, g=given: one(n, g, r), first, trials=TRIALS[full])
        best = results["policies"].get(name)
        if best is None or best["rate"] is None or rate > best["rate"]:
            results["policies"][name] = {
                "rate": rate,
                "options": given,
                "trials": [t.summary() for t in trials],
            }
        first = rate or first
        keep()


def judge(found: Findings, cell: str) -> None:
    """`drift` against tuned chunked prefill."""
    policies = found.data[cell].get("policies", {})
    rates = {name: entry["rate"] for name, entry in policies.items()}
    if rates.get("drift") and rates.get("chunked-prefill"):
        ratio = rates["drift"] / rates["chunked-prefill"]
        found.at_least(
            f"{cell} ms: drift over chunked prefill", ratio, ABOVE if cell.endswith(":15") else NEVER_BELOW
        )
    shown = ", ".join(
        f"{name} {rate:.2f}/s" if rate is not None else f"{name} -" for name, rate in rates.items()
    )
    found.lines.append(f"{cell} ms: {shown}")


def capacity(costs: Any, units: int, workload: str, tbt: float) -> float:
    """Requests per second that keep the device busy, one phase at a time, at a batch that meets the target."""
    from drift_scheduler.domain import DecodeShape, PrefillShape
    from gpu_parts.serving import WORKLOADS

    lengths = WORKLOADS[workload]
    prompt, output = round(lengths.prompt.mean), lengths.output.mean
    context = round(prompt + output / 2)
    fitting = [
        b for b in (1, 2, 4, 8, 16, 32, 64, 128) if costs.decode(DecodeShape(b, b * context), units) <= tbt
    ]
    batch = min(max(fitting, default=1), MAX_RUNNING[workload])
    prefill = costs.prefill(PrefillShape.of([(prompt, 0)]), units)
    return 0.6 / (prefill + output * costs.decode(DecodeShape(batch, batch * context), units) / batch)


def tuned_budgets(costs: Any, units: int, workload: str, tbt: float) -> list[int]:
    """The largest budget whose step meets the target by the table beside a middling batch, and the next smaller one."""
    from drift_scheduler.domain import DecodeShape, PrefillShape
    from gpu_parts.serving import WORKLOADS

    batch = MAX_RUNNING[workload] // 4
    context = round(batch * WORKLOADS[workload].prompt.mean)
    fitting = [
        budget
        for budget in BUDGETS
        if budget > batch
        and costs.fused(PrefillShape.of([(budget - batch, 0)]), DecodeShape(batch, context), units) <= tbt
    ]
    return (fitting or [BUDGETS[1]])[-2:][::-1]
