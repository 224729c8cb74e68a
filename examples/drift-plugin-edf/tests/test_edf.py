"""EDF keeps the scheduler's rules, and takes what is due first first."""

from __future__ import annotations

import pytest
from drift_plugin_edf import EarliestDeadlineFirst

from drift_scheduler import SLO, Request, RequestArrived, Scheduler
from drift_scheduler.conformance import CASES, Case, FlatCosts, conform, run_case, small_device
from drift_scheduler.domain import PrefillDone
from drift_scheduler.partition.tightest_decode import TightestDecode
from drift_scheduler.simulation.kv import CountingKv


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_conforms(case: Case) -> None:
    outcome = run_case(case, dispatch=EarliestDeadlineFirst())
    conform(outcome)
    assert len(outcome.reasons) == case.requests


def test_the_prompt_that_is_due_first_goes_first() -> None:
    policy = EarliestDeadlineFirst(max_batch_tokens=100)
    scheduler = Scheduler(small_device(), CountingKv(100), policy, TightestDecode(), FlatCosts())
    late = Request("late", 0.0, 90, 5, SLO(ttft=9.0, tbt=1.0))
    soon = Request("soon", 0.0, 90, 5, SLO(ttft=1.0, tbt=1.0))
    gang = scheduler.step(0.0, [RequestArrived(late), RequestArrived(soon)]).gang
    assert gang is not None
    assert gang.prefill is not None
    assert [chunk.request_id for chunk in gang.prefill.chunks] == ["soon"]
    gang = scheduler.step(0.5, [PrefillDone(0.5)]).gang
    assert gang is not None
    assert gang.decode is not None  # due at 1.5, "late" at 9


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        EarliestDeadlineFirst(max_batch_tokens=0)
