"""What each package's wheel carries: its code, its type marker, its licence, and nothing of the tests.

That the wheels install and run on their own is the business of `nox -s standalone` and `nox -s wheels`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import repository_rules as rules


@pytest.fixture(scope="module", params=rules.PACKAGES)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One package's name and its wheel, freshly built."""
    package: str = request.param
    folder = tmp_path_factory.mktemp(package)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=rules.ROOT / "packages" / package, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return package, path


def entries(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def wheel_metadata(path: Path) -> Message:
    with zipfile.ZipFile(path) as archive:
        (name,) = [entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_carries_every_source_file(wheel: tuple[str, Path]) -> None:
    package, path = wheel
    prefix = f"packages/{package}/src/"
    sources = {
        str(file).removeprefix(prefix) for file in rules.repository_files() if str(file).startswith(prefix)
    }
    assert sources <= set(entries(path))


def test_wheel_carries_marker_and_licence_but_no_tests(wheel: tuple[str, Path]) -> None:
    package, path = wheel
    names = entries(path)
    assert f"{package.replace('-', '_')}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "tests/" in name or Path(name).name.startswith("test_")]


def test_wheel_says_what_it_is(wheel: tuple[str, Path]) -> None:
    package, path = wheel
    fields = wheel_metadata(path)
    assert (fields["Name"], fields["Version"]) == (package, rules.projects()[package]["version"])
    assert fields["License-Expression"] == "Apache-2.0"


def test_scheduler_declares_neither_torch_nor_grpc(wheel: tuple[str, Path]) -> None:
    package, path = wheel
    needed = " ".join(wheel_metadata(path).get_all("Requires-Dist") or [])
    assert ("torch" in needed) == (package in {"drift-kernels", "drift-core"})
    assert ("grpc" in needed) == (package == "drift-gateway")


def test_scheduler_is_small_and_needs_little(wheel: tuple[str, Path]) -> None:
    package, path = wheel
    if package != "drift-scheduler":
        pytest.skip("its promise alone")
    assert path.stat().st_size < 300_000
    needed = {
        re.split(r"[^A-Za-z0-9-]", line)[0] for line in wheel_metadata(path).get_all("Requires-Dist") or []
    }
    assert needed <= {"pluggy", "numpy", "msgspec", "click", "rich"}
