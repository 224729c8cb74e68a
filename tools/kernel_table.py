"""Compile every kernel for every architecture and write the table of docs/kernels.md: registers, shared memory, fit.

`python tools/kernel_table.py [--architecture 90]...`: exit status 1 when a kernel spills, does not fit or lacks its
matrix instruction, or when the table in the document was another one (it is then rewritten).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from drift_kernels.triton_ops.tiles import ARCHITECTURES

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- table: tools/kernel_table.py -->", "<!-- end of table -->"

Row = tuple[str, str, int, int, int, int]
"""Kernel, head size or "", architecture, registers, bytes of shared memory, programs per multiprocessor."""


def compiled_rows(architecture: int, part: int) -> tuple[list[Row], list[str]]:
    """One part of the catalogue: its rows and its faults. Runs in a process of its own."""
    from drift_kernels.triton_ops import catalogue

    entries = list(catalogue.compilations(architecture))[part]()
    rows: list[Row] = []
    for entry in entries:
        one = entry.compiled
        by_head = any(word in entry.kernel for word in ("attention", "merge", "rotary", "KV"))
        head = str(entry.variant.head) if by_head else ""
        rows.append((entry.kernel, head, architecture, one.registers, one.shared, one.programs_per_sm()))
    return rows, [fault for entry in entries for fault in catalogue.faults(entry)]


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Markdown; a cell is the worst of the variants: registers / KB of shared memory / programs that fit."""
    worst: dict[tuple[str, str], dict[int, tuple[int, int, int]]] = {}
    for kernel, head, architecture, registers, shared, fit in rows:
        cells = worst.setdefault((kernel, head), {})
        seen = cells.get(architecture, (0, 0, fit))
        cells[architecture] = (max(seen[0], registers), max(seen[1], shared), min(seen[2], fit))
    shown = sorted({architecture for cells in worst.values() for architecture in cells})
    yield "| Kernel | Head | " + " | ".join(f"sm_{architecture}" for architecture in shown) + " |"
    yield "|---|---|" + "---|" * len(shown)
    for (kernel, head), cells in sorted(worst.items(), key=_order):
        texts = (_cell(cells.get(architecture)) for architecture in shown)
        yield f"| {kernel} | {head} | " + " | ".join(texts) + " |"


def _order(entry: tuple[tuple[str, str], object]) -> tuple[str, int]:
    (kernel, head), _ = entry
    return kernel, int(head or 0)


def _cell(worst: tuple[int, int, int] | None) -> str:
    if worst is None:
        return ""
    registers, shared, fit = worst
    return f"{registers} / {shared / 1024:.1f} / {fit}"


def rewrite(document: Path, lines: Iterable[str]) -> bool:
    """Put the table between its marks; whether that changed the document."""
    before = document.read_text()
    head, rest = before.split(BEGIN)
    _, tail = rest.split(END)
    after = head + BEGIN + "\n" + "\n".join(lines) + "\n" + END + tail
    document.write_text(after)
    return after != before


def main() -> int:
    """Compile, report, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", type=int, action="append", choices=ARCHITECTURES,
                        help="only these; the document stays as it is")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    from drift_kernels.triton_ops import catalogue

    parts = len(list(catalogue.compilations(90)))
    work = [(one, part) for one in options.architecture or ARCHITECTURES for part in range(parts)]
    rows: list[Row] = []
    faults: list[str] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = pool.map(compiled_rows, *zip(*work, strict=True))
        for done, (some_rows, some_faults) in enumerate(results, 1):
            rows += some_rows
            faults += some_faults
            print(f"\r{done} of {len(work)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    lines = list(table(rows))
    print("\n".join([*lines, *faults]))
    if options.architecture:
        return 1 if faults else 0
    changed = rewrite(DOCUMENT, lines)
    if changed:
        print(f"the table in {DOCUMENT.name} was another one and was rewritten; commit it")
    return 1 if faults or changed else 0


if __name__ == "__main__":
    sys.exit(main())
