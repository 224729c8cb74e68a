"""The wire API may only grow: buf, with the repository's own settings, against the committed baseline."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from drift_gateway.v1 import admin_pb2, generation_pb2, info_pb2

ROOT = Path(__file__).resolve().parent.parent
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
GENERATION = "drift_gateway/v1/generation.proto"

needs_buf = pytest.mark.skipif(BUF is None, reason="the program buf is not installed (pip install buf-bin)")


def buf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BUF is not None
    return subprocess.run(
        [BUF, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def breaking(folder: Path, change: Callable[[Path], None]) -> str:
    """What `buf breaking` says of a copy of proto/ after a change; empty when it breaks nobody."""
    shutil.copytree(ROOT / "proto", folder / "proto")
    shutil.copy(ROOT / "buf.yaml", folder)
    change(folder / "proto")
    done = buf(folder, "breaking", "--against", "proto/baseline.binpb")
    assert done.stderr == ""
    assert (done.returncode == 0) == (done.stdout == "")
    return done.stdout


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(protos: Path) -> None:
        text = (protos / file).read_text()
        assert old in text
        (protos / file).write_text(text.replace(old, new, 1))

    return change


@needs_buf
def test_the_protos_are_clean() -> None:
    done = buf(ROOT, "lint")
    assert (done.returncode, done.stdout) == (0, "")


def asked_with(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """All fields of a request, those of the messages in it included."""
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from asked_with(field.message_type, seen)


def test_what_a_request_does_not_say_differs_from_zero() -> None:
    plain = set()
    for file in (admin_pb2.DESCRIPTOR, generation_pb2.DESCRIPTOR, info_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                fields = asked_with(method.input_type, set())
                plain |= {f.full_name for f in fields if not f.is_repeated and not f.has_presence}
    assert plain == {"drift.v1.ChatMessage.role", "drift.v1.ChatMessage.content"}


@needs_buf
def test_what_is_there_now_breaks_nobody(tmp_path: Path) -> None:
    assert breaking(tmp_path, lambda protos: None) == ""


@needs_buf
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("message Usage {\n", "message Usage {\n  optional uint32 added = 900;\n"),
        ("message Usage {\n", "message Added {}\n\nmessage Usage {\n"),
        ("service GenerationService {\n", "service GenerationService {\n  rpc Added(Chat) returns (Chat);\n"),
    ],
)
def test_additions_break_nobody(tmp_path: Path, old: str, new: str) -> None:
    assert breaking(tmp_path, edit(GENERATION, old, new)) == ""


@needs_buf
@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        (GENERATION, "  uint32 output_tokens = 3;\n", "", "field \"3\" with name \"output_tokens\""),
        (GENERATION, "uint32 output_tokens = 3;", "uint32 output_tokens = 4;", "output_tokens"),
        (GENERATION, "uint32 output_tokens = 3;", "string output_tokens = 3;", "changed type"),
        (GENERATION, "uint32 output_tokens = 3;", "uint32 tokens = 3;", "changed name"),
        (GENERATION, "  rpc Tokenize(TokenizeRequest) returns (TokenizeResponse);\n", "", "\"Tokenize\""),
        (GENERATION, "  FINISH_REASON_FAILED = 5;\n", "", "enum value \"5\""),
        ("drift_gateway/compat/wire/kserve.proto", "  bool decoupled = 1;\n", "", "decoupled"),
    ],
)  # fmt: skip
def test_removals_and_changes_are_refused(
    tmp_path: Path, file: str, old: str, new: str, complaint: str
) -> None:
    assert complaint in breaking(tmp_path, edit(file, old, new))
