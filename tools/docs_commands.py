"""Run the commands and programs of the documentation as written: `python tools/docs_commands.py [FILE...]`.

The convention is in CONTRIBUTING.md, "Documentation that runs". Knows Markdown fences, a shell and nox's list
of sessions; knows nothing of Drift.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TIMEOUT_S = 180.0
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
RUNNABLE = ("console", "python", "javascript")
EVASIVE = ("bash", "sh", "shell", "zsh", "py", "pycon", "python3", "js", "mjs", "node")
OPTIONS = ("background", "exit", "timeout", "not-run")


class DocumentError(Exception):
    """A documented command failed, or a block does not follow the convention; the text says where."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block that is meant to run, with the place it stands at (line counts from 1)."""

    file: Path
    line: int
    language: str
    options: dict[str, str]
    text: str

    @property
    def place(self) -> str:
        """Where a reader finds the block: `FILE:LINE`."""
        file = self.file.relative_to(ROOT) if self.file.is_relative_to(ROOT) else self.file.name
        return f"{file}:{self.line}"

    def commands(self) -> list[str]:
        """The commands of a console block, without their `$ `; a trailing backslash joins lines."""
        found: list[str] = []
        continued = False
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append(line[2:])
            elif continued:
                found[-1] += "\n" + line.removeprefix("> ")
            else:
                continue
            continued = line.endswith("\\")
        return found


def documents(root: Path) -> list[Path]:
    """Every document whose blocks run: the pages at the root, in docs/ and beside each package."""
    patterns = ("*.md", "docs/*.md", "packages/*/README.md", "examples/*/README.md")
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def blocks(file: Path, text: str) -> list[Block]:
    """The runnable blocks of one document, in order; DocumentError on a block that breaks the convention."""
    found = []
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        opening = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)\s*(.*)$", line)
        if not opening:
            continue
        fence, language, info = opening.groups()
        body = []
        for _, inside in lines:
            if inside.strip().startswith(fence) and not inside.strip().strip(fence[0]):
                break
            body.append(inside)
        else:
            raise DocumentError(f"{file.name}:{number}: this fence is never closed")
        block = Block(file, number, language, _options(file, number, language, info), "\n".join(body))
        if language in RUNNABLE and "not-run" not in block.options:
            if language == "console" and not block.commands():
                raise DocumentError(f"{block.place}: a console block without a line that starts with '$ '")
            found.append(block)
    return found


def _options(file: Path, number: int, language: str, info: str) -> dict[str, str]:
    if language in EVASIVE:
        raise DocumentError(
            f"{file.name}:{number}: write ```console, ```python or ```javascript instead of ```{language}"
        )
    if language not in RUNNABLE:
        return {}
    options = {key: value for key, _, value in (word.partition("=") for word in info.split())}
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        choices = ", ".join(OPTIONS)
        raise DocumentError(f"{file.name}:{number}: no block option {unknown[0]!r}; there are: {choices}")
    return options


def nox_sessions(command: str) -> list[str] | None:
    """The sessions a command asks nox for, or None where nox is not what it runs.

    `pip install nox && nox -s demo` and `nox -s bench -- cpu` are such commands: the sessions are checked to
    exist, not run from within one another.
    """
    words = command.removeprefix("pip install nox && ").split()
    if not words or words[0] != "nox":
        return None
    words = words[: words.index("--")] if "--" in words else words
    named = words[words.index("-s") + 1 :] if "-s" in words else []
    return [word for word in named if not word.startswith("-")]


def pip_paths(command: str) -> list[str] | None:
    """The folders a `pip install ./PATH...` names, or None for any other command.

    Such a command is checked for its paths, not run: it would replace the packages under test. The sessions
    `standalone` and `wheels` install each package for real.
    """
    if not re.fullmatch(r"pip install( (-e|\./\S+))+", command):
        return None
    return [word for word in command.split() if word.startswith("./")]


def known_sessions(root: Path) -> set[str]:
    """The names of the sessions in the noxfile."""
    source = (root / "noxfile.py").read_text()
    return set(re.findall(r"^@nox\.session.*\ndef (\w+)\(", source, flags=re.MULTILINE))


class Runner:
    """Runs the blocks of one document in one scratch folder, background commands included."""

    def __init__(self, folder: Path, sessions: set[str]) -> None:
        self._folder = folder
        self._sessions = sessions
        self._background: list[tuple[Block, subprocess.Popen[bytes], Path]] = []

    def run(self, block: Block) -> None:
        """Run one block; DocumentError if it does not end as it says."""
        if block.language == "python":
            self._program(block, "python", ".py")
        elif block.language == "javascript":
            self._program(block, "node", ".mjs")
        elif "background" in block.options:
            self._start(block)
        else:
            for command in block.commands():
                if not self._recognised(block, command):
                    self._foreground(block, command)

    def background_news(self) -> str:
        """What the background commands printed last, to explain a failure."""
        return "".join(
            f"\n    {block.place} in the background {_state(process)}:\n{_tail(log.read_bytes())}"
            for block, process, log in self._background
        )

    def stop(self) -> None:
        """End the background commands; DocumentError if one had to be killed."""
        stubborn = []
        for block, process, _ in reversed(self._background):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                stubborn.append(block.place)
        self._background.clear()
        if stubborn:
            raise DocumentError(
                f"{', '.join(stubborn)}: did not end within {STOP_TIMEOUT_S:.0f} s of SIGTERM"
            )

    def _program(self, block: Block, interpreter: str, suffix: str) -> None:
        program = self._folder / f"block_{block.line}{suffix}"
        program.write_text(block.text)
        self._foreground(block, f"{interpreter} {program.name}")

    def _recognised(self, block: Block, command: str) -> bool:
        for name in nox_sessions(command) or []:
            if name not in self._sessions:
                raise DocumentError(
                    f"{block.place}: no nox session {name!r}; there are: {sorted(self._sessions)}"
                )
        for path in pip_paths(command) or []:
            if not (ROOT / path / "pyproject.toml").is_file():
                raise DocumentError(f"{block.place}: no package at {path}")
        return nox_sessions(command) is not None or pip_paths(command) is not None

    def _foreground(self, block: Block, command: str) -> None:
        print(f"{block.place}: {command}", flush=True)
        timeout_s = float(block.options.get("timeout", DEFAULT_TIMEOUT_S))
        wanted = int(block.options.get("exit", 0))
        process = self._spawn(command, subprocess.PIPE)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise DocumentError(
                f"{block.place}: ran past {timeout_s:.0f} s: {command}\n{_tail(output)}"
            ) from None
        if process.returncode != wanted:
            ending = f"exit {process.returncode}, not {wanted}"
            raise DocumentError(f"{block.place}: {ending}: {command}\n{_tail(output)}")

    def _start(self, block: Block) -> None:
        (command,) = block.commands()
        port = int(block.options["background"])
        log = self._folder / f"background_{block.line}.log"
        print(f"{block.place}: {command} (in the background, until port {port} answers)", flush=True)
        if _listens(port):
            raise DocumentError(f"{block.place}: port {port} is already in use")
        with log.open("wb") as sink:
            process = self._spawn(command, sink.fileno())
        self._background.append((block, process, log))
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DocumentError(
                    f"{block.place}: never listened on port {port}\n{_tail(log.read_bytes())}"
                )
            time.sleep(0.1)

    def _spawn(self, command: str, output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "COLUMNS": "110"},
        )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _state(process: subprocess.Popen[bytes]) -> str:
    code = process.poll()
    return "still runs" if code is None else f"ended with {code}"


def _tail(output: bytes, lines: int = 25) -> str:
    return "\n".join("    " + line for line in output.decode(errors="replace").splitlines()[-lines:])


@contextmanager
def scratch(root: Path, modules: Path | None = None) -> Iterator[Path]:
    """A folder that looks like the repository's root and takes what the commands write.

    `modules`: a folder of JavaScript packages, for programs to import.
    """
    folder = Path(tempfile.mkdtemp(prefix="drift-docs-"))
    try:
        for entry in root.iterdir():
            if not entry.name.startswith("."):
                (folder / entry.name).symlink_to(entry)
        if modules is not None:
            (folder / "node_modules").symlink_to(modules.resolve())
        yield folder
    finally:
        shutil.rmtree(folder)


def run_document(file: Path, sessions: set[str], modules: Path | None = None) -> list[str]:
    """Run one document's blocks in order up to the first failure; the failures, as lines to print.

    Programs in JavaScript run where there are `modules` for them, and are said to be left out elsewhere.
    """
    failures = []
    with scratch(ROOT, modules) as folder:
        runner = Runner(folder, sessions)
        try:
            for block in blocks(file, file.read_text(encoding="utf-8")):
                if block.language == "javascript" and modules is None:
                    print(f"{block.place}: LEFT OUT, there are no JavaScript packages here", flush=True)
                    continue
                runner.run(block)
        except DocumentError as error:
            failures.append(f"{error}{runner.background_news()}")
        try:
            runner.stop()
        except DocumentError as error:
            failures.append(str(error))
    return failures


def main() -> int:
    """Run the documents named, or all of them; the exit code says whether one failed."""
    parser = argparse.ArgumentParser(description="Run the commands of the documentation as written.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--list", action="store_true", help="print the blocks as JSON lines and run nothing")
    parser.add_argument("--node-modules", type=Path, help="JavaScript packages, for programs in JavaScript")
    arguments = parser.parse_args()
    files = arguments.files or documents(ROOT)
    if arguments.list:
        for block in (block for file in files for block in blocks(file, file.read_text(encoding="utf-8"))):
            print(json.dumps({"place": block.place, "language": block.language, "options": block.options}))
        return 0
    sessions = known_sessions(ROOT)
    failures = [failure for file in files for failure in run_document(file, sessions, arguments.node_modules)]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"{len(files)} documents, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
