"""A fixed split keeps the scheduler's rules and is what it says."""

from __future__ import annotations

import pytest
from drift_plugin_fixed_split import FixedSplit

from drift_scheduler import Partition, Sharing
from drift_scheduler.conformance import CASES, Case, conform, run_case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_conforms(case: Case) -> None:
    outcome = run_case(case, partitions=FixedSplit())
    conform(outcome)
    assert len(outcome.reasons) == case.requests


@pytest.mark.parametrize(
    ("share", "split"), [(0.1, Partition(3, 1)), (0.5, Partition(2, 2)), (0.9, Partition(1, 3))]
)
def test_the_nearest_split_is_used(share: float, split: Partition) -> None:
    outcome = run_case(CASES[0], partitions=FixedSplit(share))
    assert {gang.partition for gang in outcome.gangs if gang.sharing is Sharing.SPATIAL} == {split}


def test_a_share_beyond_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_share"):
        FixedSplit(1.0)
