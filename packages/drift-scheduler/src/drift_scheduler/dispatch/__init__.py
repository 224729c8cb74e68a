"""Built-in dispatch policies, one readable file each; registered by name in `FACTORIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drift_scheduler.dispatch.chunked_prefill import ChunkedPrefill
from drift_scheduler.dispatch.drift import DriftPolicy
from drift_scheduler.dispatch.exclusive import Alternate, DecodeFirst, PrefillFirst
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.dispatch.temporal import Temporal

FACTORIES: dict[str, Callable[..., Any]] = {
    "drift": DriftPolicy,
    "gang": GangPolicy,
    "chunked-prefill": ChunkedPrefill,
    "alternate": Alternate,
    "prefill-first": PrefillFirst,
    "decode-first": DecodeFirst,
    "temporal": Temporal,
}
