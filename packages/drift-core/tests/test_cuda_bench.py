"""bench/gpu.py and bench/host_step.py as far as they run without a device: parts' logic, degradation, the stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))
sys.path.insert(0, str(Path(__file__).parent))

import gpu
from cuda_world import UNITS, stub_executor
from gpu_parts import engine, findings, goodput, peer, plain_structs, serving

from drift_core.cuda.device import Place, Work
from drift_core.cuda.stub import StubDevice
from drift_scheduler.conformance import FlatCosts
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.dispatch import FACTORIES
from drift_scheduler.workloads.generated import Truncated

ROOT = Path(__file__).resolve().parents[3]
QUIET = {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp")}
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


def python(*arguments: str, seconds: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=seconds, cwd=ROOT,
        env=QUIET | environment, check=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------ the script itself


@no_device
@pytest.mark.slow
def test_without_a_device_every_part_is_skipped_and_says_so(tmp_path: Path) -> None:
    done = python("bench/gpu.py", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["parts"]["facts"]["status"] == "ok"
    assert report["parts"]["facts"]["data"]["device"] is None
    others = {name: part for name, part in report["parts"].items() if name != "facts"}
    assert len(others) == 7
    for name, part in others.items():
        assert (part["status"], part["reason"]) == ("skipped", "no CUDA device"), name
    assert done.stdout.count("no CUDA device") >= len(others)


def test_a_part_that_does_not_fit_is_skipped(tmp_path: Path) -> None:
    done = python("bench/gpu.py", "--parts", "speed,peer", "--minutes", "0.1", "--out", str(tmp_path))
    assert done.returncode == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["status"] for part in report["parts"].values()] == ["skipped", "skipped"]
    assert "s are left, it takes about" in report["parts"]["speed"]["reason"]


def test_a_part_that_breaks_or_dies_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    class Done:
        returncode, stdout = -9, ""

    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: Done())
    options = argparse.Namespace(
        quick=True, minutes=60.0, model="llama-3.1-8b", parts="speed,peer", cells="", out=tmp_path
    )
    report = gpu.run_all(options)
    assert [part["status"] for part in report["parts"].values()] == ["failed", "failed"]
    assert "exit code -9" in report["parts"]["speed"]["reason"]
    assert any("failed" in line for line in gpu.table(report))


def test_what_a_killed_part_had_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "speed.part.json"
    monkeypatch.setattr(findings, "_kept", [])
    findings.keep_in(result)
    found = findings.Findings()
    found.attempt("copy", lambda: 4.3)
    found.at_least("copy", 4.3, 4.0)
    assert gpu._so_far(result)["data"] == {"copy": 4.3}

    def killed(command: list[str], **_: Any) -> None:
        result.write_text(json.dumps({"status": "cut short"} | found.as_dict()))
        raise subprocess.TimeoutExpired(command, 1.0)

    monkeypatch.setattr(gpu.subprocess, "run", killed)
    options = SimpleNamespace(quick=True, out=tmp_path, model="llama-3.1-8b", cells="")
    entry = gpu.attempt("speed", options, 1e4, tmp_path / "gpu.log")
    assert entry["status"] == "cut short"
    assert "it ran past its" in entry["reason"]
    assert entry["data"] == {"copy": 4.3}
    assert entry["checks"][0]["met"]
    assert not list(tmp_path.glob("*.part.json"))
    report = {"config": {"commit": "x"}, "parts": {"speed": entry}}
    assert any("ok   copy: 4.3 (>= 4)" in line for line in gpu.table(report))


def test_clocks_and_throttling_are_shown_with_a_part() -> None:
    state = {
        "sm_clock_mhz": [345, 1900.0, 1980], "sm_clock_max_mhz": 1980, "power_w": [90, 612.4, 700],
        "throttled": {"power cap": 0.25},
    }  # fmt: skip
    report = {"config": {"commit": "x"}, "parts": {"speed": {"status": "ok", "state": state}}}
    shown = gpu.table(report)
    assert "    SMs at 1900 of 1980 MHz, 612 W, 25% of the time power cap" in shown
    report["parts"]["speed"]["state"] = {"sm_clock_mhz": None, "throttled": {}}
    assert len(gpu.table(report)) == len(shown) - 1


def test_a_part_notes_the_devices_state_or_why_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "_kept", [])
    options = SimpleNamespace(quick=True, out=tmp_path, model="llama-3.1-8b", cells="")
    gpu.run_part("facts", tmp_path / "facts.part.json", options, 10.0)
    entry = json.loads((tmp_path / "facts.part.json").read_text())
    assert entry["status"] == "ok"
    assert entry["state"]["readings"] or entry["state"]["unavailable"]


def test_an_unknown_part_is_named() -> None:
    done = python("bench/gpu.py", "--parts", "speeed")
    assert done.returncode == 2
    assert "no part 'speeed'; there are: facts, kernels" in done.stderr


def test_a_failing_measurement_is_a_missed_check_and_not_the_end() -> None:
    found = findings.Findings()
    found.attempt("this", lambda: 1 / 0)
    found.attempt("that", lambda: 3.0)
    assert found.data["that"] == 3.0
    assert "ZeroDivisionError" in found.data["this"]["failed"]
    assert [check.met for check in found.checks] == [False]
    assert findings.relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_kernel_checks_pass_in_the_interpreter() -> None:
    """The code that the device will run first, on inputs small enough for Triton's interpreter."""
    pytest.importorskip("triton")
    done = python("packages/drift-core/tests/cuda_interpreted.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    errors = dict(line.split("\t") for line in done.stdout.splitlines() if "\t" in line)
    assert errors.pop("done") == "0"
    assert set(errors) >= {"attention", "decode lists", "rotary", "sampling", "masks"}
    for name, error in errors.items():
        assert float(error) < 2e-3, name


def test_the_engine_runs_its_triton_kernels_in_the_interpreter() -> None:
    """Decode graphs, mixed passes, prefill blocks and draws through the real launches, without a device."""
    pytest.importorskip("triton")
    policies = ("gang", "chunked-prefill")
    done = python("packages/drift-core/tests/cuda_interpreted_engine.py", *policies, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    for policy in policies:
        assert done.stdout.count(f"{policy} faults []") == 2, done.stdout
        assert f"{policy} same True" in done.stdout, done.stdout


def test_the_partition_kernels_compile() -> None:
    pytest.importorskip("triton")
    program = """
        import sys; sys.path.insert(0, "bench")
        import torch
        from drift_kernels.triton_ops.ahead import compiling_for
        from gpu_parts import device_kernels as kernels
        place, floats = torch.zeros(64, dtype=torch.int32), torch.zeros(64)
        with compiling_for(90) as launches:
            kernels.where[(4,)](place, num_warps=4)
            kernels.spin[(4,)](floats, 1000, num_warps=4)
            kernels.copy_blocks[(4,)](floats, floats.clone(), 64, BLOCK=64, num_warps=8)
        assert "%smid" in launches[0].ptx, launches[0].ptx
        assert not any(launch.stack for launch in launches)
        assert "\\n\\tbra" in launches[1].ptx or "bra" in launches[1].ptx, "the loop was folded away"
    """
    done = python("-c", textwrap.dedent(program))
    assert done.returncode == 0, done.stderr[-3000:]


# ------------------------------------------------------------------------------------ without msgspec


def test_the_engine_path_runs_without_msgspec() -> None:
    """The stand-in carries a profile, a cost table on disk, and serving."""
    program = """
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("msgspec", "click", "rich"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Missing())
        sys.path[:0] = ["bench", "packages/drift-core/tests"]
        from gpu_parts import plain_structs
        sys.modules.pop("msgspec", None)
        sys.modules["msgspec"] = plain_structs.module()
        from pathlib import Path
        import tempfile
        from cuda_world import Load, StubDevice, UNITS, run, stub_executor
        from drift_core.cuda.assembly import CudaOptions
        from drift_scheduler.cost.fitted import FittedCost
        from drift_scheduler.cost.table import read_table, write_table
        from gpu_parts import engine, facts, goodput, kernels, partitions, peer, profiling, serving, speed, subject
        executor = stub_executor(StubDevice(UNITS, runs=False))
        table = executor.profile(executor.plan_grid(max_running=8, full=False), "tiny", lambda fraction: None)
        path = Path(tempfile.mkdtemp()) / "table.json"
        write_table(table, path)
        again = read_table(path)
        assert again == table, (again, table)
        assert FittedCost(again).deviations()
        executor = stub_executor(StubDevice(UNITS))
        executor.warm_up()
        assert len(run(executor, Load(3), "gang")) == 3
        assert "click" not in sys.modules and "rich" not in sys.modules
        print("served")
    """
    done = python("-c", textwrap.dedent(program), PYTHONPATH=_sources())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "served" in done.stdout


def _sources() -> str:
    return os.pathsep.join(str(path) for path in sorted((ROOT / "packages").glob("*/src")))


def test_the_stand_in_behaves_as_msgspec_does() -> None:
    msgspec = plain_structs.module()

    class Inner(msgspec.Struct, frozen=True):
        a: int
        b: float = 2.0

    class Outer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        rows: tuple[Inner, ...]
        names: list[str] = []  # noqa: RUF012 - msgspec copies defaults, and so does the stand-in
        maybe: Inner | None = None

    Outer.__annotations__ = {"rows": tuple[Inner, ...], "names": list[str], "maybe": Inner | None}
    value = Outer(rows=(Inner(1), Inner(2, 3.0)), maybe=Inner(4))
    assert msgspec.json.decode(msgspec.json.encode(value), type=Outer) == value
    assert msgspec.structs.replace(value, names=["x"]).names == ["x"]
    assert value.names is not Outer(rows=()).names
    with pytest.raises(msgspec.ValidationError, match="unknown field `c`"):
        msgspec.convert({"a": 1, "c": 2}, Inner)
    with pytest.raises(TypeError, match="no field 'd'"):
        Inner(1, d=3)
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(b"{")
    again = msgspec.defstruct(
        "Again", [(f.name, f.type, f.default) for f in msgspec.structs.fields(Outer)[1:]]
    )
    assert again().names == []
    assert again(maybe=3).maybe == 3
    assert [f.required for f in msgspec.structs.fields(Outer)] == [True, False, False]


# ------------------------------------------------------------------------------------ serving and goodput


def cost(work: Work, place: Place) -> float:
    """10 ms a step of the whole device, 0.2 ms a prompt token; a part is slower as it is smaller."""
    units = UNITS if place.partition is None else getattr(place.partition, place.lane.value)
    solo = {"decode": 1e-2, "prefill": 5e-5 * work.layers * work.tokens, "mixed": 1e-2 + 2e-4 * work.tokens}
    return solo.get(work.name, 1e-6) * UNITS / units


@pytest.fixture
def small_workload(monkeypatch: pytest.MonkeyPatch) -> str:
    lengths = serving.Lengths(Truncated(4, 20, 60), Truncated(2, 6, 20), 1.0)
    monkeypatch.setitem(serving.WORKLOADS, "small", lengths)
    monkeypatch.setitem(goodput.MAX_RUNNING, "small", 8)
    return "small"


def test_a_trial_holds_at_a_low_rate_and_fails_at_a_high_one(small_workload: str) -> None:
    stub = StubDevice(UNITS, cost, runs=False)
    executor = stub_executor(stub)
    executor.warm_up()

    def one(rate: float) -> serving.Outcome:
        requests = serving.requests_of(small_workload, rate, 30, 0.05, 61)
        return serving.trial(
            executor, FACTORIES["gang"](), FlatCosts(), requests, rate, max_running=8, most_seconds=60.0
        )

    rate, trials = serving.search(one, 6.0, trials=4, factor=4.0)
    assert trials[0].holds
    assert not trials[-1].holds or rate == trials[-1].rate
    assert any(not outcome.holds for outcome in trials)
    assert trials[0].summary()["tbt_p50"] > 0.009
    assert stub.faults == []
    assert executor.kv.free_pages == executor.kv.total_pages
    assert len(executor._sequences) == 0


def test_a_cell_of_goodput_tries_every_policy(
    small_workload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = StubDevice(UNITS, cost, runs=False)
    executor = stub_executor(stub)
    table = executor.profile(executor.plan_grid(max_running=8, full=False), "tiny", lambda fraction: None)
    executor.warm_up()
    monkeypatch.setattr(goodput, "REQUESTS", (40, 80))
    options = findings.Options(True, 1e18, tmp_path, ROOT)
    found = findings.Findings()
    results = found.data["small:50"] = {"policies": {}}
    kept: list[int] = []
    goodput.one_cell(
        executor, table, f"{small_workload}:50", options, 61, results,
        lambda: kept.append(len(results["policies"])),
    )  # fmt: skip
    assert kept[0] == 1
    assert kept[-1] == 4
    goodput.judge(found, "small:50")
    policies = found.data["small:50"]["policies"]
    assert set(policies) == {"chunked-prefill", "drift", "gang", "streams"}
    assert all(len(entry["trials"]) == 3 for entry in policies.values())
    assert found.lines[0].startswith("small:50 ms: ")
    assert goodput.tuned_budgets(FittedCost(table), UNITS, small_workload, 0.05)
    assert [fault for fault in stub.faults if "kv page" not in fault] == []


def test_everything_at_once_ends_when_the_last_request_does() -> None:
    stub = StubDevice(UNITS, cost, runs=False)
    executor = stub_executor(stub)
    executor.warm_up()
    requests = [serving.Request(f"r{i}", 0.0, 5, 4, serving.SLO(1e4, 1e4), prompt=[1] * 5) for i in range(12)]
    outcome = serving.trial(
        executor, FACTORIES["prefill-first"](), FlatCosts(), requests, 0.0, max_running=8, judged=False
    )
    assert outcome.finished == 12
    assert outcome.tokens == 48
    assert peer._requests(3)


# ------------------------------------------------------------------------------------ the engine part


@pytest.mark.slow
def test_the_engine_part_finds_the_cpu_engine_right_and_a_wrong_one_wrong(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    reference = engine.make_model(torch, tmp_path)
    found = engine.cpu_tokens(torch, tmp_path)
    near, same = engine.compare(torch, reference, found["prompts"], found["outputs"])
    assert near < engine.NEAR
    assert same > 0.9
    wrong = [[(token + 1) % 4096 for token in output] for output in found["outputs"]]
    assert engine.compare(torch, reference, found["prompts"], wrong)[0] > 10 * engine.NEAR


# ------------------------------------------------------------------------------------ host time


def test_the_host_step_bench_counts_gaps_and_totals() -> None:
    import host_step

    row = host_step.measure(8, 12, "gang")
    assert row["steps"] >= 12
    assert 0 < row["gap_us_p50"] <= row["total_us_p50"]
