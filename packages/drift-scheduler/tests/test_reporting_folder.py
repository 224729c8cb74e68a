"""Reports: one small bench run once, and what its files hold; charts and traces on made-up runs."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from drift_scheduler import cli
from drift_scheduler.reporting import charts
from drift_scheduler.reporting.folder import COLUMNS
from drift_scheduler.reporting.perfetto import to_trace
from drift_scheduler.reporting.recorder import Recording, Span
from drift_scheduler.reporting.svg import Chart, Scale, number, percent, seconds

SCENARIO = """
title = "Small & <quick>"
devices = ["h200"]
models = ["llama-3.1-8b"]
policies = ["drift", "gang", "chunked-prefill:token_budget=512"]
tbt = [0.05]
ttft = 0.5
[search]
seeds = [0, 1]
requests = 40
lifetimes = 0.5
tolerance = 0.3
[[workloads]]
name = "synthetic:output_mean=8:output_max=16"
label = "short"
[[workloads]]
name = "synthetic:input_mean=2000:output_mean=8:output_max=16"
label = "long"
[detail]
rates = [0.5, 1.2]
scales = [0.5, 1.0]
"""
POLICIES = ("drift", "gang", "chunked-prefill:token_budget=512")
CHARTS = (
    "goodput-versus-rate",
    "attainment-versus-slo-scale",
    "ttft-distribution",
    "tbt-distribution",
    "partition-timeline",
    "predicted-against-measured",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("bench")
    scenario = folder / "s.toml"
    scenario.write_text(SCENARIO)
    result = CliRunner().invoke(cli.drift, ["bench", str(scenario), "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return folder / "out", result


@pytest.fixture(scope="module")
def run(bench: tuple[Path, Result]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bench[0] / "run.json").read_text())
    return found


def test_the_table_has_policies_by_workloads(bench: tuple[Path, Result]) -> None:
    lines = bench[1].stdout.splitlines()
    head = next(line for line in lines if line.startswith("policy"))
    assert head.split()[:3] == ["policy", "short", "long"]
    for policy in POLICIES:
        (row,) = [line for line in lines if line.startswith(policy + " ")]
        assert len(re.findall(r"\d\.\d\dx", row)) == 3
    assert re.search(r"chunked-prefill:token_budget=512 .* 1\.00x", bench[1].stdout)


def test_run_json_holds_every_cell_and_report(run: dict[str, Any]) -> None:
    assert run["schema"] == "drift.bench/1"
    assert run["base"] == "chunked-prefill:token_budget=512"
    assert [cell["workload"] for cell in run["cells"]] == ["short", "long"]
    for cell in run["cells"]:
        goodput = cell["goodput"]
        assert goodput["schema"] == "drift.goodput/1"
        assert set(goodput["policies"]) == set(POLICIES)
        for found in goodput["policies"].values():
            assert found["rate"] > 0
            assert found["report"]["schema"] == "drift.report/1"
            assert len(found["seeds"]) == 2
    assert run["scenario"]["workloads"][0]["label"] == "short"
    (detail,) = run["details"]
    assert [point["rate"] for point in detail["by_rate"]["gang"]] == sorted(
        point["rate"] for point in detail["by_rate"]["gang"]
    )
    assert [point["scale"] for point in detail["by_scale"]["gang"]] == [0.5, 1.0]


def test_summary_csv_has_a_row_per_cell_and_policy(bench: tuple[Path, Result], run: dict[str, Any]) -> None:
    with (bench[0] / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["workload"], row["policy"]) for row in rows] == [
        (workload, policy) for workload in ("short", "long") for policy in POLICIES
    ]
    for row, cell in zip(rows, (c for c in run["cells"] for _ in POLICIES), strict=True):
        assert float(row["rate"]) == cell["goodput"]["policies"][row["policy"]]["rate"]


def test_requests_are_lines_of_json(bench: tuple[Path, Result]) -> None:
    rows = [json.loads(line) for line in (bench[0] / "requests.jsonl").read_text().splitlines()]
    assert {row["policy"] for row in rows} == set(POLICIES)
    assert all(row["ttft"] > 0 and row["e2e"] >= row["ttft"] for row in rows)


class Page(HTMLParser):
    """Tags, attributes that load something, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(bench: tuple[Path, Result]) -> None:
    text = (bench[0] / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("svg") == len(CHARTS) + 1
    for name in CHARTS:
        assert f'id="{name}"' in text
    assert "Small &amp; &lt;quick&gt;" in text
    assert "<quick>" not in text
    for policy in POLICIES:
        assert text.count(policy) > 5


def test_svg_files_are_whole_and_the_same_as_in_the_page(bench: tuple[Path, Result]) -> None:
    files = sorted(path.stem for path in (bench[0] / "svg").glob("*.svg"))
    assert files == sorted([*CHARTS, "ratios"])
    page = (bench[0] / "report.html").read_text()
    for path in (bench[0] / "svg").glob("*.svg"):
        text = path.read_text()
        root = ET.fromstring(text)
        assert root.tag.endswith("svg")
        assert text in page
        assert "nan" not in re.sub(r">[^<]*<", "><", text)


def test_curves_have_a_line_and_a_legend_entry_per_policy(bench: tuple[Path, Result]) -> None:
    for name in (
        "goodput-versus-rate",
        "attainment-versus-slo-scale",
        "ttft-distribution",
        "tbt-distribution",
    ):
        root = ET.fromstring((bench[0] / "svg" / f"{name}.svg").read_text())
        tag = "{http://www.w3.org/2000/svg}"
        texts = [element.text for element in root.iter(f"{tag}text")]
        assert set(POLICIES) <= set(texts)
        strokes = {line.get("stroke") for line in root.iter(f"{tag}polyline")}
        assert len(strokes) >= len(POLICIES)


def test_the_trace_has_a_lane_per_phase(bench: tuple[Path, Result]) -> None:
    trace = json.loads((bench[0] / "trace.json").read_text())
    events = trace["traceEvents"]
    names = {(e["tid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert names == {(1, "prefill"), (2, "decode")}
    for lane in (1, 2):
        work = sorted((e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == lane)
        assert work
        assert all(b[0] >= a[0] + a[1] - 0.01 for a, b in pairwise(work))
    assert {e["name"] for e in events if e["ph"] == "C"} == {"units", "alive"}


def test_the_same_scenario_gives_the_same_bytes(bench: tuple[Path, Result], tmp_path: Path) -> None:
    scenario = bench[0].parent / "s.toml"
    result = CliRunner().invoke(cli.drift, ["bench", str(scenario), "--out", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    for name in ("run.json", "summary.csv", "requests.jsonl", "report.html", "trace.json"):
        assert (tmp_path / "again" / name).read_bytes() == (bench[0] / name).read_bytes(), name


# ------------------------------------------------------------------------------------------ made-up runs


def recording(**changes: Any) -> Recording:
    values: dict[str, Any] = {
        "ttft": np.array([]),
        "tbt": np.array([]),
        "requests": (),
        "spans": (),
        "alive": (),
        "pairs": {"prefill": np.empty((0, 2)), "decode": np.empty((0, 2))},
        **changes,
    }
    return Recording(**values)


def test_charts_of_a_run_in_which_nothing_happened() -> None:
    empty = recording()
    for svg in (
        charts.timeline_chart(empty, "t"),
        charts.pairs_chart(empty, "p"),
        charts.tail_chart("d", "tokens", {"a": empty.tbt}, 0.1),
    ):
        ET.fromstring(svg)
    assert json.loads(to_trace(empty, "x"))["otherData"]["dropped_spans"] == 0


def test_a_timeline_shows_decode_below_and_prefill_above() -> None:
    spans = (
        Span("decode", 0.0, 0.1, "spatial", 92, 16, 8, None),
        Span("prefill", 0.0, 0.1, "spatial", 92, 16, 500, (0, 4)),
        Span("decode", 0.1, 0.2, "fused", 0, 108, 8, None),
        Span("prefill", 0.1, 0.2, "exclusive", 108, 0, 8, (0, 32)),
    )
    svg = charts.timeline_chart(recording(spans=spans), "t")
    tag = "{http://www.w3.org/2000/svg}"
    boxes = [box for box in ET.fromstring(svg).iter(f"{tag}rect") if box.find(f"{tag}title") is not None]
    tops = [(float(b.get("y", "0")), float(b.get("height", "0"))) for b in boxes]
    (decode_top, decode_height), (prefill_top, prefill_height) = tops[0], tops[1]
    assert prefill_top + prefill_height == pytest.approx(decode_top, abs=0.02)
    assert prefill_height / decode_height == pytest.approx(92 / 16, rel=0.01)
    for label in ("decode&#x27;s part", "prefill&#x27;s part", "fused", "exclusive prefill"):
        assert label in svg


def test_a_timeline_of_streams_shows_both_though_nothing_is_divided() -> None:
    spans = (
        Span("decode", 0.0, 0.1, "streams", 108, 108, 8, None),
        Span("prefill", 0.0, 0.1, "streams", 108, 108, 500, (0, 32)),
    )
    svg = charts.timeline_chart(recording(spans=spans), "t")
    assert "stream of decode" in svg
    assert "stream of prefill" in svg
    assert "fused" not in svg


def test_a_tail_reads_as_a_share_of_values_above() -> None:
    points = charts._tail(np.arange(1, 1001) / 1000)
    shares = {round(x, 3): share for x, share in points}
    assert shares[0.001] == 1.0
    assert points[-1] == pytest.approx((1.0, 0.001))
    assert all(b[1] < a[1] and b[0] > a[0] for a, b in pairwise(points))


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0, 12345, False), (3, 3, False), (1e-3, 70, True), (1, 2, True)]
)
def test_ticks_are_few_and_within(low: float, high: float, log: bool) -> None:
    ticks = Scale(low, high, 0, 100, log).ticks()
    assert 1 <= len(ticks) <= 8
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)


def test_scales_map_ends_and_clip() -> None:
    scale = Scale(1, 100, 0, 200, log=True)
    assert [scale(1), scale(10), scale(100), scale(1000), scale(0)] == pytest.approx([0, 100, 200, 200, 0])


def test_labels() -> None:
    assert [seconds(v) for v in (0, 0.0005, 0.025, 1, 90)] == ["0", "500 µs", "25 ms", "1 s", "90 s"]
    assert [number(v) for v in (0, 0.5, 12, 12000)] == ["0", "0.5", "12", "12k"]
    assert percent(0.001) == "0.1%"


def test_text_is_escaped() -> None:
    chart = Chart("<b>&", (0, 1), (0, 1))
    chart.line([(0, 0), (1, 1)], "#000", "a<b>", dots=True)
    texts = list(ET.fromstring(chart.render()).itertext())
    assert "<b>&" in texts
    assert "a<b>" in texts
