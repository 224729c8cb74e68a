"""Which ops a CUDA device gets, and that nothing needs one, or Triton, to import."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from drift_kernels import select_ops
from drift_kernels.native_library import NativeUnavailable


def _pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), sms: int = 132) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    properties = SimpleNamespace(multi_processor_count=sms)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def test_importing_needs_neither_triton_nor_a_device() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, drift_kernels, drift_kernels.ops, drift_kernels.triton_ops\n"
        "from drift_kernels.triton_ops import plan, tiles\n"
        "torch.cuda.is_available = lambda: True\n"
        "print(drift_kernels.select_ops('cuda', torch.bfloat16).description)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triton is not installed; pip install 'drift-kernels[cuda]'" in run.stdout


def test_a_cuda_device_gets_triton_for_its_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    _pretend(monkeypatch)
    whole = select_ops("cuda", torch.bfloat16)
    assert whole.description == "Triton kernels for sm_90 on 132 multiprocessors"
    part = select_ops("cuda:0", torch.float16, num_sms=48)
    assert part.description == "Triton kernels for sm_90 on 48 multiprocessors"


@pytest.mark.parametrize(
    ("dtype", "capability", "reason"),
    [
        (torch.float32, (9, 0), "no native kernels for float32 on CUDA; bfloat16 and float16 have them"),
        (torch.float16, (7, 5), r"compute capability 7\.5 is not supported"),
    ],
)
def test_what_has_no_kernels_falls_back_and_says_why(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], reason: str
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    _pretend(monkeypatch, capability)
    with pytest.raises(NativeUnavailable, match=reason):
        select_ops("cuda", dtype, native=True)
    assert select_ops("cuda", dtype).description.startswith("torch reference: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_reason_is_the_device() -> None:
    with pytest.raises(NativeUnavailable, match="torch finds no CUDA device"):
        select_ops("cuda", torch.bfloat16, native=True)
