"""The machine that a benchmark runs on, and what of it others took meanwhile."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

STAT = Path("/proc/stat")
COUNTED, STOLEN = 8, 7
"""The first so many numbers of /proc/stat's first line are disjoint, the last of them time that was stolen."""


class Stolen:
    """Share of the processors' time, since this was made, that the host gave to others while we had work to do.

    On a virtual machine all of its processes stand still then, whatever they are: latencies of a run with much of it
    say little of the program.
    """

    def __init__(self) -> None:
        self._before = _ticks()

    def share(self) -> float | None:
        """0 to 1; `None` where the system does not tell."""
        if not self._before:
            return None
        passed = [now - then for now, then in zip(_ticks(), self._before, strict=True)]
        return round(passed[STOLEN] / max(1, sum(passed)), 4)


def describe(stolen: Stolen) -> dict[str, Any]:
    """Processors, Python, load averages, and what was stolen since then."""
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "stolen": stolen.share(),
    }


def _ticks() -> list[int]:
    if not STAT.is_file():
        return []
    return [int(each) for each in STAT.read_text().splitlines()[0].split()[1 : 1 + COUNTED]]
