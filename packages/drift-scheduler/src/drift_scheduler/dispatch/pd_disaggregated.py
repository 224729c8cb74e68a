"""Prefill and decode on different accelerators (DistServe, arXiv 2401.09670; as SGLang builds it), simulated only.

Some accelerators of a cluster prefill, the others decode, each group tensor parallel with its own copy of the weights
and its own KV pool. Assumptions:

* A group's times are the whole cluster's, scaled by the ratio of the roofline models, so that a measured table anchors
  them. Groups do not slow each other down.
* A request's decode pages are taken before its prefill starts, and its KV moves when its prefill ends: all of the
  prompt, reused prefix included, at `link_gb_s` a pair of accelerators. The prefill group waits for it, which
  overstates the cost (real systems overlap it with the next prompt) by about the transfer's share, under 2% here.
* The first token is the prefill group's. Only the prefill group caches prefixes; a preempted request starts over there.
* The groups never change, however the load does: the weakness that multiplexing is set against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drift_scheduler.dispatch.streams import both_lanes
from drift_scheduler.domain import Device, Gang, Partition, Sharing
from drift_scheduler.errors import OptionError, positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View

if TYPE_CHECKING:
    from drift_scheduler.simulation.cluster import Setting

SYSTEM = "pd-disaggregated"


class PdDisaggregated:
    """`decode_accelerators`: how many decode; 0 for half. `link_gb_s`: of one accelerator to its peer in the other
    group, gigabytes a second. `max_batch_tokens`: most uncomputed tokens of one prefill, one longer prompt excepted."""

    def __init__(
        self, decode_accelerators: int = 0, link_gb_s: float = 200.0, max_batch_tokens: int = 8192
    ) -> None:
        self._decode = positive("decode_accelerators", decode_accelerators + 1) - 1
        if not 0 < link_gb_s < 1e6:
            raise OptionError(f"option 'link_gb_s' is {link_gb_s!r}, need a number above 0")
        self._link = link_gb_s
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)

    def refuses(self, device: Device) -> str | None:
        """Anything but a cluster laid out for it."""
        from drift_scheduler.simulation.cluster import only_on

        return only_on(SYSTEM, device)

    def arrange(self, setting: Setting) -> Setting:
        """Two groups of accelerators. Raises OptionError, and DriftError where the weights do not fit a group."""
        from dataclasses import replace

        from drift_scheduler.simulation.cluster import SplitKv, TensorGroups, need_accelerators

        need_accelerators(SYSTEM, setting.spec, 2)
        decode = self._decode or setting.spec.count // 2
        prefill = setting.spec.count - decode
        if prefill < 1:
            raise OptionError(
                f"option 'decode_accelerators' is {decode}, leaves none of {setting.spec.count} to prefill"
            )
        transfer = setting.model.kv_bytes / (self._link * 1e9 * min(prefill, decode))
        device = Device(
            total_units=setting.spec.count,
            menu=(Partition(prefill, decode),),
            num_layers=setting.model.num_layers,
            sharings=frozenset({Sharing.SPATIAL}),
            name=f"{setting.spec.label} as {prefill} to prefill and {decode} to decode (simulated)",
            system=SYSTEM,
        )
        kv = SplitKv(setting.group_pages(prefill), setting.group_pages(decode), setting.page_tokens)
        smaller = min(kv.prefill_side.total_pages, kv.decode_side.total_pages)
        return replace(
            setting,
            device=device,
            costs=TensorGroups(setting.costs, setting.spec, setting.model, transfer),
            truth=TensorGroups(setting.truth, setting.spec, setting.model, transfer),
            kv=kv,
            max_context=min(setting.max_context, smaller * setting.page_tokens),
        )

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """Whatever an idle group has work for."""
        return both_lanes(view, Sharing.SPATIAL, view.device.splits()[0], self._max_tokens)
