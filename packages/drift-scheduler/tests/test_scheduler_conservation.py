"""Whatever the policy and however rough the ride: pages, requests, lanes and partitions are conserved."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler import DriftError, FinishReason, Gang, Limits, Partition, Scheduler, Sharing
from drift_scheduler.conformance import FlatCosts, Hazards, InvariantError, exercise, small_device
from drift_scheduler.dispatch import CLUSTER_ONLY, FACTORIES
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.partition import TightestDecode
from drift_scheduler.simulation.kv import CountingKv

POLICIES = sorted(FACTORIES.keys() - CLUSTER_ONLY)  # those run on clusters laid out their own way


@pytest.mark.parametrize("name", POLICIES)
@given(
    seed=st.integers(0, 2**32), pages=st.sampled_from([12, 20, 40, 200]), fail=st.sampled_from([0.0, 0.03])
)
@settings(max_examples=25, deadline=None)
def test_every_request_ends_once_and_every_page_comes_back(
    name: str, seed: int, pages: int, fail: float
) -> None:
    outcome = exercise(FACTORIES[name](), seed=seed, pages=pages, requests=30, hazards=Hazards(fail=fail))
    assert len(outcome.reasons) == 30
    assert outcome.faults == []


def test_small_pools_preempt_and_still_finish_everything() -> None:
    preemptions = 0
    for seed in range(20):
        outcome = exercise(GangPolicy(), seed=seed, pages=12, hazards=Hazards(cancel=0, stop=0))
        preemptions += outcome.preemptions
        assert set(outcome.reasons.values()) == {FinishReason.LENGTH}
    assert preemptions > 20


def test_the_rough_ride_uses_every_sharing_the_policies_know() -> None:
    seen = {
        gang.sharing
        for name in POLICIES
        for seed in range(5)
        for gang in exercise(FACTORIES[name](), seed=seed).gangs
    }
    assert seen == set(Sharing)


def test_failed_lanes_end_their_requests_as_failed() -> None:
    outcome = exercise(GangPolicy(), seed=7, hazards=Hazards(cancel=0, stop=0, fail=0.2))
    assert FinishReason.FAILED in outcome.reasons.values()


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (lambda gang, view: Gang(gang.sharing, Partition(3, 3), gang.prefill, gang.decode), "off the menu"),
        (lambda gang, view: Gang(Sharing.FUSED, gang.partition, gang.prefill, gang.decode), "fused gang"),
        (lambda gang, view: Gang(gang.sharing, gang.partition, None, None), "a gang without work"),
        (lambda gang, view: 1 / 0, "raised ZeroDivisionError"),
        (lambda gang, view: "nonsense", "raised AttributeError"),
        (lambda gang, view: None, "left an idle device idle"),
    ],
)
def test_a_policy_that_misbehaves_is_replaced_counted_and_nothing_is_lost(broken, fault: str) -> None:
    class Broken:
        def __init__(self) -> None:
            self.inner = GangPolicy()

        def choose(self, view, costs, partitions):
            gang = self.inner.choose(view, costs, partitions)
            return None if gang is None else broken(gang, view)

    outcome = exercise(Broken(), seed=3, hazards=Hazards(cancel=0, stop=0))
    assert set(outcome.reasons.values()) == {FinishReason.LENGTH}
    assert any(fault in line for line in outcome.faults), outcome.faults[:3]


def test_the_checker_itself_can_fail() -> None:
    """A scheduler without legality checks lets a bad gang through; the executor's own check must catch it."""
    import drift_scheduler.scheduler as module

    class Sliced:
        """Slices a lone prefill layer by layer: the incident that turned seconds into 20 minutes."""

        def choose(self, view, costs, partitions):
            gang = GangPolicy().choose(view, costs, partitions)
            if gang is None or gang.decode is not None or gang.prefill is None:
                return gang
            from dataclasses import replace

            return replace(gang, prefill=replace(gang.prefill, layer_stop=gang.prefill.layer_start + 1))

    assert "not one block on the whole device" in exercise(Sliced(), seed=1).faults[0]
    checked = module.check_gang
    module.check_gang = lambda view, gang: None  # type: ignore[assignment]
    try:
        with pytest.raises(InvariantError, match="whole device in one block"):
            exercise(Sliced(), seed=1)
    finally:
        module.check_gang = checked


@pytest.mark.parametrize(
    ("menu", "fault"),
    [
        ([(2, 2)], "lacks 4+0, the whole device for one lane"),
        ([(4, 0), (2, 2)], "lacks 0+4, the whole device for one lane"),
        ([(4, 0), (0, 4), (3, 2)], "3+2 units of 4"),
        ([(4, 0), (0, 4), (5, -1)], "5+-1 units of 4"),
        ([(4, 0), (0, 4), (0, 0)], "0+0 units of 4"),
    ],
)
def test_a_menu_by_which_nothing_could_be_served_is_refused(menu: list[tuple[int, int]], fault: str) -> None:
    device = replace(small_device(4), menu=tuple(Partition(*split) for split in menu), name="mine")
    with pytest.raises(DriftError, match=f"^menu of device 'mine': {re.escape(fault)}$"):
        Scheduler(device, CountingKv(8, 16), GangPolicy(), TightestDecode(), FlatCosts())


def test_an_undivided_device_still_serves() -> None:
    outcome = exercise(GangPolicy(), seed=5, device=small_device(units=1))
    assert outcome.faults == []
    assert {g.sharing for g in outcome.gangs} == {Sharing.EXCLUSIVE}


def test_a_policy_with_too_many_faults_is_not_asked_again() -> None:
    calls = 0

    class Raises:
        def choose(self, view, costs, partitions):
            nonlocal calls
            calls += 1
            raise RuntimeError("no")

    exercise(Raises(), seed=2, limits=Limits(max_running=16, max_policy_faults=5))
    assert calls == 5
