"""Figures that documents quote from bench/results are the ones that stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CPU: dict[str, Any] = json.loads((RESULTS / "cpu.json").read_text())["models"]["demo"]["loads"]


def rows(page: str, first: str) -> list[list[str]]:
    """Cells of the table rows of a page that begin so."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(first)]


def ms(seconds: float, digits: int = 0) -> str:
    return f"{seconds * 1e3:.{digits}f}"


@pytest.mark.parametrize("policy", sorted(CPU["paced"]))
def test_the_readme_has_the_cpu_figures(policy: str) -> None:
    paced, saturated = CPU["paced"][policy], CPU["saturated"][policy]
    (row,) = rows("README.md", f"| `{policy}`")
    assert row[1:] == [
        f"{ms(paced['ttft_p50'])} / {ms(paced['ttft_p99'])} ms",
        f"{ms(paced['tbt_p50'], 1)} / {ms(paced['tbt_p99'], 1)} ms",
        f"{ms(saturated['tbt_p99'], 1)} ms",
        f"{saturated['total_tokens_per_s']:,.0f}",
    ]


def test_the_readme_compares_with_unchunked_prefill_and_alternation_as_measured() -> None:
    ratios = [CPU[load]["prefill-first"]["tbt_p99"] / CPU[load]["drift"]["tbt_p99"] for load in CPU]
    work = [CPU["saturated"][policy]["total_tokens_per_s"] for policy in ("drift", "alternate")]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"p99 TBT is {ratios[0]:.1f} times lower than with unchunked prefill" in text
    assert f"when paced and {ratios[1]:.1f} times when saturated, at {work[0] / work[1]:.2f} times" in text


def test_every_cell_of_the_contest_is_on_its_page() -> None:
    cells = [json.loads(line) for line in (RESULTS / "contest.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "goodput.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\S+ on \S+)\n(.*?)(?=^## |^---)", page, flags=re.MULTILINE | re.DOTALL))
    for cell in cells:
        device, model, rest = cell["cell"].split("/", 2)
        name, _, tbt = rest.partition("/tbt=")
        workload = Path(name).name.partition(".")[0]
        start = f"| {workload} | {float(tbt) * 1e3:g} |"
        (line,) = (
            found for found in sections[f"{model} on {device}"].splitlines() if found.startswith(start)
        )
        ours, limited_by, theirs, ratio = (part.strip() for part in line.split("|")[4:8])
        assert (ours, limited_by) == (
            f"{cell['drift']:.3g}" if cell["drift"] else "never",
            cell["limited_by"],
        )
        assert theirs.partition(" ")[0] == (f"{cell['chunked']:.3g}" if cell["chunked"] else "never")
        assert ratio == (f"{cell['drift'] / cell['chunked']:.2f}" if cell["chunked"] else "-")
    assert (
        len(cells)
        == sum(len(re.findall(r"^\| [a-z]", section, re.MULTILINE)) for section in sections.values()) - 3
    )


def test_the_page_on_gpus_has_the_hosts_figures() -> None:
    found = json.loads((RESULTS / "host_step.json").read_text())["running"]["128 changing"]
    names = {
        "nothing": "nothing", "somebody joined": "joined", "somebody left": "left", "left and joined": "left, joined",
        "a prefill began": "prefill begun", "left, and a prefill began": "left, prefill begun",
    }  # fmt: skip
    for words, name in names.items():
        (row,) = rows("docs/gpu.md", f"| {words} |")
        assert row[3] == f"{found['by_change'][name]['gap_us_p50']:.0f}", words
    (row,) = rows("docs/gpu.md", "| all steps |")
    assert row[3] == f"{found['gap_us_p50']:.0f}"
