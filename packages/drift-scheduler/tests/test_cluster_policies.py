"""Streams, and other systems on simulated clusters: what they may run on, their pools, their prices, their runs."""

from __future__ import annotations

import random

import pytest

from drift_scheduler.conformance import FlatCosts, Hazards, exercise, small_device
from drift_scheduler.cost.fitted import fitted
from drift_scheduler.cost.hardware import device_spec, model_spec
from drift_scheduler.cost.roofline import roofline
from drift_scheduler.dispatch import CLUSTER_ONLY, FACTORIES
from drift_scheduler.dispatch.streams import Streams
from drift_scheduler.domain import (
    DIVIDING,
    SLO,
    DecodeShape,
    Device,
    FinishReason,
    Partition,
    PrefillShape,
    Request,
    Sharing,
)
from drift_scheduler.errors import DriftError, OptionError
from drift_scheduler.scheduler import Scheduler
from drift_scheduler.simulation.cluster import NanoBatches, PrivateKv, SequenceGroups, SplitKv, TensorGroups
from drift_scheduler.simulation.kv import CountingKv
from drift_scheduler.simulation.run import Scenario, Simulation, simulate

EIGHT, LLAMA = device_spec("8xa100-80gb"), model_spec("llama-3.1-70b")
LONG = PrefillShape.of([(16_384, 0)])
BATCH = DecodeShape(64, 131_072)


def scenario(dispatch: str, workload: str = "tool-agent", **changes: object) -> Scenario:
    settings: dict[str, object] = {"rate": 0.5, "requests": 40, **changes}
    return Scenario(workload, "8xa100-80gb", "llama-3.1-70b", dispatch, SLO(30, 0.1), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(CLUSTER_ONLY))
def test_other_systems_refuse_a_device_of_our_own_in_one_line(name: str) -> None:
    from drift_scheduler.partition.tightest_decode import TightestDecode

    with pytest.raises(DriftError, match=f"'{name}' runs on simulated clusters only") as refused:
        Scheduler(small_device(), CountingKv(64), FACTORIES[name](), TightestDecode(), FlatCosts())
    assert "\n" not in str(refused.value)


def test_streams_refuse_a_device_that_only_runs_what_is_divided() -> None:
    device = Device(4, (Partition(4, 0), Partition(2, 2), Partition(0, 4)), 6, DIVIDING, name="cpu: 4 cores")
    assert Streams().refuses(small_device()) is None
    assert "cpu: 4 cores runs exclusive, fused, spatial, temporal" in (Streams().refuses(device) or "")


@pytest.mark.parametrize(
    ("device", "model", "dispatch", "message"),
    [
        ("a100-80gb", "llama-3.1-8b", "pd-disaggregated", "at least 2 accelerators"),
        ("2xa100-80gb", "llama-3.1-8b", "loongserve", "at least 4 accelerators"),
        ("8xa100-80gb", "llama-3.1-8b", "loongserve:tensor=3", "does not divide 8"),
        ("8xa100-80gb", "llama-3.1-8b", "pd-disaggregated:decode_accelerators=8", "leaves none of 8"),
        ("2xa100-80gb", "llama-3.1-70b", "pd-disaggregated", "weights"),
        ("8xa100-80gb", "llama-3.1-8b", "pd-disaggregated:link_gb_s=0", "link_gb_s"),
    ],
)
def test_a_cluster_that_does_not_do_is_refused_in_one_line(
    device: str, model: str, dispatch: str, message: str
) -> None:
    with pytest.raises((OptionError, DriftError), match=message) as refused:
        Simulation(Scenario("sharegpt", device, model, dispatch, SLO(1, 0.1), requests=5))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dispatch", [*sorted(CLUSTER_ONLY), "streams"])
def test_they_serve_everything_and_the_same_twice(dispatch: str) -> None:
    first, second = simulate(scenario(dispatch)), simulate(scenario(dispatch))
    assert first == second
    assert first["requests"]["finished"] == 40
    assert first["scheduler"]["faults"] == 0


def test_only_some_reuse_prefixes() -> None:
    hits = {
        name: simulate(scenario(name))["kv"]["prefix_hit_ratio"]
        for name in ("gang", "pd-disaggregated", "nanoflow", "loongserve")
    }
    assert hits["nanoflow"] == hits["loongserve"] == 0
    assert 0 < hits["pd-disaggregated"] <= hits["gang"]


def test_a_disaggregated_cluster_prefills_and_decodes_at_once() -> None:
    report = simulate(scenario("pd-disaggregated", rate=1.0))
    assert {k for k, v in report["sharing_s"].items() if v} <= {"spatial", "idle"}
    assert report["lanes"]["prefill_busy"] > 0.2
    assert report["lanes"]["decode_busy"] > 0.2


def test_loongserve_gives_a_lone_prompt_every_instance() -> None:
    one = simulate(scenario("loongserve", requests=1))
    assert one["sharing_s"]["exclusive_prefill"] > 0


def test_a_small_split_pool_preempts_and_still_finishes() -> None:
    tight = scenario("pd-disaggregated", "sharegpt", rate=50.0, requests=80, kv_pages=600)
    report = simulate(tight)
    assert report["kv"]["preemptions"] > 0
    assert report["requests"]["finished"] + report["requests"]["rejected"] == 80


@pytest.mark.parametrize("seed", range(5))
def test_streams_survive_the_rough_ride(seed: int) -> None:
    outcome = exercise(Streams(), seed=seed, pages=24, hazards=Hazards(fail=0.03))
    assert outcome.faults == []
    assert {gang.sharing for gang in outcome.gangs} == {Sharing.STREAMS}
    assert FinishReason.FAILED in outcome.reasons.values() or seed


# --------------------------------------------------------------------------------------------- prices


def test_fewer_accelerators_take_longer_and_less_than_in_proportion_for_decode() -> None:
    inner = fitted("", "8xa100-80gb", "llama-3.1-70b")
    groups = TensorGroups(inner, EIGHT, LLAMA)
    assert groups.prefill(LONG, 8) == pytest.approx(inner.prefill(LONG, 108))
    assert groups.decode(BATCH, 8) == pytest.approx(inner.decode(BATCH, 108))
    assert 1.5 < groups.prefill(LONG, 4) / groups.prefill(LONG, 8) < 2.1
    assert 1.1 < groups.decode(BATCH, 4) / groups.decode(BATCH, 8) < 2.0
    assert groups.slowdown(LONG, BATCH, Partition(4, 4)) == (1.0, 1.0)


def test_handing_kv_over_costs_its_bytes_reused_ones_included() -> None:
    inner = roofline("8xa100-80gb", "llama-3.1-70b")
    free, paid = TensorGroups(inner, EIGHT, LLAMA), TensorGroups(inner, EIGHT, LLAMA, transfer=1e-6)
    work = PrefillShape.of([(1000, 3000)])
    assert paid.prefill(work, 4) - free.prefill(work, 4) == pytest.approx(4e-3)


def test_sequence_parallel_instances_halve_a_long_prompt_and_not_a_short_one() -> None:
    groups = SequenceGroups(roofline("8xa100-80gb", "llama-3.1-70b"), EIGHT, LLAMA, 4)
    short = PrefillShape.of([(64, 0)])
    assert groups.prefill(LONG, 4) / groups.prefill(LONG, 8) == pytest.approx(2.0, rel=0.1)
    assert groups.prefill(short, 4) / groups.prefill(short, 8) < 1.4
    assert groups.decode(BATCH, 8) < groups.decode(BATCH, 4)


def test_nano_batches_pay_off_on_large_passes_and_not_on_small_ones() -> None:
    inner = roofline("8xa100-80gb", "llama-3.1-70b")
    nano = NanoBatches(inner, EIGHT, LLAMA, 2)
    large, small, decode = PrefillShape.of([(4096, 0)]), PrefillShape.of([(64, 0)]), DecodeShape(64, 65_536)
    assert nano.fused(large, decode, 108) < inner.fused(large, decode, 108)
    assert nano.fused(small, decode, 108) > inner.fused(small, decode, 108)
    assert nano.decode(decode, 108) == inner.decode(decode, 108)


# ---------------------------------------------------------------------------------------------- pools


def request(name: str, tokens: int, family: int = 0) -> Request:
    keys = tuple((family, i) for i in range(tokens // 16))
    return Request(name, 0.0, tokens, 100, SLO(1, 1), prefix_keys=keys)


def test_a_private_pool_shares_nothing() -> None:
    pool = PrivateKv(100)
    assert pool.admit(request("a", 160), 160, 161) == 0
    pool.commit("a", 160)
    pool.release("a")
    assert pool.lookup(request("b", 160), 160) == 0
    assert pool.admit(request("b", 160), 160, 161) == 0
    pool.audit()


def test_a_split_pool_caches_prompts_on_one_side_and_decodes_on_the_other() -> None:
    pool = SplitKv(20, 30, 16)
    assert pool.admit(request("a", 160), 160, 161) == 0
    assert (pool.prefill_side.free_pages, pool.decode_side.free_pages) == (10, 19)
    pool.commit("a", 160)
    assert (pool.prefill_side.free_pages, pool.decode_side.free_pages) == (20, 19)
    assert pool.extend("a", 177)
    assert pool.lookup(request("b", 160), 160) == 144
    assert pool.admit(request("b", 160), 160, 161) == 144
    pool.release("a")
    pool.release("b")
    assert pool.free_pages == pool.total_pages == 50
    assert pool.admit(request("c", 400), 400, 401) is None
    assert pool.free_pages == 50


def test_a_split_pool_conserves_pages_whatever_happens() -> None:
    rng, pool, held = random.Random(3), SplitKv(40, 60, 16), dict[str, int]()
    for i in range(600):
        if held and rng.random() < 0.5:
            name = rng.choice(sorted(held))
            if rng.random() < 0.5:
                pool.commit(name, held[name])
            if rng.random() < 0.6:
                pool.release(name)
                del held[name]
            else:
                pool.extend(name, held[name] + 20)
        else:
            tokens = rng.randrange(1, 300)
            if pool.admit(request(f"r{i}", tokens, rng.randrange(4)), tokens, tokens + 1) is not None:
                held[f"r{i}"] = tokens
        pool.prefill_side.audit()
        pool.decode_side.audit()
    for name in held:
        pool.release(name)
    assert pool.free_pages == pool.total_pages
