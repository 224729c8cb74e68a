"""What machine this is: device, driver, versions, clocks, and what green contexts it offers."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gpu_parts.findings import Findings, Options

ESTIMATE = (10.0, 10.0)
PACKAGES = (
    "torch",
    "triton",
    "cuda-bindings",
    "transformers",
    "numpy",
    "pluggy",
    "grpcio",
    "msgspec",
    "nvidia-ml-py",
)


def run(options: Options) -> Findings:
    """Never skipped: a machine without a device has facts too."""
    found = Findings()
    found.data["python"] = platform.python_version()
    found.data["system"] = platform.platform()
    found.data["cores"] = os.cpu_count()
    found.data["versions"] = {name: _version(name) for name in PACKAGES}
    import torch

    if not torch.cuda.is_available():
        found.data["device"] = None
        found.lines.append("no CUDA device")
        return found
    found.attempt("device", lambda: _device(torch))
    found.attempt("driver", _driver)
    found.attempt("green contexts", _green)
    found.attempt("state", _state)
    device = found.data["device"]
    if isinstance(device, dict) and "name" in device:
        found.lines.append(
            f"{device['name']}, {device['multiprocessors']} SMs, {device['memory_gib']:.0f} GiB"
        )
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device(torch: Any) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        "cuda_of_torch": torch.version.cuda,
    }


def _driver() -> dict[str, Any]:
    from drift_kernels.driver import Driver, version_text

    driver = Driver()
    driver.initialize()
    return {
        "cuda": version_text(driver.version()),
        "structured_split": driver.has_structured_split,
        "work_queues": driver.has_workqueues,
    }


def _green() -> dict[str, Any]:
    from drift_kernels.green_contexts import GreenContexts

    with GreenContexts() as made:
        return {"description": made.description, "menu": made.menu(), "notes": made.notes}


def _state() -> dict[str, Any]:
    from drift_kernels.nvml import Sampler

    with Sampler() as sampler:
        pass
    return sampler.summary().as_dict()
