"""The calls of the CUDA driver that partitions need, typed: results as values, errors as exceptions.

Knows the functions of `cuda.bindings.driver`, their arguments and since which CUDA version each is there. Knows
nothing of lanes, menus or torch. Importing it needs no device, no driver and no bindings; making a `Driver` needs
the bindings, and every call of one needs the driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NewType, cast

Device = NewType("Device", object)
Context = NewType("Context", object)
GreenContext = NewType("GreenContext", object)
Stream = NewType("Stream", object)
Resource = NewType("Resource", object)
Descriptor = NewType("Descriptor", object)

# Numbers of cuda.h, which it never changes; a test compares them with the bindings' enumerations.
NO_DEVICE, INVALID_DEVICE, NOT_SUPPORTED = 100, 101, 801
INVALID_RESOURCE_TYPE, INVALID_RESOURCE_CONFIGURATION = 914, 915
RESOURCE_SM = 1
IGNORE_SM_COSCHEDULING = 1
GROUP_BACKFILL = 1
GREEN_CTX_DEFAULT_STREAM = 1
STREAM_NON_BLOCKING = 1

GREEN_CONTEXTS_SINCE = 12040
GREEN_STREAMS_SINCE = 12050
STRUCTURED_SPLIT_SINCE = WORKQUEUES_SINCE = 13010

INSTALL_BINDINGS = "pip install 'drift-kernels[cuda]'"
INSTALL_DRIVER = "install an NVIDIA driver of release 550 or newer (CUDA 12.4)"


class DriverUnavailable(Exception):
    """There are no bindings, no driver, or the driver lacks a call: why, and what would help, a line each."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix


class CudaError(Exception):
    """A driver call that returned an error code."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} failed: {name} ({code})")
        self.call, self.code, self.name = call, code, name


@dataclass(frozen=True, slots=True)
class SmResource:
    """SMs that can be split or given to a green context.

    minimum, alignment: fewest SMs of a part and what its size must be a multiple of, 0 where bindings or driver
    are too old to say.
    """

    raw: Resource
    count: int
    minimum: int
    alignment: int


@dataclass(frozen=True, slots=True)
class SmGroup:
    """A part wanted of a structured split.

    coscheduled: SMs that must lie together, as thread-block clusters need; 0 takes the device's default.
    backfill: treat that as a hint and reach `count` with any SMs.
    """

    count: int
    coscheduled: int = 0
    backfill: bool = False


def load_bindings() -> ModuleType:
    """`cuda.bindings.driver`. Raises DriverUnavailable where it is not installed or does not load."""
    try:
        return import_module("cuda.bindings.driver")
    except ModuleNotFoundError as missing:
        raise DriverUnavailable("cuda-bindings is not installed", INSTALL_BINDINGS) from missing
    except ImportError as error:
        raise DriverUnavailable(f"cuda-bindings does not load: {_line(error)}", INSTALL_BINDINGS) from error


class Driver:
    """The driver through its bindings. Every method raises CudaError, or DriverUnavailable for a missing call."""

    def __init__(self, bindings: Any = None) -> None:
        """bindings: a module of the shape of `cuda.bindings.driver`; None imports that."""
        self._bindings: Any = load_bindings() if bindings is None else bindings
        self._version = 0

    # ------------------------------------------------------------------------------------ what there is

    def version(self) -> int:
        """The CUDA version of the driver: 12040 for 12.4. Needs no device; the call that tells if there is a driver."""
        if not self._version:
            try:
                (version,) = self._call("cuDriverGetVersion")
            except DriverUnavailable as missing:
                raise DriverUnavailable(
                    f"no NVIDIA driver here ({missing.reason})", INSTALL_DRIVER
                ) from missing
            self._version = int(version)
        return self._version

    def initialize(self) -> None:
        """Required once before anything else but `version`; harmless when repeated."""
        self._call("cuInit", 0)

    def device_count(self) -> int:
        """Devices that CUDA_VISIBLE_DEVICES leaves."""
        (count,) = self._call("cuDeviceGetCount")
        return int(count)

    def device(self, index: int) -> Device:
        """The device of that index among the visible ones, as torch counts."""
        (device,) = self._call("cuDeviceGet", index)
        return Device(device)

    def name(self, device: Device) -> str:
        """For people; a MIG instance has MIG in its name."""
        (name,) = self._call("cuDeviceGetName", 128, device)
        return bytes(name).split(b"\0")[0].decode(errors="replace").strip()

    def pci_bus_id(self, device: Device) -> str:
        """What NVML knows the device by, whatever CUDA_VISIBLE_DEVICES does to indices."""
        (bus_id,) = self._call("cuDeviceGetPCIBusId", 32, device)
        return bytes(bus_id).split(b"\0")[0].decode(errors="replace")

    def memory_bytes(self, device: Device) -> int:
        """The device's memory in all."""
        (total,) = self._call("cuDeviceTotalMem", device)
        return int(total)

    def capability(self, device: Device) -> tuple[int, int]:
        """Compute capability, (9, 0) for sm_90."""
        return (
            self._attribute(device, "COMPUTE_CAPABILITY_MAJOR"),
            self._attribute(device, "COMPUTE_CAPABILITY_MINOR"),
        )

    def multiprocessors(self, device: Device) -> int:
        """SMs of the device."""
        return self._attribute(device, "MULTIPROCESSOR_COUNT")

    # ------------------------------------------------------------------------------------- contexts, streams

    def retain_primary(self, device: Device) -> Context:
        """The context that torch works in. To be released once."""
        (context,) = self._call("cuDevicePrimaryCtxRetain", device)
        return Context(context)

    def release_primary(self, device: Device) -> None:
        """Undo one `retain_primary`."""
        self._call("cuDevicePrimaryCtxRelease", device)

    @contextmanager
    def current(self, context: Context) -> Iterator[None]:
        """Make a context current on this thread for a while; the one before comes back, whatever happens."""
        self._call("cuCtxPushCurrent", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def greatest_priority(self) -> int:
        """The most urgent stream priority of the current context; lower numbers are more urgent, 0 is the default."""
        _least, greatest = self._call("cuCtxGetStreamPriorityRange")
        return int(greatest)

    def create_stream(self, priority: int = 0) -> Stream:
        """A stream in the current context that never waits for the default stream."""
        (stream,) = self._call("cuStreamCreateWithPriority", STREAM_NON_BLOCKING, priority)
        return Stream(stream)

    def destroy_stream(self, stream: Stream) -> None:
        """Returns at once; what the stream still runs ends first."""
        self._call("cuStreamDestroy", stream)

    # -------------------------------------------------------------------------------------- green contexts

    @property
    def has_structured_split(self) -> bool:
        """Whether `split` is there."""
        return self._has("cuDevSmResourceSplit", STRUCTURED_SPLIT_SINCE)

    @property
    def has_workqueues(self) -> bool:
        """Whether `balanced_workqueue` is there."""
        return self._has("CUdevWorkqueueConfigScope", WORKQUEUES_SINCE)

    def sm_resource(self, device: Device) -> SmResource:
        """All SMs that this process may use on the device."""
        return self._sms(self._call("cuDeviceGetDevResource", device, self._resource_type("SM"))[0])

    def split(
        self, whole: SmResource, groups: Sequence[SmGroup]
    ) -> tuple[tuple[SmResource, ...], SmResource]:
        """Disjoint parts of exactly the wanted sizes, and what is left (count 0 for nothing)."""
        wanted = []
        for group in groups:
            params = self._bindings.CU_DEV_SM_RESOURCE_GROUP_PARAMS()
            params.smCount = group.count
            params.coscheduledSmCount = group.coscheduled
            params.flags = GROUP_BACKFILL if group.backfill else 0
            wanted.append(params)
        parts, rest = self._call("cuDevSmResourceSplit", len(wanted), whole.raw, 0, wanted)
        return tuple(map(self._sms, parts)), self._sms(rest)

    def split_by_count(
        self, whole: SmResource, count: int, *, ignore_coscheduling: bool = False
    ) -> tuple[SmResource, SmResource]:
        """One part of at least `count` SMs, as the driver rounds, and the rest (count 0 for nothing)."""
        flags = IGNORE_SM_COSCHEDULING if ignore_coscheduling else 0
        parts, granted, rest = self._call("cuDevSmResourceSplitByCount", 1, whole.raw, flags, count)
        if int(granted) != 1:
            raise CudaError("cuDevSmResourceSplitByCount", INVALID_RESOURCE_CONFIGURATION, "made no group")
        return self._sms(parts[0]), self._sms(rest)

    def balanced_workqueue(self, device: Device, concurrent_streams: int) -> Resource:
        """Work queues that, where possible, no other balanced green context uses."""
        (raw,) = self._call("cuDeviceGetDevResource", device, self._resource_type("WORKQUEUE_CONFIG"))
        scope = self._bindings.CUdevWorkqueueConfigScope
        raw.wqConfig.sharingScope = scope.CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED
        raw.wqConfig.wqConcurrencyLimit = concurrent_streams
        return Resource(raw)

    def descriptor(self, resources: Sequence[Resource]) -> Descriptor:
        """What a green context is made of. Lives as long as the process; there is nothing to destroy."""
        (descriptor,) = self._call("cuDevResourceGenerateDesc", list(resources), len(resources))
        return Descriptor(descriptor)

    def create_green(self, descriptor: Descriptor, device: Device) -> GreenContext:
        """A green context; it retains the primary context until it is destroyed."""
        (green,) = self._call("cuGreenCtxCreate", descriptor, device, GREEN_CTX_DEFAULT_STREAM)
        return GreenContext(green)

    def destroy_green(self, green: GreenContext) -> None:
        """Its streams outlive it, detached: destroy them first."""
        self._call("cuGreenCtxDestroy", green)

    def granted_sms(self, green: GreenContext) -> int:
        """SMs that the green context really has."""
        (raw,) = self._call("cuGreenCtxGetDevResource", green, self._resource_type("SM"))
        return self._sms(raw).count

    def create_green_stream(self, green: GreenContext, priority: int = 0) -> Stream:
        """A non-blocking stream whose kernels run on the green context's SMs."""
        if self._has("cuGreenCtxStreamCreate", GREEN_STREAMS_SINCE):
            (stream,) = self._call("cuGreenCtxStreamCreate", green, STREAM_NON_BLOCKING, priority)
            return Stream(stream)
        (context,) = self._call("cuCtxFromGreenCtx", green)
        self._call("cuCtxPushCurrent", context)
        try:
            stream = self.create_stream(priority)
        except BaseException:
            self._call("cuCtxPopCurrent")
            raise
        try:
            self._call("cuCtxPopCurrent")
        except BaseException:
            self.destroy_stream(stream)
            raise
        return stream

    # ---------------------------------------------------------------------------------------------- inside

    def _call(self, name: str, *arguments: object) -> tuple[Any, ...]:
        function = getattr(self._bindings, name, None)
        if function is None:
            raise DriverUnavailable(
                f"the installed cuda-bindings has no {name}", "pip install -U 'cuda-bindings>=12.8'"
            )
        try:
            code, *results = function(*arguments)
        except RuntimeError as error:  # the bindings' word for a library or a symbol that is not there
            raise DriverUnavailable(
                f"{name}: {_line(error)}",
                "install cuda-bindings of the driver's CUDA version, or a newer driver",
            ) from error
        if int(code) != 0:
            raise CudaError(name, int(code), str(getattr(code, "name", code)))
        return tuple(results)

    def _has(self, name: str, since: int) -> bool:
        return hasattr(self._bindings, name) and self.version() >= since

    def _attribute(self, device: Device, name: str) -> int:
        kind = getattr(self._bindings.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", kind, device)[0])

    def _resource_type(self, name: str) -> object:
        return cast(object, getattr(self._bindings.CUdevResourceType, f"CU_DEV_RESOURCE_TYPE_{name}"))

    def _sms(self, raw: Any) -> SmResource:
        """Read a resource; the remainder of a split that left nothing is of no valid type."""
        if int(raw.type) != RESOURCE_SM:
            return SmResource(Resource(raw), 0, 0, 0)
        return SmResource(
            Resource(raw),
            int(raw.sm.smCount),
            int(getattr(raw.sm, "minSmPartitionSize", 0)),
            int(getattr(raw.sm, "smCoscheduledAlignment", 0)),
        )


def version_text(version: int) -> str:
    """12040 as people write it: 12.4."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
