"""The profile: what it measures, the table it writes, and when a kept one is believed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from drift_core import costs, profile_cache
from drift_core.assembly import cpu_executor
from drift_core.cli import profile as profile_command
from drift_core.engine import Setup, engine_config
from drift_core.executor import CpuExecutor
from drift_core.kv import PoolPlan
from drift_core.model.config import ModelConfig, Rope
from drift_core.model.decoder import Decoder, KvCache
from drift_core.model.weights import random_weights
from drift_core.profile import Grid, plan_grid
from drift_kernels.affinity import CpuAffinity
from drift_kernels.ops import select_ops
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.table import CostTable, read_table, write_table
from drift_scheduler.domain import DecodeShape, Device, Partition, PrefillShape
from drift_scheduler.errors import DriftError

LAYERS = 6
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=LAYERS,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rms_eps=1e-5,
    rope=Rope(10000.0),
    layer_windows=(None,) * LAYERS,
    max_context=128,
)


@pytest.fixture
def executor() -> Iterator[CpuExecutor]:
    weights = random_weights(MODEL, torch.float32, seed=1)
    cache = KvCache.allocate(MODEL, 40, 16, torch.float32)
    decoder = Decoder(MODEL, weights, select_ops("cpu", torch.float32))
    made = cpu_executor(decoder, cache, PoolPlan(40, 16, 1, 128), CpuAffinity())
    yield made
    made.close()


def small_grid(executor: CpuExecutor) -> Grid:
    return plan_grid(executor.device, max_context=128, max_running=4, full=False)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("units", [1, 2, 16])
@pytest.mark.parametrize("max_context", [2, 17, 100_000])
def test_grids_fit_the_device_and_the_model(units: int, full: bool, max_context: int) -> None:
    affinity = [(units - d, d) for d in range(units + 1)]
    device = Device(units, tuple(Partition(*split) for split in affinity), 24)
    grid = plan_grid(device, max_context=max_context, max_running=8, full=full)
    assert set(grid.units) <= set(range(1, units + 1))
    assert units in grid.units
    assert all(n >= 1 and r >= 0 and n + r <= max_context for n, r in grid.prefill)
    assert all(1 <= b <= 8 and 1 <= c <= max_context for b, c in grid.decode)
    assert all(split in device.splits() for split in grid.splits)
    assert grid.layers == (24 if full else 4)
    assert full or grid.cells < 60


def test_a_measured_table_is_valid_and_predicts(executor: CpuExecutor, tmp_path: Path) -> None:
    told: list[float] = []
    grid = small_grid(executor)
    table = executor.profile(grid, "tiny", told.append)
    write_table(table, tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == table
    assert (table.num_layers, table.total_units) == (LAYERS, executor.device.total_units)
    assert len(table.prefill) == len(grid.units) * len(grid.prefill)
    assert len(table.decode) == len(grid.units) * len(grid.decode)
    assert len(table.slowdown) == len(grid.splits) * len(grid.beside)
    assert told == sorted(told)
    assert told[-1] == 1.0
    costs = FittedCost(table)
    assert costs.prefill(PrefillShape.of([(64, 0)]), 1) > 0
    assert costs.decode(DecodeShape(4, 200), 1) > 0


def test_profiling_leaves_the_executor_ready(executor: CpuExecutor) -> None:
    executor.warm_up()
    executor.profile(small_grid(executor), "tiny", lambda fraction: None)
    assert executor.kv.free_pages == executor.kv.total_pages


class _Counting:
    """Stands in for an executor whose measurements are given."""

    def __init__(self, executor: CpuExecutor, table: CostTable) -> None:
        self.device, self.identity, self.plan = executor.device, executor.identity, executor.plan
        self.table, self.full_runs = table, 0
        self.factor = 1.0

    def profile(self, grid: Grid, model: str, progress: object) -> CostTable:
        if len(grid.prefill) > 1:
            self.full_runs += 1
            return self.table
        rows = [row for row in self.table.prefill if (row.new, row.reused) == grid.prefill[0]]
        prefill = msgspec.structs.replace(rows[-1], seconds=rows[-1].seconds * self.factor)
        decode = msgspec.structs.replace(
            self.table.decode[-1], seconds=self.table.decode[-1].seconds * self.factor
        )
        return msgspec.structs.replace(self.table, prefill=(prefill,), decode=(decode,))


def test_a_kept_profile_is_believed_as_long_as_it_is_true(
    executor: CpuExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = executor.profile(small_grid(executor), "tiny", lambda fraction: None)
    counting = _Counting(executor, table)
    setup = Setup(engine_config(model="tiny", max_running=4), MODEL, tmp_path, lambda phase, fraction: None)
    for factor, runs in ((1.0, 1), (1.0, 1), (1.3, 1), (3.0, 2), (0.2, 3)):
        counting.factor = factor
        assert costs._table(setup, counting) == table  # type: ignore[arg-type]
        assert counting.full_runs == runs


def test_a_profile_is_kept_under_all_that_its_times_depend_on(
    executor: CpuExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = profile_cache.place(*executor.identity)
    assert place.parent == tmp_path / "drift" / "profiles"
    assert place == profile_cache.place(*executor.identity)
    assert place != profile_cache.place(
        replace(MODEL, num_layers=LAYERS, rms_eps=1e-6), *executor.identity[1:]
    )
    assert profile_cache.find(place) is None
    place.parent.mkdir(parents=True)
    place.write_text("{}")
    assert profile_cache.find(place) is None


def test_a_folder_that_cannot_be_written_is_no_fault(executor: CpuExecutor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = executor.profile(small_grid(executor), "tiny", lambda fraction: None)
    assert not profile_cache.keep(table, tmp_path / "file" / "drift" / "table.json")


def test_the_command_writes_a_table(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    arguments = ["--model", "demo", "--max-running", "2", "--max-context", "64", "--out", str(out)]
    result = CliRunner().invoke(profile_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert read_table(out).model == "demo"
    assert "decode" in result.output


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_where_no_table_can_go_is_seen_before_anything_is_measured(tmp_path: Path, option: str) -> None:
    arguments = ["--model", "no-such-model", option, str(tmp_path / "none" / "table.json")]
    with pytest.raises(DriftError, match=r"none/table\.json: No such file or directory"):
        CliRunner().invoke(profile_command, arguments, catch_exceptions=False)
