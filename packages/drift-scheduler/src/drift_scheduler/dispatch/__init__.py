"""Built-in dispatch policies, one readable file each; registered by name in `FACTORIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drift_scheduler.dispatch.chunked_prefill import ChunkedPrefill
from drift_scheduler.dispatch.drift import DriftPolicy
from drift_scheduler.dispatch.exclusive import Alternate, DecodeFirst, PrefillFirst
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.dispatch.loongserve import LoongServe
from drift_scheduler.dispatch.nanoflow import NanoFlow
from drift_scheduler.dispatch.pd_disaggregated import PdDisaggregated
from drift_scheduler.dispatch.streams import Streams
from drift_scheduler.dispatch.temporal import Temporal

FACTORIES: dict[str, Callable[..., Any]] = {
    "drift": DriftPolicy,
    "gang": GangPolicy,
    "chunked-prefill": ChunkedPrefill,
    "alternate": Alternate,
    "prefill-first": PrefillFirst,
    "decode-first": DecodeFirst,
    "temporal": Temporal,
    "streams": Streams,
    "pd-disaggregated": PdDisaggregated,
    "nanoflow": NanoFlow,
    "loongserve": LoongServe,
}

CLUSTER_ONLY = frozenset({"pd-disaggregated", "nanoflow", "loongserve"})
"""Other systems, simulated on clusters laid out their way; they refuse every other device."""
