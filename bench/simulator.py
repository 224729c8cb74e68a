"""What the simulator costs: `python bench/simulator.py [--trace PATH] [--json PATH]`.

Import time of drift_scheduler in fresh processes; then an hour of requests on one simulated device, each policy in a
process of its own: processor seconds, memory, steps. The bounds to hold: 150 ms to import, 40 s for an hour of
mooncake_conversation (12,031 requests, 4.1M output tokens), and memory that depends on the requests alive only, which
is why half of the trace is run too. Without the trace, `conversation` requests are generated in its stead.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TRACE = ROOT.parent / "shared" / "traces" / "mooncake_conversation.jsonl.gz"
POLICIES = ("drift", "gang", "chunked-prefill:token_budget=512")
REQUESTS = 12_031

IMPORT = "import time; t = time.perf_counter(); import drift_scheduler; print(time.perf_counter() - t)"
HOUR = """
import json, resource, sys, time
from drift_scheduler.domain import SLO
from drift_scheduler.simulation.run import Scenario, Simulation
workload, dispatch, requests, rate = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
scenario = Scenario(workload, "8xa100-80gb", "llama-3.1-8b", dispatch, SLO(5.0, 0.05), requests=requests,
                    rate=rate or None)
begun = time.process_time()
simulation = Simulation(scenario)
report = simulation.run()
seconds = time.process_time() - begun
print(json.dumps({"processor_s": seconds, "steps": report["scheduler"]["steps"], "simulated_s": report["duration_s"],
                  "requests": requests, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                  "output_tokens": round(report["throughput"]["output_tokens_per_s"] * report["duration_s"])}))
"""


def python(code: str, *arguments: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def imports(times: int) -> dict[str, float]:
    """Seconds to import the package, the first process left out."""
    took = [float(python(IMPORT)) for _ in range(times + 1)][1:]
    return {"median_s": statistics.median(took), "least_s": min(took), "most_s": max(took)}


def hour(trace: Path, dispatch: str, requests: int) -> dict[str, Any]:
    """One run."""
    there = trace.is_file()
    workload = (str(trace), "0") if there else ("conversation", "3.4")
    found: dict[str, Any] = json.loads(python(HOUR, workload[0], dispatch, str(requests), workload[1]))
    return {"workload": trace.name if there else "conversation", **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print as it goes, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"schema": "drift.bench.simulator/1", "python": platform.python_version()}
    result["import"] = imports(9)
    print(f"import: median {result['import']['median_s'] * 1e3:.0f} ms")
    result["hour"] = {}
    for dispatch in POLICIES:
        whole = hour(options.trace, dispatch, options.requests)
        half = hour(options.trace, dispatch, max(1, options.requests // 2))
        result["hour"][dispatch] = {"whole": whole, "half": half}
        print(
            f"{dispatch}: {whole['requests']} requests, {whole['output_tokens']} output tokens, {whole['steps']} steps "
            f"in {whole['processor_s']:.1f} s; {whole['peak_kib'] / 1024:.0f} MiB at most, "
            f"{half['peak_kib'] / 1024:.0f} for half of them"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
