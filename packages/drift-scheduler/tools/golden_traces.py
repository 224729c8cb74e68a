"""Write the golden traces again: `python packages/drift-scheduler/tools/golden_traces.py [NAME...]`.

One decision log per built-in policy, on the ride `drift_scheduler.conformance.GOLDEN`. Run it when a policy is meant to
decide differently, and let the difference be part of the commit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from drift_scheduler.conformance import GOLDEN, record_golden
from drift_scheduler.dispatch import FACTORIES
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.partition import FACTORIES as PARTITIONS

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"
PARTITION_OPTIONS: dict[str, dict[str, Any]] = {"static": {"decode_units": 2}}


def names() -> dict[str, dict[str, Any]]:
    """File name -> what `record_golden` and `compare_golden` get: policies that run on the golden ride's device."""
    found: dict[str, dict[str, Any]] = {}
    for name, factory in FACTORIES.items():
        refuses = getattr(factory(), "refuses", None)
        if refuses is None or not refuses(GOLDEN.device):
            found[f"dispatch-{name}"] = {"policy": factory()}
    for name, factory in PARTITIONS.items():
        options = PARTITION_OPTIONS.get(name, {})
        found[f"partition-{name}"] = {"policy": GangPolicy(), "partitions": factory(**options)}
    return found


def main() -> None:
    """Write all, or those named."""
    for name, policies in names().items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            record_golden(path=FOLDER / f"{name}.jsonl", **policies)
            print(f"{name}.jsonl")


if __name__ == "__main__":
    main()
