"""The engine of Drift: model runner, shared KV, executors and the engine process.

Importing this package does not import torch: a process has to say how OpenMP waits before torch loads (see
`drift_kernels.process`). The names below are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drift_core.engine import EngineConfig as EngineConfig
    from drift_core.llm import LLM as LLM
    from drift_core.llm import RequestOutput as RequestOutput
    from drift_core.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "drift_core.llm",
    "EngineConfig": "drift_core.engine",
    "RequestOutput": "drift_core.llm",
    "SamplingParams": "drift_core.sampling_params",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'drift_core' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
