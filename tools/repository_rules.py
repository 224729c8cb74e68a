"""The repository's own rules, as questions about its files that answer with a list of violations.

What ruff, mypy and import-linter check is not repeated here. Each rule takes what it judges as arguments, so a
test can plant a violation; `tests/test_repository_rules.py` does, and runs every rule on the repository.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("drift-scheduler", "drift-kernels", "drift-core", "drift-gateway")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}
CODE_FROM_DATA_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
}
CODE_FROM_DATA_CALLS = {"torch.load", "torch.save", "torch.hub.load", "eval", "exec"}
MAX_FILE_LINES = 900
MAX_FUNCTION_LINES = 120
MAX_FILE_BYTES = 10_000_000
DATA_SUFFIXES = frozenset({".gz", ".jsonl", ".csv", ".parquet", ".zst", ".xz"})
PUBLISHED_TRACES = (
    "azure",
    "burstgpt",
    "mooncake",
    "sharegpt",
    "lmsys",
    "servegen",
    "loogle",
    "openthoughts",
)
MACHINE_PATHS = ("/" + "work/", "/" + "root/")


def repository_files(root: Path = ROOT) -> list[PurePosixPath]:
    """Every file that is in the repository or would be with the next `git add`, relative to `root`."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout.decode()
    names = (name for name in listing.split("\0") if name)
    return sorted({PurePosixPath(name) for name in names if (root / name).is_file()})


def is_generated(path: PurePosixPath) -> bool:
    """Whether protoc wrote the file."""
    return "_pb2" in path.name


def version_violations(projects: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One version for all packages, and each pins the others it needs to exactly that version.

    `projects` maps a package's name to the `[project]` table of its pyproject.toml.
    """
    versions = {name: table["version"] for name, table in projects.items()}
    found = []
    if len(set(versions.values())) != 1:
        found.append(f"versions differ: {versions}")
    for name, table in projects.items():
        for requirement in table.get("dependencies", []):
            needed, _, pinned = requirement.partition("==")
            if needed.strip().startswith("drift-") and pinned.strip() != versions.get(needed.strip()):
                found.append(f"{name} asks for {requirement}; there is {versions.get(needed.strip())}")
    return found


def name_violations(paths: Iterable[PurePosixPath]) -> list[str]:
    """No module and no folder of modules whose name says nothing."""
    return [
        f"{path}: {part!r} says nothing about what is inside"
        for path in paths
        if path.suffix == ".py"
        for part in (*path.parts[:-1], path.stem)
        if part.strip("_").lower() in VAGUE_NAMES
    ]


def code_from_data_violations(path: PurePosixPath, source: str) -> list[str]:
    """Nothing that can turn data into code: pickle and its kin, torch.load, eval, exec."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            forbidden = [name for name in _imported(node) if name.split(".")[0] in CODE_FROM_DATA_MODULES]
            found += [f"{path}:{node.lineno}: imports {name}" for name in forbidden]
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in CODE_FROM_DATA_CALLS:
                found.append(f"{path}:{node.lineno}: calls {ast.unparse(node.func)}")
            for keyword in node.keywords:
                if (
                    keyword.arg in {"allow_pickle", "trust_remote_code"}
                    and ast.unparse(keyword.value) != "False"
                ):
                    found.append(f"{path}:{node.lineno}: passes {keyword.arg}")
    return found


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.module and not node.level else []


def length_violations(path: PurePosixPath, source: str) -> list[str]:
    """Files and functions stay short enough to read in one go."""
    found = []
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines, more than {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"
                )
    return found


def data_violations(sizes: Mapping[PurePosixPath, int]) -> list[str]:
    """No published trace, whole or in part, and no large file; `sizes` gives bytes per file."""
    found = []
    for path, size in sizes.items():
        is_data = path.suffix in DATA_SUFFIXES
        if is_data and any(name in path.name.lower() for name in PUBLISHED_TRACES):
            found.append(f"{path}: looks like a third party's trace; tests make their own samples")
        if size > MAX_FILE_BYTES:
            found.append(f"{path}: {size} bytes, more than {MAX_FILE_BYTES}")
    return found


def link_violations(page: PurePosixPath, text: str, root: Path = ROOT) -> list[str]:
    """Every relative link of a Markdown page leads to a file or folder of the repository."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    return [f"{page}: leads to {target}" for target in local if not (root / page.parent / target).exists()]


def placeholder_violations(page: PurePosixPath, text: str) -> list[str]:
    """Nothing that was to be filled in later."""
    return [
        f"{page}: still says {word}" for word in re.findall(r"@[A-Z_]+@|\bTODO\b|\bTBD\b|\bFIXME\b", text)
    ]


def machine_path_violations(path: PurePosixPath, text: str) -> list[str]:
    """No path that exists on one developer's machine only."""
    return [
        f"{path}:{number}: a path of somebody's machine"
        for number, line in enumerate(text.splitlines(), start=1)
        if any(marker in line for marker in MACHINE_PATHS)
    ]


def projects(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """The `[project]` table of each package."""
    return {name: _toml(root / "packages" / name / "pyproject.toml")["project"] for name in PACKAGES}


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
