"""Writing a bench's report folder: JSON, CSV, SVG, HTML and a trace. The only module here that touches files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from drift_scheduler.bench import Cell, Result, to_run_json
from drift_scheduler.errors import DriftError
from drift_scheduler.goodput import PolicyGoodput, ratios
from drift_scheduler.reporting.charts import detail_charts, ratio_chart
from drift_scheduler.reporting.html import group_title, groups, to_html
from drift_scheduler.reporting.perfetto import to_trace

COLUMNS = (
    "device", "model", "workload", "ttft_s", "tbt_s", "policy", "dispatch", "rate", "ci95_low", "ci95_high",
    "ratio", "ratio_ci95_low", "ratio_ci95_high", "limited_by", "ttft_p99_s", "tbt_p99_s", "attainment",
    "output_tokens_per_s", "prefix_hit_ratio", "bubble_ratio",
)  # fmt: skip


def prepare_folder(path: str | Path) -> Path:
    """The folder, made if need be, before hours of work are spent on what cannot be written. Raises DriftError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").touch()
    except OSError as error:
        raise DriftError(f"{folder}: {error.strerror or error}") from error
    return folder


def write_folder(result: Result, path: str | Path) -> list[Path]:
    """Write everything; the files written. Raises DriftError."""
    folder = prepare_folder(path)
    written = []
    for name, text in _files(result):
        target = folder / name
        try:
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DriftError(f"{target}: {error.strerror or error}") from error
        written.append(target)
    return written


def summary_csv(result: Result) -> str:
    """One row per cell and policy."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in result.grid.cells:
        found = result.goodput[cell.key]
        for policy, mine in found.items():
            writer.writerow(_row(cell, policy, mine, found[result.grid.base]))
    return text.getvalue()


def requests_jsonl(result: Result) -> Iterator[str]:
    """Every request of the recorded runs, one JSON object per line."""
    for detail in result.details:
        for policy, recording in detail.recordings.items():
            for row in recording.requests:
                named = {"cell": detail.cell.key, "policy": policy, **asdict(row)}
                yield json.dumps(named) + "\n"


def _files(result: Result) -> Iterator[tuple[str, str]]:
    yield "run.json", json.dumps(to_run_json(result), indent=1, allow_nan=False) + "\n"
    yield "summary.csv", summary_csv(result)
    yield "requests.jsonl", "".join(requests_jsonl(result))
    featured = result.grid.file.policies[0]
    pictures: dict[str, dict[str, str]] = {}
    for detail in result.details:
        pictures[detail.cell.key] = charts = detail_charts(detail, featured)
        prefix = f"{_slug(detail.cell.key)}--" if len(result.details) > 1 else ""
        for name, svg in charts.items():
            yield f"svg/{prefix}{name}.svg", svg
    overview = [
        ratio_chart(result, cells, f"Goodput over {result.grid.base}'s: {group_title(cells)}")
        for cells in groups(result.grid.cells)
    ]
    for i, svg in enumerate(overview):
        yield f"svg/ratios{f'-{i + 1}' if len(overview) > 1 else ''}.svg", svg
    yield "report.html", to_html(result, pictures, overview)
    if result.details:
        shown = result.details[0]
        title = f"{featured}, {shown.cell.key}, {shown.rate:.4g} requests/s"
        yield "trace.json", to_trace(shown.recordings[featured], title)


def _row(cell: Cell, policy: str, mine: PolicyGoodput, base: PolicyGoodput) -> list[object]:
    ratio, interval = ratios(mine, base)
    report = mine.report or {}
    slo = cell.scenario.slo
    low, high = mine.interval or (None, None)
    ratio_low, ratio_high = interval or (None, None)
    return [
        cell.system.device, cell.system.model, cell.workload.title, slo.ttft, slo.tbt, policy, mine.dispatch,
        mine.rate, low, high, ratio, ratio_low, ratio_high,
        " ".join(sorted({found.reason for found in mine.seeds if found.reason})),
        _get(report, "ttft_s", "p99"), _get(report, "tbt_s", "p99"), _get(report, "slo", "attainment"),
        _get(report, "throughput", "output_tokens_per_s"), _get(report, "kv", "prefix_hit_ratio"),
        _get(report, "lanes", "bubble_ratio"),
    ]  # fmt: skip


def _get(report: dict[str, dict[str, object]], section: str, key: str) -> object:
    return report.get(section, {}).get(key)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", text).strip("-")
