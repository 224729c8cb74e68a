"""How much memory this process may still take, and what of it the KV pool gets when nobody says.

Knows nothing of models or pages. Sizes are bytes.
"""

from __future__ import annotations

import re
from pathlib import Path

from drift_scheduler.errors import DriftError

GIB = 1 << 30
DEFAULT_SHARE = 0.25
DEFAULT_MOST = 4 * GIB


def available_bytes() -> int | None:
    """Memory this process can still have: what the machine has left, or its control group if that is less.

    `None` where the platform does not say.
    """
    limits = [limit for limit in (_machine(), _control_group()) if limit is not None]
    return min(limits) if limits else None


def kv_budget(wanted: int | None, *, useful: int, available: int | None) -> int:
    """Bytes for the KV pool.

    Without a wish: a quarter of what is available, 4 GiB at most, and no more than the `useful` bytes that all
    running requests can fill. Raises DriftError when the wish is more than there is.
    """
    if wanted is None:
        share = DEFAULT_MOST if available is None else min(DEFAULT_MOST, int(DEFAULT_SHARE * available))
        return min(share, useful)
    if available is not None and wanted > available:
        raise DriftError(
            f"too little memory: a KV budget of {readable(wanted)}, and {readable(available)} are available"
        )
    return wanted


def check_weights_fit(model: str, needed: int, available: int | None) -> None:
    """Raise DriftError when `needed` bytes of weights are more than there is, before loading any."""
    if available is not None and needed > available:
        raise DriftError(
            f"too little memory: the weights of {model} take {readable(needed)}, and {readable(available)} are "
            "available"
        )


def readable(size: float) -> str:
    """A size for people, as in 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _machine() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _control_group() -> int | None:
    """What the control group (version 2) leaves; file cache that can be dropped counts as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    droppable = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    return max(int(limit) - used + (int(droppable[1]) if droppable else 0), 0)
