"""The repository keeps its own rules, and each rule notices when it is broken."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import PurePosixPath

import pytest
import repository_rules as rules

FILES = rules.repository_files()
PYTHON = [path for path in FILES if path.suffix == ".py" and not rules.is_generated(path)]
SHIPPED = [path for path in PYTHON if path.parts[0] == "packages" and path.parts[2] == "src"]
TEXT = [
    path for path in FILES if path.suffix in {".py", ".md", ".toml", ".yaml", ".txt", ".proto", ".c", ".svg"}
]


def read(path: PurePosixPath) -> str:
    return (rules.ROOT / path).read_text(encoding="utf-8")


def test_four_packages_have_one_version() -> None:
    assert rules.version_violations(rules.projects()) == []


def test_a_version_that_differs_is_noticed() -> None:
    planted = {
        "drift-a": {"version": "0.1.0"},
        "drift-b": {"version": "0.2.0", "dependencies": ["drift-a==0.2.0"]},
    }
    assert len(rules.version_violations(planted)) == 2


def test_an_unpinned_sibling_is_noticed() -> None:
    planted = {"drift-a": {"version": "1"}, "drift-b": {"version": "1", "dependencies": ["drift-a>=1"]}}
    assert rules.version_violations(planted)


def test_module_names_say_something() -> None:
    assert rules.name_violations(PYTHON) == []


@pytest.mark.parametrize("name", ["src/utils.py", "src/common/kv.py", "tests/_helpers.py", "a/manager.py"])
def test_a_vague_name_is_noticed(name: str) -> None:
    assert len(rules.name_violations([PurePosixPath(name)])) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_no_code_from_data(path: PurePosixPath) -> None:
    assert rules.code_from_data_violations(path, read(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "from concurrent import futures\nimport shelve as s",
        "def f():\n    import cloudpickle",
        "import torch\nw = torch.load('x', weights_only=True)",
        "eval('1')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_code_from_data_is_noticed(source: str) -> None:
    assert len(rules.code_from_data_violations(PurePosixPath("planted.py"), source)) == 1


def test_putting_a_model_in_evaluation_mode_is_not_code_from_data() -> None:
    assert rules.code_from_data_violations(PurePosixPath("fine.py"), "model.eval()\nre.compile('x')") == []


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_files_and_functions_are_short(path: PurePosixPath) -> None:
    assert rules.length_violations(path, read(path)) == []


def test_length_is_noticed() -> None:
    long_function = "def f():\n" + "    x = 1\n" * 120
    assert len(rules.length_violations(PurePosixPath("planted.py"), long_function)) == 1
    assert len(rules.length_violations(PurePosixPath("planted.py"), "x = 1\n" * 901)) == 1
    assert rules.length_violations(PurePosixPath("fine.py"), "x = 1\n" * 900) == []


def test_no_third_party_trace_and_no_large_file() -> None:
    assert rules.data_violations({path: (rules.ROOT / path).stat().st_size for path in FILES}) == []


@pytest.mark.parametrize(
    ("name", "size"),
    [("tests/mooncake_conversation.jsonl.gz", 10), ("AzureTrace.csv", 10), ("big.bin", 10_000_001)],
)
def test_a_trace_or_large_file_is_noticed(name: str, size: int) -> None:
    assert len(rules.data_violations({PurePosixPath(name): size})) == 1


def test_no_path_of_one_machine() -> None:
    found = [line for path in TEXT for line in rules.machine_path_violations(path, read(path))]
    assert found == []


def test_a_path_of_one_machine_is_noticed() -> None:
    assert rules.machine_path_violations(PurePosixPath("a.md"), "see " + "/ro" + "ot/models")


@pytest.mark.parametrize("page", [path for path in FILES if path.suffix == ".md"], ids=str)
def test_pages_lead_somewhere_and_are_finished(page: PurePosixPath) -> None:
    text = read(page)
    assert rules.link_violations(page, text) + rules.placeholder_violations(page, text) == []


def test_a_broken_link_and_a_placeholder_are_noticed() -> None:
    page = PurePosixPath("docs/planted.md")
    broken = (
        "[a](../README.md) [b](absent.md) [c](https://example.org) [d](../CHANGELOG.md#x) [e](../absent/)"
    )
    assert len(rules.link_violations(page, broken)) == 2
    assert len(rules.placeholder_violations(page, "loss @" + "LOSS@, TO" + "DO")) == 2


def test_test_modules_have_unique_names() -> None:
    names = [path.name for path in PYTHON if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("package", rules.PACKAGES)
def test_package_carries_its_marker_and_licence(package: str) -> None:
    folder = rules.ROOT / "packages" / package
    assert (folder / "src" / package.replace("-", "_") / "py.typed").is_file()
    assert (folder / "LICENSE").read_bytes() == (rules.ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("package", rules.PACKAGES)
def test_registered_entry_points_load(package: str) -> None:
    project = rules.projects()[package]
    declared = dict(project.get("scripts", {}))
    for group in project.get("entry-points", {}).values():
        declared.update(group)
    installed = {entry.name: entry for entry in metadata.distribution(package).entry_points}
    assert {name: entry.value for name, entry in installed.items()} == declared
    for entry in installed.values():
        entry.load()


@pytest.mark.parametrize("package", rules.PACKAGES)
def test_installed_version_is_the_declared_one(package: str) -> None:
    assert metadata.version(package) == rules.projects()[package]["version"]
    module = importlib.import_module(package.replace("-", "_"))
    assert getattr(module, "__version__", metadata.version(package)) == metadata.version(package)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("drift_scheduler", ["torch", "grpc", "msgspec", "click", "rich", "drift_core", "drift_kernels"]),
        (
            "drift_gateway.server, drift_gateway.serving, drift_gateway.commands.serve, drift_gateway.client",
            ["torch"],
        ),
    ],
)
def test_imports_stay_light(modules: str, heavy: list[str]) -> None:
    """The scheduler brings neither its command line's needs nor tensors; a gateway process has no torch."""
    program = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
