"""docs/api.md says what the code says; that its examples work is seen by running them (`nox -s docs`)."""

from __future__ import annotations

import docs_commands
import error_table
import pytest

from drift_gateway.compat.kserve_tensors import INPUTS, OUTPUTS, TARGETS
from drift_gateway.v1 import generation_pb2 as pb

PAGE = error_table.PAGE.read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_table_of_errors_is_the_gateways() -> None:
    assert error_table.with_table(PAGE) == PAGE, "run `python tools/error_table.py` and commit docs/api.md"


@pytest.mark.parametrize("message", [pb.SLO, pb.RequestTiming])
def test_every_target_and_every_proof_is_explained(message: type) -> None:
    text = section("Latency targets, and the proof")
    fields = message.DESCRIPTOR.fields_by_name  # type: ignore[attr-defined]
    assert [name for name in fields if f"`{name}`" not in text] == []


def test_every_tensor_is_explained_with_its_type() -> None:
    rows = [row for row in section("Triton and KServe clients").splitlines() if row.startswith("| `")]
    for name, kind in {**INPUTS, **OUTPUTS}.items():
        (row,) = (row for row in rows if f"`{name}`" in row.split("|")[1])
        assert row.split("|")[2].strip() == kind
    assert [name for name in TARGETS if f"`{name}`" not in PAGE] == []


def test_there_are_examples_in_python_javascript_and_the_shell() -> None:
    languages = {block.language for block in docs_commands.blocks(error_table.PAGE, PAGE)}
    assert languages == {"console", "python", "javascript"}
