"""What a GPU is expected to do, for serving without a profile: its data file, or what its properties come to.

Right to within tens of percent at best; `drift profile` measures. Knows nothing of models.
"""

from __future__ import annotations

import logging
import re
from itertools import pairwise
from typing import Any

import msgspec

from drift_core.cuda.device import Accelerator
from drift_scheduler.cost.hardware import DeviceSpec, device_spec, installed

log = logging.getLogger("drift.engine")

_KIN = {80: "a100-80gb", 89: "l40s", 90: "h100", 100: "h200", 120: "rtx5090"}
"""Whose shares and fixed times stand in, by compute capability."""

_FLOPS_PER_CLOCK = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
"""Dense 16-bit operations with fp32 sums of one multiprocessor in one cycle, by the vendor's white papers: its
datasheet rates over multiprocessors and boost clock (A100 312, RTX 4090 165, H100 989 TFLOP/s)."""


def described(accelerator: Accelerator) -> DeviceSpec:
    """The data file of this device's name, for as many units as it has; else what its properties come to."""
    properties: Any = getattr(accelerator, "properties", None)
    found = named(accelerator.name)
    if found is not None:
        spec = device_spec(found)
        log.info("costs: no profile; estimated by the data of %s for %s", found, accelerator.name)
    else:
        spec = derived(properties)
        log.warning(
            "costs: no profile and no data on %s; derived from %d multiprocessors, %.0f TFLOP/s and %.0f GB/s, which "
            "may be far off: run `drift profile`",
            accelerator.name, accelerator.units, spec.tflops, spec.bandwidth_gb_s,
        )  # fmt: skip
    if spec.units != accelerator.units:  # a MIG instance, or fewer multiprocessors than the full chip
        share = accelerator.units / spec.units
        spec = msgspec.structs.replace(spec, units=accelerator.units, tflops=spec.tflops * share)
    return spec


def named(name: str) -> str | None:
    """The data file that a driver's device name stands for: every word of the file's name is a word of it."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    known = {*words, *(first + second for first, second in pairwise(words))}
    fitting = [spec for spec in installed("devices") if known.issuperset(spec.split("-"))]
    return max(fitting, key=len, default=None)


def derived(properties: Any) -> DeviceSpec:
    """A description from what the driver says; rates of a kindred device where it does not say."""
    capability = 10 * getattr(properties, "major", 9) + getattr(properties, "minor", 0)
    kin = device_spec(_KIN[_nearest(capability, _KIN)])
    units = int(getattr(properties, "multi_processor_count", kin.units))
    clock = float(getattr(properties, "clock_rate", 0)) * 1e3  # the driver says kHz
    memory_clock = float(getattr(properties, "memory_clock_rate", 0)) * 1e3
    bus_bytes = float(getattr(properties, "memory_bus_width", 0)) / 8
    flops = units * clock * _FLOPS_PER_CLOCK[_nearest(capability, _FLOPS_PER_CLOCK)]
    return msgspec.structs.replace(
        kin,
        name=str(getattr(properties, "name", "GPU")),
        units=units,
        memory_gb=float(getattr(properties, "total_memory", 0)) / 1e9 or kin.memory_gb,
        tflops=flops / 1e12 or kin.tflops * units / kin.units,
        bandwidth_gb_s=2 * memory_clock * bus_bytes / 1e9 or kin.bandwidth_gb_s,  # two transfers a cycle
    )


def _nearest(capability: int, table: dict[int, Any]) -> int:
    """The latest architecture of the table that is no later, or its first."""
    return max((known for known in table if known <= capability), default=min(table))
