"""The report page: one HTML file that needs nothing else, charts inline. Knows results and charts, not files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from drift_scheduler.bench import Cell, Detail, Result, spread
from drift_scheduler.goodput import WINDOW, PolicyGoodput, ratios
from drift_scheduler.reporting.svg import FONT, seconds

STYLE = f"""
:root {{ color-scheme: light dark }}
* {{ box-sizing: border-box }}
body {{ margin: 0; font: 15px/1.5 {FONT}; color: #1f2933; background: #f4f6f8 }}
main {{ max-width: 1360px; margin: 0 auto; padding: 28px 24px 60px }}
h1 {{ font-size: 26px; margin: 0 0 4px }} h2 {{ font-size: 19px; margin: 34px 0 10px }}
h3 {{ font-size: 15px; margin: 22px 0 8px }}
p {{ max-width: 80em; margin: 6px 0 }} .soft {{ color: #61707f }}
.card {{ background: #fff; border: 1px solid #dfe4e9; border-radius: 8px; padding: 14px; overflow-x: auto }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 16px }}
.wide {{ grid-column: 1 / -1 }}
svg {{ max-width: 100%; height: auto; display: block }}
.wide svg {{ min-width: 760px }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ padding: 6px 12px; text-align: right; border-bottom: 1px solid #e6eaee; white-space: nowrap;
  font-variant-numeric: tabular-nums }}
th {{ font-weight: 600; color: #45525f; font-size: 13px }}
th:first-child, td:first-child {{ text-align: left }}
td small {{ color: #61707f; margin-left: 6px }}
tr.first td {{ font-weight: 600 }} td.best {{ background: #e3f6ec }} td.never {{ color: #a61e4d }}
code {{ background: #eef1f4; padding: 1px 5px; border-radius: 4px }}
@media (max-width: 560px) {{
  main {{ padding: 18px 10px 40px }} .card {{ padding: 8px }} th, td {{ padding: 5px 7px }}
}}
@media (prefers-color-scheme: dark) {{
  body {{ color: #dde3e9; background: #0f1419 }} .soft, td small {{ color: #93a1af }} th {{ color: #b4bfca }}
  .card {{ background: #1a1a1a; border-color: #303030 }} th, td {{ border-color: #303030 }}
  td.best {{ background: #123526 }} td.never {{ color: #ff8fb3 }} code {{ background: #242c35 }}
  svg {{ filter: invert(.9) hue-rotate(180deg) }}
}}
"""


def to_html(result: Result, pictures: Mapping[str, Mapping[str, str]], overview: Sequence[str]) -> str:
    """The page. `pictures`: cell key -> chart name -> SVG; `overview`: SVGs of all cells."""
    file = result.grid.file
    parts = [
        f"<h1>{escape(file.title)}</h1>",
        f'<p class="soft">{escape(_subtitle(result))}</p>',
        "<h2>Goodput</h2>",
        *(_table(result, cells) for cells in groups(result.grid.cells)),
        *(f'<div class="card wide" style="margin-top:16px">{svg}</div>' for svg in overview),
        *(_detail(detail, pictures[detail.cell.key]) for detail in result.details),
        "<h2>Limits and tuning</h2>",
        _limits(result),
        "<h2>How this was measured</h2>",
        *_method(result),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(file.title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n"
        "</main></body></html>\n"
    )


def groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that one table shows: those of one system and TBT target."""
    found: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.system_title, cell.tbt), []).append(cell)
    return list(found.values())


def group_title(cells: Sequence[Cell]) -> str:
    """What a table's cells have in common."""
    return f"{cells[0].system_title}, TBT target {seconds(cells[0].tbt)}"


def _subtitle(result: Result) -> str:
    cells, policies = result.grid.cells, result.grid.file.policies
    return (
        f"{len(policies)} dispatch policies in {len(cells)} cells on simulated devices: the highest request rate at "
        f"which the targets hold, and its ratio to {result.grid.base}"
    )


def _table(result: Result, cells: Sequence[Cell]) -> str:
    head = "".join(
        f"<th>{escape(cell.workload.title)}<br><span class=soft>TTFT {seconds(cell.scenario.slo.ttft)}</span></th>"
        for cell in cells
    )
    rows = []
    for i, policy in enumerate(result.grid.file.policies):
        row = "".join(_cell(result, cell, policy) for cell in cells)
        first = ' class="first"' if i == 0 else ""
        rows.append(f"<tr{first}><td>{escape(policy)}</td>{row}{_mean(result, cells, policy)}</tr>")
    return (
        f'<h3>{escape(group_title(cells))}</h3><div class="card"><table><thead><tr><th>requests/s</th>{head}'
        f"<th>mean ratio</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(result: Result, cell: Cell, policy: str) -> str:
    found = result.goodput[cell.key]
    mine = found[policy]
    if mine.rate <= 0:
        return '<td class="never">never</td>'
    best = mine.rate >= max(other.rate for other in found.values()) * 0.98
    ratio, interval = ratios(mine, found[result.grid.base])
    known = "" if ratio is None else f"<small>{ratio:.2f}×</small>"
    return f'<td{" class=best" if best else ""} title="{escape(_hint(mine, interval))}">{mine.rate:.3g}{known}</td>'


def _hint(mine: PolicyGoodput, ratio: tuple[float, float] | None) -> str:
    texts = [f"{mine.rate:.4g} requests/s"]
    if mine.interval is not None:
        texts.append(f"95% interval {mine.interval[0]:.4g} to {mine.interval[1]:.4g}")
    if ratio is not None:
        texts.append(f"ratio {ratio[0]:.2f} to {ratio[1]:.2f}")
    return "; ".join(texts)


def _mean(result: Result, cells: Sequence[Cell], policy: str) -> str:
    found = [ratio for cell in cells if (ratio := result.ratio(cell, policy)) is not None]
    return f"<td>{sum(found) / len(found):.2f}×</td>" if found else "<td>-</td>"


def _detail(detail: Detail, pictures: Mapping[str, str]) -> str:
    cell, wide = detail.cell, {"partition-timeline"}
    charts = "".join(
        f'<div class="card{" wide" if name in wide else ""}" id="{escape(name)}">{svg}</div>'
        for name, svg in pictures.items()
    )
    title = f"{cell.workload.title}: {cell.system_title}, TBT target {seconds(cell.tbt)}"
    return f'<h2>{escape(title)}</h2><div class="charts">{charts}</div>'


def _limits(result: Result) -> str:
    rows = []
    for cell in result.grid.cells:
        for policy, mine in result.goodput[cell.key].items():
            limit = sorted({found.reason for found in mine.seeds if found.reason})
            seeds = ", ".join(f"{found.rate:.4g}" for found in mine.seeds)
            interval = "-" if mine.interval is None else f"{mine.interval[0]:.3g} - {mine.interval[1]:.3g}"
            notes = [] if all(found.monotone for found in mine.seeds) else ["not monotone in the rate"]
            if mine.tuned is not None:
                notes.append(f"{mine.tuned['option']} {mine.tuned['value']}")
            columns = (
                f"{cell.workload.title} on {cell.system.device}, {cell.system.model}, {seconds(cell.tbt)}",
                policy, f"{mine.rate:.4g}", interval, seeds, ", ".join(limit) or "-", "; ".join(notes),
            )  # fmt: skip
            rows.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in columns) + "</tr>")
    head = ("cell", "policy", "requests/s", "95% interval", "by seed", "limited by", "notes")
    titles = "".join(f"<th>{name}</th>" for name in head)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<details class="card"><summary>Every search, {len(rows)} in all</summary>{table}</details>'


def _method(result: Result) -> list[str]:
    file = result.grid.file
    search = file.search
    criterion = (
        "the 99th percentiles of TTFT over requests and of TBT over tokens are within target"
        if search.criterion == "p99"
        else f"the share of requests that meet all of their own targets is at least {search.criterion.split(':')[1]}"
    )
    spreads = []
    for policy in file.policies:
        found = spread(result, policy)
        if found is not None and policy != result.grid.base:
            spreads.append(f"{policy} {found[1]:.2f}× on average, {found[0]:.2f}× to {found[2]:.2f}×")
    texts = [
        f"A rate holds when {criterion}. Counted is everything from the {WINDOW}; the drain after it is not. Rates "
        f"are bracketed, then bisected to {search.tolerance:.1%}, and the next rates above the found one were "
        f"seen to fail. Seeds: {', '.join(map(str, search.seeds))}; intervals are Student's t over seeds, and "
        "every policy gets the same requests at a rate.",
        f"A run has at least {search.requests} requests and spans at least {search.lifetimes:g} lifetimes of a mean "
        f"request at the TBT target and {10 * search.lifetimes:g} TTFT targets, unless the workload says otherwise. "
        "A policy with a token budget gets the best of its values in every cell, raced on the first seed.",
        f"Ratios to {result.grid.base} over all cells: {'; '.join(spreads) or 'none'}.",
        "Run it again with <code>drift bench SCENARIO.toml --out DIR</code>; <code>run.json</code> holds the scenario, "
        "every trial and every report. Open <code>trace.json</code> at ui.perfetto.dev.",
    ]
    return [f"<p>{text if '<code>' in text else escape(text)}</p>" for text in texts]
