"""Check that an installed package stands on its own: `python tools/alone.py PACKAGE ABSENT...`.

Imports PACKAGE from where it is installed and fails if it came from the source tree, if it lacks its type
marker, or if a module named in ABSENT can be imported beside it. Knows nothing of what the packages do.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def complaints(package: str, absent: list[str], source_tree: Path) -> list[str]:
    """Everything that keeps `package` from standing alone, as lines to print."""
    found = [f"{name} is importable beside {package}" for name in absent if importlib.util.find_spec(name)]
    module = importlib.import_module(package)
    assert module.__file__ is not None, f"{package} is a namespace package"
    home = Path(module.__file__).resolve().parent
    if home.is_relative_to(source_tree / "packages"):
        found.append(f"{package} was imported from the source tree, not from its wheel: {home}")
    if not (home / "py.typed").is_file():
        found.append(f"{package} was installed without py.typed")
    return found


def main() -> int:
    """Print what is wrong, if anything; the exit code says whether there was something."""
    package, *absent = sys.argv[1:]
    found = complaints(package, absent, Path(__file__).resolve().parent.parent)
    for line in found:
        print(line)
    print(f"{package}: {'does not stand alone' if found else 'stands alone'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
