"""Everything there is to find out on a machine with an NVIDIA GPU, in one run of a plain checkout:

    python3 bench/gpu.py [--quick] [--out DIR] [--minutes M] [--parts NAME,...] [--cells sharegpt:15,...]

Nothing needs to be installed besides torch, triton, numpy, pluggy, safetensors, cuda-bindings and, for two
parts, transformers; paths are set here, and where msgspec is missing a stand-in takes its place
(`gpu_parts/plain_structs.py`).

Parts run one after another, each in a process of its own with a time limit, so that one that fails, hangs or
runs out of memory stops no other; what it had found until then is kept. One that does not fit the time left
is skipped and says so. `gpu.json` is written after every part, `gpu.log` holds what the parts printed, and the
table at the end says what held and what did not. With `--out` of an earlier run the profile goes on where it
was. Without a device every part is skipped, with exit code 0.

On a machine that is lent by the command (at most ten minutes each): first `--quick --minutes 9`, then
`--parts profiling,goodput --minutes 9.5`. What each part measures is in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCHEMA = "drift.bench.gpu/1"
PARTS = ("facts", "kernels", "partitions", "engine", "speed", "profiling", "goodput", "peer")
MINUTES = (9.0, 30.0)  # quick, full
START_SECONDS = 15.0  # a process, torch and the device, before a part begins
GRACE_SECONDS = 20.0


def set_paths() -> list[str]:
    """The checkout's packages and the parts, first on the path; no packages of the same name elsewhere count."""
    paths = [str(HERE), *sorted(str(path) for path in (ROOT / "packages").glob("*/src"))]
    sys.path[:0] = paths
    return paths


# -------------------------------------------------------------------------------------- one part, in its process


def run_part(name: str, result: Path, options: argparse.Namespace, seconds: float) -> None:
    """Run a part here and write what it found; whatever goes wrong is a result too."""
    set_paths()
    from gpu_parts import plain_structs

    plain_structs.install()
    from gpu_parts.findings import Options, Skipped, keep_in, write

    keep_in(result)
    given = Options(
        quick=options.quick, deadline=time.monotonic() + seconds, folder=options.out, root=ROOT,
        model=options.model, cells=tuple(filter(None, options.cells.split(","))),
    )  # fmt: skip
    entry: dict[str, Any]
    from drift_kernels.nvml import Sampler

    watch = Sampler(interval_s=0.5)
    try:
        with watch:
            entry = {"status": "ok"} | import_module(f"gpu_parts.{name}").run(given).as_dict()
    except Skipped as why:
        entry = {"status": "skipped", "reason": str(why)}
    except Exception as error:
        traceback.print_exc()
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        entry = _so_far(result) | {"status": "failed", "reason": failure}
    write(result, entry | {"state": watch.summary().as_dict()})


# ----------------------------------------------------------------------------------------------- all of them


def attempt(name: str, options: argparse.Namespace, left: float, log: Path) -> dict[str, Any]:
    """A part in a process of its own, within the time that is left."""
    estimate = import_module(f"gpu_parts.{name}").ESTIMATE[not options.quick]
    needed = estimate if name != "goodput" else ESTIMATE_OF_A_CELL
    if left < needed + START_SECONDS:
        return {
            "status": "skipped",
            "reason": f"{left:.0f} s are left, it takes about {needed + START_SECONDS:.0f}",
        }
    limit = min(left, max(2.0 * estimate, estimate + 120.0) + START_SECONDS)
    result = options.out / f"{name}.part.json"
    result.unlink(missing_ok=True)
    command = [
        sys.executable, "-u", "-X", "faulthandler", str(HERE / "gpu.py"),
        "--part", name, "--out", str(options.out), "--result", str(result),
        "--seconds", str(limit - START_SECONDS - GRACE_SECONDS),
        "--model", options.model, "--cells", options.cells,
        *(["--quick"] if options.quick else []),
    ]  # fmt: skip
    begun = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n===== {name}\n".encode())
        file.flush()
        try:
            code = subprocess.run(command, stdout=file, stderr=file, timeout=limit, check=False).returncode
            ended = f"it ended with exit code {code} and left no result"
        except subprocess.TimeoutExpired:
            ended = f"it ran past its {limit:.0f} s"
    entry = _so_far(result) or {"status": "failed"}
    if entry["status"] in ("failed", "cut short") and "reason" not in entry:
        entry["reason"] = ended
    result.unlink(missing_ok=True)
    return entry | {"seconds": round(time.monotonic() - begun, 1)}


def _so_far(result: Path) -> dict[str, Any]:
    """What a part has written, nothing if it has not."""
    try:
        found: dict[str, Any] = json.loads(result.read_text())
    except (OSError, ValueError):
        return {}
    return found


ESTIMATE_OF_A_CELL = 120.0


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Every chosen part; the report is written after each."""
    set_paths()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu.log"
    log.write_bytes(b"")
    started = time.monotonic()
    minutes = options.minutes or MINUTES[not options.quick]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "config": {"quick": options.quick, "minutes": minutes, "model": options.model, "commit": commit()},
        "parts": {},
    }
    for name in options.parts.split(","):
        left = minutes * 60 - (time.monotonic() - started)
        print(f"{name} ...", end=" ", flush=True)
        try:
            entry = attempt(name, options, left, log)
        except Exception as error:
            entry = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        report["parts"][name] = entry
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{entry['status']}{_reason(entry)}", flush=True)
    return report


def table(report: dict[str, Any]) -> list[str]:
    """What held, what did not, and what was not tried."""
    lines = [f"Drift on a GPU, commit {report['config']['commit']}"]
    for name, entry in report["parts"].items():
        lines.append(f"{name:<12}{entry['status']:<9}{entry.get('seconds', 0):>7.0f} s{_reason(entry)}")
        lines += [f"    {line}" for line in (*_state(entry), *entry.get("lines", ()))]
        for check in entry.get("checks", ()):
            mark, sign = "ok  " if check["met"] else "MISS", ">=" if check["at_least"] else "<="
            lines.append(
                f"    {mark} {check['name']}: {check['value']:.4g}{check['unit']} ({sign} {check['bound']:g})"
            )
    return lines


def _state(entry: dict[str, Any]) -> list[str]:
    """Clocks and power while the part ran, and what held the clocks down."""
    state = entry.get("state") or {}
    if not state.get("sm_clock_mhz"):
        return []
    watts = f", {state['power_w'][1]:.0f} W" if state.get("power_w") else ""
    held = "".join(f", {share:.0%} of the time {reason}" for reason, share in state["throttled"].items())
    return [f"SMs at {state['sm_clock_mhz'][1]:.0f} of {state['sm_clock_max_mhz']} MHz{watts}{held}"]


def _reason(entry: dict[str, Any]) -> str:
    return f": {entry['reason']}" if entry.get("reason") else ""


def commit() -> str:
    """The checkout's, with a mark when files differ; "unknown" where git cannot say."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and trials: under ten minutes")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for gpu.json, gpu.log and the cost table"
    )
    parser.add_argument("--minutes", type=float, default=None, help="time for everything")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--cells", default="", help="of goodput: WORKLOAD:TBT_MS,...")
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape that `random:SHAPE` knows")
    parser.add_argument("--part", default=None, choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.parts.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"no part '{unknown[0]}'; there are: {', '.join(PARTS)}")
    options.out = (options.out or Path(os.environ.get("OUT") or HERE / "results" / "gpu")).resolve()
    if options.part is not None:
        run_part(options.part, options.result, options, options.seconds)
        return
    report = run_all(options)
    print()
    print("\n".join(table(report)))
    print(f"written to {options.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
