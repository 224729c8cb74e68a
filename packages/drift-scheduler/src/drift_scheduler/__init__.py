"""Drift's scheduler: pure decisions about who runs where and when, and a simulator to try them in.

`import drift_scheduler` is light; command line, readers and reports load when used.
"""

from __future__ import annotations

from drift_scheduler.domain import (
    SLO,
    Accepted,
    DecodeDone,
    DecodeStep,
    Device,
    Finished,
    FinishReason,
    Gang,
    Lane,
    LaneFailed,
    Nudged,
    Partition,
    PrefillBlock,
    PrefillChunk,
    PrefillDone,
    Request,
    RequestArrived,
    RequestCancelled,
    RequestTiming,
    Sharing,
    Step,
    StepRecord,
    Tokens,
)
from drift_scheduler.errors import DriftError, OptionError, PluginError, UnknownNameError
from drift_scheduler.loop import serve
from drift_scheduler.scheduler import Limits, Scheduler

__version__ = "0.1.0"

__all__ = [
    "SLO",
    "Accepted",
    "DecodeDone",
    "DecodeStep",
    "Device",
    "DriftError",
    "FinishReason",
    "Finished",
    "Gang",
    "Lane",
    "LaneFailed",
    "Limits",
    "Nudged",
    "OptionError",
    "Partition",
    "PluginError",
    "PrefillBlock",
    "PrefillChunk",
    "PrefillDone",
    "Request",
    "RequestArrived",
    "RequestCancelled",
    "RequestTiming",
    "Scheduler",
    "Sharing",
    "Step",
    "StepRecord",
    "Tokens",
    "UnknownNameError",
    "serve",
]
