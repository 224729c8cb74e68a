"""Built-in partition policies: how many units each lane gets when both have work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drift_scheduler.partition.best_progress import BestProgress
from drift_scheduler.partition.static import Static
from drift_scheduler.partition.tightest_decode import TightestDecode

FACTORIES: dict[str, Callable[..., Any]] = {
    "tightest-decode": TightestDecode,
    "static": Static,
    "best-progress": BestProgress,
}
