"""Run as a script with TRITON_INTERPRET=1: the CUDA executor with its Triton kernels on the stub device.

Everything of a GPU's engine but the GPU: decode steps, mixed passes, prefill blocks, draws and masks go through the
real launches, over the executor's own buffers and lists of work. Prints each policy's tokens beside those of
the torch specification, and what the stub saw.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(ROOT / "packages" / "drift-kernels" / "tests" / "triton")]

import cuda_world as world  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bf16_interpreter import corrected  # noqa: E402
from patched_once import patched_once  # noqa: E402

from drift_core.cuda import kernels  # noqa: E402
from drift_core.cuda.executor import CudaExecutor  # noqa: E402
from drift_core.cuda.stub import StubDevice  # noqa: E402
from drift_core.kv import PagedKv, PoolPlan  # noqa: E402
from drift_core.model.decoder import Decoder, KvCache  # noqa: E402
from drift_core.model.weights import random_weights  # noqa: E402
from drift_core.sampling_params import SamplingParams  # noqa: E402
from drift_core.sequences import SequenceTable  # noqa: E402
from drift_kernels.triton_ops.ops import TritonOps  # noqa: E402
from drift_scheduler.domain import Device, Partition, Sharing  # noqa: E402

UNITS, PAGES = 4, 40
MENU = ((UNITS, 0), (2, 2), (0, UNITS))
MODEL = replace(
    world.MODEL, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=2,
    layer_windows=(None, None), qk_norm=True,
)  # fmt: skip


class Splits(world.Splits):
    """A split into halves."""

    units = UNITS

    def menu(self) -> tuple[tuple[int, int], ...]:
        return MENU


class Alternating:
    """A form without a library: even tokens and odd ones in turn."""

    complete, fault, ends = False, None, ()

    def __init__(self) -> None:
        self._turn = 0

    def bits(self) -> Any:
        return np.full(-(-MODEL.vocab_size // 32), (0x55555555, -0x55555556)[self._turn % 2], np.int32)

    def accept(self, token: int) -> None:
        assert token % 2 == self._turn % 2, f"token {token} at an {('even', 'odd')[self._turn % 2]} place"
        self._turn += 1


class Forming:
    """An executor that holds the last request's output to a form."""

    def __init__(self, inner: CudaExecutor) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def arrive(self, request: Any, params: SamplingParams) -> None:
        matcher: Any = Alternating() if request.id == "r2" else None
        self._inner.arrive(request, params, matcher)


def executor(made: Any, dtype: torch.dtype) -> CudaExecutor:
    """Over `made` kernels."""
    sequences = SequenceTable()
    kv = PagedKv(PAGES, 16, sequences.tokens_of)
    menu = tuple(Partition(*entry) for entry in MENU)
    weights = random_weights(MODEL, dtype, seed=1)
    for layer in weights.layers:  # larger, so that tokens differ
        for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down):
            matrix.mul_(5)
    decoder = Decoder(MODEL, weights, made.ops(UNITS), MODEL.max_context)
    device = Device(UNITS, menu, MODEL.num_layers, frozenset(Sharing), name="stub")
    return CudaExecutor(
        StubDevice(UNITS), Splits(), decoder, KvCache.allocate(MODEL, PAGES + 1, 16, dtype), made, kv,
        PoolPlan(PAGES, 16, 1, MODEL.max_context), sequences, device, max_running=4, prefill_tokens=64,
    )  # fmt: skip


def main() -> None:
    kernels.select_ops = lambda *given, num_sms, **named: TritonOps(num_sms, 90)  # type: ignore[assignment]
    shape, dtype = kernels.Shape.of(MODEL, 16), torch.float16
    drawn = SamplingParams(temperature=0.8, top_p=0.9, seed=3, ignore_eos=True)
    load = world.Load(
        3, prompt=(3, 36), output=(2, 4), params=lambda index: drawn if index == 1 else world.GREEDY
    )
    with corrected(), patched_once():
        for policy in sys.argv[1:]:
            tokens = []
            for made in (kernels.TritonKernels(shape, 90, dtype), kernels.ReferenceKernels(shape)):
                engine = executor(made, dtype)
                tokens.append(world.run(Forming(engine), load, policy, max_running=4))
                assert isinstance(engine.accelerator, StubDevice)
                assert "mask" in {name for name, *_ in engine.accelerator.log}
                print(policy, "faults", engine.accelerator.faults)
            print(policy, "same", tokens[0] == tokens[1], tokens)


if __name__ == "__main__":
    main()
