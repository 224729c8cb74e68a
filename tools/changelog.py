"""Turn the fragments of changelog.d into a section of CHANGELOG.md: `python tools/changelog.py VERSION --date DATE`.

Knows file names and Markdown, nothing of git; the date is an argument. `--check` only looks at the fragments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("added", "changed", "fixed", "removed", "security")
MARK = "<!-- releases -->\n"


class FragmentError(Exception):
    """A fragment's name or text is not as changelog.d/README.md asks; the text says which."""


def fragments(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    """Path and text of every fragment by kind, in the order of KINDS and then of names."""
    found: dict[str, list[tuple[Path, str]]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.iterdir()):
        if path.name == "README.md":
            continue
        name, _, rest = path.name.partition(".")
        kind, _, suffix = rest.partition(".")
        if not name or kind not in KINDS or suffix != "md":
            raise FragmentError(f"{path.name}: name it NAME.KIND.md, where KIND is one of {', '.join(KINDS)}")
        text = " ".join(path.read_text(encoding="utf-8").split())
        if not text:
            raise FragmentError(f"{path.name}: is empty")
        found[kind].append((path, text))
    return found


def section(version: str, date: str, found: dict[str, list[tuple[Path, str]]]) -> str:
    """The Markdown section of one release."""
    lines = [f"## {version} ({date})", ""]
    for kind, entries in found.items():
        if entries:
            lines += [f"### {kind.capitalize()}", "", *(f"- {text}" for _, text in entries), ""]
    return "\n".join(lines)


def release(root: Path, version: str, date: str) -> None:
    """Write the section for `version` to the top of CHANGELOG.md and delete the fragments it was made of."""
    found = fragments(root / "changelog.d")
    if not any(found.values()):
        raise FragmentError("changelog.d holds no fragment: there is nothing to release")
    changelog = root / "CHANGELOG.md"
    before, mark, after = changelog.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise FragmentError(f"CHANGELOG.md has no line {MARK.strip()!r}")
    changelog.write_text(f"{before}{mark}\n{section(version, date, found)}{after}", encoding="utf-8")
    for entries in found.values():
        for path, _ in entries:
            path.unlink()


def main() -> int:
    """Make a release's section, or check the fragments; exit code 2 names a fragment that is wrong."""
    parser = argparse.ArgumentParser(
        description="Turn the fragments of changelog.d into a section of CHANGELOG.md."
    )
    parser.add_argument("version", nargs="?")
    parser.add_argument("--date", metavar="YYYY-MM-DD")
    parser.add_argument("--check", action="store_true", help="only check that every fragment is well formed")
    arguments = parser.parse_args()
    if not arguments.check and not (arguments.version and arguments.date):
        parser.error("a release needs VERSION and --date")
    try:
        if arguments.check:
            fragments(ROOT / "changelog.d")
        else:
            release(ROOT, arguments.version, arguments.date)
    except FragmentError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
