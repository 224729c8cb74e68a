"""Runs tests/triton in processes of their own: Triton decides at import whether kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
FOLDER = Path(__file__).parent / "triton"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("module", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(module: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{module}.py")]
    # numpy warns of infinities and NaN that kernels mask out afterwards.
    command += ["-W", "ignore::RuntimeWarning"]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
