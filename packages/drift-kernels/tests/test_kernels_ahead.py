"""Kernels compiled for architectures that are not here, by the real launchers over a stub of Triton's driver.

A sample per architecture; `nox -s kernels` compiles every variant and writes docs/kernels.md.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.compiler.compiler import max_shared_mem
from triton.runtime.errors import OutOfResources

from drift_kernels.triton_ops import attention, catalogue, tiles
from drift_kernels.triton_ops.ahead import Compiled, compiling_for
from drift_kernels.triton_ops.lane import AttentionLane, AttentionShape
from drift_kernels.triton_ops.layers import launch_silu_and_mul

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SAMPLE = {
    80: catalogue.Variant(64, torch.float16),
    89: catalogue.Variant(96),
    90: catalogue.Variant(128),
    100: catalogue.Variant(128, page_tokens=128),
    120: catalogue.Variant(256),
}


@pytest.mark.parametrize("kind", ["narrow", "wide"])
@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
def test_attention_fits_without_spills_and_uses_the_matrix_units(architecture: int, kind: str) -> None:
    entries = catalogue.compile_attention(architecture, SAMPLE[architecture], kind)
    assert [fault for entry in entries for fault in catalogue.faults(entry)] == []
    assert "cp.async.cg" in entries[0].compiled.ptx, "KV is fetched asynchronously, 16 bytes at a time"
    assert entries[0].compiled.shared <= tiles.LIMITS[architecture].program_shared


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_other_kernels_fit_without_spills(architecture: int) -> None:
    entries = [
        *catalogue.compile_layers(architecture, catalogue.Variant()),
        *catalogue.compile_rows(architecture, torch.bfloat16, 4096),
        *catalogue.compile_sampling(architecture),
    ]
    assert [fault for entry in entries for fault in catalogue.faults(entry)] == []
    for entry in entries:
        if "RMS" in entry.kernel or "SiLU" in entry.kernel:
            assert "ld.global.v4" in entry.compiled.ptx, f"{entry.kernel} reads 16 bytes at a time"


def _launch_decode(num_sms: int, contexts: list[int], dtype: torch.dtype = torch.bfloat16) -> list[Compiled]:
    lane = AttentionLane(AttentionShape(8, 2, 64, 16), 8, 8, 256, 16, 90, "cpu")
    q = torch.zeros(len(contexts), 8, 64, dtype=dtype)
    pages = torch.zeros(20, 16, 2, 64, dtype=dtype)
    with compiling_for(90) as launches:
        planned = lane.plan([1] * len(contexts), contexts, [list(range(16))] * len(contexts), 0.1, num_sms)
        planned.attend(q, pages, pages, torch.zeros_like(q))
    return launches


def test_one_captured_grid_serves_any_lengths() -> None:
    """The grid depends on the partition alone, and no length is compiled in."""
    few, many = _launch_decode(4, [1]), _launch_decode(4, [256, 3, 77, 16])
    tile = tiles.narrow_tile(90, 64)
    assert [one.grid for one in few] == [one.grid for one in many] == [(4 * tile.programs_per_sm, 1, 1)] * 2
    assert [one.ptx for one in few] == [one.ptx for one in many]
    assert _launch_decode(7, [1])[0].grid == (7 * tile.programs_per_sm, 1, 1)


def test_work_of_another_partition_is_refused() -> None:
    lane = AttentionLane(AttentionShape(8, 2, 64, 16), 1, 1, 64, 16, 90, "cpu")
    planned = lane.plan([1], [9], [[0]], 0.1, 4)
    q, pages = torch.zeros(1, 8, 64), torch.zeros(1, 16, 2, 64)
    with pytest.raises(ValueError, match="the list of work is for 16 programs; num_sms=5 makes 20"):
        attention.launch_attention(
            q, pages, pages, q, planned.query_starts, planned.context_lens, planned.page_table,
            planned.narrow, 0.1, None, 5,
        )  # fmt: skip


def test_the_number_of_rows_is_not_compiled_in() -> None:
    """A prefill of any length finds its kernels compiled."""
    kernels = set()
    for rows in (1, 7, 16, 33):
        with compiling_for(90) as launches:
            launch_silu_and_mul(torch.zeros(rows, 64), torch.zeros(rows, 32), 4)
        kernels.add(launches[0].ptx)
    assert len(kernels) == 1


def test_spills_and_misfits_are_found() -> None:
    """The checks above can fail: a tile with too many rows for its warps spills, and does not fit three times."""
    (entry, *_) = catalogue.compile_attention(90, catalogue.Variant(64), "narrow")
    one = entry.compiled
    worse = Compiled(one.name, 90, one.warps, 255, 64, 200_000, one.grid, "")
    found = catalogue.faults(catalogue.Entry("k", entry.variant, worse, 3, "mma.sync"))
    assert len(found) == 3
    assert "spills: 64 bytes" in found[0]
    assert "fits 1 times on a multiprocessor, the tile table says 3" in found[1]
    assert "has no mma.sync" in found[2]


def test_a_wasteful_compiler_is_held_to_what_fits() -> None:
    """Triton 3.6, left alone, takes 218 registers for decode of head 128 on sm_90, and two programs fit, not three."""
    for architecture, limits in tiles.LIMITS.items():
        for head in tiles.HEAD_SIZES:
            for tile in (tiles.narrow_tile(architecture, head), tiles.wide_tile(architecture, head)):
                most = attention.most_registers(tile, True)
                assert most is not None
                assert most * 32 * tile.warps * tile.programs_per_sm <= limits.registers
                assert attention.most_registers(tile, False) is None
    assert attention.most_registers(tiles.narrow_tile(90, 128), True) == 168


def test_too_much_shared_memory_fails_at_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: the stub knows the limits of what it stands for."""
    monkeypatch.setitem(tiles.LIMITS, 90, tiles.Limits(1000, 2000))
    max_shared_mem.cache_clear()
    try:
        with pytest.raises(OutOfResources, match="shared memory"):
            _launch_decode(2, [3], torch.float16)
    finally:
        max_shared_mem.cache_clear()
