"""Policies change and prefixes are forgotten between steps: what is conserved stays so, nothing is a fault."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler import Scheduler
from drift_scheduler.conformance import FlatCosts, exercise, small_device
from drift_scheduler.dispatch import CLUSTER_ONLY, FACTORIES
from drift_scheduler.dispatch.gang import GangPolicy
from drift_scheduler.domain import StepRecord
from drift_scheduler.errors import DriftError
from drift_scheduler.partition import TightestDecode
from drift_scheduler.simulation.kv import CountingKv

POLICIES = sorted(FACTORIES.keys() - CLUSTER_ONLY)


class Changes:
    """An observer that now and then puts another policy in force, or has prefixes forgotten."""

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self._scheduler = scheduler
        self._chance = random.Random(seed)

    def on_step(self, record: StepRecord) -> None:
        if self._chance.random() < 0.2:
            self._scheduler.set_policies(FACTORIES[self._chance.choice(POLICIES)]())
        if self._chance.random() < 0.1:
            self._scheduler.forget_prefixes()
            assert isinstance(self._scheduler.kv, CountingKv)
            assert self._scheduler.kv.num_cached_pages == 0


@given(seed=st.integers(0, 2**32), pages=st.sampled_from([20, 40, 200]))
@settings(max_examples=60, deadline=None)
def test_policies_follow_one_another_without_a_fault(seed: int, pages: int) -> None:
    outcome = exercise(
        GangPolicy(), seed=seed, pages=pages, requests=30, watch=lambda scheduler: [Changes(scheduler, seed)]
    )
    assert len(outcome.reasons) == 30
    assert outcome.faults == []


def scheduler(kv: object) -> Scheduler:
    return Scheduler(small_device(), kv, GangPolicy(), TightestDecode(), FlatCosts())  # type: ignore[arg-type]


def test_a_policy_that_refuses_the_device_changes_nothing() -> None:
    class Refusing(GangPolicy):
        def refuses(self, device: object) -> str:
            return "not on this one"

    class Partitions(TightestDecode):
        pass

    subject = scheduler(CountingKv(10, 16))
    before = subject._dispatch, subject._partitions
    with pytest.raises(DriftError, match="not on this one"):
        subject.set_policies(Refusing(), Partitions())
    assert (subject._dispatch, subject._partitions) == before


def test_a_new_policy_does_not_inherit_the_faults_of_the_old() -> None:
    subject = scheduler(CountingKv(10, 16))
    subject.policy_faults = 1000
    subject.set_policies(partitions=TightestDecode())
    assert subject.policy_faults == 1000
    subject.set_policies(GangPolicy())
    assert subject.policy_faults == 0


def test_a_pool_that_cannot_forget_says_so() -> None:
    class Plain:
        page_tokens, total_pages, free_pages = 16, 10, 10

    with pytest.raises(DriftError, match="Plain keeps its cached prefixes"):
        scheduler(Plain()).forget_prefixes()
