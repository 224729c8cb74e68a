"""Profiles and set-up of the CUDA executor, as far as they run without a device."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from drift_core.assembly import weights_on
from drift_core.costs import measured_costs
from drift_core.cuda import estimates
from drift_core.cuda.assembly import CudaOptions, plan_memory
from drift_core.cuda.device import Place, Work
from drift_core.cuda.measure import plan_grid
from drift_core.cuda.stub import StubDevice
from drift_core.engine import Setup, engine_config
from drift_core.model.config import load_config, model_directory, shape_config
from drift_scheduler.cli import drift
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.table import CostTable
from drift_scheduler.domain import DecodeShape, Device, Partition, PrefillShape
from drift_scheduler.errors import DriftError

sys.path.insert(0, str(Path(__file__).parent))

from cuda_world import LAYERS, UNITS, Load, run, stub_executor

H200 = 141 << 30


def cost(work: Work, place: Place) -> float:
    """Work that halves with twice the units; 20% slower under a split."""
    units = UNITS if place.partition is None else getattr(place.partition, place.lane.value)
    solo = {"decode": 1e-4 + 1e-5 * work.tokens, "prefill": 2e-5 * work.layers * work.tokens / LAYERS}
    return solo.get(work.name, 1e-7 * max(work.tokens, 1)) * UNITS / units


def disorder(stub: StubDevice) -> list[str]:
    """Faults but for pages: those of made-up requests overlap on purpose, and their contents mean nothing."""
    return [fault for fault in stub.faults if "kv page" not in fault]


def table(stub: StubDevice, journal: Path | None = None) -> CostTable:
    executor = stub_executor(stub)
    grid = executor.plan_grid(max_running=8, full=False)
    return executor.profile(grid, "tiny", lambda fraction: None, journal)


def test_a_profile_finds_what_the_stub_takes() -> None:
    stub = StubDevice(UNITS, cost)
    found = table(stub)
    assert not disorder(stub)
    assert {row.units for row in found.decode} == {4, 8, 12, UNITS}
    by_units = {row.units: row.seconds for row in found.decode if row.batch == 8}
    assert by_units[4] == pytest.approx(4 * by_units[UNITS], rel=0.05)
    assert found.prefill
    assert found.fused
    assert {(row.prefill_units, row.decode_units) for row in found.slowdown} == {(12, 4), (8, 8), (4, 12)}
    fit = FittedCost(found)
    assert fit.decode(DecodeShape(8, 8 * 200), UNITS) == pytest.approx(1e-4 + 8e-5, rel=0.3)


def test_a_profile_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    journal = tmp_path / "cells.jsonl"
    first = table(StubDevice(UNITS, cost, runs=False), journal)
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[: len(lines) // 2], '{"subject": "stub/ti']))
    stub = StubDevice(UNITS, cost, runs=False)
    again = table(stub, journal)
    assert [row.seconds for row in again.decode] == pytest.approx([row.seconds for row in first.decode])
    whole = StubDevice(UNITS, cost, runs=False)
    table(whole)
    assert len(stub.log) < len(whole.log)


def test_an_executor_serves_after_its_profile() -> None:
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    executor.profile(executor.plan_grid(max_running=8, full=False), "tiny", lambda fraction: None)
    executor.warm_up()
    assert run(executor, Load(), "gang") == run(_ready(), Load(), "alternate")
    assert not disorder(stub)


def _ready():  # type: ignore[no-untyped-def]
    made = stub_executor(StubDevice(UNITS))
    made.warm_up()
    return made


def test_the_full_grid_takes_every_split() -> None:
    menu = tuple(Partition(132 - d, d) for d in range(0, 133, 12))
    device = Device(132, menu, 32)
    full = plan_grid(device, max_context=32768, max_running=256, full=True)
    short = plan_grid(device, max_context=32768, max_running=256, full=False)
    assert len(full.splits) == len(device.splits())
    assert short.cells < full.cells / 4
    assert all(new + reused < 32768 for new, reused in full.prefill)


def test_memory_goes_to_kv_after_weights_and_passes() -> None:
    model = shape_config("llama-3.1-8b")
    weights = model.num_parameters * 2
    assert weights == pytest.approx(16.06e9, rel=0.001)
    plan = plan_memory(
        model, torch.bfloat16, H200 - weights, 10, CudaOptions(max_running=256, max_context=32768)
    )
    assert plan.bytes_per_page == 16 * 128 * 1024
    assert 80e9 < plan.memory_bytes < 125e9
    with pytest.raises(DriftError, match="too little memory"):
        plan_memory(model, torch.bfloat16, 1 << 30, 10, CudaOptions(kv_memory_bytes=2 << 30))
    small = plan_memory(model, torch.bfloat16, 30 << 30, 10, CudaOptions(max_running=1, max_context=131072))
    assert small.max_context <= 131072


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", None), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"), ("NVIDIA GH200 480GB", None), ("NVIDIA L4", None), ("stub", None),
    ],
)  # fmt: skip
def test_a_gpus_name_finds_its_data(name: str, wanted: str | None) -> None:
    assert estimates.named(name) == wanted


def test_what_no_data_describes_is_derived_from_its_properties() -> None:
    h200 = SimpleNamespace(
        name="NVIDIA H2000", major=9, minor=0, multi_processor_count=132, clock_rate=1_830_000,
        memory_clock_rate=3_201_000, memory_bus_width=6144, total_memory=150e9,
    )  # fmt: skip
    spec = estimates.derived(h200)
    assert spec.tflops == pytest.approx(989, rel=0.01)
    assert spec.bandwidth_gb_s == pytest.approx(4900, rel=0.01)
    silent = estimates.derived(SimpleNamespace(major=8, minor=6, multi_processor_count=54))
    assert silent.tflops == pytest.approx(312 / 2, rel=0.01)  # half the multiprocessors of its kin


@pytest.mark.parametrize(("name", "units", "line"), [
    ("NVIDIA H200", 132, "estimated by the data of h200"),
    ("NVIDIA H200", 66, "estimated by the data of h200"),
    ("NVIDIA X1", 132, "no data on NVIDIA X1; derived from 132 multiprocessors"),
])  # fmt: skip
def test_without_a_profile_a_gpus_costs_are_a_gpus(
    name: str, units: int, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    stub.units, stub.name = units, name  # type: ignore[misc]
    config = engine_config(model="random:llama-3.1-8b", profile="none")
    model = shape_config("llama-3.1-8b")
    setup = Setup(config, model, Path("random:llama-3.1-8b"), lambda phase, fraction: None)
    with caplog.at_level("INFO", logger="drift.engine"):
        costs = measured_costs(setup, executor)
    assert line in caplog.text
    step = costs.decode(DecodeShape(64, 64 * 2048), units)
    if units == 132:
        assert 1e-2 < step < 3e-2  # twice bf16's floor of 6.9 ms is the least; a CPU would take a second
    prefill = costs.prefill(PrefillShape.of([(4096, 0)]), units)
    assert (0.05 if units == 132 else 0.15) < prefill < (0.15 if units == 132 else 0.4)


def test_a_load_format_that_is_none_is_refused() -> None:
    from drift_core.starting import start_engine

    with pytest.raises(DriftError, match="gguf"):
        start_engine(engine_config(model="demo", device="cpu", load_format="gguf", profile="none"))


@pytest.mark.parametrize("command", ["generate", "profile", "serve"])
def test_commands_know_the_load_formats(command: str) -> None:
    done = CliRunner().invoke(drift, [command, "--load-format", "gguf"])
    assert done.exit_code == 2
    assert "'gguf' is not one of 'auto', 'dummy'" in done.output


def test_dummy_weights_need_no_checkpoint(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_directory("demo") / name).read_bytes())
    wanted = [
        "generate",
        "--model",
        str(tmp_path),
        "--device",
        "cpu",
        "--prompt",
        "hello",
        "--max-tokens",
        "3",
    ]
    assert CliRunner().invoke(drift, wanted).exit_code != 0
    done = CliRunner().invoke(drift, [*wanted, "--load-format", "dummy", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert '"length"' in done.output


@pytest.mark.parametrize(("load_format", "device"), [("auto", "cpu"), ("dummy", "cpu"), ("auto", "meta")])
def test_weights_go_straight_to_their_device(
    load_format: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float]] = []
    config = engine_config(model="demo", load_format=load_format)
    setup = Setup(config, load_config("demo"), model_directory("demo"), lambda *news: told.append(news))
    made: list[str] = []
    real = torch.empty

    def empty(*size: Any, **named: Any) -> torch.Tensor:
        made.append(torch.device(named["device"]).type)
        return real(*size, **named)

    monkeypatch.setattr(torch, "empty", empty)
    weights = weights_on(device, setup, torch.bfloat16)
    assert weights.device.type == device
    assert set(made) == {device}  # nothing on the way there
    assert told[0] == ("load weights", 0.0)
    assert told[-1] == ("load weights", 1.0)
    assert told == sorted(told)
    assert load_format == "dummy" or len(told) > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_device_the_engine_says_so_in_one_line() -> None:
    from drift_core.starting import start_engine

    with pytest.raises(DriftError, match="no CUDA device"):
        start_engine(engine_config(model="random:llama-3.1-8b", device="cuda", profile="none"))
