"""Compiles what the launchers launch for an architecture that is not here, and reads what the result needs.

The launchers themselves run, on CPU tensors: `compiling_for` puts a stub in the driver's place, so that a launch
compiles, keeps the kernel and runs nothing, and the specialisation is the call site's own, alignment and all. Not for
a process in which Triton's interpreter is on, nor for one that runs kernels at the same time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from drift_kernels.triton_ops.tiles import LIMITS

_RESOURCES = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as compiled for one architecture. `stack` bytes per thread are spills: no kernel has arrays."""

    name: str
    architecture: int
    warps: int
    registers: int  # per thread
    stack: int
    shared: int  # bytes per program
    grid: tuple[int, ...]
    ptx: str

    @property
    def matrix_instructions(self) -> frozenset[str]:
        """Which kinds of matrix instruction the PTX has: mma.sync, wgmma, tcgen05."""
        kinds = {"mma.sync": "mma.sync.", "wgmma": "wgmma.mma_async.", "tcgen05": "tcgen05.mma."}
        return frozenset(kind for kind, opcode in kinds.items() if opcode in self.ptx)

    def programs_per_sm(self) -> int:
        """How many programs fit on one multiprocessor at once."""
        limits = LIMITS[self.architecture]
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = limits.registers // (per_warp * self.warps)
        return min(by_registers, limits.sm_shared // (self.shared + limits.reserved_shared))


class _StubDriver:
    """As much of Triton's driver as a launch touches. A launch that exceeds shared memory fails as on a device."""

    def __init__(self, architecture: int, launches: list[Compiled]) -> None:
        self._target = GPUTarget("cuda", architecture, 32)
        self.launches = launches
        limit = {"max_shared_mem": LIMITS[architecture].program_shared}
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: limit, load_binary=lambda *_: (object(), object(), 0, 0, 1024)
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)  # Triton keeps compiled kernels per device

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            kernels = source.fn.device_caches[self._target.arch][0].values()
            (kernel,) = (kernel for kernel in kernels if kernel.metadata is metadata)
            compiled = _read(kernel, int(self._target.arch), arguments[:3])
            driver.active.launches.append(compiled)  # a kernel keeps its launcher from one stub to the next

        return launch


@cache
def _read(kernel: Any, architecture: int, grid: tuple[int, int, int]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _RESOURCES.search(listing)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of the resources of {kernel.name}: {listing!r}")
    return Compiled(
        name=kernel.name,
        architecture=architecture,
        warps=kernel.metadata.num_warps,
        registers=int(found["registers"]),
        stack=int(found["stack"]),
        shared=kernel.metadata.shared,
        grid=grid,
        ptx=kernel.asm["ptx"],
    )


@contextmanager
def compiling_for(architecture: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile for `architecture` and land in the list instead of on a device."""
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process started with TRITON_INTERPRET=1")
    launches: list[Compiled] = []
    before = driver._active
    driver.set_active(_StubDriver(architecture, launches))
    try:
        yield launches
    finally:
        driver._active = before
