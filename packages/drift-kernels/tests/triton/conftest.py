"""Tests of this folder run kernels in Triton's interpreter, so only in a process started with TRITON_INTERPRET=1.

`test_kernels_interpreted.py` beside the folder starts one; elsewhere nothing here is collected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*"]
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _right_about_bf16_and_quicker() -> Iterator[None]:
    from bf16_interpreter import corrected
    from patched_once import patched_once

    with corrected(), patched_once():
        yield
