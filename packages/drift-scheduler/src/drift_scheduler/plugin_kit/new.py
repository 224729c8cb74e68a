"""Writes the package of a new policy: it works as it is, and its test holds it to the rules.

Knows the templates and nothing of what is installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from string import Template

from drift_scheduler.errors import DriftError, OptionError
from drift_scheduler.plugin_kit import templates

KINDS: Mapping[str, Mapping[str, str]] = {"dispatch": templates.DISPATCH, "partition": templates.PARTITION}
"""What `drift plugins new --kind` offers -> path -> template of each file."""


def write_plugin(name: str, kind: str = "dispatch", into: str | Path = ".") -> Path:
    """Write package `drift-plugin-NAME` with a policy called NAME into a folder; returns the package's folder.

    Raises OptionError for a name that is none, DriftError where the folder exists already or cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 60:
        raise OptionError(
            f"'{name}' is no name for a policy: lower-case words of letters and digits joined by hyphens, as in "
            "'shortest-first'"
        )
    if kind not in KINDS:
        raise OptionError(f"no kind of plugin '{kind}'; kinds: {', '.join(KINDS)}")
    folder = Path(into) / f"drift-plugin-{name}"
    words = {
        "name": name,
        "module": f"drift_plugin_{name.replace('-', '_')}",
        "test": f"test_{name.replace('-', '_')}",
        "Class": "".join(word.capitalize() for word in name.split("-")),
        "version": version("drift-scheduler"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=False)
        for path, template in KINDS[kind].items():
            file = folder / Template(path).substitute(words)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(Template(template).substitute(words), encoding="utf-8")
    except FileExistsError:
        raise DriftError(f"{folder} is already there; choose another name or folder (--into)") from None
    except OSError as error:
        raise DriftError(f"{error.filename or folder}: {error.strerror or error}") from error
    return folder
