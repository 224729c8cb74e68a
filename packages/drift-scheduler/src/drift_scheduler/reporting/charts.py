"""The charts of a report, each from finished results to one SVG text. Knows what is drawn, not where it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from drift_scheduler.bench import Cell, Detail, Point, Result
from drift_scheduler.domain import FloatArray
from drift_scheduler.goodput import ratios
from drift_scheduler.reporting.recorder import Recording, Span
from drift_scheduler.reporting.svg import DASHES, INK, SOFT, Chart, colour, percent, seconds

SHARING_COLOURS: Mapping[str, str] = {
    "temporal": "#ffe066",
    "fused": "#b197fc",
    "exclusive prefill": "#ffc9a3",
    "exclusive decode": "#a5d8ff",
}
PREFILL, DECODE = "#e8590c", "#1c7ed6"
TIMELINE_S = 3.0
"""Seconds of a run that a timeline shows."""
TIMELINE_SPANS = 2500
LOWEST_SHARE = 1e-4


def detail_charts(detail: Detail, featured: str) -> dict[str, str]:
    """A cell's charts by file name (without suffix). `featured`: the policy whose device is shown."""
    slo = detail.cell.scenario.slo
    times = {policy: recording.ttft for policy, recording in detail.recordings.items()}
    gaps = {policy: recording.tbt for policy, recording in detail.recordings.items()}
    shown = detail.recordings[featured]
    at = f"at {detail.rate:.4g} requests/s"
    return {
        "goodput-versus-rate": rate_chart(detail.by_rate),
        "attainment-versus-slo-scale": scale_chart(detail.by_scale, detail.rate),
        "ttft-distribution": tail_chart(f"Time to first token, {at}", "requests", times, slo.ttft),
        "tbt-distribution": tail_chart(f"Time between tokens, {at}", "tokens", gaps, slo.tbt),
        "partition-timeline": timeline_chart(shown, f"{featured}: the device over time, {at}"),
        "predicted-against-measured": pairs_chart(shown, f"{featured}: predicted against measured lane time"),
    }


def rate_chart(by_rate: Mapping[str, Sequence[Point]]) -> str:
    """Requests per second that meet all of their own targets, over the offered rate."""
    lines = {
        policy: [(p.x, p.x * p.report["slo"]["attainment"]) for p in points]
        for policy, points in by_rate.items()
    }
    top = max(x for points in lines.values() for x, _ in points) * 1.04
    chart = Chart(
        "Goodput versus rate",
        (0, top),
        (0, top),
        "offered, requests/s",
        "within all targets, requests/s",
    )
    chart.line([(0, 0), (top, top)], "#b6c0ca", "", "3 4", width=1.2)
    _policies(chart, lines)
    return chart.render()


def scale_chart(by_scale: Mapping[str, Sequence[Point]], rate: float) -> str:
    """Share of requests that meet their targets, over a factor on both targets."""
    lines = {
        policy: [(p.x, p.report["slo"]["attainment"]) for p in points] for policy, points in by_scale.items()
    }
    xs = [x for points in lines.values() for x, _ in points]
    chart = Chart(
        f"SLO attainment versus SLO scale, at {rate:.4g} requests/s",
        (min(xs) * 0.96, max(xs) * 1.04),
        (0, 1),
        "scale of both targets",
        "requests within all targets",
        y_text=percent,
        log_x=max(xs) > 1.01 * min(xs),
        x_text=lambda x: f"{x:g}×",
    )
    _policies(chart, lines)
    return chart.render()


def tail_chart(title: str, what: str, values: Mapping[str, FloatArray], target: float) -> str:
    """The share of values above x, both axes logarithmic, so that a 99th percentile is a point on the 1% line."""
    lines = {policy: _tail(found) for policy, found in values.items()}
    xs = [x for points in lines.values() for x, _ in points] + [target]
    chart = Chart(
        title,
        (max(min(xs) * 0.8, max(xs) * 1e-5), max(xs) * 1.25),
        (LOWEST_SHARE, 1),
        "",
        f"share of {what} that took longer",
        log_x=True,
        log_y=True,
        x_text=seconds,
        y_text=percent,
        y_ticks=[1, 0.1, 0.01, 0.001, 0.0001],
    )
    chart.at_y(0.01, "99th percentile")
    chart.at_x(target, f"target {seconds(target)}", INK)
    _policies(chart, lines, dots=False)
    return chart.render()


def timeline_chart(recording: Recording, title: str) -> str:
    """Who had which units for a few seconds from the middle of a run; decode below, prefill above."""
    spans = _middle(recording.spans)
    units = max((s.prefill_units + s.decode_units for s in spans), default=1)
    start = min((s.start for s in spans), default=0.0)
    stop = max((s.stop for s in spans), default=1.0)
    chart = Chart(
        title, (0, max(stop - start, 1e-6)), (0, units), "", "units", x_text=seconds, width=1300, height=300
    )
    used: dict[str, str] = {}
    for span in spans:
        label, fill, low, high = _area(span, units)
        used[label] = fill
        work = f"{span.tokens} requests" if span.layers is None else f"{span.tokens} tokens"
        if span.layers is not None:
            work += f", layers {span.layers[0]}-{span.layers[1]}"
        hint = f"{span.sharing} {span.lane} {span.prefill_units}+{span.decode_units}: {work}, "
        chart.box(
            span.start - start, span.stop - start, low, high, fill, hint + seconds(span.stop - span.start)
        )
    for label, fill in used.items():
        chart.key(label, fill)
    return chart.render()


def pairs_chart(recording: Recording, title: str) -> str:
    """Predicted over measured seconds of finished work; on the diagonal they agree."""
    shown = {lane: _some(pairs[(pairs > 0).all(axis=1)]) for lane, pairs in recording.pairs.items()}
    everything = np.concatenate([pairs.reshape(-1) for pairs in shown.values()] or [np.empty(0)])
    low, high = (float(everything.min()), float(everything.max())) if len(everything) else (1e-3, 1.0)
    bounds = (low * 0.8, high * 1.25)
    chart = Chart(title, bounds, bounds, "measured", "predicted", True, True, seconds, seconds, height=420)
    chart.line([(bounds[0], bounds[0]), (bounds[1], bounds[1])], SOFT, "", "4 4", width=1)
    for lane, fill in (("prefill", PREFILL), ("decode", DECODE)):
        pairs = shown.get(lane, np.empty((0, 2)))
        chart.dots([(float(m), float(p)) for p, m in pairs], fill, 2.2, opacity=0.45)
        if len(pairs):
            error = float(np.abs(pairs[:, 0] / pairs[:, 1] - 1).mean())
            chart.key(f"{lane}, off by {error:.1%} on average", fill)
    return chart.render()


def ratio_chart(result: Result, cells: Sequence[Cell], title: str) -> str:
    """Every policy's goodput over the base's, per cell, with 95% intervals."""
    policies, base = result.grid.file.policies, result.grid.base
    bars: list[tuple[int, int, float, tuple[float, float] | None]] = []
    for c, cell in enumerate(cells):
        found = result.goodput[cell.key]
        for p, policy in enumerate(policies):
            ratio, interval = ratios(found[policy], found[base])
            if ratio is not None:
                bars.append((c, p, ratio, interval))
    top = max((max(ratio, (interval or (0, 0))[1]) for _, _, ratio, interval in bars), default=1.0)
    top = min(top, 1.6 * max((ratio for _, _, ratio, _ in bars), default=1.0))
    chart = Chart(
        title, (0, len(cells)), (0, max(top, 1.0) * 1.08), "", f"goodput / {base}", width=1300, height=340,
        y_text=lambda y: f"{y:g}×", x_text=lambda x: "",
    )  # fmt: skip
    each = min(0.8 / len(policies), 0.08 * len(cells))
    for c, p, ratio, interval in bars:
        x = c + 0.5 + (p - len(policies) / 2) * each
        cell, policy = cells[c], policies[p]
        rate = result.goodput[cell.key][policy].rate
        chart.box(x, x + each * 0.88, 0, ratio, colour(p), f"{policy}: {rate:.4g} requests/s, {ratio:.2f}×")
        if interval is not None and interval[1] > interval[0]:
            middle = x + each * 0.44
            chart.line([(middle, interval[0]), (middle, interval[1])], INK, width=1)
    chart.at_y(1.0)
    for c, cell in enumerate(cells):
        chart.text(chart.sx(c + 0.5), chart.height - chart.bottom + 18, cell.workload.title, "middle", 12)
    for p, policy in enumerate(policies):
        chart.key(policy, colour(p))
    return chart.render()


def _policies(chart: Chart, lines: Mapping[str, Sequence[tuple[float, float]]], dots: bool = True) -> None:
    """One line per policy, the first drawn last and strongest."""
    order = list(enumerate(lines.items()))
    for i, (policy, points) in reversed(order):
        chart.line(points, colour(i), policy, DASHES[i % len(DASHES)], dots, 2.8 if i == 0 else 1.8)
    chart.keys.reverse()


def _tail(values: FloatArray) -> list[tuple[float, float]]:
    """Points (x, share of values above x), about 150 of them, evenly spaced in the logarithm of the share."""
    n = len(values)
    if not n:
        return []
    ordered = np.sort(values)
    shares = np.geomspace(1.0, max(1.0 / n, LOWEST_SHARE), 150)
    ranks = np.unique(np.clip(np.ceil((1 - shares) * n).astype(np.int64), 0, n - 1))
    return [(max(float(ordered[r]), 1e-6), max(1 - r / n, LOWEST_SHARE)) for r in ranks]


def _middle(spans: Sequence[Span]) -> list[Span]:
    """The spans of a few seconds around the middle one of those with prefill, where the device is shared."""
    if not spans:
        return []
    prompts = [span for span in spans if span.layers is not None] or list(spans)
    first = max(0.0, prompts[len(prompts) // 2].start - TIMELINE_S / 2)
    inside = [s for s in spans if s.stop > first and s.start < first + TIMELINE_S]
    return inside[:TIMELINE_SPANS]


def _area(span: Span, units: int) -> tuple[str, str, float, float]:
    """Legend label, colour, and the units from and to which a span is drawn."""
    if span.sharing == "spatial":
        if span.lane == "decode":
            return "decode's part", DECODE, 0, span.decode_units
        return "prefill's part", PREFILL, units - span.prefill_units, units
    if span.sharing == "exclusive":
        label = f"exclusive {span.lane}"
        return label, SHARING_COLOURS[label], 0, units
    if span.sharing == "temporal":
        fill = SHARING_COLOURS["exclusive decode"] if span.lane == "decode" else SHARING_COLOURS["temporal"]
        return ("temporal decode" if span.lane == "decode" else "temporal prefill"), fill, 0, units
    if span.sharing == "streams":  # either may have any unit; shown as halves, so that both are seen
        low, high = (0.0, units / 2) if span.lane == "decode" else (units / 2, float(units))
        return f"stream of {span.lane}", DECODE if span.lane == "decode" else PREFILL, low, high
    return "fused", SHARING_COLOURS["fused"], 0, units


def _some(pairs: FloatArray, most: int = 700) -> FloatArray:
    return pairs[:: max(1, math.ceil(len(pairs) / most))]
