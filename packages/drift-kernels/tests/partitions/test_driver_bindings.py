"""The fake that the other tests use, against the real `cuda.bindings.driver`: names, arguments, fields, numbers.

Needs the bindings, and no driver.
"""

from __future__ import annotations

import inspect
import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from fake_cuda import FakeCuda

from drift_kernels import driver as facade
from drift_kernels.driver import Driver, SmGroup

real: Any = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

ENUMS = [
    c for c in vars(fake_cuda).values() if inspect.isclass(c) and issubclass(c, IntEnum) and c is not IntEnum
]
STRUCTS = {
    "CUdevSmResource": fake_cuda.CUdevSmResource,
    "CUdevWorkqueueConfigResource": fake_cuda.CUdevWorkqueueConfigResource,
    "CU_DEV_SM_RESOURCE_GROUP_PARAMS": fake_cuda.CU_DEV_SM_RESOURCE_GROUP_PARAMS,
}


@pytest.mark.parametrize("name", fake_cuda.FUNCTIONS)
def test_functions_take_these_arguments_in_this_order(name: str) -> None:
    wanted = [p for p in inspect.signature(getattr(fake_cuda.FakeCuda, name)).parameters if p != "self"]
    assert list(inspect.signature(getattr(real, name)).parameters) == wanted


@pytest.mark.parametrize("name", fake_cuda.FUNCTIONS)
def test_functions_return_this_many_results_after_the_code(name: str) -> None:
    returns = (getattr(real, name).__doc__ or "").split("Returns\n", 1)[1]
    results = re.findall(r"^ *(\w+) : ", returns.split("See Also")[0], re.MULTILINE)
    assert len(results) == fake_cuda.RESULTS[name]


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.__name__)
def test_enumerations_have_these_numbers(enum: type[IntEnum]) -> None:
    there = getattr(real, enum.__name__)
    assert {m.name: int(getattr(there, m.name)) for m in enum} == {m.name: int(m) for m in enum}


@pytest.mark.parametrize(("name", "fake"), STRUCTS.items())
def test_structures_have_these_fields(name: str, fake: type) -> None:
    there = getattr(real, name)()
    for field in fake.__slots__:
        assert hasattr(there, field), field


def test_constants_of_the_facade() -> None:
    result, flags = real.CUresult, real.CUdevSmResourceSplitByCount_flags
    assert facade.NO_DEVICE == result.CUDA_ERROR_NO_DEVICE
    assert facade.INVALID_DEVICE == result.CUDA_ERROR_INVALID_DEVICE
    assert facade.NOT_SUPPORTED == result.CUDA_ERROR_NOT_SUPPORTED
    assert facade.INVALID_RESOURCE_TYPE == result.CUDA_ERROR_INVALID_RESOURCE_TYPE
    assert facade.INVALID_RESOURCE_CONFIGURATION == result.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION
    assert facade.RESOURCE_SM == real.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    assert facade.IGNORE_SM_COSCHEDULING == flags.CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING
    assert facade.GROUP_BACKFILL == real.CUdevSmResourceGroup_flags.CU_DEV_SM_RESOURCE_GROUP_BACKFILL
    assert facade.GREEN_CTX_DEFAULT_STREAM == real.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    assert facade.STREAM_NON_BLOCKING == real.CUstream_flags.CU_STREAM_NON_BLOCKING


def test_the_facade_calls_nothing_that_is_not_compared_here() -> None:
    called = set(re.findall(r'_call\(\s*"(\w+)"', Path(facade.__file__).read_text()))
    called |= {"cuDriverGetVersion"}
    assert called == set(fake_cuda.FUNCTIONS)


class Mixed(FakeCuda):
    """Real structures, as the driver would fill them; the calls stay fake."""

    CUdevResourceType = real.CUdevResourceType
    CUdevWorkqueueConfigScope = real.CUdevWorkqueueConfigScope
    CU_DEV_SM_RESOURCE_GROUP_PARAMS = real.CU_DEV_SM_RESOURCE_GROUP_PARAMS

    def cuDeviceGetDevResource(self, device: object, typename: Any) -> Any:
        resource = real.CUdevResource()
        resource.type = typename
        if typename == real.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM:
            resource.sm.smCount, resource.sm.minSmPartitionSize, resource.sm.smCoscheduledAlignment = (
                132,
                8,
                8,
            )
        return (resource,)

    def cuDevSmResourceSplit(self, nbGroups: int, input_: Any, flags: int, groupParams: list[Any]) -> Any:
        self.groups = groupParams
        return ([input_] * nbGroups, real.CUdevResource())


def test_real_structures_are_read_and_written_as_the_facade_does() -> None:
    cuda = Mixed()
    driver = Driver(cuda)
    device = driver.device(0)
    whole = driver.sm_resource(device)
    assert (whole.count, whole.minimum, whole.alignment) == (132, 8, 8)
    _parts, rest = driver.split(whole, [SmGroup(32), SmGroup(100, 2, backfill=True)])
    assert rest.count == 0
    assert [(g.smCount, g.coscheduledSmCount, g.flags) for g in cuda.groups] == [(32, 0, 0), (100, 2, 1)]
    queue: Any = driver.balanced_workqueue(device, 1)
    assert queue.wqConfig.sharingScope == real.CUdevWorkqueueConfigScope.CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED
    assert queue.wqConfig.wqConcurrencyLimit == 1


def test_handles_of_the_real_bindings_are_numbers_for_torch() -> None:
    from drift_kernels.streams_only import as_handle

    assert as_handle(real.CUstream(0x7F00)) == 0x7F00
