"""Both lanes from one split, what was granted, and every call in its order."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
from fake_cuda import GREATEST_PRIORITY, CUdevResourceType, FakeCuda

from drift_kernels.driver import Driver, SmResource
from drift_kernels.green_contexts import (
    Granularity,
    GreenContexts,
    PartitionUnavailable,
    default_menu,
    granularity,
)
from drift_kernels.streams_only import StreamsOnly

H200 = {"sms": 132, "capability": (9, 0), "granularity": (8, 8)}
A100 = {"sms": 108, "capability": (8, 0), "granularity": (4, 2), "name": "NVIDIA A100-SXM4-80GB"}
BY_COUNT = {"version": 12080, "tells_granularity": False}
OLDEST = {"version": 12040, "tells_granularity": False, "lacks": ("cuGreenCtxStreamCreate",)}


def green(cuda: FakeCuda, **options: object) -> GreenContexts:
    return GreenContexts(driver=Driver(cuda), **options)


def test_calls_of_a_structured_split_in_order() -> None:
    cuda = FakeCuda(**H200)
    contexts = green(cuda, menu=[(100, 32)])
    device = cuda.device
    sm, queues = CUdevResourceType(1), CUdevResourceType(1000)
    flat = [(name, tuple(a for a in arguments if isinstance(a, int | str))) for name, arguments in cuda.calls]
    assert flat == [
        ("cuDriverGetVersion", ()),
        ("cuInit", (0,)),
        ("cuDeviceGetCount", ()),
        ("cuDeviceGet", (0,)),
        ("cuDeviceGetName", (128,)),
        ("cuDevicePrimaryCtxRetain", ()),
        ("cuDeviceGetAttribute", (16,)),
        ("cuCtxPushCurrent", ("primary",)),
        ("cuCtxGetStreamPriorityRange", ()),
        ("cuStreamCreateWithPriority", (1, 0)),
        ("cuStreamCreateWithPriority", (1, GREATEST_PRIORITY)),
        ("cuCtxPopCurrent", ()),
        ("cuDeviceGetAttribute", (75,)),
        ("cuDeviceGetAttribute", (76,)),
        ("cuDeviceGetDevResource", (sm,)),
        ("cuDeviceGetDevResource", (queues,)),
        ("cuDevSmResourceSplit", (2, 0)),
        ("cuDevResourceGenerateDesc", (2,)),
        ("cuGreenCtxCreate", (1,)),
        ("cuGreenCtxStreamCreate", (1, 0)),
        ("cuGreenCtxGetDevResource", (sm,)),
        ("cuDevResourceGenerateDesc", (2,)),
        ("cuGreenCtxCreate", (1,)),
        ("cuGreenCtxStreamCreate", (1, 0)),
        ("cuGreenCtxGetDevResource", (sm,)),
    ]
    arguments = dict(cuda.calls)
    groups = arguments["cuDevSmResourceSplit"][3]
    assert [(g.smCount, g.coscheduledSmCount, g.flags) for g in groups] == [(32, 0, 0), (100, 0, 1)]
    _sms, queue = arguments["cuDevResourceGenerateDesc"][0]
    assert (queue.wqConfig.sharingScope, queue.wqConfig.wqConcurrencyLimit) == (1, 1)
    assert arguments["cuGreenCtxCreate"][1] is device
    contexts.close()


def test_calls_of_a_split_by_count_on_the_first_driver_with_green_contexts() -> None:
    cuda = FakeCuda(**H200 | OLDEST)
    contexts = green(cuda, menu=[(100, 32)])
    names = cuda.names()
    made = names[names.index("cuDevSmResourceSplitByCount") :]
    lane = [
        "cuDevResourceGenerateDesc",
        "cuGreenCtxCreate",
        "cuCtxFromGreenCtx",
        "cuCtxPushCurrent",
        "cuStreamCreateWithPriority",
        "cuCtxPopCurrent",
        "cuGreenCtxGetDevResource",
    ]
    assert made == ["cuDevSmResourceSplitByCount", *lane, *lane]
    groups, _whole, flags, count = dict(cuda.calls)["cuDevSmResourceSplitByCount"]
    assert (groups, flags, count) == (1, 0, 32)
    resources, number = dict(cuda.calls)["cuDevResourceGenerateDesc"]
    assert (len(resources), number) == (1, 1)
    assert cuda.current == []
    assert any("13.1" in note for note in contexts.notes)
    contexts.close()


@pytest.mark.parametrize("machine", [H200, A100, H200 | BY_COUNT, A100 | BY_COUNT, H200 | OLDEST])
@pytest.mark.parametrize("relaxed", [False, True])
def test_lanes_of_a_split_share_no_sm_and_leave_none(machine: dict, relaxed: bool) -> None:
    cuda = FakeCuda(**machine)
    with green(cuda, relax_coscheduling=relaxed) as contexts:
        menu = contexts.menu()
        assert menu[0] == (contexts.units, 0)
        assert menu[-1] == (0, contexts.units)
        assert [d for _, d in menu] == sorted({d for _, d in menu})
        assert 5 <= len(menu) - 2 <= 8
        for split in menu[1:-1]:
            prefill, decode = (cuda.stream(handle) for handle in contexts.streams(split))
            assert (len(prefill.sms), len(decode.sms)) == split == contexts.realised(split)
            assert not prefill.sms & decode.sms
            assert prefill.sms | decode.sms == frozenset(range(contexts.units))
        splits = [name for name in cuda.names() if "Split" in name]
        assert len(splits) == len(menu) - 2, "one split for each entry, not one for each lane"
    assert cuda.left() == []


def test_whole_device_lanes_are_plain_streams_and_decode_is_urgent() -> None:
    cuda = FakeCuda()
    with green(cuda, menu=[]) as contexts:
        assert contexts.menu() == ((132, 0), (0, 132))
        prefill, nothing = contexts.streams((132, 0))
        assert nothing is None
        nothing, decode = contexts.streams((0, 132))
        assert nothing is None
        assert contexts.streams((132, 132)) == (prefill, decode)
        assert contexts.realised((132, 132)) == (132, 132)
        assert cuda.stream(prefill).priority == 0
        assert cuda.stream(decode).priority == GREATEST_PRIORITY
        assert cuda.stream(decode).of is None


def test_requests_are_rounded_reported_and_merged() -> None:
    cuda = FakeCuda(**H200)
    with green(cuda, menu=[(112, 20), (108, 24), (90, 40), (132, 0)]) as contexts:
        assert contexts.menu() == ((132, 0), (108, 24), (92, 40), (0, 132))
        assert contexts.notes[:3] == (
            "112+20 is granted as 108+24",
            "108+24 is granted as 108+24, which is there already",
            "90+40 is granted as 92+40",
        )
        assert contexts.realised((112, 20)) == (108, 24)
        assert contexts.streams((112, 20)) == contexts.streams((108, 24))
    assert cuda.names().count("cuGreenCtxCreate") == 4, "two splits; the one asked for twice is made once"
    assert cuda.left() == []


def test_the_green_context_has_the_last_word_on_what_is_granted() -> None:
    cuda = FakeCuda(**H200, really_granted={32: 24})
    with green(cuda, menu=[(100, 32)]) as contexts:
        assert contexts.menu()[1] == (100, 24)
        assert contexts.realised((100, 32)) == (100, 24)
        assert "100+32 is granted as 100+24" in contexts.notes
        assert "100+24 leaves 8 SMs to neither lane" in contexts.notes


def test_a_split_that_turns_out_to_be_another_is_destroyed_at_once() -> None:
    cuda = FakeCuda(**H200, really_granted={40: 32, 92: 100})
    with green(cuda, menu=[(100, 32), (92, 40)]) as contexts:
        assert contexts.menu() == ((132, 0), (100, 32), (0, 132))
        assert contexts.realised((92, 40)) == (100, 32)
        assert len([h for h in cuda.handles if h.kind == "green context" and h.alive]) == 2
    assert cuda.left() == []


def test_lanes_that_overlap_are_refused() -> None:
    cuda = FakeCuda(**H200, really_granted={32: 40})
    with pytest.raises(PartitionUnavailable, match=r"100\+40 of 132 SMs: the lanes overlap"):
        green(cuda, menu=[(100, 32)])
    assert cuda.left() == []


def test_a_topology_without_that_structured_split_is_split_by_count() -> None:
    cuda = FakeCuda(**H200, structured_refuses=[32])
    with green(cuda, menu=[(100, 32), (92, 40)]) as contexts:
        assert contexts.menu()[1:-1] == ((100, 32), (92, 40))
        assert "100+32 has no structured split" in contexts.notes[0]


def test_relaxed_splits_go_in_pairs_of_sms() -> None:
    cuda = FakeCuda(**H200)
    with green(cuda, relax_coscheduling=True, menu=[(122, 10)]) as contexts:
        assert contexts.menu()[1] == (122, 10)
        groups = dict(cuda.calls)["cuDevSmResourceSplit"][3]
        assert [(g.smCount, g.coscheduledSmCount, g.flags) for g in groups] == [(10, 2, 0), (122, 2, 0)]
    cuda = FakeCuda(**H200 | BY_COUNT)
    with green(cuda, relax_coscheduling=True, menu=[(122, 10)]) as contexts:
        assert contexts.menu()[1] == (122, 10)
        assert dict(cuda.calls)["cuDevSmResourceSplitByCount"][2:] == (1, 10)


def test_an_odd_rest_is_the_remainder_of_a_structured_split() -> None:
    cuda = FakeCuda(sms=133)
    with green(cuda, menu=[(101, 32)]) as contexts:
        assert contexts.menu()[1] == (101, 32)
        assert len(dict(cuda.calls)["cuDevSmResourceSplit"][3]) == 1


def test_a_split_that_leaves_prefill_too_little_is_left_out() -> None:
    cuda = FakeCuda(**H200)
    with green(cuda, menu=[(4, 128), (100, 32)]) as contexts:
        assert contexts.menu()[1:-1] == ((100, 32),)
        assert "4+128 is left out" in contexts.notes[0]
        with pytest.raises(ValueError, match=r"no split \(4, 128\) was prepared; choose from \[\(132, 0\)"):
            contexts.streams((4, 128))


@pytest.mark.parametrize("bad", [(-1, 20), (100, 40), (0, 0)])
def test_a_menu_that_does_not_fit_is_one_clear_line(bad: tuple[int, int]) -> None:
    cuda = FakeCuda(**H200)
    with pytest.raises(ValueError, match=rf"menu has \({bad[0]}, {bad[1]}\), which does not fit 132 SMs"):
        green(cuda, menu=[bad])
    assert cuda.left() == []


def test_balanced_work_queues_and_their_limit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    cuda = FakeCuda(**H200)
    with green(cuda) as contexts:
        assert "balanced work queues" in contexts.description
        assert "CUDA_DEVICE_MAX_CONNECTIONS=32" in contexts.notes[-1]
        assert all(h.balanced for h in cuda.handles if h.kind == "green context")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    with green(FakeCuda(**H200)) as contexts:
        assert contexts.notes == ()


@pytest.mark.parametrize("where", ["cuDevResourceGenerateDesc", "cuGreenCtxCreate"])
def test_without_balanced_work_queues_where_the_driver_will_not_have_them(where: str) -> None:
    cuda = FakeCuda(**H200)
    first = green(cuda, menu=[(100, 32)])
    at = cuda.names().index(where)
    first.close()
    cuda = FakeCuda(**H200)
    cuda.failures[at] = 801
    with green(cuda, menu=[(100, 32)]) as contexts:
        assert contexts.menu()[1] == (100, 32)
        assert "shared work queues" in contexts.description
        assert any("work queues are shared by the lanes: " + where in note for note in contexts.notes)
        assert not any(h.balanced for h in cuda.handles if h.kind == "green context")
    assert cuda.left() == []


def test_description_says_how() -> None:
    with green(FakeCuda(**H200)) as contexts:
        assert contexts.description == (
            "green contexts on 132 SMs of NVIDIA H200 (compute capability 9.0, driver: CUDA 13.1): "
            "a structured split, 7 splits, balanced work queues"
        )


def test_streams_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda h, device: SimpleNamespace(h=h, device=device))
    with green(FakeCuda(**H200), menu=[(100, 32)]) as contexts:
        prefill, decode = contexts.torch_streams((100, 32))
        assert (prefill.h, decode.h) == contexts.streams((100, 32))
        assert prefill.device == torch.device("cuda", 0)
        assert contexts.torch_streams((132, 0))[1] is None


def test_granularity_is_the_drivers_or_the_guideline() -> None:
    silent, telling = SmResource(None, 132, 0, 0), SmResource(None, 132, 16, 4)
    assert granularity((9, 0), silent) == granularity((10, 0), silent) == Granularity(8, 8)
    assert granularity((8, 9), silent) == Granularity(4, 2)
    assert granularity((7, 5), silent) == Granularity(2, 2)
    assert granularity((6, 0), silent) == Granularity(1, 1)
    assert granularity((5, 2), silent) is None
    assert granularity((9, 0), telling) == Granularity(16, 4)
    assert granularity((9, 0), telling, relaxed=True) == Granularity(2, 2)


@pytest.mark.parametrize("units", [16, 24, 48, 60, 84, 108, 114, 132, 148, 160, 170])
@pytest.mark.parametrize("grain", [Granularity(8, 8), Granularity(4, 2), Granularity(2, 2)])
def test_default_menu_fits_and_is_spread(units: int, grain: Granularity) -> None:
    menu = default_menu(units, grain)
    assert 1 <= len(menu) <= 8
    decodes = [d for _, d in menu]
    assert len({b - a for a, b in pairwise(decodes)}) <= 1
    for prefill, decode in menu:
        assert prefill + decode == units
        assert decode % grain.step == 0
        assert min(prefill, decode) >= grain.minimum


def test_streams_only_has_the_same_shape() -> None:
    cuda = FakeCuda(**H200)
    with StreamsOnly(driver=Driver(cuda)) as streams:
        assert streams.units == 132
        assert streams.menu() == ((132, 0), (0, 132))
        prefill, decode = streams.streams((132, 132))
        assert cuda.stream(prefill).sms == cuda.stream(decode).sms == frozenset(range(132))
        assert streams.realised((0, 132)) == (0, 132)
        assert "no partition" in streams.description
        with pytest.raises(ValueError, match="two plain streams cannot"):
            streams.streams((100, 32))
    assert cuda.left() == []
    streams.close()
    with pytest.raises(RuntimeError, match="closed"):
        streams.streams((132, 0))
