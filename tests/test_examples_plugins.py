"""The example plugins, installed as anybody would install them, found by their entry points, and used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("drift-plugin-*"))
SIMULATE = (
    *("simulate", "--workload", "sharegpt", "--requests", "40", "--rate", "12", "--device", "a100-80gb"),
    *("--model", "llama-3.1-8b", "--json", "-"),
)


def install(target: Path, *packages: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    ran = subprocess.run(
        [*command, "--target", str(target), *map(str, packages)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which both examples were installed."""
    target = tmp_path_factory.mktemp("plugins")
    install(target, *(ROOT / "examples" / name for name in EXAMPLES))
    return target


def drift(target: Path, *args: str, code: int = 0) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "drift_scheduler.cli", *args],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(target)},
    )  # fmt: skip
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout if code == 0 else ran.stderr


def simulated(target: Path, *args: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(drift(target, *SIMULATE, *args))
    return found


def test_both_are_listed_with_the_plugin_they_come_from(installed: Path) -> None:
    names = json.loads(drift(installed, "plugins", "list", "--json", "-"))["names"]
    assert names["dispatch policy"]["edf"]["plugin"] == "drift-plugin-edf"
    assert names["partition policy"]["fixed-split"]["plugin"] == "drift-plugin-fixed-split"


def test_edf_serves_everything_by_its_own_decisions(installed: Path) -> None:
    report = simulated(installed, "--dispatch", "edf:max_batch_tokens=2048")
    assert report["requests"]["finished"] == 40
    assert report["scheduler"]["faults"] == 0
    assert report["sharing_s"]["exclusive_prefill"] > 0
    assert report["sharing_s"]["spatial"] == 0


def test_fixed_split_sets_the_split(installed: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    report = simulated(
        installed, "--dispatch", "gang", "--partition", "fixed-split:decode_share=0.45", "--log", str(log)
    )
    assert report["scheduler"]["faults"] == 0
    gangs = [line["gang"] for line in map(json.loads, log.read_text().splitlines()[1:]) if "gang" in line]
    assert {tuple(g["partition"]) for g in gangs if g["sharing"] == "spatial"} == {(60, 48)}


def test_a_log_is_replayed_under_a_plugins_policy(installed: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    simulated(installed, "--dispatch", "prefill-first", "--log", str(log))
    (found,) = json.loads(drift(installed, "replay", str(log), "--dispatch", "edf", "--json", "-"))["logs"]
    assert 0 < found["others"][0]["decisions"]["ratio"] <= 1
    assert found["others"][0]["report"]["requests"]["finished"] == 40


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_conforms_and_passes_its_own_tests(installed: Path, name: str) -> None:
    checked = drift(installed, "plugins", "check", name, "--budget-us", "1e6", "--json", "-")
    assert all(policy["passed"] for policy in json.loads(checked)["policies"])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "examples" / name / "tests")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_new_plugin_works_once_it_is_installed(tmp_path: Path) -> None:
    drift(tmp_path / "none", "plugins", "new", "shortest-first", "--into", str(tmp_path))
    package, target = tmp_path / "drift-plugin-shortest-first", tmp_path / "plugins"
    install(target, package)
    report = simulated(target, "--dispatch", "shortest-first:scan=8")
    assert (report["requests"]["finished"], report["scheduler"]["faults"]) == (40, 0)
    refused = drift(target, *SIMULATE, "--dispatch", "shortest-first:scam=8", code=2)
    assert "takes no option 'scam'; options: scan" in refused
    clash = drift(target, "plugins", "new", "shortest-first", "--into", str(tmp_path / "again"), code=2)
    assert "is there already, in plugin drift-plugin-shortest-first" in clash


BROKEN = """
from drift_scheduler.plugins import hookimpl

class Broken:
    def choose(self, view, costs, partitions):
        raise RuntimeError("out of order")

class OffTheMenu:
    def split(self, view, prefill, decode, costs):
        return (1, 1)

@hookimpl
def drift_dispatch_policies():
    return {"broken": Broken}

@hookimpl
def drift_partition_policies():
    return {"off-the-menu": OffTheMenu}
"""


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "broken.py").write_text(BROKEN)
    facts = tmp_path / "broken-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[drift]\nbroken = broken\n")
    return tmp_path


@pytest.mark.parametrize(
    "policies",
    [("--dispatch", "broken"), ("--dispatch", "gang", "--partition", "off-the-menu")],
    ids=" ".join,
)
def test_a_broken_plugin_is_outlived_and_the_report_counts_its_faults(
    broken: Path, policies: tuple[str, ...]
) -> None:
    report = simulated(broken, *policies)
    assert report["requests"]["finished"] == 40
    assert report["scheduler"]["faults"] > 0
    text = drift(broken, *SIMULATE[:-2], *policies)
    assert f"at fault {report['scheduler']['faults']} times and the fallback decided" in " ".join(
        text.split()
    )


def test_a_broken_plugin_does_not_conform(broken: Path) -> None:
    assert drift(broken, "plugins", "check", "broken", code=1) == ""
    found = subprocess.run(
        [sys.executable, "-m", "drift_scheduler.cli", "plugins", "check", "broken", "--json", "-"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(broken)},
    )  # fmt: skip
    policies = json.loads(found.stdout)["policies"]
    assert [policy["name"] for policy in policies] == ["broken"]
    assert "raised RuntimeError: out of order" in policies[0]["cases"][0]["fault"]
