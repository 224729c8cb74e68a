"""An engine in this process, from its configuration: what `LLM` and the engine process begin with."""

from __future__ import annotations

import logging

from drift_core.engine import Engine, EngineConfig, Progress
from drift_kernels.process import prepare_process

log = logging.getLogger("drift.engine")


def start_engine(config: EngineConfig, progress: Progress = lambda phase, fraction: None) -> Engine:
    """Load the model, allocate the KV pool, profile, warm up. Raises DriftError on whatever is wrong."""
    warning = prepare_process()  # before torch loads, which the next line may bring
    if warning is not None:
        log.warning(warning)
    from drift_core.composition import assemble

    return assemble(config, progress)
