"""The runner of documented commands finds what runs, and fails where a document is wrong."""

from __future__ import annotations

import shutil
import socket
import textwrap
from pathlib import Path

import docs_commands as docs
import pytest


def parsed(text: str) -> list[docs.Block]:
    return docs.blocks(Path("page.md"), textwrap.dedent(text))


def failures(tmp_path: Path, text: str) -> list[str]:
    page = tmp_path / "page.md"
    page.write_text(textwrap.dedent(text))
    return docs.run_document(page, {"tests", "demo"})


def test_commands_are_lines_with_a_prompt_and_their_continuations() -> None:
    (block,) = parsed("""
        ```console
        $ echo one \\
        >   two
        one two
        $ true
        ```
        """)
    assert block.commands() == ["echo one \\\n  two", "true"]
    assert block.place == "page.md:2"


def test_other_languages_and_blocks_marked_not_run_are_left_alone() -> None:
    assert parsed("```text\n$ rm -rf x\n```\n```python not-run\n1/0\n```\n```json\n{}\n```\n") == []


def test_a_fence_within_a_longer_fence_is_text() -> None:
    assert parsed("````text\n```console\n$ false\n```\n````\n") == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```bash\nls\n```", "instead of ```bash"),
        ("```console\nls\n```", "starts with '\\$ '"),
        ("```console quietly\n$ ls\n```", "no block option 'quietly'"),
        ("```console\n$ ls\n", "never closed"),
    ],
)
def test_a_block_that_evades_the_convention_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(docs.DocumentError, match=complaint):
        parsed(text)


@pytest.mark.parametrize(
    ("command", "sessions"),
    [
        ("pip install nox && nox -s demo", ["demo"]),
        ("nox -s lint types", ["lint", "types"]),
        ("nox -s bench -- cpu", ["bench"]),
        ("drift serve", None),
        ("pip install torch", None),
    ],
)
def test_nox_commands_are_recognised(command: str, sessions: list[str] | None) -> None:
    assert docs.nox_sessions(command) == sessions


def test_every_session_of_the_noxfile_is_known() -> None:
    assert {"tests", "demo", "lint", "types", "imports", "proto", "docs", "standalone", "serve", "bench"} <= (
        docs.known_sessions(docs.ROOT)
    )


def test_a_page_whose_commands_work_passes(tmp_path: Path) -> None:
    page = """
        ```console
        $ echo 1 > number
        $ nox -s tests
        $ pip install ./packages/drift-scheduler
        ```
        ```python
        assert open("number").read() == "1\\n"
        ```
        ```console exit=2
        $ exit 2
        ```
        """
    assert failures(tmp_path, page) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```console\n$ echo so; exit 3\n```", "exit 3, not 0"),
        ("```console exit=2\n$ true\n```", "exit 0, not 2"),
        ("```python\n1/0\n```", "ZeroDivisionError"),
        ("```console timeout=0.2\n$ sleep 60\n```", "ran past"),
        ("```console\n$ nox -s absent\n```", "no nox session 'absent'"),
        ("```console\n$ pip install ./packages/absent\n```", "no package at"),
        ("```console background=1\n$ true\n```", "never listened on port 1"),
    ],
)
def test_a_page_that_is_wrong_fails_and_says_where(tmp_path: Path, text: str, complaint: str) -> None:
    (failure,) = failures(tmp_path, text)
    assert failure.startswith("page.md:1: ")
    assert complaint in failure


def test_javascript_runs_where_it_has_packages_and_is_said_to_be_left_out_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text('```javascript\nimport { two } from "two";\nif (two !== 2) process.exit(1);\n```\n')
    assert docs.run_document(page, set()) == []
    assert "page.md:1: LEFT OUT" in capsys.readouterr().out
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    package = tmp_path / "modules" / "two"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"name": "two", "type": "module", "main": "two.js"}')
    (package / "two.js").write_text("export const two = 2;\n")
    assert docs.run_document(page, set(), tmp_path / "modules") == []
    (package / "two.js").write_text("export const two = 3;\n")
    (failure,) = docs.run_document(page, set(), tmp_path / "modules")
    assert failure.startswith("page.md:1: exit 1, not 0")


def test_a_server_in_the_background_serves_later_blocks_and_ends_with_the_page(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = f"""
        ```console background={port}
        $ exec python -m http.server {port} --bind 127.0.0.1
        ```
        ```python
        import socket
        socket.create_connection(("127.0.0.1", {port}), timeout=5).close()
        ```
        """
    assert failures(tmp_path, page) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
