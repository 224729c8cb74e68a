"""`drift plugins new` writes what works, `drift plugins check` finds what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from drift_scheduler import cli, plugins
from drift_scheduler.conformance import CASES
from drift_scheduler.dispatch.exclusive import Alternate
from drift_scheduler.errors import OptionError, UnknownNameError
from drift_scheduler.plugin_kit.check import check
from drift_scheduler.plugin_kit.new import KINDS, write_plugin
from drift_scheduler.plugins import Registry, hookimpl, load

FEW = CASES[::6]


@pytest.fixture(autouse=True)
def only_built_in_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drift_scheduler.plugins.entry_points", lambda group: ())
    monkeypatch.setattr(cli.drift, "_found", None, raising=False)


def drift(*args: str) -> Result:
    return CliRunner().invoke(cli.drift, args, prog_name="drift")


def registry_with(kind: str, factory: Any) -> Registry:
    def hook() -> dict[str, Any]:
        return {"mine": factory}

    hook.__name__ = kind
    return load([("acme", SimpleNamespace(**{kind: hookimpl(hook)}))], installed=False)


class Clock:
    """A microsecond passes whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


def verdict_of(kind: str, factory: Any, budget_us: float = 2000.0, wall: Clock | None = None) -> Any:
    registry = registry_with(kind, factory)
    (verdict,) = check(registry, "mine", wall=wall or Clock(), cpu=Clock(), budget_us=budget_us, cases=FEW)
    return verdict


# ----------------------------------------------------------------------------------------------- new


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_passes_its_own_test(tmp_path: Path, kind: str) -> None:
    folder = write_plugin("quick-brown", kind, tmp_path)
    assert folder == tmp_path / "drift-plugin-quick-brown"
    text = (folder / "pyproject.toml").read_text()
    assert '[project.entry-points.drift]\nquick-brown = "drift_plugin_quick_brown"' in text
    assert not [f for f in folder.rglob("*") if f.is_file() and "$" in f.read_text().replace("$ ", "")]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-k", "conforms"],
        cwd=folder, env={"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(CASES)} passed" in ran.stdout


def test_what_is_written_is_python_of_a_decent_width(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = write_plugin(f"mine-{kind}", kind, tmp_path)
        for file in folder.rglob("*.py"):
            compile(file.read_text(), str(file), "exec")
            assert max(len(line) for line in file.read_text().splitlines()) <= 120


@pytest.mark.parametrize("name", ["", "Mine", "my policy", "-x", "x-", "a--b", "../x", "1st", "x" * 61])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="is no name for a policy"):
        write_plugin(name, into=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    result = drift("plugins", "new", "mine", "--into", str(tmp_path))
    assert result.exit_code == 0
    assert "drift plugins check mine" in result.stdout
    again = drift("plugins", "new", "mine", "--into", str(tmp_path))
    assert again.exit_code == 2
    assert "is already there" in again.stderr
    taken = drift("plugins", "new", "gang", "--into", str(tmp_path))
    assert taken.exit_code == 2
    assert "the dispatch policy 'gang' is there already, in plugin drift-scheduler" in taken.stderr
    file = tmp_path / "file"
    file.touch()
    assert drift("plugins", "new", "mine", "--into", str(file)).exit_code == 2


# --------------------------------------------------------------------------------------------- check


def test_a_sound_policy_conforms() -> None:
    verdict = verdict_of("drift_dispatch_policies", Alternate)
    assert verdict.passed
    assert [result.case for result in verdict.cases] == [case.name for case in FEW]
    assert verdict.decisions > 200
    assert verdict.wall_p50_us == pytest.approx(1.0)


def test_a_policy_that_proposes_what_is_illegal_does_not_conform() -> None:
    class Sliced(Alternate):
        """Slices a lone prefill."""

        def choose(self, view, costs, partitions):
            from dataclasses import replace

            gang = super().choose(view, costs, partitions)
            if gang is None or gang.prefill is None:
                return gang
            return replace(gang, prefill=replace(gang.prefill, layer_stop=gang.prefill.layer_start + 1))

    verdict = verdict_of("drift_dispatch_policies", Sliced)
    assert not verdict.passed
    assert verdict.in_time
    assert "not one block on the whole device" in verdict.cases[0].fault


def test_a_split_off_the_menu_does_not_conform() -> None:
    class Odd:
        def split(self, view, prefill, decode, costs):
            return type(view.device.menu[0])(1, 1)

    verdict = verdict_of("drift_partition_policies", Odd)
    assert not verdict.passed
    assert any("off the menu" in result.fault for result in verdict.cases)


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_policy_that_takes_too_long_does_not_conform(sleeps: bool) -> None:
    wall = Clock()

    class Slow(Alternate):
        def choose(self, view, costs, partitions):
            wall.now += 0.003 if sleeps else 0.0
            return super().choose(view, costs, partitions)

    verdict = verdict_of("drift_dispatch_policies", Slow, wall=wall)
    assert verdict.in_time is not sleeps
    assert verdict.passed is not sleeps
    assert not verdict_of("drift_dispatch_policies", Alternate, budget_us=0.5).in_time


def test_policies_are_found_by_name_with_options_and_by_plugin() -> None:
    registry = registry_with("drift_partition_policies", Alternate)
    clocks = {"wall": Clock(), "cpu": Clock(), "cases": FEW[:1]}
    (static,) = check(registry, "static:decode_units=1", **clocks)
    assert static.passed
    assert (static.kind, static.plugin) == ("partition policy", "drift-scheduler")
    (mine,) = check(registry, "acme", **clocks)
    assert mine.name == "mine"
    assert not mine.passed  # it has no split()
    with pytest.raises(UnknownNameError, match=r"no policy or plugin 'gagn' .*did you mean 'gang'"):
        check(registry, "gagn", **clocks)
    with pytest.raises(OptionError, match="needs option 'decode_units'"):
        check(registry, "static", **clocks)


def test_a_policy_that_refuses_the_device_is_not_checked() -> None:
    (verdict,) = check(load(installed=False), "nanoflow", wall=Clock(), cpu=Clock())
    assert not verdict.passed
    assert "simulated clusters" in verdict.refused


def test_the_command_prints_a_table_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drift_scheduler.plugin_kit.check.CASES", FEW)
    monkeypatch.setattr(cli, "_clocks", lambda: (Clock(), Clock()))
    result = drift("plugins", "check", "decode-first", "--json", "-")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["policies"]
    assert found["passed"]
    assert {case["fault"] for case in found["cases"]} == {""}

    class Raises:
        def choose(self, view, costs, partitions):
            raise RuntimeError("no")

    broken = registry_with("drift_dispatch_policies", Raises)
    monkeypatch.setattr(plugins, "load", lambda strict: broken)
    result = drift("plugins", "check", "mine")
    assert result.exit_code == 1
    assert "Raises raised RuntimeError: no" in result.stdout.replace("\n", " ").replace("  ", " ")
    assert "does NOT conform" in result.stdout
    assert drift("plugins", "check", "absent").exit_code == 2


def test_a_plugins_observer_sees_every_step_of_a_simulation_until_it_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    class Watching:
        def on_step(self, record: Any) -> None:
            seen.append(record.index)
            if record.index == 9:
                raise RuntimeError("enough")

    def drift_observers(config: Any) -> list[Any]:
        assert config["dispatch"] == "gang"
        return [Watching()]

    plugin = SimpleNamespace(drift_observers=hookimpl(drift_observers))
    registry = load([("acme", plugin)], installed=False)
    monkeypatch.setattr(plugins, "load", lambda strict: registry)
    result = drift(
        *("simulate", "--workload", "sharegpt", "--requests", "5", "--rate", "5", "--device", "a100-80gb"),
        *("--model", "llama-3.1-8b", "--dispatch", "gang"),
    )
    assert result.exit_code == 0, result.output
    assert seen == list(range(10))
    assert "observer Watching is dropped: it raised RuntimeError: enough" in result.stderr
