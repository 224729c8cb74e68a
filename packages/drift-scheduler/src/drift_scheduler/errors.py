"""Errors meant for people: one line that names the culprit and the valid choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DriftError(Exception):
    """Something outside Drift is wrong (input, file, option, plugin); the message is one clear line.

    Command lines print it and exit with code 2; the gateway turns it into a gRPC status.
    """


class UnknownNameError(DriftError):
    """A name that nothing registered."""

    def __init__(self, kind: str, name: str, installed: Iterable[str]) -> None:
        names = sorted(installed)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        super().__init__(f"no {kind} '{name}'{hint}; installed: {', '.join(names) or 'none'}")
        self.kind, self.name, self.installed = kind, name, names


class OptionError(DriftError):
    """An option that a factory does not take, or a value it refuses."""


class PluginError(DriftError):
    """A plugin that cannot be loaded, clashes with another or registers something unusable."""


def positive(name: str, value: object) -> int:
    """`value` if it is a positive whole number. Raises OptionError naming the option."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"option '{name}' is {value!r}, need a whole number of at least 1")
    return value
