"""What launching and contention cost on a simulated device: buckets, the host's pace, load, streams, polling."""

from __future__ import annotations

import pytest

from drift_scheduler.conformance import Hazards, exercise
from drift_scheduler.cost.contention import Contended
from drift_scheduler.cost.hardware import device_spec, model_spec
from drift_scheduler.cost.launch import Launched, bucket, innermost
from drift_scheduler.cost.online import OnlineCost
from drift_scheduler.cost.roofline import RooflineCost, roofline
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    DecodeShape,
    DecodeStep,
    Device,
    Gang,
    Lane,
    Observation,
    Partition,
    PrefillBlock,
    PrefillChunk,
    PrefillDone,
    PrefillShape,
    Sharing,
)
from drift_scheduler.simulation.executor import Overheads, SimulatedExecutor
from drift_scheduler.simulation.run import Scenario, Simulation

A100, LLAMA = device_spec("a100-80gb"), model_spec("llama-3.1-8b")
SPLIT = Partition(76, 32)
PROMPT, BATCH = PrefillShape.of([(4096, 0)]), DecodeShape(32, 32_768)


def test_batches_round_up_to_captured_sizes() -> None:
    assert [bucket(b, 8) for b in (1, 2, 3, 4, 5, 8, 9, 16, 250)] == [1, 2, 4, 4, 8, 8, 16, 16, 256]
    assert [bucket(b, 0) for b in (1, 3, 250)] == [1, 3, 250]


def test_decode_climbs_a_staircase_and_context_does_not() -> None:
    costs = Launched(roofline("a100-80gb", "llama-3.1-8b"), A100, 32)
    times = [costs.decode(DecodeShape(batch, 50_000), 32) for batch in range(9, 18)]
    assert len(set(times[:8])) == 1
    assert times[8] > times[7]
    assert costs.decode(DecodeShape(9, 60_000), 32) > times[0]


def test_no_layer_runs_faster_than_the_host_launches_it() -> None:
    inner = roofline("a100-80gb", "llama-3.1-8b")
    costs = Launched(inner, A100, 32)
    tiny = PrefillShape.of([(8, 0)])
    assert inner.prefill(tiny, 108) == pytest.approx(0.0096, rel=0.5)
    assert costs.prefill(tiny, 108) >= 32 * A100.launch_layer_us * 1e-6
    assert costs.prefill(PROMPT, 108) == inner.prefill(PROMPT, 108)
    assert costs.fused(tiny, DecodeShape(1, 1), 108) >= 32 * A100.launch_layer_us * 1e-6
    assert device_spec("8xa100-80gb").launch_seconds > A100.launch_seconds == A100.launch_layer_us * 1e-6


def test_what_launching_explains_is_not_learned_twice() -> None:
    inner = OnlineCost(roofline("a100-80gb", "llama-3.1-8b"), 32)
    costs = Launched(inner, A100, 32)
    work = DecodeShape(9, 9000)
    took = costs.decode(work, 108)
    seen = Observation(Lane.DECODE, Partition(0, 108), Sharing.EXCLUSIVE, None, work, 32, False, took, took)
    for _ in range(20):
        costs.observe(seen)
    assert costs.decode(work, 108) == pytest.approx(took)
    assert isinstance(innermost(costs), RooflineCost)


@pytest.mark.parametrize(
    ("lane", "sharing"),
    [(Lane.PREFILL, Sharing.TEMPORAL), (Lane.DECODE, Sharing.FUSED), (Lane.PREFILL, Sharing.EXCLUSIVE)],
)
def test_waiting_for_the_host_is_no_accident(lane: Lane, sharing: Sharing) -> None:
    """A small pass takes as long as its launch, and each block a launch of its own: nothing the guard should mind."""
    inner = roofline("h200", "llama-3.1-8b")
    costs = Launched(inner, device_spec("h200"), 32)
    tiny, one = PrefillShape.of([(8, 0)]), DecodeShape(1, 100)
    fused = sharing is Sharing.FUSED
    assert inner.prefill(tiny, 132) * 1.01 < costs.prefill(tiny, 132)
    seconds = costs.fused(tiny, one, 132) if fused else costs.prefill(tiny, 132) / 32
    took = seconds + costs.block_seconds
    layers = 32 if fused else 1
    costs.observe(
        Observation(lane, Partition(0, 132), sharing, tiny, one if fused else None, layers, False, took, took)
    )
    assert costs.slowdown(tiny, one, Partition(0, 132)) == (1.0, 1.0)


def test_contention_grows_with_the_load_on_memory_and_stays_below_the_worst_case() -> None:
    truth = Contended(roofline("a100-80gb", "llama-3.1-8b"), A100, LLAMA)
    light, heavy = DecodeShape(1, 100), DecodeShape(256, 512_000)
    for shape in (light, heavy):
        factors = truth.slowdown(PROMPT, shape, SPLIT)
        assert all(1.0 < factor <= 1.2 for factor in factors)
    assert truth.load(PROMPT, light, Partition(92, 16)) < truth.load(PROMPT, heavy, Partition(44, 64)) <= 1
    assert truth.slowdown(PROMPT, light, SPLIT)[1] < 1.2


def test_streams_hurt_decode_more_than_a_partition_does_and_more_than_prefill() -> None:
    truth = Contended(roofline("a100-80gb", "llama-3.1-8b"), A100, LLAMA)
    slow_prefill, slow_decode = truth.slowdown(PROMPT, BATCH, Partition(108, 108))
    assert slow_decode > slow_prefill > 1.2


def test_the_guard_learns_a_milder_worst_case_than_its_prior() -> None:
    scenario = Scenario(
        "tool-agent", "8xa100-80gb", "llama-3.1-70b", "gang", SLO(30, 0.1), rate=1.0, requests=60
    )
    simulation = Simulation(scenario)
    simulation.run()
    cells = innermost(simulation.costs).guard.cells()["decode"]  # type: ignore[attr-defined]
    settled = [worst for worst in cells.values() if worst < 1.2]
    assert settled
    assert max(settled) > 1.01


DEVICE = Device(10, (Partition(10, 0), Partition(6, 4), Partition(0, 10)), 4, frozenset(Sharing))


class Flat:
    """Solo times in seconds: prefill 12, decode 4, over units; streams double both."""

    def prefill(self, work: PrefillShape, units: int) -> float:
        return 12.0 / units

    def decode(self, work: DecodeShape, units: int) -> float:
        return 4.0 / units

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        return 1.5

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        return (2.0, 2.0) if sum(partition) > 10 else (1.0, 1.0)

    def observe(self, observation: Observation) -> None:
        raise AssertionError("the truth does not learn")


def gang(sharing: Sharing, partition: Partition, layers: int = 4, *, decode: bool = True) -> Gang:
    block = PrefillBlock(0, (PrefillChunk("a", 0, 8),), 0, layers) if layers else None
    return Gang(sharing, partition, block, DecodeStep(("b",), 8) if decode else None)


def executor(overheads: Overheads | None = None) -> SimulatedExecutor:
    return SimulatedExecutor(DEVICE, Flat(), (), overheads=overheads)


def test_streams_overlap_on_all_units_and_slow_each_other_down() -> None:
    run = executor()
    run.submit(gang(Sharing.STREAMS, DEVICE.unpartitioned))
    assert run.wait(None) == [DecodeDone(pytest.approx(0.8))]
    run.submit(gang(Sharing.STREAMS, DEVICE.unpartitioned, layers=0))
    assert run.wait(None) == [DecodeDone(pytest.approx(0.8))]
    assert run.wait(None) == [PrefillDone(pytest.approx(1.6 + 0.4))]


def test_a_partitioned_gang_beside_streams_breaks_the_device() -> None:
    run = executor()
    run.submit(gang(Sharing.STREAMS, DEVICE.unpartitioned, decode=False))
    with pytest.raises(AssertionError, match="units of 10"):
        run.submit(gang(Sharing.SPATIAL, Partition(6, 4), layers=0))


def test_while_the_host_launches_it_notices_nothing() -> None:
    run = executor(Overheads(launch_layer_seconds=0.4))
    run.submit(gang(Sharing.SPATIAL, Partition(6, 4)))
    events = run.wait(None)  # decode ends at 1.0, the last layer is launched at 1.6
    assert events == [DecodeDone(pytest.approx(1.0))]
    assert run.now() == pytest.approx(1.6)
    assert run.wait(None) == [PrefillDone(pytest.approx(2.0))]
    assert run.now() == pytest.approx(2.0)


def test_a_layer_takes_at_least_its_launch() -> None:
    run = executor(Overheads(launch_layer_seconds=0.6))
    run.submit(gang(Sharing.SPATIAL, Partition(6, 4), decode=False))
    assert run.wait(None) == [PrefillDone(pytest.approx(2.4))]


def test_without_polling_decode_waits_for_the_prefill_to_end() -> None:
    run = executor(Overheads(polling=False))
    run.submit(gang(Sharing.SPATIAL, Partition(6, 4)))
    assert run.wait(None) == [DecodeDone(pytest.approx(1.0)), PrefillDone(pytest.approx(2.0))]
    assert run.now() == pytest.approx(2.0)


def test_gang_without_slicing_launches_every_prefill_whole() -> None:
    layers = 6
    whole = exercise(GangPolicy(slice_layers=False), seed=1, hazards=Hazards(cancel=0))
    sliced = exercise(GangPolicy(), seed=1, hazards=Hazards(cancel=0))
    assert whole.faults == sliced.faults == []
    assert {g.prefill.layers for g in whole.gangs if g.prefill is not None} == {layers}
    assert min(g.prefill.layers for g in sliced.gangs if g.prefill is not None) < layers
