"""Attention and model operations of Drift, each beside its torch reference, and the partition launchers.

Importing this package does not import torch: `drift_kernels.process.prepare_process` has to run before torch
loads. The names below are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drift_kernels.inputs import AttentionInputs as AttentionInputs
    from drift_kernels.ops import Ops as Ops
    from drift_kernels.ops import ReferenceOps as ReferenceOps
    from drift_kernels.ops import select_ops as select_ops

__version__ = "0.1.0"

_HOME = {
    "AttentionInputs": "drift_kernels.inputs",
    "Ops": "drift_kernels.ops",
    "ReferenceOps": "drift_kernels.ops",
    "select_ops": "drift_kernels.ops",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'drift_kernels' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
