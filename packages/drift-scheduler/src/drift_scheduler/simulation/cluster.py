"""Simulated clusters laid out as other systems lay them out: what those baselines need beyond a device of our own.

A dispatch policy with `arrange(setting)` gets the setting of a simulation before it starts and returns it changed:
another device (its `system` names the layout), cost models that price its groups of accelerators, a KV pool of
its own kind. Nothing here runs on hardware, and nothing here decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from drift_scheduler.cost.hardware import DeviceSpec, ModelSpec, kv_tokens
from drift_scheduler.cost.roofline import RooflineCost
from drift_scheduler.domain import (
    DecodeShape,
    Device,
    Observation,
    Partition,
    PrefillShape,
    Request,
    Sharing,
)
from drift_scheduler.errors import OptionError
from drift_scheduler.protocols import CostModel, KvPool
from drift_scheduler.simulation.kv import CountingKv


@dataclass(frozen=True, slots=True)
class Setting:
    """What a simulation is about to run on. `costs`: what the scheduler believes, `truth`: what the device does.

    `kv_pages`: pages asked for in all, `None` for what fits.
    """

    spec: DeviceSpec
    model: ModelSpec
    device: Device
    costs: CostModel
    truth: CostModel
    kv: KvPool
    kv_pages: int | None
    page_tokens: int
    max_context: int

    def group_pages(self, accelerators: int, copies: int = 1) -> int:
        """KV pages of `copies` groups of so many accelerators, each with the weights once. Raises DriftError where
        the weights do not fit a group."""
        group = msgspec.structs.replace(self.spec, count=accelerators)
        if self.kv_pages is None:
            return copies * pages_that_fit(group, self.model, self.page_tokens)
        kv_tokens(group, self.model)  # the weights must fit all the same
        return max(1, self.kv_pages * accelerators * copies // self.spec.count)


def pages_that_fit(spec: DeviceSpec, model: ModelSpec, page_tokens: int) -> int:
    """KV pages beside one copy of the weights. Raises DriftError where these, or a single page, do not fit."""
    tokens = kv_tokens(spec, model)
    if tokens < page_tokens:
        raise OptionError(f"page-tokens is {page_tokens}, more than the {tokens} that fit beside the weights")
    return tokens // page_tokens


def only_on(system: str, device: Device) -> str | None:
    """Why a policy of another system does not run on this device; `None` where it was laid out for it."""
    if device.system == system:
        return None
    return (
        f"dispatch policy '{system}' runs on simulated clusters only (drift simulate --device 8xa100-80gb ...), "
        f"not on {device.name}"
    )


def need_accelerators(system: str, spec: DeviceSpec, least: int) -> None:
    """Raise OptionError on a device of too few accelerators."""
    if spec.count < least:
        raise OptionError(
            f"dispatch policy '{system}' needs a cluster of at least {least} accelerators; "
            f"'{spec.label}' has {spec.count}: use --device Nx{spec.name}"
        )


class TensorGroups:
    """Implements `CostModel` for groups of whole accelerators, tensor parallel inside each; units are accelerators.

    A group's time is `inner`'s (of all of them, whole) times the ratio of the two roofline models, so that a measured
    table still anchors it. Groups share no memory: no contention. `transfer`: seconds per prompt token, the
    reused ones included, to hand KV to the other group at the end of a prefill.
    """

    def __init__(self, inner: CostModel, spec: DeviceSpec, model: ModelSpec, transfer: float = 0.0) -> None:
        self._costs = inner
        self._spec = spec
        self._model = model
        self._whole = RooflineCost(spec, model)
        self._transfer = transfer
        self._groups: dict[int, RooflineCost] = {}

    def prefill(self, work: PrefillShape, units: int) -> float:
        """Seconds on a group, its transfer included."""
        all_units = self._spec.units
        ratio = self._group(units).prefill(work, all_units) / self._whole.prefill(work, all_units)
        moved = self._transfer * (work.new_tokens + work.reused_tokens)
        return self._costs.prefill(work, all_units) * ratio + moved

    def decode(self, work: DecodeShape, units: int) -> float:
        """Seconds for a step on a group."""
        all_units = self._spec.units
        ratio = self._group(units).decode(work, all_units) / self._whole.decode(work, all_units)
        return self._costs.decode(work, all_units) * ratio

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """Seconds for a mixed pass on a group; no built-in layout runs one."""
        all_units = self._spec.units
        group = self._group(units).fused(prefill, decode, all_units)
        return (
            self._costs.fused(prefill, decode, all_units)
            * group
            / self._whole.fused(prefill, decode, all_units)
        )

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """None: groups share nothing."""
        return 1.0, 1.0

    def observe(self, observation: Observation) -> None:
        """Does not learn."""

    def _group(self, accelerators: int) -> RooflineCost:
        group = self._groups.get(accelerators)
        if group is None:
            spec = msgspec.structs.replace(self._spec, count=accelerators)
            group = self._groups[accelerators] = RooflineCost(spec, self._model)
        return group


class SequenceGroups:
    """Implements `CostModel` for instances of `tensor` accelerators that share long sequences; units are accelerators.

    A batch's tokens, its attention and a decode step's KV divide evenly over the instances, and passing KV round the
    ring hides behind compute; the weights are read, and fixed times paid, by every instance.
    """

    def __init__(self, inner: CostModel, spec: DeviceSpec, model: ModelSpec, tensor: int) -> None:
        self._instance = TensorGroups(inner, spec, model)
        self._tensor = tensor

    def prefill(self, work: PrefillShape, units: int) -> float:
        """Seconds on `units` accelerators."""
        k = units // self._tensor
        share = PrefillShape(
            work.requests,
            -(-work.new_tokens // k),
            work.reused_tokens // k,
            work.new_squared // k,
            work.new_times_reused // k,
        )
        return self._instance.prefill(share, self._tensor)

    def decode(self, work: DecodeShape, units: int) -> float:
        """Seconds for a step on `units` accelerators."""
        k = units // self._tensor
        return self._instance.decode(DecodeShape(-(-work.batch // k), work.context_tokens // k), self._tensor)

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """One after the other: this layout has no mixed pass."""
        return self.prefill(prefill, units) + self.decode(decode, units)

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """None: instances share nothing."""
        return 1.0, 1.0

    def observe(self, observation: Observation) -> None:
        """Does not learn."""


class NanoBatches:
    """Implements `CostModel` with mixed passes split into `passes` overlapping nano-batches; the rest is `inner`'s.

    The pass costs `inner`'s time times the ratio of the roofline's nano-batched and plain pass.
    """

    def __init__(self, inner: CostModel, spec: DeviceSpec, model: ModelSpec, passes: int) -> None:
        self.inner = inner
        self._roofline = RooflineCost(spec, model)
        self._passes = passes

    def prefill(self, work: PrefillShape, units: int) -> float:
        """The inner model's."""
        return self.inner.prefill(work, units)

    def decode(self, work: DecodeShape, units: int) -> float:
        """The inner model's."""
        return self.inner.decode(work, units)

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """Seconds for one pass of overlapping nano-batches."""
        plain = self._roofline.fused(prefill, decode, units)
        nano = self._roofline.nano_batched(prefill, decode, units, self._passes)
        return self.inner.fused(prefill, decode, units) * nano / plain

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """The inner model's."""
        return self.inner.slowdown(prefill, decode, partition)

    def observe(self, observation: Observation) -> None:
        """The inner model learns from everything but mixed passes."""
        if observation.sharing is not Sharing.FUSED:
            self.inner.observe(observation)


class PrivateKv(CountingKv):
    """A counting pool whose pages no other request ever reuses: a system without a prefix cache."""

    def lookup(self, request: Request, known_tokens: int) -> int:
        """Nothing is cached."""
        return 0

    def _keys(self, request: Request) -> tuple[tuple[()], int]:
        return (), 1


class SplitKv:
    """Implements `KvPool` as two pools: prompts are computed in one with a prefix cache, decoded from another without.

    A request takes pages in both at once, as its decode side is allocated before the transfer; when its prompt is
    complete the prefill side lets go of it, and what it published there stays cached.
    """

    def __init__(self, prefill_pages: int, decode_pages: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.prefill_side = CountingKv(prefill_pages, page_tokens)
        self.decode_side = PrivateKv(decode_pages, page_tokens)
        self._prompts: dict[str, int] = {}  # requests on the prefill side: the tokens to compute there

    @property
    def total_pages(self) -> int:
        """Of both pools."""
        return self.prefill_side.total_pages + self.decode_side.total_pages

    @property
    def free_pages(self) -> int:
        """Of both pools."""
        return self.prefill_side.free_pages + self.decode_side.free_pages

    def lookup(self, request: Request, known_tokens: int) -> int:
        """Cached positions on the prefill side."""
        return self.prefill_side.lookup(request, known_tokens)

    def admit(self, request: Request, known_tokens: int, reserve_tokens: int) -> int | None:
        """Pages on both sides, or `None`; the decode side keeps a page for each request that decodes."""
        fresh = -(-reserve_tokens // self.page_tokens)
        if fresh > self.decode_side.free_pages:
            return None
        cached = self.prefill_side.admit(request, known_tokens, known_tokens)
        if cached is None:
            return None
        taken = self.decode_side.admit(request, known_tokens, reserve_tokens)
        assert taken is not None, "pages that were there"
        self._prompts[request.id] = known_tokens
        return cached

    def extend(self, request_id: str, tokens: int) -> bool:
        """Cover `tokens` positions on the decode side."""
        return self.decode_side.extend(request_id, tokens)

    def commit(self, request_id: str, tokens: int) -> None:
        """Publish on the prefill side; a complete prompt leaves it."""
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return
        self.prefill_side.commit(request_id, min(tokens, prompt))
        if tokens >= prompt:
            del self._prompts[request_id]
            self.prefill_side.release(request_id)

    def release(self, request_id: str) -> None:
        """Drop the request on whichever sides hold it."""
        if self._prompts.pop(request_id, None) is not None:
            self.prefill_side.release(request_id)
        self.decode_side.release(request_id)
