"""Ten thousand requests cancelled at random moments; what they leave behind: pages, tasks, descriptors, memory.

    nox -s bench -- gateway_cancellations [--requests 10000] [--at-once 200] [--out PATH]

See tools/cancel_storm.py, which a test runs with some hundred of them. Fails when anything is left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import uvloop  # noqa: E402
from cancel_storm import storm  # noqa: E402
from gateway_parts.processes import resident_bytes  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "gateway_cancellations.json"
PARTS = 10


async def run(requests: int, at_once: int) -> dict[str, Any]:
    """Storm in ten parts, and count what is left after each."""
    async with storm() as storming:
        await storming.blow(200, at_once, seed=0)
        before = await storming.settled()
        begun, rss = time.monotonic(), []
        for part in range(PARTS):
            await storming.blow(requests // PARTS, at_once, seed=part + 1)
            after = await storming.settled()
            rss.append(round(resident_bytes(os.getpid()) / 1e6, 1))
            print(f"{(part + 1) * (requests // PARTS):6d} requests: {after}, {rss[-1]} MB", file=sys.stderr)
        clean = after.free_pages == storming.total_pages
        clean = clean and after.tasks <= before.tasks and after.descriptors <= before.descriptors
        return {
            "schema": "drift.bench.gateway_cancellations/1",
            "requests": requests,
            "at_once": at_once,
            "seconds": round(time.monotonic() - begun, 1),
            "ends": dict(storming.ends),
            "total_pages": storming.total_pages,
            "before": asdict(before),
            "after": asdict(after),
            "rss_mb": rss,
            "nothing_left": clean,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = uvloop.run(run(options.requests, options.at_once))
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    sys.exit(0 if report["nothing_left"] else 1)


if __name__ == "__main__":
    main()
