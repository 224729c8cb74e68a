"""Registers the dispatch policy `edf` with Drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from drift_plugin_edf.policy import EarliestDeadlineFirst
from drift_scheduler.plugins import hookimpl
from drift_scheduler.protocols import DispatchPolicy

__all__ = ["EarliestDeadlineFirst", "drift_dispatch_policies"]


@hookimpl
def drift_dispatch_policies() -> Mapping[str, Callable[..., DispatchPolicy]]:
    """Name -> factory; `edf:max_batch_tokens=2048` on the command line calls it with that option."""
    return {"edf": EarliestDeadlineFirst}
