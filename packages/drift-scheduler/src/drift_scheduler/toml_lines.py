"""On which line of a TOML text a key stands, as the standard library's reader does not tell.

Good enough for pointing: it knows tables, arrays of tables and keys at the start of a line, not keys within inline
tables, whose line is that of the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TABLE = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(
    r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


def line_of(text: str, key: str) -> int | None:
    """The line, from 1, of `key` as in `workloads[1].ttft`, or of the nearest table or key that holds it."""
    lines = _lines(text)
    wanted = key
    while wanted:
        if wanted in lines:
            return lines[wanted]
        wanted = wanted[: max(wanted.rfind("."), wanted.rfind("["), 0)]
    return None


@dataclass(frozen=True, slots=True)
class Source:
    """A file's name and its text, to say where a key stands."""

    name: str
    text: str = ""

    def at(self, key: str) -> str:
        """`FILE:LINE`, or the file alone where the line cannot be told."""
        line = line_of(self.text, key)
        return self.name if line is None else f"{self.name}:{line}"

    def of(self, key: str, problem: str) -> str:
        """Where msgspec's complaint about `key` belongs: an unknown field has a line of its own."""
        unknown = re.search(r"unknown field `([^`]+)`", problem)
        return self.at(".".join(part for part in (key, unknown[1] if unknown else "") if part))


def _lines(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), 1):
        if table := _TABLE.match(line):
            name = ".".join(_parts(table[2]))
            if table[1] == "[[":
                index = counts.get(name, 0)
                counts[name] = index + 1
                found.setdefault(name, number)
                name = f"{name}[{index}]"
            prefix = name
            found.setdefault(name, number)
        elif key := _KEY.match(line):
            name = ".".join([*([prefix] if prefix else []), *_parts(key[1])])
            found.setdefault(name, number)
    return found


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in _PART.findall(dotted)]
