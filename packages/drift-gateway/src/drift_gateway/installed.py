"""What is installed, for ListPlugins: every registered name with the package that brings it.

Loading plugins imports them, so it happens once and off the event loop.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from drift_gateway.v1 import info_pb2 as pb
from drift_scheduler import plugins


@cache
def installed_plugins() -> tuple[pb.Plugin, ...]:
    """By kind and name; what cannot be loaded is left out, as the engine leaves it out."""
    registry = plugins.load(strict=False)
    return tuple(
        pb.Plugin(
            kind=kind,
            name=name,
            package=entry.plugin,
            version=_version(entry.plugin),
            summary=_summary(entry.factory),
        )
        for kind, names in registry.names.items()
        for name, entry in names.items()
    )


def _version(package: str) -> str:
    """Of the package, which a plugin is named after; empty for one that was registered by hand."""
    try:
        return version(package.partition(":")[0])
    except PackageNotFoundError:
        return ""


def _summary(factory: Any) -> str:
    """The first line of a factory's documentation, or of its module's where it begins with its options."""
    described = getattr(factory, "help", None) or inspect.getdoc(factory) or ""
    if not described or described.startswith("`"):
        module = sys.modules.get(getattr(factory, "__module__", ""))
        described = (inspect.getdoc(module) or "") if module is not None else ""
    return described.strip().partition("\n")[0]
