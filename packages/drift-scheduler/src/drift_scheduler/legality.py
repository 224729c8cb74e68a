"""What makes a gang, and a split, legal: the rules every policy is held to before anything is applied."""

from __future__ import annotations

from drift_scheduler.domain import (
    DecodeStep,
    Device,
    Gang,
    Partition,
    PrefillBatch,
    PrefillBlock,
    PrefillShape,
    Sharing,
)
from drift_scheduler.protocols import CostModel, PartitionPolicy
from drift_scheduler.view import View


class IllegalGangError(Exception):
    """A proposal that breaks a rule; the message names it. Never leaves the scheduler: the fallback takes over."""


class PartitionFaultError(Exception):
    """What a partition policy did wrong; the message names it, whichever dispatch policy had asked."""


class CheckedPartitions:
    """A partition policy whose faults are told as its own."""

    def __init__(self, policy: PartitionPolicy) -> None:
        self._policy = policy

    def split(self, view: View, prefill: PrefillShape, decode: DecodeStep, costs: CostModel) -> Partition:
        """The policy's. Raises PartitionFaultError; IllegalGangError where the device has no split to choose."""
        splits = view.device.splits()
        if not splits:
            raise IllegalGangError("a split of a device that has none")
        try:
            partition = self._policy.split(view, prefill, decode, costs)
        except Exception as error:  # a third party's policy may raise anything
            raise PartitionFaultError(f"{self._name} raised {type(error).__name__}: {error}") from error
        if partition not in splits:
            menu = ", ".join(str(p) for p in splits)
            raise PartitionFaultError(
                f"{self._name} chose partition {partition} off the menu of splits ({menu})"
            )
        return partition

    @property
    def _name(self) -> str:
        return type(self._policy).__name__


def menu_fault(device: Device) -> str | None:
    """Why nothing could be served by this menu; `None` where all is well.

    Where nothing decodes a prefill takes the whole device, and the other way round, but on a cluster laid out for some
    system, whose lanes have accelerators of their own.
    """
    for partition in device.menu:
        least, units = min(partition.prefill, partition.decode), partition.prefill + partition.decode
        if least < 0 or not 0 < units <= device.total_units:
            return f"{partition} units of {device.total_units}"
    for whole in () if device.system else (device.all_prefill, device.all_decode):
        if whole not in device.menu:
            return f"lacks {whole}, the whole device for one lane"
    return None


def check_gang(view: View, gang: Gang) -> None:
    """Raise IllegalGangError unless the gang may run now.

    Rules: a sharing the device runs; a partition on its menu, matched to the work; no lane given work while busy; no
    partition change under a busy lane; one-at-a-time sharings only on an idle device; a decode step over decoding
    requests; a prefill block that continues its batch, or opens one from waiting requests.
    """
    if gang.prefill is None and gang.decode is None:
        raise IllegalGangError("a gang without work")
    if gang.sharing not in view.device.sharings:
        names = ", ".join(sorted(s.value for s in view.device.sharings))
        raise IllegalGangError(f"sharing {gang.sharing.value} on a device that runs {names}")
    _check_partition(view, gang)
    _check_lanes(view, gang)
    if gang.decode is not None:
        _check_decode(view, gang.decode)
    if gang.prefill is not None:
        _check_prefill(view, gang.prefill, whole=gang.sharing is Sharing.FUSED)


def _check_partition(view: View, gang: Gang) -> None:
    partition, device = gang.partition, view.device
    if gang.sharing is Sharing.STREAMS:
        if partition != device.unpartitioned:
            raise IllegalGangError(f"streams gang on partition {partition} instead of {device.unpartitioned}")
        return
    if partition not in device.menu:
        menu = ", ".join(str(p) for p in device.menu)
        raise IllegalGangError(f"partition {partition} off the menu ({menu})")
    whole = (device.all_prefill, device.all_decode)
    match gang.sharing:
        case Sharing.SPATIAL:
            if partition in whole:
                raise IllegalGangError(f"spatial gang on partition {partition}, which leaves a lane nothing")
        case Sharing.EXCLUSIVE:
            if gang.prefill is not None and gang.decode is not None:
                raise IllegalGangError("exclusive gang with work for both lanes")
            want = device.all_prefill if gang.prefill is not None else device.all_decode
            if partition != want:
                raise IllegalGangError(f"exclusive gang on partition {partition} instead of {want}")
        case Sharing.TEMPORAL | Sharing.FUSED:
            if partition not in whole:
                raise IllegalGangError(
                    f"{gang.sharing.value} gang on partition {partition}, not the whole device"
                )
            if gang.prefill is None or gang.decode is None:
                raise IllegalGangError(f"{gang.sharing.value} gang needs work of both phases")


def _check_lanes(view: View, gang: Gang) -> None:
    if gang.prefill is not None and view.prefill_lane.busy:
        raise IllegalGangError("prefill for a busy prefill lane")
    if gang.decode is not None and view.decode_lane.busy:
        raise IllegalGangError("decode for a busy decode lane")
    if not (view.prefill_lane.busy or view.decode_lane.busy):
        _check_alone(view, gang)
        return
    if gang.sharing is not view.sharing or gang.sharing not in (Sharing.SPATIAL, Sharing.STREAMS):
        raise IllegalGangError(f"{gang.sharing.value} gang beside a busy lane")
    if gang.partition != view.partition and not view.device.repartition_while_busy:
        raise IllegalGangError(f"partition {gang.partition} under a lane busy on {view.partition}")


def _check_alone(view: View, gang: Gang) -> None:
    """Slicing without a decode beside it only costs launches: a prefill alone is one block on the whole device.

    Not so where no partition is set, or where a lane's units are accelerators of its own.
    """
    block = gang.prefill
    if block is None or gang.decode is not None or gang.sharing is Sharing.STREAMS or view.device.system:
        return
    if gang.sharing is not Sharing.EXCLUSIVE or block.layer_stop != view.device.num_layers:
        raise IllegalGangError("a prefill with decode idle that is not one block on the whole device")


def _check_decode(view: View, step: DecodeStep) -> None:
    available = view.decode_step()
    if available is None:
        raise IllegalGangError("a decode step with nothing to decode")
    if step is available or step.request_ids == available.request_ids:
        return
    if not step.request_ids or not set(step.request_ids) <= set(available.request_ids):
        raise IllegalGangError("a decode step over requests that are not decoding")
    raise IllegalGangError("a decode step that leaves decoding requests out")


def _check_prefill(view: View, block: PrefillBlock, *, whole: bool) -> None:
    layers = view.device.num_layers
    if not 0 <= block.layer_start < block.layer_stop <= layers:
        raise IllegalGangError(f"layers [{block.layer_start}, {block.layer_stop}) of {layers}")
    if whole and block.layers != layers:
        raise IllegalGangError("a fused block over part of the layers")
    if block.batch_id >= 0:
        _check_continues(view.prefills, block)
        return
    if len(view.prefills) >= 2:
        raise IllegalGangError("a third prefill batch: preemption at a layer boundary does not recurse")
    if block.layer_start != 0:
        raise IllegalGangError(f"a new prefill batch that starts at layer {block.layer_start}")
    _check_chunks(view, block)


def _check_continues(batches: tuple[PrefillBatch, ...], block: PrefillBlock) -> None:
    if not batches:
        raise IllegalGangError(f"no prefill batch {block.batch_id} under way")
    for batch in batches:
        if batch.batch_id == block.batch_id:
            if block.layer_start != batch.next_layer:
                raise IllegalGangError(
                    f"batch {batch.batch_id} continues at layer {batch.next_layer}, not {block.layer_start}"
                )
            if block.chunks != batch.chunks:
                raise IllegalGangError(f"batch {batch.batch_id} with other chunks than it started with")
            return
    raise IllegalGangError(f"no prefill batch {block.batch_id} under way")


def _check_chunks(view: View, block: PrefillBlock) -> None:
    if not block.chunks:
        raise IllegalGangError("a prefill batch without requests")
    waiting = {w.request.id: w for w in view.find_waiting([c.request_id for c in block.chunks])}
    seen: set[str] = set()
    for chunk in block.chunks:
        known = waiting.get(chunk.request_id)
        if known is None or chunk.request_id in seen:
            raise IllegalGangError(f"request '{chunk.request_id}' is not waiting for prefill")
        seen.add(chunk.request_id)
        if chunk.start != known.computed or not chunk.start < chunk.stop <= known.total:
            raise IllegalGangError(
                f"positions [{chunk.start}, {chunk.stop}) of '{chunk.request_id}', "
                f"which has {known.computed} of {known.total}"
            )
        if chunk.last != (chunk.stop == known.total):
            raise IllegalGangError(
                f"chunk of '{chunk.request_id}' wrongly marked {'last' if chunk.last else 'not last'}"
            )
