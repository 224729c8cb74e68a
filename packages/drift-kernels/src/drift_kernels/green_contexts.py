"""The partition mechanism of an NVIDIA GPU: disjoint sets of SMs for the prefill and the decode lane.

Every entry of the menu comes from one split by the driver that yields both lanes, since two separate splits may
overlap. Each lane gets a green context and one stream in it; a kernel launched on the stream runs on the lane's SMs.
Everything is created at start-up, so that a change of partition is a choice of streams. Memory, caches, power and
clocks stay shared. Knows nothing of what the lanes run, and creates no CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drift_kernels.driver import (
    GREEN_CONTEXTS_SINCE,
    INSTALL_DRIVER,
    INVALID_RESOURCE_CONFIGURATION,
    INVALID_RESOURCE_TYPE,
    NOT_SUPPORTED,
    CudaError,
    Driver,
    Resource,
    SmGroup,
    SmResource,
    version_text,
)
from drift_kernels.streams_only import (
    Handles,
    Owned,
    Partition,
    PartitionUnavailable,
    StreamsOnly,
    as_handle,
    as_torch,
    raise_first,
    raise_unavailable,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["Granularity", "GreenContexts", "PartitionUnavailable", "default_menu", "granularity"]

MOST_SPLITS = 8
"""Splits of a default menu: a pair of contexts takes about 4 MB, and CUDA graphs are captured for each."""

_REFUSALS = (NOT_SUPPORTED, INVALID_RESOURCE_TYPE, INVALID_RESOURCE_CONFIGURATION)
_STREAMS_PER_LANE = 1
_DEFAULT_CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class Granularity:
    """A lane has at least `minimum` SMs; the decode lane's number of SMs is a multiple of `step`."""

    minimum: int
    step: int

    def round_up(self, units: int) -> int:
        """The smallest part of at least `units` SMs."""
        return max(self.minimum, -(-units // self.step) * self.step)


@dataclass(frozen=True, slots=True)
class _Lanes:
    realised: Partition
    streams: Handles


class GreenContexts:
    """The splits of one GPU, each with a stream for both lanes. Raises PartitionUnavailable where that cannot be.

    units: SMs in all. notes: a line for each thing that is not as asked: a split granted otherwise, merged with
    another or refused, and queues that could not be balanced.
    """

    def __init__(
        self,
        device_index: int = 0,
        *,
        driver: Driver | None = None,
        relax_coscheduling: bool = False,
        menu: Sequence[Partition] | None = None,
    ) -> None:
        """device_index: among the visible devices, as torch counts. menu: the (prefill, decode) splits to prepare
        besides those that give one lane everything; None spreads up to MOST_SPLITS evenly.

        relax_coscheduling: parts in steps of 2 SMs, on devices where kernels with thread-block clusters need more
        that lie together; only for kernels without clusters.

        Raises PartitionUnavailable, or ValueError for a menu that does not fit the device.
        """
        self._whole = StreamsOnly(device_index, driver=driver)
        self._owned = Owned()
        self._closed = False
        self._relaxed = relax_coscheduling
        self._notes: list[str] = []
        try:
            self._probe()
            self._lanes, self._asked = self._prepare(menu)
        except BaseException as error:
            self._destroy()
            raise_unavailable(error, self._whole.name)
            raise

    @property
    def units(self) -> int:
        """SMs that this process may use, in all."""
        return self._sms.count

    @property
    def device_index(self) -> int:
        """Among the visible devices, as torch counts."""
        return self._whole.device_index

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as asked, a line each."""
        return tuple(self._notes)

    @property
    def description(self) -> str:
        """One line for logs."""
        how = "a structured split" if self._structured else "a split by count"
        if self._relaxed:
            how += ", co-scheduling relaxed"
        queues = "balanced" if self._workqueue is not None else "shared"
        return (
            f"green contexts on {self.units} SMs of {self._whole.name} "
            f"(compute capability {self.capability[0]}.{self.capability[1]}, driver: CUDA "
            f"{version_text(self._whole.cuda_version)}): {how}, {len(self._lanes)} splits, {queues} work queues"
        )

    def menu(self) -> tuple[Partition, ...]:
        """Splits as the driver granted them, from all SMs for prefill down to all for decode."""
        splits = sorted(self._lanes, key=lambda split: (split[1], -split[0]))
        return ((self.units, 0), *splits, (0, self.units))

    def streams(self, split: Partition) -> Handles:
        """Stream handles of the lanes, None for a lane without SMs.

        split: one of the menu, one that was asked for, or (units, units): both lanes on all SMs. Raises
        ValueError for any other.
        """
        if self._closed:
            raise RuntimeError(f"the green contexts of {self._whole.name} are closed")
        if self._is_whole(split):
            # Of what the process may use: fewer than the device has where MPS gives it a share.
            prefill, decode = (self._whole.units if units else 0 for units in split)
            return self._whole.streams((prefill, decode))
        return self._of(split).streams

    def realised(self, split: Partition) -> Partition:
        """SMs that each lane really got, as its green context says, for a partition as in `streams`."""
        return split if self._is_whole(split) else self._of(split).realised

    def torch_streams(self, split: Partition) -> tuple[Any, Any]:
        """The streams of `streams` as `torch.cuda.ExternalStream`s."""
        return as_torch(self.streams(split), self.device_index)

    def close(self) -> None:
        """Destroy every stream and context; the lanes must be idle. A second call does nothing.

        Raises the first CudaError, after trying everything.
        """
        raise_first(self._destroy())

    def _destroy(self) -> list[Exception]:
        self._closed = True
        return self._owned.destroy() + self._whole.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------- start-up

    def _probe(self) -> None:
        """Whether this driver and device can, and how they divide."""
        driver, whole = self._whole.driver, self._whole
        if whole.cuda_version < GREEN_CONTEXTS_SINCE:
            has = version_text(whole.cuda_version)
            raise PartitionUnavailable(f"the driver has CUDA {has}, green contexts need 12.4", INSTALL_DRIVER)
        self.capability = driver.capability(whole.device)
        self._sms = driver.sm_resource(whole.device)
        grain = granularity(self.capability, self._sms, relaxed=self._relaxed)
        if grain is None:
            raise PartitionUnavailable(
                f"{whole.name} has compute capability {self.capability[0]}.{self.capability[1]}, green contexts "
                "need 6.0",
                "use the mechanism 'streams'",
            )
        self._grain = grain
        self._structured = driver.has_structured_split
        self._workqueue = self._balanced_queues()

    def _balanced_queues(self) -> Resource | None:
        if not self._whole.driver.has_workqueues:
            self._notes.append(
                "work queues are shared by the lanes: balanced ones need driver and bindings of 13.1"
            )
            return None
        try:
            return self._whole.driver.balanced_workqueue(self._whole.device, _STREAMS_PER_LANE)
        except CudaError as error:
            if error.code not in _REFUSALS:
                raise
            self._notes.append(f"work queues are shared by the lanes: {error}")
            return None

    def _prepare(
        self, menu: Sequence[Partition] | None
    ) -> tuple[dict[Partition, _Lanes], dict[Partition, Partition]]:
        """Lanes by what was granted, and what was granted by what was asked."""
        asked = default_menu(self.units, self._grain) if menu is None else _checked(menu, self.units)
        if not asked and menu is None:
            raise PartitionUnavailable(
                f"{self._whole.name} has {self.units} SMs, too few for two lanes of {self._grain.minimum}",
                "use the mechanism 'streams'",
            )
        lanes: dict[Partition, _Lanes] = {}
        granted: dict[Partition, Partition] = {}
        for split in asked:
            made = self._make(split, lanes)
            if made is None:
                continue
            granted[split] = made.realised
            if made.realised in lanes:
                self._notes.append(
                    f"{_text(split)} is granted as {_text(made.realised)}, which is there already"
                )
                continue
            lanes[made.realised] = made
            if made.realised != split:
                self._notes.append(f"{_text(split)} is granted as {_text(made.realised)}")
            if idle := self.units - sum(made.realised):
                self._notes.append(f"{_text(made.realised)} leaves {idle} SMs to neither lane")
        if asked and not lanes:
            raise PartitionUnavailable(
                f"{self._whole.name}: no split was granted ({self._notes[-1]})", "use the mechanism 'streams'"
            )
        self._note_connections(len(lanes))
        return lanes, granted

    def _make(self, split: Partition, there: dict[Partition, _Lanes]) -> _Lanes | None:
        """Split the device and create both lanes; None where it cannot be split so, noted."""
        decode = self._grain.round_up(split[1])
        if self.units - decode < self._grain.minimum:
            self._notes.append(
                f"{_text(split)} is left out: decode would get {decode} SMs and prefill fewer than the minimum, "
                f"{self._grain.minimum}"
            )
            return None
        parts = self._split(split, decode)
        if parts is None:
            return None
        planned = (parts[0].count, parts[1].count)
        return there[planned] if planned in there else self._create(parts, there)

    def _split(self, asked: Partition, decode: int) -> tuple[SmResource, SmResource] | None:
        """(prefill, decode) resources from one call of the driver; None, with a note, where it refuses."""
        try:
            prefill_part, decode_part = self._split_structured(decode) or self._split_by_count(decode)
        except CudaError as error:
            if error.code != INVALID_RESOURCE_CONFIGURATION:
                raise
            self._notes.append(f"{_text(asked)} is refused: {error}")
            return None
        if prefill_part.count and decode_part.count:
            return prefill_part, decode_part
        self._notes.append(
            f"{_text(asked)} is refused: {decode_part.count} SMs for decode leave none to prefill"
        )
        return None

    def _split_structured(self, decode: int) -> tuple[SmResource, SmResource] | None:
        """Both lanes as groups, so that prefill too keeps SMs that lie together; None where split by count must do.

        Decode comes first and is exact; prefill takes the rest, whose size need be no multiple of the step. An odd
        rest cannot be a group: the remainder is its lane.
        """
        if not self._structured:
            return None
        rest = self.units - decode
        together = 2 if self._relaxed else 0
        groups = [SmGroup(decode, together)]
        if rest % 2 == 0:
            groups.append(SmGroup(rest, together, backfill=not self._relaxed))
        try:
            parts, remainder = self._whole.driver.split(self._sms, groups)
        except CudaError as error:
            if error.code != INVALID_RESOURCE_CONFIGURATION:
                raise
            self._notes.append(f"{rest}+{decode} has no structured split ({error.name}), splitting by count")
            return None
        return (parts[1] if len(parts) == 2 else remainder), parts[0]

    def _split_by_count(self, decode: int) -> tuple[SmResource, SmResource]:
        """Decode as the one group, prefill the remainder."""
        decode_part, prefill_part = self._whole.driver.split_by_count(
            self._sms, decode, ignore_coscheduling=self._relaxed
        )
        return prefill_part, decode_part

    def _create(self, parts: tuple[SmResource, SmResource], there: dict[Partition, _Lanes]) -> _Lanes:
        """Contexts and streams of both lanes; destroyed again when any of it fails, or was there already."""
        made = Owned()
        try:
            prefill, prefill_sms = self._create_lane("prefill", parts[0], made)
            decode, decode_sms = self._create_lane("decode", parts[1], made)
            if prefill_sms + decode_sms > self.units:
                raise PartitionUnavailable(
                    f"{self._whole.name} granted {prefill_sms}+{decode_sms} of {self.units} SMs: the lanes overlap",
                    "use the mechanism 'streams', and report the driver's version",
                )
        except BaseException:
            made.destroy()
            raise
        realised = (prefill_sms, decode_sms)
        if realised in there:
            made.destroy()
            return there[realised]
        self._owned.take_over(made)
        return _Lanes(realised, (prefill, decode))

    def _create_lane(self, lane: str, part: SmResource, made: Owned) -> tuple[int, int]:
        """A stream handle and the SMs behind it."""
        driver = self._whole.driver
        green = self._create_green(part)
        made.add(f"the {lane} context of {part.count} SMs", lambda: driver.destroy_green(green))
        stream = driver.create_green_stream(green)
        made.add(f"the {lane} stream of {part.count} SMs", lambda: driver.destroy_stream(stream))
        return as_handle(stream), driver.granted_sms(green)

    def _create_green(self, part: SmResource) -> Any:
        """A context with balanced work queues, or without where the driver will not have them."""
        driver, device = self._whole.driver, self._whole.device
        if self._workqueue is not None:
            try:
                return driver.create_green(driver.descriptor([part.raw, self._workqueue]), device)
            except CudaError as error:
                if error.code not in _REFUSALS:
                    raise
                self._notes.append(f"work queues are shared by the lanes: {error}")
                self._workqueue = None
        return driver.create_green(driver.descriptor([part.raw]), device)

    def _note_connections(self, splits: int) -> None:
        """Balanced queues come out of the connections there are; more contexts than those may share after all."""
        if self._workqueue is None:
            return
        given = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
        connections = int(given) if given.isdigit() else _DEFAULT_CONNECTIONS
        if 2 * splits > connections:
            self._notes.append(
                f"{2 * splits} contexts over {connections} work queues: lanes may share one; set "
                "CUDA_DEVICE_MAX_CONNECTIONS=32 before CUDA starts"
            )

    # ----------------------------------------------------------------------------------------- partitions

    def _is_whole(self, split: Partition) -> bool:
        return split in ((self.units, 0), (0, self.units), (self.units, self.units))

    def _of(self, split: Partition) -> _Lanes:
        found = self._lanes.get(split) or self._lanes.get(self._asked.get(split, split))
        if found is None:
            raise ValueError(f"no split {split} was prepared; choose from {list(self.menu())}")
        return found


def granularity(
    capability: tuple[int, int], whole: SmResource, *, relaxed: bool = False
) -> Granularity | None:
    """How finely a device divides; None where it cannot.

    What the driver says counts; older ones do not say, and the guideline in the driver API's chapter on green
    contexts stands in. Relaxed: pairs of SMs, which is how they lie in hardware.
    """
    major, _minor = capability
    if major < 6:
        return None
    minimum, step = {6: (1, 1), 7: (2, 2), 8: (4, 2)}.get(major, (8, 8))
    if relaxed:
        return Granularity(min(minimum, 2), min(step, 2))
    return Granularity(whole.minimum or minimum, whole.alignment or step)


def default_menu(units: int, grain: Granularity, most: int = MOST_SPLITS) -> tuple[Partition, ...]:
    """At most `most` splits, evenly spaced in the decode lane's SMs, which are multiples of the step."""
    space = grain.round_up(-(-units // (most + 1)))
    return tuple((units - decode, decode) for decode in range(space, units - grain.minimum + 1, space))[:most]


def _checked(menu: Sequence[Partition], units: int) -> tuple[Partition, ...]:
    """The splits of a menu that divide the device, each once."""
    for prefill, decode in menu:
        if prefill < 0 or decode < 0 or not 1 <= prefill + decode <= units:
            raise ValueError(f"menu has ({prefill}, {decode}), which does not fit {units} SMs")
    return tuple(dict.fromkeys((p, d) for p, d in menu if p and d))


def _text(partition: Partition) -> str:
    return f"{partition[0]}+{partition[1]}"
