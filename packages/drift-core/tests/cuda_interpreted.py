"""Run as a script with TRITON_INTERPRET=1: the GPU script's kernel checks on small inputs, on the CPU.

Prints one line per check with its relative error. The device's properties are made up; its kernels are not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "packages" / "drift-kernels" / "tests" / "triton")]

import torch  # noqa: E402
from bf16_interpreter import corrected  # noqa: E402
from gpu_parts import findings, kernels, speed  # noqa: E402
from patched_once import patched_once  # noqa: E402

from drift_core.cuda import torch_cuda  # noqa: E402
from drift_core.cuda.stub import StubDevice  # noqa: E402

UNITS = 4


class Stub(StubDevice):
    """A stub of a known compute capability."""

    capability = 90

    def __init__(self) -> None:
        super().__init__(UNITS)


def checks() -> dict[str, float]:
    """Every check of the part `kernels`, by name."""
    lengths = [(1, 17), (1, 64), (5, 20)]
    half = torch.float16
    return {
        "attention": kernels._attention(torch, 64, 2, 16, None, lengths, half),
        "windowed attention": kernels._attention(torch, 64, 1, 64, 9, lengths, half),
        "decode lists": kernels._decode_lists(torch, 64, half, rows=2, longest=20),
        "rotary": kernels._rotary(torch, 64, half),
        "silu": kernels._silu(torch, half),
        "sampling": kernels._sampling(torch, rows=12, vocab=300),
        "masks": kernels._masks(torch, rows=12, vocab=320),
    }


def rates() -> None:
    """The launches of the part `speed`; times mean nothing here."""
    speed.decode_attention(torch, 2, 40)
    speed.prefill_attention(torch, 20)
    speed.rows(torch, 1.0, count=2)


def main() -> None:
    kernels.DEVICE = speed.DEVICE = "cpu"
    torch_cuda.TorchCuda = Stub  # type: ignore[assignment,misc]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=UNITS)  # type: ignore[assignment,return-value]
    for module in (findings, speed):
        module.milliseconds = lambda run, *_: (run(), 1.0)[1]  # type: ignore[attr-defined]
        module.graph_of = lambda run, *_: (run(), SimpleNamespace(replay=lambda: None))[1]  # type: ignore[attr-defined]
    with corrected(), patched_once(), torch.inference_mode():
        for name, error in checks().items():
            print(f"{name}\t{error}")
        rates()
    print("done\t0")


if __name__ == "__main__":
    main()
