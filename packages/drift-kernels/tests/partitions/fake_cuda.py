"""A stand-in for `cuda.bindings.driver`: the same names, argument names and result tuples, every call recorded.

It keeps the rules of the driver's documentation for splits, contexts and streams, and knows which SM each part has
got, so that a test can see an overlap. What is destroyed twice, used after it is gone or left behind shows.
`test_driver_bindings.py` compares its shape with the real bindings where they are installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from enum import IntEnum
from typing import Any

INVALID_VALUE, INVALID_CONFIGURATION = 1, 915
GREATEST_PRIORITY = -5


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_INVALID_RESOURCE_TYPE = 914
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915


class CUdevResourceType(IntEnum):
    CU_DEV_RESOURCE_TYPE_INVALID = 0
    CU_DEV_RESOURCE_TYPE_SM = 1
    CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG = 1000


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUdevWorkqueueConfigScope(IntEnum):
    CU_WORKQUEUE_SCOPE_DEVICE_CTX = 0
    CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED = 1


class CUdevSmResource:
    __slots__ = ("flags", "minSmPartitionSize", "smCoscheduledAlignment", "smCount")


class OldSmResource:
    """As bindings before 13.0 have it."""

    __slots__ = ("smCount",)


class CUdevWorkqueueConfigResource:
    __slots__ = ("device", "sharingScope", "wqConcurrencyLimit")


class CUdevResource:
    __slots__ = ("sm", "sms", "split", "type", "wqConfig")


class CU_DEV_SM_RESOURCE_GROUP_PARAMS:
    __slots__ = ("coscheduledSmCount", "flags", "preferredCoscheduledSmCount", "smCount")

    def __init__(self) -> None:
        self.smCount = self.coscheduledSmCount = self.preferredCoscheduledSmCount = self.flags = 0


class Handle:
    """A context, green context, stream or descriptor, with the SMs behind it."""

    def __init__(
        self, kind: str, number: int, sms: frozenset[int] = frozenset(), of: Handle | None = None
    ) -> None:
        self.kind, self.number, self.sms, self.of, self.alive = kind, number, sms, of, True
        self.balanced = False
        self.priority = 0

    def __int__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"{self.kind} {self.number}"


class FakeCuda:
    """One machine's driver.

    failures: error code or exception by number of the call, once; failing: by name, always. A call that may not
    raise in the code under test (a destroy) notes what is wrong in `violations`.
    """

    CUresult = CUresult
    CUdevResourceType = CUdevResourceType
    CUdevice_attribute = CUdevice_attribute
    CUdevWorkqueueConfigScope = CUdevWorkqueueConfigScope
    CU_DEV_SM_RESOURCE_GROUP_PARAMS = CU_DEV_SM_RESOURCE_GROUP_PARAMS

    def __init__(
        self,
        sms: int = 132,
        capability: tuple[int, int] = (9, 0),
        version: int = 13010,
        *,
        granularity: tuple[int, int] = (8, 8),
        tells_granularity: bool = True,
        name: str = "NVIDIA H200",
        devices: int = 1,
        lacks: Collection[str] = (),
        structured_refuses: Collection[int] = (),
        really_granted: dict[int, int] | None = None,
    ) -> None:
        """structured_refuses: decode counts the device's topology has no structured split for. really_granted: for
        a part of so many SMs a green context gets another number. tells_granularity: struct fields of 13.0."""
        self.sms, self.capability, self.version, self.granularity = sms, capability, version, granularity
        self.tells, self.name_, self.devices = tells_granularity, name, devices
        self.lacks = set(lacks)
        self.structured_refuses = structured_refuses
        self.really_granted = really_granted or {}
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.handles: list[Handle] = []
        self.destroyed: list[Handle] = []
        self.primary_retained = 0
        self.current: list[object] = []
        self.failures: dict[int, int | Exception] = {}
        self.failing: dict[str, int | Exception] = {}
        self.device = object()
        self.violations: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        find = super().__getattribute__
        if name.startswith(("cu", "CU")):
            if name in find("lacks"):
                raise AttributeError(name)
            found = find(name)
            if inspect.ismethod(found):
                return lambda *arguments: find("_record")(name, found, arguments)
            return found
        return find(name)

    def _record(
        self, name: str, method: Callable[..., Any], arguments: tuple[object, ...]
    ) -> tuple[Any, ...]:
        failure = self.failures.pop(len(self.calls), None) or self.failing.get(name)
        self.calls.append((name, arguments))
        if isinstance(failure, Exception):
            raise failure
        outcome = failure if failure is not None else method(*arguments)
        if isinstance(outcome, int):
            code = CUresult(outcome)
            results = (None,) * RESULTS[name] if code else ()
            return (code, *results)
        return (CUresult.CUDA_SUCCESS, *outcome)

    # ------------------------------------------------------------------------------ what a test looks at

    def names(self, since: int = 0) -> list[str]:
        return [name for name, _ in self.calls[since:]]

    def left(self) -> list[object]:
        """What was created and is still there, and what was destroyed twice or too early."""
        return [
            *(h for h in self.handles if h.alive),
            *["the primary context"] * self.primary_retained,
            *self.violations,
        ]

    def stream(self, handle: int) -> Handle:
        (found,) = [h for h in self.handles if h.kind == "stream" and h.number == handle and h.alive]
        return found

    # ------------------------------------------------------------------------------------- the driver

    def cuDriverGetVersion(self) -> Any:
        return (self.version,)

    def cuInit(self, Flags: int) -> Any:
        return () if Flags == 0 else INVALID_VALUE

    def cuDeviceGetCount(self) -> Any:
        return (self.devices,)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return (self.device,) if ordinal < self.devices else 101

    def cuDeviceGetName(self, length: int, dev: object) -> Any:
        self._check(dev)
        return (self.name_.encode().ljust(length, b"\0"),)

    def cuDeviceGetPCIBusId(self, length: int, dev: object) -> Any:
        self._check(dev)
        return (b"0000:1B:00.0".ljust(length, b"\0"),)

    def cuDeviceTotalMem(self, dev: object) -> Any:
        self._check(dev)
        return (141 * 2**30,)

    def cuDeviceGetAttribute(self, attrib: CUdevice_attribute, dev: object) -> Any:
        self._check(dev)
        return ({16: self.sms, 75: self.capability[0], 76: self.capability[1]}[attrib],)

    def cuDevicePrimaryCtxRetain(self, dev: object) -> Any:
        self._check(dev)
        self.primary_retained += 1
        return ("primary",)

    def cuDevicePrimaryCtxRelease(self, dev: object) -> Any:
        self._check(dev)
        if self.primary_retained < 1:
            self.violations.append("the primary context is released more often than retained")
        if any(h.alive for h in self.handles):
            self.violations.append("the primary context goes before what lives in it")
        self.primary_retained -= 1
        return ()

    def cuCtxPushCurrent(self, ctx: object) -> Any:
        self.current.append(ctx)
        return ()

    def cuCtxPopCurrent(self) -> Any:
        return (self.current.pop(),)

    def cuCtxGetStreamPriorityRange(self) -> Any:
        assert self.current, "needs a current context"
        return (0, GREATEST_PRIORITY)

    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> Any:
        context = self.current[-1]
        if context == "primary":
            return (self._stream(flags, priority, frozenset(range(self.sms)), None),)
        assert isinstance(context, Handle)
        assert context.of is not None
        return (self._stream(flags, priority, context.sms, context.of),)

    def cuStreamDestroy(self, hStream: Handle) -> Any:
        return self._destroy(hStream, "stream")

    def cuDeviceGetDevResource(self, device: object, typename: CUdevResourceType) -> Any:
        self._check(device)
        if typename == CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM:
            return (self._sm_resource(frozenset(range(self.sms)), split=False),)
        resource = CUdevResource()
        resource.type = typename
        resource.wqConfig = CUdevWorkqueueConfigResource()
        resource.wqConfig.device = device
        resource.wqConfig.sharingScope = CUdevWorkqueueConfigScope.CU_WORKQUEUE_SCOPE_DEVICE_CTX
        resource.wqConfig.wqConcurrencyLimit = 8
        return (resource,)

    def cuDevSmResourceSplit(
        self,
        nbGroups: int,
        input_: CUdevResource,
        flags: int,
        groupParams: list[CU_DEV_SM_RESOURCE_GROUP_PARAMS],
    ) -> Any:
        if input_.split or flags or nbGroups != len(groupParams):
            return INVALID_CONFIGURATION
        free = sorted(input_.sms)
        parts = []
        for params in groupParams:
            together = params.coscheduledSmCount or self.granularity[1]
            count = params.smCount
            if params.flags & 1:
                fits = count % 2 == 0 and count >= together
            else:
                fits = count % together == 0 and count not in self.structured_refuses
            if not fits or not 2 <= count <= len(free):
                return INVALID_CONFIGURATION
            parts.append(self._sm_resource(frozenset(free[:count])))
            free = free[count:]
        return (parts, self._sm_resource(frozenset(free)))

    def cuDevSmResourceSplitByCount(
        self, nbGroups: int, input_: CUdevResource, flags: int, minCount: int
    ) -> Any:
        if input_.split or not 0 <= minCount <= len(input_.sms):
            return INVALID_CONFIGURATION
        minimum, step = (2, 2) if flags & 1 else self.granularity
        count = max(minimum, -(-minCount // step) * step)
        free = sorted(input_.sms)
        made = min(nbGroups, len(free) // count)
        parts = [self._sm_resource(frozenset(free[i * count : (i + 1) * count])) for i in range(made)]
        return (parts, made, self._sm_resource(frozenset(free[made * count :])))

    def cuDevResourceGenerateDesc(self, resources: list[CUdevResource], nbResources: int) -> Any:
        assert len(resources) == nbResources
        sms = frozenset[int]().union(*(r.sms for r in resources if r.type == 1))
        descriptor = Handle("descriptor", len(self.handles), sms)
        descriptor.alive = False  # lives as long as the process
        descriptor.balanced = any(r.type == 1000 and r.wqConfig.sharingScope == 1 for r in resources)
        self.handles.append(descriptor)
        return (descriptor,) if sms else INVALID_CONFIGURATION

    def cuGreenCtxCreate(self, desc: Handle, dev: object, flags: int) -> Any:
        self._check(dev)
        assert desc.kind == "descriptor"
        if flags != 1:
            return INVALID_VALUE
        return (self._new("green context", desc.sms, None, balanced=desc.balanced),)

    def cuGreenCtxDestroy(self, hCtx: Handle) -> Any:
        if any(h.alive and h.of is hCtx for h in self.handles):
            self.violations.append(f"{hCtx} goes before its stream")
        return self._destroy(hCtx, "green context")

    def cuGreenCtxGetDevResource(self, hCtx: Handle, typename: CUdevResourceType) -> Any:
        assert hCtx.alive
        assert typename == CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        count = self.really_granted.get(len(hCtx.sms), len(hCtx.sms))
        return (self._sm_resource(frozenset(range(count)), split=False),)

    def cuGreenCtxStreamCreate(self, greenCtx: Handle, flags: int, priority: int) -> Any:
        assert greenCtx.alive
        return (self._stream(flags, priority, greenCtx.sms, greenCtx),)

    def cuCtxFromGreenCtx(self, hCtx: Handle) -> Any:
        assert hCtx.alive
        view = Handle("context", len(self.handles), hCtx.sms, of=hCtx)
        view.alive = False  # a view of the green context, nothing to destroy
        self.handles.append(view)
        return (view,)

    # ------------------------------------------------------------------------------------------ inside

    def _check(self, device: object) -> None:
        assert device is self.device

    def _sm_resource(self, sms: frozenset[int], *, split: bool = True) -> CUdevResource:
        resource = CUdevResource()
        resource.type = CUdevResourceType(1 if sms else 0)
        resource.sms, resource.split = sms, split
        resource.sm = CUdevSmResource() if self.tells else OldSmResource()
        resource.sm.smCount = len(sms)
        if self.tells:
            resource.sm.minSmPartitionSize, resource.sm.smCoscheduledAlignment = self.granularity
        return resource

    def _new(self, kind: str, sms: frozenset[int], of: Handle | None, *, balanced: bool = False) -> Handle:
        handle = Handle(kind, 0x1000 + 16 * len(self.handles), sms, of)
        handle.balanced = balanced
        self.handles.append(handle)
        return handle

    def _stream(self, flags: int, priority: int, sms: frozenset[int], of: Handle | None) -> Any:
        assert flags == 1, "streams must be non-blocking"
        stream = self._new("stream", sms, of)
        stream.priority = priority
        return stream

    def _destroy(self, handle: Handle, kind: str) -> Any:
        if handle.kind != kind or not handle.alive:
            self.violations.append(f"{handle} is destroyed twice, or as a {kind}")
        handle.alive = False
        self.destroyed.append(handle)
        return ()


FUNCTIONS = tuple(n for n, f in vars(FakeCuda).items() if n.startswith("cu") and inspect.isfunction(f))
_TWO, _THREE = {"cuDevSmResourceSplit", "cuCtxGetStreamPriorityRange"}, {"cuDevSmResourceSplitByCount"}
_NONE = {
    "cuInit",
    "cuDevicePrimaryCtxRelease",
    "cuCtxPushCurrent",
    "cuStreamDestroy",
    "cuGreenCtxDestroy",
}
RESULTS = {n: 0 if n in _NONE else 2 if n in _TWO else 3 if n in _THREE else 1 for n in FUNCTIONS}
