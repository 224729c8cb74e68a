"""Elastic sequence parallelism (LoongServe, arXiv 2404.09526), simulated only.

A cluster is a row of equal tensor-parallel instances, each with a copy of the weights. Every iteration prefill and
decode get some of them: a long prompt is spread over many, decode keeps the fewest that meet its target. Assumptions:

* A batch divides evenly over its instances and the ring hides behind compute (see `SequenceGroups`); fixed times and
  reading the weights do not shrink. Instances do not slow each other down.
* KV fits wherever there is room, as pages of one pool over all instances (the paper's token granularity); what a
  prefill computed reaches the instances that decode at no cost (its proactive retention), and nothing else moves.
* Instances change hands between iterations only, so a prompt that began on few stays there; it takes all of them when
  nothing decodes. The paper's preemption of decode by a prefill that would gain more is left out.
* Requests do not share KV: no prefix cache, every prompt is computed whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drift_scheduler.dispatch.streams import whole_block
from drift_scheduler.domain import DecodeStep, Device, Gang, Partition, Sharing
from drift_scheduler.errors import OptionError, positive
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View

if TYPE_CHECKING:
    from drift_scheduler.simulation.cluster import Setting

SYSTEM = "loongserve"


class LoongServe:
    """`tensor`: accelerators of an instance; 0 for the fewest, at least 2, of which the weights fill at most half.
    `max_batch_tokens`: most tokens of one prefill, one longer prompt excepted."""

    def __init__(self, tensor: int = 0, max_batch_tokens: int = 8192) -> None:
        self._tensor = positive("tensor", tensor + 1) - 1
        self._max_tokens = positive("max_batch_tokens", max_batch_tokens)

    def refuses(self, device: Device) -> str | None:
        """Anything but a cluster laid out for it."""
        from drift_scheduler.simulation.cluster import only_on

        return only_on(SYSTEM, device)

    def arrange(self, setting: Setting) -> Setting:
        """Instances as units to divide. Raises OptionError, and DriftError where the weights do not fit an instance."""
        from dataclasses import replace

        from drift_scheduler.simulation.cluster import PrivateKv, SequenceGroups

        count, tensor = setting.spec.count, self._instance(setting)
        splits = tuple(Partition(count - d, d) for d in range(tensor, count, tensor))
        device = Device(
            total_units=count,
            menu=(Partition(count, 0), *splits, Partition(0, count)),
            num_layers=setting.model.num_layers,
            sharings=frozenset({Sharing.SPATIAL, Sharing.EXCLUSIVE}),
            name=f"{setting.spec.label} as {count // tensor} instances of {tensor} (simulated)",
            system=SYSTEM,
        )
        return replace(
            setting,
            device=device,
            costs=SequenceGroups(setting.costs, setting.spec, setting.model, tensor),
            truth=SequenceGroups(setting.truth, setting.spec, setting.model, tensor),
            kv=PrivateKv(setting.group_pages(tensor, copies=count // tensor), setting.page_tokens),
        )

    def _instance(self, setting: Setting) -> int:
        from drift_scheduler.simulation.cluster import need_accelerators

        spec, tensor = setting.spec, self._tensor
        if not tensor:
            tensor = 2
            while 2 * setting.model.weight_bytes > tensor * spec.memory_gb * 1e9:
                tensor *= 2
        need_accelerators(SYSTEM, spec, 2 * tensor)
        if spec.count % tensor:
            raise OptionError(f"option 'tensor' is {tensor}, does not divide {spec.count} accelerators")
        return tensor

    def choose(self, view: View, costs: CostModel, partitions: PartitionPolicy) -> Gang | None:
        """Work for idle instances, under the division in force while either phase runs."""
        if view.prefill_lane.busy or view.decode_lane.busy:
            return self._beside(view)
        block, step = whole_block(view, self._max_tokens), view.decode_step()
        if step is None:
            if block is None:
                return None
            return Gang(Sharing.EXCLUSIVE, view.device.all_prefill, prefill=block)
        split = _fewest(view, costs, step)
        if split is None:
            if block is None:
                return Gang(Sharing.EXCLUSIVE, view.device.all_decode, decode=step)
            split = view.device.splits()[-1]
        return Gang(Sharing.SPATIAL, split, prefill=block, decode=step)

    def _beside(self, view: View) -> Gang | None:
        current = view.partition
        if view.sharing is not Sharing.SPATIAL or current is None:
            return None
        block = None if view.prefill_lane.busy else whole_block(view, self._max_tokens)
        step = view.decode_step()
        if block is None and step is None:
            return None
        return Gang(Sharing.SPATIAL, current, prefill=block, decode=step)


def _fewest(view: View, costs: CostModel, step: DecodeStep) -> Partition | None:
    """The division with the fewest accelerators for decode that meets its target; `None` when none does."""
    for split in view.device.splits():
        if costs.decode(step.shape(), split.decode) <= view.tbt_target:
            return split
    return None
