"""Menu, pinning and process settings. Cores are read back from the operating system."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from drift_kernels import affinity
from drift_kernels.affinity import CpuAffinity
from drift_kernels.openmp import gomp_parallel, run_on_team

T = TypeVar("T")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores that can be pinned")


def on_own_thread(work: Callable[[], T]) -> T:
    """Pinning is for good, so never on the test runner's own thread."""
    results: list[T] = []
    faults: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(60)
    if faults:
        raise faults[0]
    return results[0]


def with_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> CpuAffinity:
    monkeypatch.setattr(affinity, "_allowed_cores", lambda: tuple(range(count)))
    monkeypatch.setattr(affinity, "_why_not_pinned", lambda cores, allowed: "pretended")
    return CpuAffinity()


def test_menu_of_one_core_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_cores(monkeypatch, 1).menu() == ((1, 0), (0, 1))


def test_menu_of_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_cores(monkeypatch, 4).menu() == ((4, 0), (3, 1), (2, 2), (1, 3), (0, 4))


@pytest.mark.parametrize("cores", [2, 3, 17, 64, 100, 192])
@pytest.mark.parametrize("most", [2, 3, 9, 17])
def test_menu_holds_both_ends_within_its_bound(
    monkeypatch: pytest.MonkeyPatch, cores: int, most: int
) -> None:
    menu = with_cores(monkeypatch, cores).menu(most)
    assert menu[0] == (cores, 0)
    assert menu[-1] == (0, cores)
    assert len(menu) == len(set(menu)) <= most
    assert all(p + d == cores for p, d in menu)


@pytest.mark.parametrize("cores", [1, 2, 5, 8])
def test_lanes_never_overlap_and_cover_all(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    mechanism = with_cores(monkeypatch, cores)
    for partition in mechanism.menu():
        prefill, decode = (mechanism.cores_of(lane, partition) for lane in ("prefill", "decode"))
        assert prefill + decode == mechanism.cores


def test_bad_partitions_lanes_and_cores_name_the_choices() -> None:
    mechanism = CpuAffinity()
    for partition in ((0, 0), (-1, 1), (mechanism.units, 1)):
        with pytest.raises(ValueError, match="choose from"):
            mechanism.pin("prefill", partition)
    with pytest.raises(ValueError, match="lanes: prefill, decode"):
        mechanism.cores_of("both", (1, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose from"):
        CpuAffinity([100_000])
    with pytest.raises(ValueError, match="may use 1 to"):
        CpuAffinity(100_000)
    with pytest.raises(ValueError, match="none twice"):
        CpuAffinity([0, 0])
    with pytest.raises(ValueError, match="at least 2"):
        mechanism.menu(1)


def test_a_lane_without_cores_gets_none() -> None:
    mechanism = CpuAffinity()
    before = os.sched_getaffinity(0)
    assert mechanism.pin("decode", (mechanism.units, 0)) == 0
    assert os.sched_getaffinity(0) == before


@two_cores
def test_the_lane_thread_and_its_workers_move() -> None:
    def lane() -> list[tuple[int, int, set[int], list[set[int]]]]:
        mechanism, seen = CpuAffinity(CORES[:2]), []
        # Workers are born under (2, 0); (1, 1) parks them on the wrong set; (0, 2) must fetch them back.
        for name, partition in (("prefill", (2, 0)), ("prefill", (1, 1)), ("decode", (0, 2))):
            realised = mechanism.pin(name, partition)  # type: ignore[arg-type]
            torch.ones(1 << 20).add_(1)
            team: list[set[int]] = []
            run_on_team(lambda: team.append(os.sched_getaffinity(0)), torch.get_num_threads())  # noqa: B023
            seen.append((realised, torch.get_num_threads(), os.sched_getaffinity(0), team))
        return seen

    both = set(CORES[:2])
    all_cores, one_core, all_again = on_own_thread(lane)
    assert all_cores == (2, 2, both, [both, both])
    assert one_core[:3] == (1, 1, {CORES[0]})
    assert all_again == (2, 2, both, [both, both])


@two_cores
def test_workers_that_a_library_born_elsewhere_are_fetched() -> None:
    def lane() -> list[set[int]]:
        torch.get_num_threads()
        os.sched_setaffinity(0, {CORES[1]})
        run_on_team(lambda: None, 2)  # the worker is born on the wrong core
        os.sched_setaffinity(0, CORES)
        CpuAffinity(CORES[:2]).pin("prefill", (2, 0))
        team: list[set[int]] = []
        run_on_team(lambda: team.append(os.sched_getaffinity(0)), 2)
        return team

    assert on_own_thread(lane) == [set(CORES[:2])] * 2


@two_cores
def test_two_lanes_at_once_keep_their_own_cores_and_thread_counts() -> None:
    mechanism, ready, seen = CpuAffinity(CORES[:2]), threading.Barrier(2, timeout=60), {}

    def lane(name: affinity.Lane) -> None:
        realised = mechanism.pin(name, (1, 1))
        ready.wait()
        seen[name] = (realised, torch.get_num_threads(), os.sched_getaffinity(0))

    threads = [threading.Thread(target=lane, args=(name,)) for name in ("prefill", "decode")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {"prefill": (1, 1, {CORES[0]}), "decode": (1, 1, {CORES[1]})}


@two_cores
def test_pin_skips_work_when_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def lane() -> int:
        mechanism = CpuAffinity(CORES[:2])
        mechanism.pin("decode", (1, 1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("pinned again"))
            return mechanism.pin("decode", (1, 1))

    assert on_own_thread(lane) == 1


def test_a_refused_pin_degrades_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, cores: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    mechanism = CpuAffinity()
    assert mechanism.unpinned is not None
    assert "Operation not permitted" in mechanism.unpinned
    assert "not pinned" in mechanism.description
    assert on_own_thread(lambda: mechanism.pin("prefill", (mechanism.units, 0))) == mechanism.units


def test_a_pin_refused_later_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = CpuAffinity()

    def refuse(pid: int, cores: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert on_own_thread(lambda: mechanism.pin("prefill", (mechanism.units, 0))) == mechanism.units
    assert mechanism.unpinned is not None


def test_a_fault_on_a_team_member_is_raised_by_the_caller() -> None:
    if gomp_parallel() is None:
        pytest.skip("torch does not use GNU OpenMP here")
    with pytest.raises(ZeroDivisionError):
        on_own_thread(lambda: run_on_team(lambda: 1 // 0, 2))  # type: ignore[arg-type, return-value]


def test_one_openmp_runtime_in_the_process() -> None:
    if gomp_parallel() is None:
        pytest.skip("torch does not use GNU OpenMP here")
    maps = Path("/proc/self/maps").read_text().split()
    assert len({word for word in maps if "libgomp" in word}) == 1
    assert ctypes.CDLL(None) is not None


def run_fresh(code: str, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_prepare_process_loads_no_torch_and_sets_the_policy() -> None:
    code = (
        "import os, sys\nfrom drift_kernels.process import prepare_process\n"
        "print(prepare_process(), os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    assert run_fresh(code) == "None PASSIVE False"
    assert "OMP_WAIT_POLICY is active" in run_fresh(
        "from drift_kernels.process import prepare_process; print(prepare_process())",
        OMP_WAIT_POLICY="active",
    )


def test_prepare_process_says_when_it_came_too_late() -> None:
    code = "import torch\nfrom drift_kernels.process import prepare_process\nprint(prepare_process())"
    assert "torch was imported before" in run_fresh(code)
    assert run_fresh(code, OMP_WAIT_POLICY="passive") == "None"
