"""Scenario files: what is read, and one line `FILE:LINE: KEY: ...` for everything that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler import cli
from drift_scheduler.bench import make_grid, read_grid
from drift_scheduler.errors import DriftError
from drift_scheduler.plugins import load
from drift_scheduler.scenario_file import ScenarioFile, check_scenario, read_scenario
from drift_scheduler.toml_lines import Source

GOOD = """
devices = ["h200", "a100-80gb"]
models = ["llama-3.1-8b"]
policies = ["drift", "chunked-prefill"]
tbt = [0.025, 0.05]
[[workloads]]
name = "sharegpt"
[[workloads]]
name = "loogle"
ttft = 10.0
tbt = [0.1]
requests = 7
"""


@pytest.fixture(autouse=True)
def only_built_in_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drift_scheduler.plugins.entry_points", lambda group: ())
    monkeypatch.setattr(cli.drift, "_found", None, raising=False)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "s.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_grid_is_every_system_workload_and_target(tmp_path: Path) -> None:
    grid = read_grid(write(tmp_path, GOOD), load(installed=False))
    assert [cell.key for cell in grid.cells] == [
        "h200/llama-3.1-8b/sharegpt/tbt=0.025",
        "h200/llama-3.1-8b/sharegpt/tbt=0.05",
        "h200/llama-3.1-8b/loogle/tbt=0.1",
        "a100-80gb/llama-3.1-8b/sharegpt/tbt=0.025",
        "a100-80gb/llama-3.1-8b/sharegpt/tbt=0.05",
        "a100-80gb/llama-3.1-8b/loogle/tbt=0.1",
    ]
    loogle = grid.cells[2]
    assert (loogle.scenario.slo.ttft, loogle.plan.requests) == (10.0, 7)
    assert (grid.cells[0].scenario.slo.ttft, grid.cells[0].plan.requests) == (1.0, 300)
    assert grid.base == "chunked-prefill"


def test_systems_pair_devices_with_models_and_scale_targets(tmp_path: Path) -> None:
    text = """
    policies = ["gang"]
    [[systems]]
    device = "8xa100-80gb"
    model = "llama-3.1-70b"
    tbt = [0.1]
    ttft_scale = 3.0
    [[workloads]]
    name = "sharegpt"
    """
    (cell,) = read_grid(write(tmp_path, text), load(installed=False)).cells
    assert (cell.scenario.slo.ttft, cell.scenario.slo.tbt) == (3.0, 0.1)
    assert cell.scenario.cost_name == "fitted"


def test_traces_are_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"arrival_ms": 0, "input_tokens": 10, "output_tokens": 4}) + "\n"
    )
    text = 'devices=["h200"]\nmodels=["llama-3.1-8b"]\npolicies=["gang"]\n[[workloads]]\nname="t.jsonl"\n'
    (cell,) = read_grid(write(tmp_path, text), load(installed=False)).cells
    assert cell.workload.title == "t"
    assert cell.scenario.workload == str(tmp_path / "t.jsonl")


def test_the_default_grid_of_the_repository_is_good() -> None:
    path = Path(__file__).parents[3] / "bench" / "grid.toml"
    if not path.is_file():
        pytest.skip("not in the repository")
    file = read_scenario(path)
    assert file.policies[0] == "drift"
    assert len(file.search.seeds) >= 3
    assert {w.name for w in file.workloads} == {
        "sharegpt",
        "loogle",
        "openthoughts",
        "conversation",
        "tool-agent",
    }


BAD = [
    (GOOD.replace('["h200", "a100-80gb"]', '["h2000"]'), "devices[0]: no device 'h2000' (did you mean 'h200'?)"),
    (GOOD.replace('["llama-3.1-8b"]', '["llama"]'), "models[0]: no model 'llama'"),
    (GOOD.replace('["h200", "a100-80gb"]', '["h200"]').replace("3.1-8b", "3.1-70b"), "simulation.cost|workloads[0]"),
    (GOOD.replace('"drift"', '"drif"'), "policies[0]: no dispatch policy 'drif'"),
    (GOOD.replace('"drift"', '"drift:margin=7"'), "policies[0]: option 'margin'"),
    (GOOD.replace('"drift"', '"chunked-prefill"'), "policies: 'chunked-prefill' is there twice"),
    (GOOD.replace('"loogle"', '"logle"'), "workloads[1].name: no workload 'logle'"),
    (GOOD.replace('"loogle"', '"missing.jsonl"'), "workloads[1].name: missing.jsonl: No such file"),
    (GOOD.replace('"loogle"', '"sharegpt"'), "workloads: 'sharegpt' is there twice; tell them apart by label"),
    (GOOD.replace('"loogle"', "3"), "workloads[1].name: Expected `str`, got `int`"),
    (GOOD.replace("10.0", "nan"), "workloads[1].ttft: nan is not a finite number"),
    (GOOD.replace("10.0", "-1.0"), "workloads[1].ttft: Expected `float` > 0"),
    (GOOD.replace("10.0", "1e9"), "workloads[1].ttft: Expected `float` <= 1000000"),
    (GOOD.replace("requests = 7", "requests = 0"), "workloads[1].requests: Expected `int` >= 1"),
    (GOOD.replace("requests = 7", "requests = 99999999999999999999"), "workloads[1].requests"),
    (GOOD.replace("requests = 7", "request = 7"), "workloads[1]: Object contains unknown field `request`"),
    (GOOD.replace("[0.025, 0.05]", "[]"), "tbt: Expected `array` of length >= 1"),
    (GOOD.replace("[0.025, 0.05]", "0.05"), "tbt: Expected `array`, got `float`"),
    (GOOD.replace("[0.025, 0.05]", "[0.025, inf]"), "tbt[1]: inf is not a finite number"),
    (GOOD.replace('models = ["llama-3.1-8b"]', ""), "models: missing; give devices and models, or systems"),
    (GOOD + '[[systems]]\ndevice="h200"\nmodel="llama-3.1-8b"\n', "systems: give either systems, or devices"),
    (GOOD + '[search]\ncriterion="p1"\n', "search.criterion: criterion 'p1'"),
    (GOOD + "[search]\nseeds=[1,1]\n", "search.seeds: '1' is there twice"),
    (GOOD + "[search]\nseeds=[-1]\n", "search.seeds[0]: Expected `int` >= 0"),
    (GOOD + "[simulation]\npartition='x'\n", "simulation.partition: no partition policy 'x'"),
    (GOOD + "[simulation]\ntruth='x'\n", "simulation.truth: no cost model 'x'"),
    (GOOD + "[simulation]\nnoise=nan\n", "simulation.noise: nan is not a finite number"),
    (GOOD + "[detail]\ncells='some'\n", "detail.cells: Invalid enum value"),
    (GOOD.replace("policies", "base='gang'\npolicies"), "base: 'gang' is not among the policies"),
    ("", "Object missing required field"),
    ("a = [[[", "not TOML"),
    (b"\xff\xfe", "not UTF-8 text"),
    ("a = " + "[" * 5000, "not TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_bad_file_is_one_line_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DriftError) as caught:
        read_grid(path, load(installed=False))
    message = str(caught.value)
    assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", message)
    assert any(part in message for part in said.split("|"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ('"drift"', '"drif"', ":4: policies[0]: no dispatch policy"),
        ('"loogle"', "3", ":9: workloads[1].name: "),
        ("requests = 7", "requests = nan", ":12: workloads[1].requests: nan"),
        ("requests = 7", "request = 7", ":12: workloads[1]: Object contains unknown field"),
        ("requests = 7", "requests = = 7", "not TOML: Invalid value (at line 12"),
    ],
)
def test_an_error_names_the_line(tmp_path: Path, old: str, new: str, place: str) -> None:
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(DriftError) as caught:
        read_grid(path, load(installed=False))
    assert str(caught.value).startswith(str(path))
    assert place in str(caught.value)


def test_a_file_that_is_not_there_or_far_too_big(tmp_path: Path) -> None:
    with pytest.raises(DriftError, match="No such file"):
        read_scenario(tmp_path / "none.toml")
    with pytest.raises(DriftError, match="Is a directory"):
        read_scenario(tmp_path)
    with pytest.raises(DriftError, match="no scenario file"):
        read_scenario(write(tmp_path, b"#" * 2_000_000))


def test_a_huge_grid_is_refused() -> None:
    values = {
        "devices": [f"h200-{i}" for i in range(60)],
        "models": [f"m{i}" for i in range(60)],
        "policies": ["gang"],
        "workloads": [{"name": "sharegpt"}],
    }
    with pytest.raises(DriftError, match="grid has 3600 cells"):
        check_scenario(values, Source("x.toml"))


KEYS = sorted(ScenarioFile.__struct_fields__)
LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=8),
    st.just("h200"),
    st.just("gang"),
)
KEY = st.one_of(st.sampled_from(["name", "ttft", "device", "seeds"]), st.text(max_size=5))
VALUE = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(KEY, inner, max_size=4),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=8))
def test_any_values_give_a_file_or_one_line(values: dict[str, Any]) -> None:
    base: dict[str, Any] = {
        "devices": ["h200"],
        "models": ["llama-3.1-8b"],
        "policies": ["gang"],
        "workloads": [{"name": "sharegpt"}],
    }
    problem = ""
    try:
        source = Source("f.toml")
        make_grid(check_scenario({**base, **values}, source), source, load(installed=False))
    except DriftError as error:
        problem = str(error)
    assert not problem or problem.startswith("f.toml: ")
    assert len(problem.splitlines()) <= 1


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with pytest.raises(DriftError) as caught:
        read_scenario(path)
    assert len(str(caught.value).splitlines()) == 1


def drift(*args: str) -> Result:
    return CliRunner().invoke(cli.drift, ["bench", *args], prog_name="drift")


def test_the_command_refuses_before_it_searches(tmp_path: Path) -> None:
    result = drift(str(write(tmp_path, GOOD.replace('"drift"', '"drif"'))))
    assert result.exit_code == 2
    assert result.stderr.startswith("drift: ")
    assert len(result.stderr.strip().splitlines()) == 1
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = drift(str(write(tmp_path, GOOD)), "--out", str(blocked))
    assert result.exit_code == 2
    assert str(blocked) in result.stderr
