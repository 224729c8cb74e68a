"""The cost table of the subject on this device, and how near a decode step comes to its floor.

Every cell is kept in a journal as it is measured; with the same `--out` an interrupted profile goes on.
"""

from __future__ import annotations

import time
from typing import Any

from gpu_parts.findings import Findings, Options, need_cuda
from gpu_parts.subject import executor_of, model_of, weights_of

ESTIMATE = (120.0, 240.0)
TABLE, JOURNAL = "cost-table.json", "profile.jsonl"
FLOOR_SHARE = 0.70


def run(options: Options) -> Findings:
    """Needs a device."""
    torch = need_cuda()
    from drift_scheduler.cost.fitted import FittedCost
    from drift_scheduler.cost.table import write_table

    found = Findings()
    config = model_of(options.model)
    begun = time.monotonic()
    weights = weights_of(config)
    torch.cuda.synchronize()
    found.data["weights, s"] = time.monotonic() - begun
    executor = executor_of(config, weights, max_running=128, max_context=32768)
    found.data["kv"] = executor.plan.describe()
    begun = time.monotonic()
    executor.warm_up()
    found.data["start-up, s"] = time.monotonic() - begun
    found.data["graphs"] = len(executor.decode.graphs)
    found.keep()
    grid = executor.plan_grid(max_running=128, full=not options.quick)
    table = executor.profile(grid, options.model, lambda done: None, options.folder / JOURNAL)
    write_table(table, options.folder / TABLE)
    fit = FittedCost(table)
    for phase, deviation in fit.deviations().items():
        found.data[f"fit of {phase}"] = {"worst": deviation.worst, "mean": deviation.mean}
        found.at_most(f"fit of {phase}: mean error", deviation.mean, 0.10)
    found.data["slowdown"] = [
        [row.prefill_units, row.decode_units, row.prefill_factor, row.decode_factor] for row in table.slowdown
    ]
    found.data["decode ms by SMs, 128 x 2048"] = {
        row.units: row.seconds * 1e3
        for row in table.decode
        if (row.batch, row.context_tokens) == (128, 128 * 2048)
    }
    found.data["prefill ms by SMs, 4096"] = {
        row.units: row.seconds * 1e3 for row in table.prefill if (row.new, row.reused) == (4096, 0)
    }
    found.attempt("floor", lambda: floor(torch, executor, config, found))
    return found


def floor(torch: Any, executor: Any, config: Any, found: Findings) -> dict[str, float]:
    """A step of 64 requests of 2048 tokens against reading weights and KV once at the copy bandwidth."""
    from drift_core.cuda.measure import Rig
    from gpu_parts.speed import copy_rate

    copy = copy_rate(torch)
    torch.cuda.empty_cache()
    rig = Rig(executor)
    times = rig.decode(executor.device.all_decode, 64, 2048, 10)
    step = sorted(times)[len(times) // 2]
    read = 2 * (config.num_parameters - config.vocab_size * config.hidden_size)  # the embedding is looked up
    read += 64 * 2048 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    found.at_least("decode step 64 x 2048, share of its floor", read / copy / step, FLOOR_SHARE)
    return {"step_ms": step * 1e3, "floor_ms": read / copy * 1e3}
