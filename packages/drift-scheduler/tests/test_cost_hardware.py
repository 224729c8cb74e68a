"""Device and model descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler.cost.hardware import (
    device_spec,
    installed,
    kv_tokens,
    menu,
    model_spec,
    simulated_device,
)
from drift_scheduler.domain import Partition, Sharing
from drift_scheduler.errors import DriftError, UnknownNameError

DEVICES = ("a100-80gb", "cpu", "h100", "h200", "l40s", "rtx4090", "rtx5090")
MODELS = ("demo", "llama-3.1-70b", "llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b")


def test_the_built_in_descriptions_are_installed() -> None:
    assert tuple(installed("devices")) == DEVICES
    assert tuple(installed("models")) == MODELS


@pytest.mark.parametrize("name", DEVICES)
def test_every_menu_is_what_the_hardware_can_split(name: str) -> None:
    spec = device_spec(name)
    found = menu(spec)
    assert found[0] == Partition(spec.units, 0)
    assert found[-1] == Partition(0, spec.units)
    assert len(found) == len(set(found)) >= 3
    for split in found[1:-1]:
        assert split.prefill + split.decode == spec.units
        assert min(split.prefill, split.decode) >= spec.min_units
        assert split.decode % spec.multiple_units == 0


def test_the_a100_menu_is_the_papers_six_splits() -> None:
    assert [p.decode for p in menu(device_spec("a100-80gb"))[1:-1]] == [16, 32, 48, 64, 80, 96]


def test_weights_and_kv_of_llama_8b_are_as_known() -> None:
    spec = model_spec("llama-3.1-8b")
    assert spec.weight_bytes == pytest.approx(16.06e9, rel=0.001)
    assert spec.kv_bytes == 128 * 1024
    assert model_spec("llama-3.1-70b").weight_bytes == pytest.approx(141.1e9, rel=0.001)


def test_what_does_not_fit_says_so_and_more_devices_help() -> None:
    model = model_spec("llama-3.1-70b")
    with pytest.raises(DriftError, match=r"141\.1 GB.*72\.0 GB.*Nxa100-80gb"):
        kv_tokens(device_spec("a100-80gb"), model)
    assert kv_tokens(device_spec("8xa100-80gb"), model) > 1_000_000


def test_a_device_of_one_unit_runs_nothing_side_by_side(tmp_path: Path) -> None:
    text = Path(device_file("cpu")).read_text().replace("units = 2\n", "units = 1\n")
    (tmp_path / "one.toml").write_text(text)
    device = simulated_device(device_spec(str(tmp_path / "one.toml")), model_spec("demo"))
    assert not device.splits()
    assert Sharing.SPATIAL not in device.sharings


def device_file(name: str) -> str:
    import drift_scheduler

    return str(Path(drift_scheduler.__path__[0]) / "data" / "devices" / f"{name}.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("units = 2\n", "units = -2\n", "field units"),
        ("units = 2\n", 'units = "two"\n', "field units"),
        ("tflops = 0.5\n", "tflops = nan\n", "field tflops"),
        ("tflops = 0.5\n", "tflops = inf\n", "field tflops"),
        ("tflops = 0.5\n", "", "missing required field `tflops`"),
        ("tflops = 0.5\n", "tflops = 0.5\nfoo = 1\n", "unknown field `foo`"),
        ("tflops = 0.5\n", "tflops = = 1\n", "line"),
    ],
)
def test_a_bad_device_file_is_one_line_that_names_file_and_field(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = Path(device_file("cpu")).read_text()
    assert old in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(old, new))
    with pytest.raises(DriftError) as caught:
        device_spec(str(file))
    assert message in str(caught.value)
    assert "mine.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_device_file_is_one_line_that_names_the_line(tmp_path: Path) -> None:
    text = Path(device_file("cpu")).read_text()
    number = text[: text.index("tflops =")].count("\n") + 1
    for new in ("tflops = nan\n", "tflops = -1\n", 'tflops = "x"\n'):
        (tmp_path / "mine.toml").write_text(text.replace("tflops = 0.5\n", new))
        with pytest.raises(DriftError, match=rf"mine\.toml:{number}: field tflops: "):
            device_spec(str(tmp_path / "mine.toml"))


KEYS = ("units", "memory_gb", "tflops", "bandwidth_gb_s", "min_units", "step_units", "unit", "x")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**25), 10**25), st.floats(), st.text(max_size=8), st.just("[1]")
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), st.binary(max_size=60))
def test_any_device_file_is_a_device_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], tail: bytes
) -> None:
    lines = {
        line.split(" =")[0]: line for line in Path(device_file("cpu")).read_text().splitlines() if "=" in line
    }
    lines |= {key: f"{key} = {_toml(value)}" for key, value in changes.items()}
    file = tmp_path_factory.getbasetemp() / "any-device.toml"
    file.write_bytes("\n".join(lines.values()).encode() + b"\n" + tail)
    problem = "any-device.toml"
    try:
        simulated_device(device_spec(str(file)), model_spec("demo"))
    except DriftError as error:
        problem = str(error)
    assert "any-device.toml" in problem
    assert len(problem.splitlines()) == 1


def _toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"no device 'h300'.*did you mean 'h200'.*a100-80gb, cpu"):
        device_spec("h300")
    with pytest.raises(UnknownNameError, match="no model 'gpt'"):
        model_spec("gpt")
    with pytest.raises(DriftError, match="0 devices"):
        device_spec("0xh100")
    with pytest.raises(DriftError, match=r"none\.toml: No such file"):
        device_spec("none.toml")
