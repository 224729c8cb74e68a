"""Overlap inside one device by nano-batches (NanoFlow, arXiv 2408.12757), simulated only.

Chunked prefill's fused steps under the same token budget, each split into nano-batches so that products, reading
memory and all-reduces of different nano-batches overlap. Assumptions:

* A fused pass takes the longest of its overlapped parts (rounded off where two are close) instead of their sum; weights
  are read and kernels launched once per nano-batch. By the roofline's parts, applied as a ratio to whatever cost model
  prices the plain pass, so that a measured table still anchors it. Decode and prefill alone gain nothing.
* Requests do not share KV: no prefix cache, every prompt is computed whole.
* What the paper adds beside (offloading KV, asynchronous batch forming) is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drift_scheduler.dispatch.chunked_prefill import ChunkedPrefill
from drift_scheduler.domain import Device, Gang, Sharing
from drift_scheduler.errors import positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View

if TYPE_CHECKING:
    from drift_scheduler.simulation.cluster import Setting

SYSTEM = "nanoflow"


class NanoFlow:
    """`token_budget`: tokens of one fused step. `nano_batches`: how many it is split into. `max_batch_tokens`: of a
    prefill while nothing decodes."""

    def __init__(self, token_budget: int = 512, nano_batches: int = 2, max_batch_tokens: int = 8192) -> None:
        self._passes = positive("nano_batches", nano_batches)
        self._chunked = ChunkedPrefill(token_budget, max_batch_tokens)

    def refuses(self, device: Device) -> str | None:
        """Anything but a simulated device laid out for it."""
        from drift_scheduler.simulation.cluster import only_on

        return only_on(SYSTEM, device)

    def arrange(self, setting: Setting) -> Setting:
        """The same accelerators with overlapping fused passes and a pool without prefix reuse."""
        from dataclasses import replace

        from drift_scheduler.simulation.cluster import NanoBatches, PrivateKv

        device = replace(
            setting.device,
            sharings=frozenset({Sharing.FUSED, Sharing.EXCLUSIVE}),
            name=f"{setting.spec.label} with nano-batches (simulated)",
            system=SYSTEM,
        )
        return replace(
            setting,
            device=device,
            costs=NanoBatches(setting.costs, setting.spec, setting.model, self._passes),
            truth=NanoBatches(setting.truth, setting.spec, setting.model, self._passes),
            kv=PrivateKv(setting.kv.total_pages, setting.page_tokens),
        )

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """What chunked prefill would do."""
        return self._chunked.choose(view, costs, partitions)
