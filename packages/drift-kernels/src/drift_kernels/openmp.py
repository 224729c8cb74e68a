"""The OpenMP runtime that torch brought along, reached by name so that no second one enters the process.

GNU OpenMP keeps one team of workers per thread that opens parallel regions, hence one per lane, and torch's
operators and our native kernels share it. Knows nothing of lanes; other runtimes (macOS) are reported as absent.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def gomp_parallel() -> int | None:
    """Address of `GOMP_parallel(fn, data, threads, flags)` in the libgomp already loaded, None where none is."""
    import torch  # noqa: F401  (brings its libgomp into the process)

    for name in ("libgomp.so.1", *_mapped_libgomps()):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _mapped_libgomps() -> list[str]:
    """Paths of the libgomp copies in this process: wheels for CUDA carry one under a name of their own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*libgomp\S*", maps)))


def run_on_team(task: Callable[[], None], threads: int) -> bool:
    """Run `task` once on each of `threads` members of the calling thread's team, itself included.

    Returns False, with nothing run, where the runtime is not GNU OpenMP. The first exception is raised here.
    """
    address = gomp_parallel()
    if address is None:
        return False
    faults: list[BaseException] = []

    def member(_: object) -> None:
        try:
            task()
        except BaseException as fault:  # it must cross a C frame
            faults.append(fault)

    parallel = ctypes.CFUNCTYPE(None, _REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(address)
    parallel(_REGION(member), None, threads, 0)
    if faults:
        raise faults[0]
    return True
