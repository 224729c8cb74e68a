"""The command line: simulate end to end, determinism, logs, plugins, and one line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from drift_scheduler import cli
from drift_scheduler.dispatch import CLUSTER_ONLY
from drift_scheduler.domain import SLO, Request
from drift_scheduler.errors import PluginError
from drift_scheduler.plugins import Registry, load

BASE = ["simulate", "--device", "a100-80gb", "--model", "llama-3.1-8b", "--requests", "60", "--rate", "8"]


@pytest.fixture(autouse=True)
def only_built_in_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drift_scheduler.plugins.entry_points", lambda group: ())
    monkeypatch.setattr(cli.drift, "_found", None, raising=False)


def drift(*args: str) -> Result:
    return CliRunner().invoke(cli.drift, args, prog_name="drift")


def simulate(*args: str) -> Result:
    return drift(*BASE, *args)


def report_of(*args: str) -> dict[str, Any]:
    result = simulate(*args, "--json", "-")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("dispatch", sorted(load(installed=False).dispatch_policies))
def test_every_policy_serves_every_request(dispatch: str) -> None:
    device = ("--device", "8xa100-80gb") if dispatch in CLUSTER_ONLY else ()
    report = report_of("--workload", "sharegpt", "--dispatch", dispatch, *device)
    assert report["requests"]["finished"] == report["requests"]["offered"] == 60
    assert report["scheduler"]["faults"] == 0
    spent = sum(report["sharing_s"].values())
    assert spent == pytest.approx(report["duration_s"])


@pytest.mark.parametrize("workload", sorted(load(installed=False).workloads))
def test_every_workload_runs(workload: str) -> None:
    report = report_of("--workload", workload, "--dispatch", "gang", "--requests", "3")
    assert report["requests"]["finished"] == 3


def test_the_same_seed_gives_the_same_bytes() -> None:
    args = (
        *BASE,
        "--workload",
        "sharegpt",
        "--requests",
        "20",
        "--dispatch",
        "gang",
        "--noise",
        "0.1",
        "--json",
        "-",
    )
    first, second, other = drift(*args), drift(*args), drift(*args, "--seed", "5")
    assert first.stdout == second.stdout
    assert first.stdout != other.stdout


def test_the_published_table_is_used_where_it_fits_and_prefixes_are_reused() -> None:
    report = report_of(
        *("--workload", "tool-agent", "--dispatch", "gang", "--device", "8xa100-80gb"),
        *("--model", "llama-3.1-70b", "--rate", "0.5", "--slo-tbt", "0.1"),
    )
    assert report["config"]["cost"] == "fitted"
    assert report["kv"]["prefix_hit_ratio"] > 0.2
    assert report["sharing_s"]["spatial"] > 0


def test_options_of_a_policy_follow_its_name() -> None:
    small = report_of(
        "--workload", "loogle", "--requests", "10", "--dispatch", "chunked-prefill:token_budget=128"
    )
    large = report_of(
        "--workload", "loogle", "--requests", "10", "--dispatch", "chunked-prefill:token_budget=4096"
    )
    assert small["scheduler"]["steps"] > large["scheduler"]["steps"]


def test_belief_and_truth_may_differ() -> None:
    report = report_of(
        "--workload",
        "sharegpt",
        "--dispatch",
        "gang",
        "--truth",
        "roofline:slowdown_decode=1.0",
        "--noise",
        "0.3",
    )
    assert report["config"]["truth"] == "roofline:slowdown_decode=1.0"
    assert report["cost_model"]["error"]["decode"] > 0.1


def test_a_table_for_people_and_json_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    result = simulate("--workload", "sharegpt", "--dispatch", "gang", "--json", str(file), "--timing")
    assert result.exit_code == 0
    assert "60 of 60 requests finished" in result.stdout
    report = json.loads(file.read_text())
    assert report["scheduler"]["step_us"]["p50"] > 0
    assert report["config"]["seed"] == 0


def test_the_log_has_a_line_per_step_and_is_also_a_trace(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    report = report_of("--workload", "sharegpt", "--dispatch", "gang", "--log", str(log))
    head, *steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert head["schema"] == "drift.log/1"
    assert head["device"]["layers"] == 32
    assert len(steps) == report["scheduler"]["steps"]
    arrived = [e["arrived"]["id"] for s in steps for e in s["events"] if "arrived" in e]
    finished = [request_id for s in steps for request_id in (end["id"] for end in s.get("finished", ()))]
    assert sorted(arrived) == sorted(finished)
    assert len(arrived) == 60
    lanes = [lane for s in steps for lane in s.get("lanes", ())]
    assert {lane["lane"] for lane in lanes} == {"prefill", "decode"}


def test_a_trace_file_is_a_workload(tmp_path: Path) -> None:
    trace = tmp_path / "mine.jsonl"
    trace.write_text(
        "".join(f'{{"arrival_ms": {i}, "input_tokens": 99, "output_tokens": 5}}\n' for i in range(9))
    )
    report = report_of("--workload", str(trace), "--dispatch", "gang", "--requests", "5")
    assert report["requests"]["finished"] == 5
    assert report["throughput"]["output_tokens_per_s"] * report["duration_s"] == pytest.approx(25)


def test_a_pool_under_pressure_preempts_and_still_serves_all() -> None:
    report = report_of(
        *(
            "--workload",
            "synthetic:output_mean=600",
            "--dispatch",
            "gang",
            "--rate",
            "100",
            "--kv-pages",
            "1200",
        )
    )
    assert report["requests"]["finished"] == 60
    assert report["kv"]["preemptions"] > 0
    assert report["kv"]["peak_utilisation"] > 0.9


SHAREGPT = ("--workload", "sharegpt", "--dispatch", "gang")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--workload", "sharegtp", "--dispatch", "gang"),
            "no workload 'sharegtp' (did you mean 'sharegpt'?)",
        ),
        (
            ("--workload", "sharegpt", "--dispatch", "gagn"),
            "no dispatch policy 'gagn' (did you mean 'gang'?)",
        ),
        (("--workload", "sharegpt", "--dispatch", "gang:x=1"), "takes no option 'x'"),
        (("--workload", "sharegpt", "--dispatch", "gang:x"), "NAME:option=value"),
        (("--workload", "none.jsonl", "--dispatch", "gang"), "none.jsonl: No such file"),
        ((*SHAREGPT, "--device", "a1000"), "no device 'a1000'"),
        ((*SHAREGPT, "--model", "llama"), "no model 'llama'"),
        ((*SHAREGPT, "--model", "llama-3.1-70b"), "use more devices"),
        ((*SHAREGPT, "--partition", "x"), "no partition policy 'x'"),
        ((*SHAREGPT, "--cost", "x"), "no cost model 'x'"),
        (
            (*SHAREGPT, "--cost", "fitted"),
            "no built-in cost table of model 'llama-3.1-8b' on device 'a100-80gb'",
        ),
        ((*SHAREGPT, "--cost", "fitted:table=none.json"), "none.json: No such file"),
        ((*SHAREGPT, "--cost", "fitted:table=8xa100-80gb--llama-3.1-70b"), "80 layers"),
        ((*SHAREGPT, "--cost", "roofline:slowdown_decode=0.1"), "between 1 and 100"),
        ((*SHAREGPT, "--rate", "-1"), "rate is -1.0"),
        ((*SHAREGPT, "--rate", "nan"), "rate is nan"),
        ((*SHAREGPT, "--requests", "0"), "0 requests"),
        ((*SHAREGPT, "--slo-ttft", "0"), "slo-ttft is 0.0"),
        ((*SHAREGPT, "--slo-tbt", "nan"), "slo-tbt is nan"),
        ((*SHAREGPT, "--noise", "-1"), "noise is -1.0"),
        (
            ("--workload", "synthetic:input_min=x", "--dispatch", "gang"),
            "workload 'synthetic' (plugin drift-scheduler) with rate=8.0, requests=60, input_min='x': ",
        ),
        ((*SHAREGPT, "--kv-pages", "0"), "kv-pages is 0"),
        ((*SHAREGPT, "--page-tokens", "0"), "page-tokens is 0"),
        ((*SHAREGPT, "--page-tokens", "100000000"), "page-tokens is 100000000, more than the 4"),
        (
            (*SHAREGPT, "--device", "8xh200", "--dispatch", "pd-disaggregated", "--page-tokens", "5000000"),
            "page-tokens is 5000000, more than the",
        ),
        ((*SHAREGPT, "--log", "/nowhere/log"), "/nowhere/log: No such file"),
        ((*SHAREGPT, "--json", "/nowhere/json"), "/nowhere/json: No such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args: tuple[str, ...], message: str) -> None:
    result = simulate(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("drift: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("path", "problem"), [("none/found.json", "No such file"), ("", "Is a directory")])
def test_where_no_report_can_go_is_seen_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, problem: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing was to be run")

    monkeypatch.setattr("drift_scheduler.simulation.run.Simulation.run", never)
    report = ("--json", str(tmp_path / path))
    grid = tmp_path / "grid.toml"
    grid.write_text(
        'devices = ["h200"]\nmodels = ["llama-3.1-8b"]\npolicies = ["gang"]\n[[workloads]]\nname = "sharegpt"\n'
    )
    searched = ("--dispatch", "gang", "--workload", "sharegpt", "--device", "h200", "--model", "llama-3.1-8b")
    for result in (
        simulate(*SHAREGPT, *report),
        drift("goodput", *searched, *report),
        drift("bench", str(grid), *report),
    ):
        assert result.exit_code == 2
        assert problem in result.stderr
        assert result.stderr.count("\n") == 1


def test_lists(tmp_path: Path) -> None:
    assert "tool-agent" in drift("workloads").stdout
    found = json.loads(drift("plugins", "list", "--json", "-").stdout)
    assert found["names"]["dispatch policy"]["gang"]["plugin"] == "drift-scheduler"
    assert found["problems"] == []
    assert "chunked-prefill" in drift("plugins", "list").stdout
    for kind in ("dispatch policy", "partition policy", "cost model", "workload"):
        for name, entry in found["names"][kind].items():
            assert entry["summary"], f"{kind} {name} does not say what it is"
    assert drift("--version").stdout.startswith("drift ")


def test_a_plugin_that_cannot_be_loaded_is_named_and_help_still_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = load(installed=False)
    broken = Registry(good.manager, good.names, (PluginError("plugin 'bad' cannot be imported: boom"),))
    monkeypatch.setattr("drift_scheduler.plugins.load", lambda strict=True: broken)
    result = drift("--help")
    assert result.exit_code == 0
    assert "plugin 'bad' cannot be imported" in result.stderr
    assert "simulate" in result.stdout
    assert drift("plugins", "list").exit_code == 2
    unknown = drift("nonsense")
    assert unknown.exit_code == 2
    assert "No such command 'nonsense'" in unknown.stderr


@pytest.mark.parametrize("command", ["simulate", "goodput"])
def test_a_workload_that_sees_late_what_is_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from drift_scheduler.hookspecs import hookimpl

    def town(seed: int, city: str = "", **_: object) -> Iterator[Request]:
        if not city:
            raise ValueError("no city was named")
        yield Request("a", 0.0, 10, 5, SLO(1.0, 0.1))

    class Plugin:
        @staticmethod
        @hookimpl
        def drift_workloads() -> dict[str, object]:
            return {"town": town, "none": lambda seed, **_: 7}

    registry = load([("acme", Plugin)], installed=False)
    monkeypatch.setattr("drift_scheduler.plugins.load", lambda strict=True: registry)
    on = (command, "--device", "h200", "--model", "llama-3.1-8b", "--dispatch", "gang", "--workload")
    assert drift(*on, "town").stderr == "drift: workload 'town' (plugin acme): no city was named\n"
    assert drift(*on, "none").stderr == "drift: workload 'none' (plugin acme): 'int' object is not iterable\n"


def test_a_plugins_command_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    from drift_scheduler.hookspecs import hookimpl

    class Plugin:
        @staticmethod
        @hookimpl
        def drift_cli_commands() -> dict[str, click.Command]:
            return {"hello": click.Command("hello", callback=lambda: click.echo("hi"), help="Greets.")}

    registry = load([("greeter", Plugin)], installed=False)
    monkeypatch.setattr("drift_scheduler.plugins.load", lambda strict=True: registry)
    assert "Greets." in drift("--help").stdout
    assert drift("hello").stdout == "hi\n"


def test_a_plugins_command_that_cannot_join_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    from drift_scheduler.hookspecs import hookimpl

    class Plugin:
        @staticmethod
        @hookimpl
        def drift_cli_commands() -> dict[str, object]:
            return {"hello": print, "simulate": click.Command("simulate", help="Another.")}

    registry = load([("greeter", Plugin)], installed=False)
    monkeypatch.setattr("drift_scheduler.plugins.load", lambda strict=True: registry)
    result = drift("--help")
    assert result.exit_code == 0
    assert "plugin 'greeter': command 'hello' is no click command" in result.stderr
    assert "plugin 'greeter': drift has a command 'simulate' already" in result.stderr
    assert "Another." not in result.stdout


def test_importing_the_package_loads_neither_click_nor_msgspec_nor_rich() -> None:
    code = (
        "import sys, drift_scheduler, drift_scheduler.plugins, drift_scheduler.scheduler, drift_scheduler.loop; "
        "bad = {'click', 'msgspec', 'rich', 'torch', 'grpc'} & set(sys.modules); sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
