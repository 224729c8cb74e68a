"""Where work runs: each place on its partition's own stream, work on the whole device on the right one and in turn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from drift_core.cuda.device import Place
from drift_core.cuda.stub import StubDevice
from drift_scheduler.domain import Lane

sys.path.insert(0, str(Path(__file__).parent))

from cuda_world import UNITS, Load, Splits, run, stub_executor

LOAD = Load(8, output=(3, 20))
"""More requests than run at once, so that some prefill while others decode."""


class Handles(Splits):
    """Every split's streams are told apart by their handles."""

    def streams(self, split: tuple[int, int]) -> tuple[int, int]:
        whole = split == (UNITS, UNITS)
        return (100, 200) if whole else (1000 + split[0], 2000 + split[1])


class Named(StubDevice):
    """Remembers which handle each place was given."""

    def __init__(self) -> None:
        super().__init__(UNITS)
        self.handles: dict[Place, int | None] = {}

    def stream(self, place: Place, handle: int | None = None) -> Any:
        self.handles[place] = handle
        return super().stream(place, handle)


def test_each_place_runs_on_its_partitions_own_stream() -> None:
    stub = Named()
    executor = stub_executor(stub, partitions=Handles())
    assert stub.handles[Place(Lane.PREFILL, None)] == 100
    assert stub.handles[Place(Lane.DECODE, None)] == 200  # the one with the decode lane's priority
    for split in executor.device.splits():
        assert stub.handles[Place(Lane.PREFILL, split)] == 1000 + split.prefill
        assert stub.handles[Place(Lane.DECODE, split)] == 2000 + split.decode


def places_of(stub: StubDevice, name: str) -> set[Place]:
    return {place for what, place, _, _ in stub.log if what == name}


@pytest.mark.parametrize(
    ("policy", "prefill", "decode"),
    [("temporal", Lane.DECODE, Lane.DECODE), ("alternate", Lane.PREFILL, Lane.DECODE)],
)
def test_work_on_the_whole_device_runs_in_turn(policy: str, prefill: Lane, decode: Lane) -> None:
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    executor.warm_up()
    stub.log.clear()
    run(executor, LOAD, policy, max_running=3)
    assert places_of(stub, "decode") == {Place(decode, None)}
    assert Place(prefill, None) in places_of(stub, "prefill")
    assert overlapping(stub) == []
    assert stub.faults == []


def test_mixed_passes_run_on_the_decode_lanes_stream_of_the_whole_device() -> None:
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    executor.warm_up()
    stub.log.clear()
    run(executor, LOAD, "chunked-prefill", max_running=3)
    assert places_of(stub, "mixed") == {Place(Lane.DECODE, None)}
    assert overlapping(stub) == []
    assert stub.faults == []


def overlapping(stub: StubDevice) -> list[tuple[str, str]]:
    """Decode and prefill work at the same time."""
    spans = [
        (name, start, stop) for name, _, start, stop in stub.log if name in ("decode", "prefill", "mixed")
    ]
    return [
        (a[0], b[0])
        for index, a in enumerate(spans)
        for b in spans[index + 1 :]
        if a[0] != b[0] and min(a[2], b[2]) - max(a[1], b[1]) > 1e-12
    ]


def test_temporal_prefill_on_another_stream_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubDevice(UNITS)
    executor = stub_executor(stub)
    executor.warm_up()
    stub.log.clear()
    start, right = executor._start_prefill, executor.stream

    def wrong(gang: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(executor, "stream", lambda place: right(Place(Lane.PREFILL, None)))
            start(gang)

    monkeypatch.setattr(executor, "_start_prefill", wrong)
    run(executor, LOAD, "temporal", max_running=3)
    assert ("decode", "prefill") in overlapping(stub)
