"""Compiles `native.c` and its header once per machine, keeps it in the user's cache and loads it.

Knows how to build and find the library, not what is in it. Two processes that start together both compile; each
renames a finished file into place, so neither sees half of one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from drift_kernels.openmp import gomp_parallel

_SOURCES = ("native.c", "native_vectors.h")
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
LEVELS = ("portable vectors", "avx512_bf16", "amx_bf16")
_COMPILE_LIMIT_S = 120


class NativeUnavailable(Exception):
    """Why there are no native kernels here, in one line."""


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The loaded kernels: `free` releases the interpreter lock during a call, `held` keeps it (for short calls)."""

    free: ctypes.CDLL
    held: ctypes.PyDLL
    level: int  # index into LEVELS: the best that compiler and machine have
    threaded: bool


def load_native() -> NativeLibrary:
    """Compile if need be, and load.

    Raises NativeUnavailable, with the reason, where there is no compiler or it fails.
    """
    outcome = _load()
    if isinstance(outcome, str):
        raise NativeUnavailable(outcome)
    return outcome


@cache
def _load() -> NativeLibrary | str:
    try:
        compiler = _compiler()
        sources = {name: files("drift_kernels").joinpath(name).read_bytes() for name in _SOURCES}
        arch = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
        name = f"native-{_fingerprint(sources, compiler, arch)}.so"
        with _library_folder() as folder:
            return _open(_built(folder, name, sources, [*compiler, *_FLAGS, arch]))
    except NativeUnavailable as why:
        return str(why)
    except OSError as error:
        return f"the native kernels could not be built: {error}"


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    path = shutil.which(command[0])
    if path is None:
        raise NativeUnavailable(f"no C compiler '{command[0]}' on the path")
    return [path, *command[1:]]


def _fingerprint(sources: dict[str, bytes], compiler: list[str], arch: str) -> str:
    real = os.stat(compiler[0])
    parts = (
        sources,
        compiler,
        _FLAGS,
        arch,
        real.st_size,
        real.st_mtime_ns,
        platform.machine(),
        _cpu_model(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _cpu_model() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", text, re.MULTILINE))


def _built(folder: Path, name: str, sources: dict[str, bytes], command: list[str]) -> Path:
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            _compile(sources, Path(scratch), command).replace(library)
    return library


@contextmanager
def _library_folder() -> Iterator[Path]:
    """$XDG_CACHE_HOME/drift/kernels, ours alone: what lies there is loaded as code.

    Where that cannot be (read-only home, somebody else's folder): a temporary folder for this process.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drift" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        private = _is_private(folder)
    except (OSError, RuntimeError):
        private = False
    if private:
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="drift-kernels-") as temporary:
            yield Path(temporary)


def _is_private(folder: Path) -> bool:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    folder.chmod(0o700)
    return os.access(folder, os.W_OK)


def _compile(sources: dict[str, bytes], scratch: Path, command: list[str]) -> Path:
    library = scratch / "native.so"
    for name, text in sources.items():
        (scratch / name).write_bytes(text)
    try:
        done = subprocess.run(
            [*command, "-o", str(library), str(scratch / _SOURCES[0]), "-lm"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILE_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line]
            or done.stderr.splitlines()
            or ["?"]
        )
        raise NativeUnavailable(f"{command[0]} failed: {lines[0].strip()}")
    return library


def _open(path: Path) -> NativeLibrary:
    try:
        free, held = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path.name} does not load: {error}") from error
    for library in (free, held):
        _declare(library)
    team = gomp_parallel()
    return NativeLibrary(free, held, int(free.drift_init(team)), team is not None)


def _declare(library: ctypes.CDLL) -> None:
    pointer, long, int_, float_ = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    signatures = {
        "drift_init": (int_, [pointer]),
        "drift_linear": (None, [pointer] * 5 + [long] * 4 + [int_] * 3),
        "drift_attend": (int_, [pointer] * 7 + [long] * 12 + [float_] + [int_] * 3),
        "drift_rms_norm": (None, [pointer] * 5 + [long] * 4 + [float_] + [int_] * 2),
        "drift_silu_and_mul": (None, [pointer] * 2 + [long] * 3 + [int_] * 2),
        "drift_rotary": (None, [pointer] * 6 + [long] * 8 + [int_] * 3),
        "drift_write_kv": (long, [pointer] * 5 + [long] * 5),
        "drift_cut_decode": (long, [pointer] + [long] * 6 + [pointer] * 5),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
