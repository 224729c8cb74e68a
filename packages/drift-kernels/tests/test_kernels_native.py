"""The C ops against their specification, on every instruction level that this machine has.

Memory that nobody wrote is NaN here, in outputs and in KV slots alike, so that reading it or leaving it shows.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drift_kernels import AttentionInputs, reference, select_ops
from drift_kernels.cpu import CpuOps
from drift_kernels.native_library import LEVELS, NativeUnavailable, load_native

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Against fp32 arithmetic on the same inputs. bf16 results are within 2^-9 of the right value by rounding alone.
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 6e-3, "rtol": 6e-3}}


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    try:
        library = load_native()
    except NativeUnavailable as why:
        pytest.skip(str(why))
    if library.level < request.param:
        pytest.skip(f"this machine has no {LEVELS[request.param]}")
    return CpuOps(library, request.param)


@pytest.fixture
def best() -> CpuOps:
    try:
        return CpuOps(load_native())
    except NativeUnavailable as why:
        pytest.skip(str(why))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Have torch fill new memory with NaN; and check that it does."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.zeros(4).new_empty((4,)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Batch:
    """A ragged batch whose KV lies in shuffled pages; slots that hold no token, and spare pages, are NaN."""

    def __init__(
        self,
        queries: list[int],
        contexts: list[int],
        *,
        dtype: torch.dtype,
        group: int = 2,
        kv_heads: int = 2,
        size: int = 64,
        page_tokens: int = 16,
        window: int | None = None,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        needed = [-(-c // page_tokens) for c in contexts]
        order = torch.randperm(sum(needed) + 3).tolist()
        tables = [[order.pop() for _ in range(n)] for n in needed]
        shape = (sum(needed) + 3, page_tokens, kv_heads, size)
        self.k_pages, self.v_pages = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        everything = AttentionInputs.build(contexts, contexts, tables, page_tokens, 1.0)
        for pages in (self.k_pages, self.v_pages):
            pages.view(-1, kv_heads, size)[everything.slots] = torch.randn(sum(contexts), kv_heads, size).to(
                dtype
            )
        self.q = torch.randn(sum(queries), kv_heads * group, size).to(dtype)
        self.inputs = AttentionInputs.build(queries, contexts, tables, page_tokens, size**-0.5, window)

    def expected(self) -> Tensor:
        clean = (pages.float().nan_to_num() for pages in (self.k_pages, self.v_pages))
        return reference.attend(self.q.float(), *clean, self.inputs)

    def attend(self, ops: CpuOps) -> Tensor:
        return ops.attend(self.q, self.k_pages, self.v_pages, self.inputs)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.float(), want.float(), **TOLERANCE[got.dtype], equal_nan=False)


RAGGED = {
    "one token": ([1], [1]),
    "decode": ([1, 1, 1, 1, 1], [1, 15, 16, 17, 130]),
    "prefill": ([5, 64, 1, 33], [5, 64, 1, 33]),
    "prefill after a prefix": ([5, 40, 16], [21, 200, 32]),
    "mixed": ([1, 1, 70, 1, 9], [64, 65, 70, 200, 73]),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("window", [None, 1, 9, 64, 1000])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_attend_over_ragged_batches(
    ops: CpuOps, lengths: Any, window: int | None, dtype: torch.dtype
) -> None:
    batch = Batch(*lengths, dtype=dtype, window=window, group=3)
    assert_close(batch.attend(ops), batch.expected())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 5, 8])
def test_attend_over_head_sizes_and_groups(ops: CpuOps, group: int, size: int, dtype: torch.dtype) -> None:
    batch = Batch([1, 20, 1], [70, 45, 16], dtype=dtype, group=group, size=size, kv_heads=3)
    assert_close(batch.attend(ops), batch.expected())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("page_tokens", [1, 3, 16, 64, 128])
def test_attend_over_page_sizes(ops: CpuOps, page_tokens: int, dtype: torch.dtype) -> None:
    batch = Batch([1, 20, 1, 3], [70, 45, 128, 129], dtype=dtype, page_tokens=page_tokens, window=50)
    assert_close(batch.attend(ops), batch.expected())


def test_attend_reads_no_slot_outside_the_window(ops: CpuOps) -> None:
    for dtype in DTYPES.values():
        batch = Batch([1, 4], [200, 90], dtype=dtype, window=20)
        want = batch.expected()
        table, tokens = batch.inputs.page_table, batch.k_pages.shape[1]
        for b, oldest in ((0, 180), (1, 67)):
            for t in range(oldest):
                for pages in (batch.k_pages, batch.v_pages):
                    pages[int(table[b, t // tokens]), t % tokens] = float("nan")
        assert_close(batch.attend(ops), want)


def test_attend_survives_scores_far_apart(ops: CpuOps) -> None:
    for dtype in DTYPES.values():
        batch = Batch([1, 30], [300, 95], dtype=dtype)
        batch.q *= 40
        # Scores reach 200, where fp32 itself is only good to 1e-5, and so are the weights it makes of them.
        torch.testing.assert_close(batch.attend(ops).float(), batch.expected(), atol=6e-3, rtol=6e-3)


def test_attend_takes_a_slice_of_a_fused_projection(ops: CpuOps) -> None:
    batch = Batch([1, 9], [40, 9], dtype=torch.bfloat16)
    want = batch.attend(ops)
    fused = torch.cat([batch.q, torch.full_like(batch.q, float("nan"))], dim=1)
    batch.q = fused[:, : batch.q.shape[1]]
    assert torch.equal(batch.attend(ops), want)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "fault", ["a token forgotten", "a window one short", "scale 5% off", "heads swapped"]
)
def test_the_tolerance_can_fail(ops: CpuOps, fault: str, dtype: torch.dtype) -> None:
    """The same comparison with a fault planted must not pass."""
    batch = Batch([1, 20], [33, 45], dtype=dtype, window=30)
    want, inputs = batch.expected(), batch.inputs
    changes: dict[str, dict[str, Any]] = {
        "a token forgotten": {"context_lens": inputs.context_lens - torch.tensor([1, 0], dtype=torch.int32)},
        "a window one short": {"window": 29},
        "scale 5% off": {"scale": inputs.scale * 1.05},
        "heads swapped": {},
    }
    fields = {name: getattr(inputs, name) for name in AttentionInputs.__slots__} | changes[fault]
    batch.inputs = AttentionInputs(**fields)
    if fault == "heads swapped":
        batch.q = batch.q.flip(1)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(batch.attend(ops), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_starts": [0, 1, 22]}, "query_starts"),
        ({"query_starts": [0, 21]}, "contradicts itself"),
        ({"page_table": [[0, 1, 2]]}, "contradicts itself"),
        ({"context_lens": torch.tensor([33, 45])}, "must be int32"),
        ({"query_starts": [0, 21, 21]}, "query_starts"),
        ({"max_query": 19}, "query_starts"),
        ({"context_lens": [33, 19]}, "context_lens"),
        ({"max_context": 40}, "context_lens"),
        ({"context_lens": [33, 60], "max_context": 60}, "page_table is too narrow"),
        ({"page_table": [[0, 1, 2], [3, 4, 99]]}, "names a page"),
        ({"page_table": [[0, 1, 2], [3, -1, 5]]}, "names a page"),
    ],
)
def test_attend_refuses_inputs_that_contradict_themselves(
    ops: CpuOps, change: dict[str, Any], message: str
) -> None:
    batch = Batch([1, 20], [33, 45], dtype=torch.bfloat16)
    fields = {name: getattr(batch.inputs, name) for name in AttentionInputs.__slots__}
    fields |= {k: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for k, v in change.items()}
    batch.inputs = AttentionInputs(**fields)
    with pytest.raises(ValueError, match=message):
        batch.attend(ops)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (200, 320), (1027, 512), (1, 48), (100, 40)])
def test_linear(ops: CpuOps, outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> None:
    for rows in (1, 2, 3, 7, 15, 16, 17, 33, 128, 129):
        torch.manual_seed(rows)
        x, weight = (
            torch.randn(rows, inputs).to(dtype),
            (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype),
        )
        offset = torch.randn(outputs).to(dtype) if bias else None
        want = reference.linear(x.double(), weight.double(), None if offset is None else offset.double())
        assert_close(ops.linear(x, weight, offset), want)


def test_linear_of_wide_inputs_and_strided_rows(ops: CpuOps) -> None:
    for dtype in DTYPES.values():
        x = torch.randn(2, 5, 2 * 16_384).to(dtype)[..., :16_384]
        weight = (torch.randn(64, 16_384) / 128).to(dtype)
        assert_close(ops.linear(x, weight), reference.linear(x.double(), weight.double()))


def test_linear_tolerance_can_fail(ops: CpuOps) -> None:
    for dtype in DTYPES.values():
        x, weight = torch.randn(4, 320).to(dtype), (torch.randn(2048, 320) * 320**-0.5).to(dtype)
        want = reference.linear(x.double(), weight.double())
        weight[:, 300] = 0  # one of 320 inputs lost
        with pytest.raises(AssertionError, match="not close"):
            assert_close(ops.linear(x, weight), want)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 64), (2, 9, 896), (40, 1024), (5, 40)], ids=str)
def test_norms_and_activation_round_as_torch_does(
    ops: CpuOps, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, residual, weight = (
        torch.randn(shape).to(dtype),
        torch.randn(shape).to(dtype),
        torch.randn(shape[-1]).to(dtype),
    )
    gate_up = (torch.randn(*shape[:-1], 2 * shape[-1]) * 4).to(dtype)
    pairs = [
        (ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)),
        *zip(
            ops.add_rms_norm(x, residual, weight, 1e-5),
            reference.add_rms_norm(x, residual, weight, 1e-5),
            strict=True,
        ),
        (ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)),
    ]
    for got, want in pairs:
        assert got.shape == want.shape
        assert_close(got, want)
        # Rounded at the same places: all but a few values, where an exponential or a root differs, are the same.
        if dtype == torch.bfloat16:
            assert (got != want).float().mean() < 0.02


def test_silu_at_the_ends_and_nan(ops: CpuOps) -> None:
    for dtype in DTYPES.values():
        gate = torch.tensor([-1e30, -200.0, -89.0, -88.0, -1.0, 0.0, 1.0, 89.0, 200.0, 1e30] + [0.5] * 6).to(
            dtype
        )
        got = ops.silu_and_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
        torch.testing.assert_close(
            got, reference.silu_and_mul(torch.cat([gate, torch.ones_like(gate)])), rtol=1e-2, atol=1e-30
        )
        broken = torch.full((2, 64), float("nan"), dtype=dtype)
        assert ops.silu_and_mul(broken).isnan().all()
        assert ops.rms_norm(broken, broken[0], 1e-5).isnan().all()


@pytest.mark.parametrize("angles", [torch.float32, torch.bfloat16], ids=["cos fp32", "cos bf16"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [16, 32, 64, 80, 96, 128])
def test_rotary(ops: CpuOps, size: int, dtype: torch.dtype, angles: torch.dtype) -> None:
    torch.manual_seed(0)
    fused = torch.randn(19, 8, size).to(dtype)
    q, k = fused[:, :6], fused[:, 6:]
    turns = torch.randn(19, size // 2).repeat(1, 2)
    cos, sin = turns.cos().to(angles), turns.sin().to(angles)
    for got, want in zip(
        ops.apply_rotary(q, k, cos, sin), reference.apply_rotary(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float16], ids=[*DTYPES, "fp16"])
def test_write_kv_touches_its_slots_alone(ops: CpuOps, dtype: torch.dtype) -> None:
    fused = torch.randn(7, 6, 24).to(dtype)
    k, v, slots = fused[:, 2:4], fused[:, 4:], torch.tensor([31, 0, 5, 16, 15, 40, 47])
    ours, theirs = (
        [torch.full((3, 16, 2, 24), float("nan"), dtype=dtype) for _ in range(2)] for _ in range(2)
    )
    ops.write_kv(k, v, *ours, slots)
    reference.write_kv(k, v, *theirs, slots)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
    for bad in (48, -1):
        with pytest.raises(ValueError, match=rf"slots\[1\] is {bad}; k_pages has slots 0 to 47"):
            ops.write_kv(k[:2], v[:2], *ours, torch.tensor([0, bad]))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rotate_and_write_is_its_parts(ops: CpuOps, dtype: torch.dtype, qk_norm: bool) -> None:
    torch.manual_seed(1)
    fused, slots = torch.randn(7, 8, 32).to(dtype), torch.tensor([31, 0, 5, 16, 15, 40, 47])
    q, k, v = fused.split((4, 2, 2), dim=1)
    turns = torch.randn(7, 16).repeat(1, 2)
    cos, sin = turns.cos().to(dtype), turns.sin().to(dtype)
    norms = (torch.rand(32).to(dtype), torch.rand(32).to(dtype)) if qk_norm else None
    ours, theirs = ([torch.zeros(3, 16, 2, 32, dtype=dtype) for _ in range(2)] for _ in range(2))
    got = ops.rotate_and_write(q, k, v, cos, sin, *ours, slots, norms, 1e-6)
    want = reference.rotate_and_write(q, k, v, cos, sin, *theirs, slots, norms, 1e-6)
    near = {"atol": 1e-6, "rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5}
    for mine, spec in zip((got, *ours), (want, *theirs), strict=True):
        torch.testing.assert_close(mine, spec, **near)


def step(ops: CpuOps, batch: Batch, weight: Tensor) -> list[Tensor]:
    mixed = batch.attend(ops)
    hidden = ops.linear(mixed.flatten(1), weight)
    return [mixed, hidden, ops.silu_and_mul(hidden), ops.rms_norm(hidden, weight[:, 0].contiguous(), 1e-6)]


def test_two_lanes_at_once_compute_what_each_computes_alone(best: CpuOps) -> None:
    for dtype in DTYPES.values():
        weight = (torch.randn(256, 256) / 16).to(dtype)
        batches = [
            Batch([64, 100], [64, 300], dtype=dtype, seed=1),  # prefill
            Batch([1] * 16, [200] * 16, dtype=dtype, seed=2),  # decode
        ]
        alone = [step(best, batch, weight) for batch in batches]
        differing: list[int] = []
        together = threading.Barrier(2, timeout=60)

        def lane(i: int, dtype: torch.dtype = dtype) -> None:
            torch.get_num_threads()
            torch.set_num_threads(1 + i)
            together.wait()  # noqa: B023
            for _ in range(20):
                again = step(best, batches[i], weight)  # noqa: B023
                differing.append(sum(not torch.equal(a, b) for a, b in zip(again, alone[i], strict=True)))  # noqa: B023

        lanes = [threading.Thread(target=lane, args=(i,)) for i in range(2)]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join(120)
        assert differing == [0] * 40


def test_threads_do_not_change_results(best: CpuOps) -> None:
    def both() -> list[list[Tensor]]:
        torch.get_num_threads()
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            batch = Batch([200, 1, 1], [200, 900, 33], dtype=torch.bfloat16, group=4, kv_heads=4, seed=3)
            torch.manual_seed(4)
            results.append(step(best, batch, (torch.randn(2048, 1024) / 32).to(torch.bfloat16)))
        return results

    found: list[list[list[Tensor]]] = []
    thread = threading.Thread(target=lambda: found.append(both()))
    thread.start()
    thread.join(120)
    one, *more = found[0]
    for several in more:
        assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_torch_keeps_its_own_tile_configuration(best: CpuOps) -> None:
    """oneDNN configures AMX tiles too; calls of ours in between must not disturb its results."""
    x, weight = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    want = reference.linear(x, weight)
    for _ in range(5):
        best.linear(x[:16], weight)
        assert torch.equal(reference.linear(x, weight), want)


REPORT = (
    "import torch; from drift_kernels import select_ops; print(select_ops('cpu', torch.bfloat16).description)"
)


def start(code: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.strip()


def test_without_a_compiler_torch_serves_and_says_why(tmp_path: Path) -> None:
    found = output(start(REPORT, CC="no-such-cc", XDG_CACHE_HOME=str(tmp_path)))
    assert found == "torch reference: no C compiler 'no-such-cc' on the path"


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'fatal error: no such machine' >&2\nexit 1\n")
    broken.chmod(0o755)
    found = output(start(REPORT, CC=str(broken), XDG_CACHE_HOME=str(tmp_path)))
    assert found.startswith("torch reference: ")
    assert found.endswith("fatal error: no such machine")


def test_two_processes_share_a_private_cache(best: CpuOps, tmp_path: Path) -> None:
    both = [start(REPORT, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [output(process).startswith("native C") for process in both] == [True, True]
    folder = tmp_path / "drift" / "kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    before = next(folder.iterdir()).stat().st_mtime_ns
    output(start(REPORT, XDG_CACHE_HOME=str(tmp_path)))
    assert next(folder.iterdir()).stat().st_mtime_ns == before


def test_a_cache_that_cannot_be_private_is_not_used(best: CpuOps, tmp_path: Path) -> None:
    (tmp_path / "drift").write_text("a file where the folder should be")
    assert output(start(REPORT, XDG_CACHE_HOME=str(tmp_path))).startswith("native C")


def test_select_ops_says_what_it_chose() -> None:
    assert select_ops("cpu", torch.bfloat16, native=False).description == "torch reference, as asked"
    assert "float16" in select_ops("cpu", torch.float16).description
    assert "CUDA" in select_ops("cuda", torch.float32).description
    with pytest.raises(NativeUnavailable, match="float16"):
        select_ops("cpu", torch.float16, native=True)
