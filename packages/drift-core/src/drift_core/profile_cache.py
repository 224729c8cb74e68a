"""Where a start's short profile is kept, so that the next start with everything alike does not measure again.

A table's place is named after all that its times depend on: the model's shape, dtype, ops, cores, processor
and Drift's version. Knows nothing of how it is measured.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from drift_scheduler.cost.table import CostTable, encode, read_table
from drift_scheduler.errors import DriftError


def place(*parts: object) -> Path:
    """The file for everything that `parts` say, in the user's cache folder."""
    said = "\n".join([*map(repr, parts), processor(), platform.python_version()])
    digest = hashlib.sha256(said.encode()).hexdigest()[:24]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "drift" / "profiles" / f"{digest}.json"


def find(file: Path) -> CostTable | None:
    """The table kept there; `None` when there is none, or none that this version reads."""
    try:
        return read_table(file) if file.is_file() else None
    except (DriftError, OSError):
        return None


def keep(table: CostTable, file: Path) -> bool:
    """Write a table for later; `False` where the folder cannot be written, which is no fault."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(encode(table))
        part.replace(file)
    except OSError:
        return False
    return True


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
