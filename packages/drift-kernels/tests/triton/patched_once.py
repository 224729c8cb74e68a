"""Makes Triton's interpreter quicker: what it patches for a launch it patches once, not in every call of a function.

As of Triton 3.7 each call of a device function, `tl.sum` and `tl.cdiv` among them, searches the whole language again
for what the launch around it has patched already, and finds nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Launch:
    """What the interpreter keeps of a launch's patches: undone at its end, and then nothing is patched."""

    def __init__(self, scope: Any, patched: set[frozenset[str]]) -> None:
        self._scope, self._patched = scope, patched

    def restore(self) -> None:
        self._scope.restore()
        self._patched.clear()


@contextmanager
def patched_once() -> Iterator[None]:
    """The interpreter with this change, put back afterwards."""
    shipped: Any = interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    def patch(function: Any) -> Any:
        seen = frozenset(v.__name__ for v in function.__globals__.values() if v is tl or v is tl.core)
        if seen in patched:
            return None  # only a launch asks for what it is to undo, and it is the first to patch
        outermost = not patched
        scope = shipped(function)
        patched.add(seen)
        return _Launch(scope, patched) if outermost else None

    interpreter._patch_lang = patch
    try:
        yield
    finally:
        interpreter._patch_lang = shipped
