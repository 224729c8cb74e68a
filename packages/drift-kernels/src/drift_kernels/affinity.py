"""The partition mechanism of a CPU: disjoint sets of cores for the prefill and the decode lane.

Prefill takes the first cores of the process's set, decode the last. Each lane is one thread that pins itself and
its OpenMP workers; the mechanism knows nothing of what the lanes run, and starts no thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Literal

import torch

from drift_kernels.openmp import run_on_team

Lane = Literal["prefill", "decode"]
Partition = tuple[int, int]  # (prefill cores, decode cores)


class CpuAffinity:
    """Splits of one machine's cores. One object serves both lanes; each calls `pin` on its own thread.

    unpinned: None where cores can be pinned, else one line that says why not; the lanes then still use the right
    number of threads, but the operating system places them.
    """

    def __init__(self, cores: int | Sequence[int] | None = None) -> None:
        """cores: which to use, or how many of the process's allowed ones; None takes all of those."""
        allowed = _allowed_cores()
        self.cores = _choose(cores, allowed)
        self.unpinned = _why_not_pinned(self.cores, allowed)
        self._pinned = threading.local()

    @property
    def units(self) -> int:
        return len(self.cores)

    @property
    def description(self) -> str:
        how = "pinned" if self.unpinned is None else f"not pinned: {self.unpinned}"
        return f"{self.units} CPU cores ({', '.join(map(str, self.cores))}), {how}"

    def menu(self, most: int = 17) -> tuple[Partition, ...]:
        """Splits from all cores to prefill down to all to decode, at most `most`, evenly spaced.

        One core can only alternate: ((1, 0), (0, 1)).
        """
        if most < 2:
            raise ValueError(f"most must be at least 2, got {most}: a menu holds both whole-device splits")
        step = -(-self.units // (most - 1))
        decode = sorted({*range(0, self.units, step), self.units})
        return tuple((self.units - d, d) for d in decode)

    def cores_of(self, lane: Lane, partition: Partition) -> tuple[int, ...]:
        """The cores a lane owns under a partition; disjoint between the lanes."""
        prefill, decode = partition
        if prefill < 0 or decode < 0 or not 1 <= prefill + decode <= self.units:
            raise ValueError(
                f"partition {partition} does not fit {self.units} cores; choose from {list(self.menu())}"
            )
        if lane == "prefill":
            return self.cores[:prefill]
        if lane == "decode":
            return self.cores[self.units - decode :]
        raise ValueError(f"no lane {lane!r}; lanes: prefill, decode")

    def pin(self, lane: Lane, partition: Partition) -> int:
        """Give the calling thread and its OpenMP workers this lane's cores; returns how many it got.

        A thread that already has them pays about a microsecond, a change about 0.1 ms. A lane without cores in
        this partition is left where it is, and gets 0.
        """
        cores = self.cores_of(lane, partition)
        if not cores:
            return 0
        if getattr(self._pinned, "cores", None) == cores:
            return int(self._pinned.realised)
        if not hasattr(self._pinned, "cores"):
            torch.get_num_threads()  # makes the count below this thread's own rather than the process's
        torch.set_num_threads(len(cores))
        self._pinned.realised = len(cores) if self.unpinned else self._move(cores)
        self._pinned.cores = cores
        return int(self._pinned.realised)

    def _move(self, cores: tuple[int, ...]) -> int:
        """Pin this thread first, so that workers born later start out right, then the workers it has."""
        try:
            os.sched_setaffinity(0, cores)
            if len(cores) > 1 and not run_on_team(lambda: os.sched_setaffinity(0, cores), len(cores)):
                self.unpinned = "torch does not use GNU OpenMP here, its workers cannot be reached"
            return len(os.sched_getaffinity(0))
        except OSError as error:  # the allowed set shrank under us, or a sandbox forbids the call
            self.unpinned = f"cores {list(cores)}: {error.strerror or error}"
            return len(cores)


def _allowed_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _choose(cores: int | Sequence[int] | None, allowed: tuple[int, ...]) -> tuple[int, ...]:
    if cores is None:
        return allowed
    if isinstance(cores, int):
        if not 1 <= cores <= len(allowed):
            raise ValueError(f"cores is {cores}; this process may use 1 to {len(allowed)}")
        return allowed[:cores]
    chosen = tuple(cores)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"cores is {list(chosen)}: name at least one core, none twice")
    if unknown := sorted(set(chosen) - set(allowed)):
        raise ValueError(
            f"cores names {unknown}, which this process may not use; choose from {list(allowed)}"
        )
    return chosen


def _why_not_pinned(cores: tuple[int, ...], allowed: tuple[int, ...]) -> str | None:
    """Try it: the same call that `pin` makes, undone at once."""
    if not hasattr(os, "sched_setaffinity"):
        return f"{os.uname().sysname} does not let a process choose its cores"
    try:
        os.sched_setaffinity(0, cores)
        os.sched_setaffinity(0, allowed)
    except OSError as error:
        return f"cores {list(cores)}: {error.strerror or error}"
    return None
