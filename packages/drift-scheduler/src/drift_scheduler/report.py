"""The report of a run: schema `drift.report/1` as a dictionary, as JSON, and as a table for people.

Knows only `Metrics`. Times in seconds; `None` (JSON null) where there is nothing to measure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from drift_scheduler.domain import FinishReason, Lane
from drift_scheduler.metrics import ClassCounts, Metrics, overall

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "drift.report/1"

Report = dict[str, Any]

TIMES = ("ttft_s", "tbt_s", "tpot_s", "e2e_s", "queue_s")


def build_report(metrics: Metrics, config: Mapping[str, Any]) -> Report:
    """Everything `metrics` counted, as `drift.report/1`. `config`: every flag, the seed and versions."""
    metrics.settle()
    ends, duration = metrics.ends, metrics.duration
    finished = ends[FinishReason.STOP] + ends[FinishReason.LENGTH]
    return {
        "schema": SCHEMA,
        "config": dict(config),
        "requests": {
            "offered": metrics.offered,
            "finished": finished,
            "rejected": ends[FinishReason.REJECTED],
            "cancelled": ends[FinishReason.CANCELLED],
            "failed": ends[FinishReason.FAILED],
        },
        "duration_s": duration,
        "throughput": {
            "requests_per_s": _per(finished, duration),
            "output_tokens_per_s": _per(metrics.output_tokens, duration),
            "total_tokens_per_s": _per(metrics.output_tokens + metrics.prompt_tokens, duration),
        },
        "ttft_s": metrics.ttft.summary(),
        "tbt_s": metrics.tbt.summary(),
        "tpot_s": metrics.tpot.summary(),
        "e2e_s": metrics.e2e.summary(),
        "queue_s": metrics.queue.summary(),
        "slo": _slo(metrics),
        "kv": {
            "prefix_hit_ratio": _per(metrics.cached_tokens, metrics.prompt_tokens),
            "peak_utilisation": metrics.peak_utilisation,
            "preemptions": metrics.preemptions,
        },
        "lanes": {
            "prefill_busy": _per(metrics.lanes.prefill_busy, duration),
            "decode_busy": _per(metrics.lanes.decode_busy, duration),
            "bubble_ratio": metrics.bubble_ratio,
        },
        "sharing_s": dict(metrics.lanes.sharing),
        "scheduler": {
            "steps": metrics.steps,
            "step_us": {"p50": metrics.step_us.quantile(0.5), "p99": metrics.step_us.quantile(0.99)},
            "faults": metrics.faults,
            "first_fault": metrics.first_fault,
        },
        "cost_model": {
            "error": {
                "prefill": metrics.cost_error(Lane.PREFILL),
                "decode": metrics.cost_error(Lane.DECODE),
            }
        },
    }


def to_json(report: Report) -> str:
    """One object, indented, keys in the order of the schema, ending in a newline."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def print_report(report: Report, console: Console) -> None:
    """A summary for people."""
    from rich.table import Table

    requests, rates = report["requests"], report["throughput"]
    lost = [f"{requests[k]} {k}" for k in ("rejected", "cancelled", "failed") if requests[k]]
    console.print(
        f"{requests['finished']} of {requests['offered']} requests finished in {report['duration_s']:.1f} s"
        + (f" ({', '.join(lost)})" if lost else "")
        + f": {rates['requests_per_s']:.2f} requests/s, {rates['output_tokens_per_s']:.0f} output tokens/s, "
        f"{rates['total_tokens_per_s']:.0f} tokens/s in all"
    )
    table = Table(title=None, header_style="bold")
    table.add_column("seconds")
    for name in ("mean", "p50", "p90", "p99", "max", "target"):
        table.add_column(name, justify="right")
    targets = {"ttft_s": report["slo"]["ttft_s"], "tbt_s": report["slo"]["tbt_s"]}
    for key in TIMES:
        cells = [_seconds(report[key][name]) for name in ("mean", "p50", "p90", "p99", "max")]
        table.add_row(key.removesuffix("_s").upper(), *cells, _seconds(targets.get(key), blank=""))
    console.print(table)
    for line in _lines(report):
        console.print(line)


def _lines(report: Report) -> list[str]:
    slo, kv, lanes, sharing = report["slo"], report["kv"], report["lanes"], report["sharing_s"]
    verdict = "met" if slo["met"] else "NOT met"
    lines = [
        f"Targets {verdict} at p99: TTFT {_percent(slo['ttft_attainment'])} in time, "
        f"TBT {_percent(slo['tbt_attainment'])}; {_percent(slo['attainment'])} of requests met all of theirs"
    ]
    if len(slo["classes"]) > 1:
        lines += [
            f"  class {name}: TTFT {_percent(c['ttft_attainment'])}, TBT {_percent(c['tbt_attainment'])}, "
            f"all {_percent(c['attainment'])} of {c['requests']} requests"
            for name, c in slo["classes"].items()
        ]
    busy = {name: seconds for name, seconds in sharing.items() if seconds}
    total = sum(busy.values()) or 1.0
    lines.append(
        f"Lanes: prefill busy {_percent(lanes['prefill_busy'])}, decode busy {_percent(lanes['decode_busy'])}, "
        f"bubbles {_percent(lanes['bubble_ratio'])}; "
        + (", ".join(f"{n.replace('_', ' ')} {_percent(s / total)}" for n, s in busy.items()) or "not known")
    )
    lines.append(
        f"KV: peak {_percent(kv['peak_utilisation'])} of pages, {_percent(kv['prefix_hit_ratio'])} of prompt tokens "
        f"reused, {kv['preemptions']} preemptions"
    )
    if report["scheduler"]["steps"] is None:  # seen from a client
        return lines
    errors = report["cost_model"]["error"]
    lines.append(
        f"Scheduler: {report['scheduler']['steps']} steps; solo predictions off by "
        f"{_percent(errors['prefill'])} (prefill), {_percent(errors['decode'])} (decode) on average"
    )
    faults = faults_line("The policy", report["scheduler"])
    return [*lines, faults] if faults else lines


def faults_line(who: str, scheduler: Mapping[str, Any]) -> str | None:
    """What a policy did wrong by a report's `scheduler`, for people; `None` where that is nothing."""
    faults, first = scheduler["faults"], scheduler["first_fault"]
    times = "once" if faults == 1 else f"{faults} times"
    return f"{who} was at fault {times} and the fallback decided instead, first: {first}" if faults else None


def _slo(metrics: Metrics) -> dict[str, Any]:
    classes = metrics.classes
    total = overall(list(classes.values()))
    return {
        "ttft_s": total.slo.ttft if classes else None,
        "tbt_s": total.slo.tbt if classes else None,
        **_attainment(total),
        "met": all(counts.met for counts in classes.values()),
        "classes": {
            name: {
                "ttft_s": c.slo.ttft,
                "tbt_s": c.slo.tbt,
                "requests": c.served,
                **_attainment(c),
                "met": c.met,
            }
            for name, c in sorted(classes.items())
        },
    }


def _attainment(counts: ClassCounts) -> dict[str, float]:
    return {
        "ttft_attainment": counts.ttft_attainment,
        "tbt_attainment": counts.tbt_attainment,
        "attainment": counts.attainment,
    }


def _per(amount: float, whole: float) -> float:
    return amount / whole if whole > 0 else 0.0


def _seconds(value: float | None, blank: str = "-") -> str:
    if value is None:
        return blank
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
