"""The default grid of goodputs: `nox -s bench -- grid`, options `[SCENARIO.toml] [--out DIR] [--jobs N]`.

`drift bench` on bench/grid.toml with a process per core. Finishes within ten minutes on two cores and prints one table:
policies x workloads, goodput and its ratio to tuned chunked prefill.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from drift_scheduler.cli import drift

DEFAULT = Path(__file__).with_name("grid.toml")


def main(arguments: list[str]) -> None:
    named = [a for a in arguments if a.endswith(".toml")]
    options = [a for a in arguments if not a.endswith(".toml")]
    if "--jobs" not in options and "-j" not in options:
        options += ["--jobs", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)]
    begun = time.monotonic()
    drift.main(
        ["bench", str(named[0] if named else DEFAULT), *options], prog_name="drift", standalone_mode=False
    )
    print(f"{time.monotonic() - begun:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
