"""Goodput: the search on made-up verdicts, the judge on real runs, tuning, intervals, and both ways of running."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler import cli
from drift_scheduler.dispatch import ChunkedPrefill
from drift_scheduler.domain import SLO
from drift_scheduler.errors import DriftError, OptionError, PluginError
from drift_scheduler.goodput import (
    Criterion,
    Decided,
    Found,
    Judge,
    Outcome,
    PolicyGoodput,
    SearchPlan,
    Start,
    Trial,
    Trials,
    at_rate,
    begin,
    ratios,
    run_trial,
    seed_search,
    t_interval,
)
from drift_scheduler.hookspecs import hookimpl
from drift_scheduler.plugins import Registry, load
from drift_scheduler.simulation.run import Scenario, Simulation
from drift_scheduler.tuning import TOKEN_BUDGETS, base_of, policy_search, to_document, tunable
from drift_scheduler.workers import run_searches

CHAT = Scenario(
    workload="sharegpt", device="h200", model="llama-3.1-8b", dispatch="gang", slo=SLO(0.2, 0.025)
)
SHORT = "synthetic:output_mean=8:output_max=16"
"""A workload of short answers: runs of it take a few steps."""
QUICK = SearchPlan(requests=60, lifetimes=0.5, tolerance=0.1, seeds=(0, 1))


@pytest.fixture(autouse=True)
def only_built_in_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drift_scheduler.plugins.entry_points", lambda group: ())
    monkeypatch.setattr(cli.drift, "_found", None, raising=False)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load(installed=False)


def play(search: Trials, holds: Callable[[float], bool]) -> Found:
    """Answer every trial from a made-up device."""
    (trial,) = next(search)
    for _ in range(200):
        rate = trial.scenario.rate
        assert rate is not None
        try:
            (trial,) = search.send([Outcome(rate, holds(rate), "" if holds(rate) else "TBT")])
        except StopIteration as stop:
            found: Found = stop.value
            return found
    raise AssertionError("no end")


START = Start(rate=10.0, span_s=5.0)

# --------------------------------------------------------------------------------------------- search


@given(st.floats(0.3, 5000), st.floats(0.005, 0.2), st.one_of(st.none(), st.floats(0.3, 5000)))
def test_the_found_rate_holds_and_the_next_does_not(
    limit: float, tolerance: float, near: float | None
) -> None:
    plan = SearchPlan(tolerance=tolerance)
    found = play(seed_search(CHAT, plan, START, near), lambda rate: rate <= limit)
    assert found.rate <= limit < found.fails_at
    assert found.fails_at / found.rate <= (1 + tolerance) * 1.001
    assert found.monotone
    assert found.reason == "TBT"


def test_few_trials_are_needed() -> None:
    found = play(seed_search(CHAT, SearchPlan(), START), lambda rate: rate <= 17.3)
    assert len(found.trials) <= 10
    near = play(seed_search(CHAT, SearchPlan(), START, near=17.0), lambda rate: rate <= 17.3)
    assert len(near.trials) <= 6


def test_a_policy_that_never_meets_its_targets_gets_zero() -> None:
    found = play(seed_search(CHAT, SearchPlan(), START), lambda rate: False)
    assert found.rate == 0
    assert min(outcome.rate for outcome in found.trials) > START.rate / 100


def test_a_device_without_limit_ends_the_search() -> None:
    found = play(seed_search(CHAT, SearchPlan(), START), lambda rate: True)
    assert found.rate > 100 * START.rate
    assert found.fails_at == math.inf


def test_a_rate_that_holds_above_one_that_failed_is_found_and_told() -> None:
    """Holds up to 20 and, oddly, from 21 to 22.4: the check above the failed rate sees it."""
    found = play(seed_search(CHAT, SearchPlan(), START), lambda rate: rate <= 20 or 21 < rate <= 22.4)
    assert 21.9 < found.rate <= 22.4
    assert not found.monotone


def test_a_race_is_given_up_after_one_failure() -> None:
    found = play(seed_search(CHAT, SearchPlan(), START, at_least=20.0), lambda rate: rate < 15)
    assert (found.rate, len(found.trials)) == (0.0, 1)
    found = play(seed_search(CHAT, SearchPlan(), START, at_least=20.0), lambda rate: rate < 25)
    assert 24 < found.rate < 25


def test_runs_span_the_plan() -> None:
    plan = SearchPlan(requests=300)
    assert at_rate(CHAT, 1.0, plan, START).requests == 300
    assert at_rate(CHAT, 200.0, plan, START).requests == 1000


def test_the_guess_is_near_what_the_device_can_do(registry: Registry) -> None:
    start = begin(CHAT, SearchPlan(lifetimes=2), registry)
    assert 10 < start.rate < 200
    assert start.span_s == pytest.approx(2 * 195 * 0.025, rel=0.2)
    assert start.seeds_matter


# ---------------------------------------------------------------------------------------------- judge


def verdict(scenario: Scenario, criterion: Criterion | None = None) -> Outcome:
    return run_trial(Trial(scenario, criterion or Criterion()), load(installed=False))


@pytest.mark.parametrize("dispatch", ["drift", "gang", "chunked-prefill", "prefill-first", "decode-first"])
@pytest.mark.parametrize("rate", [20.0, 400.0])
def test_an_early_verdict_is_the_whole_run_s(dispatch: str, rate: float) -> None:
    """The judged window lacks only the drain, in which nothing is late here."""
    scenario = replace(CHAT, dispatch=dispatch, rate=rate, requests=120 if rate < 100 else 600)
    outcome = verdict(scenario)
    report = Simulation(scenario, load(installed=False)).run()
    assert outcome.holds == report["slo"]["met"]
    assert outcome.simulated_s <= report["duration_s"]
    if not outcome.holds:
        assert outcome.reason in ("TTFT", "TBT")


def test_a_hopeless_run_ends_early() -> None:
    scenario = replace(CHAT, rate=2000.0, requests=500)
    outcome = verdict(scenario)
    assert not outcome.holds
    whole = Simulation(scenario, load(installed=False)).run()["duration_s"]
    assert outcome.simulated_s < whole / 4


def test_waiting_past_the_target_counts_before_a_first_token_comes() -> None:
    """One prompt that takes 5 s alone against a target of 0.1 s fails at 0.1 s and the next step."""
    scenario = replace(
        CHAT,
        workload="synthetic:input_min=100000:input_mean=100000:input_max=100000",
        requests=2,
        rate=100.0,
        slo=SLO(0.1, 1.0),
    )
    outcome = verdict(scenario)
    assert (outcome.holds, outcome.reason) == (False, "TTFT")


def test_attainment_is_a_share_of_requests() -> None:
    scenario = replace(CHAT, rate=60.0, requests=100, slo=SLO(0.05, 0.025))
    share = Simulation(scenario, load(installed=False)).run()["slo"]["attainment"]
    assert 0.2 < share < 0.99, "pick a rate at which some meet their targets"
    assert verdict(scenario, Criterion(share - 0.005)).holds
    assert not verdict(scenario, Criterion(share + 0.005)).holds


def test_lost_requests_fail_a_rate() -> None:
    """Prompts beyond the pool are rejected."""
    scenario = replace(CHAT, rate=1.0, requests=50, kv_pages=20)
    outcome = verdict(scenario)
    assert (outcome.holds, outcome.reason) == (False, "requests lost")


def test_classes_are_judged_by_their_own_targets() -> None:
    simulation = Simulation(replace(CHAT, rate=20.0, requests=100), load(installed=False))
    requests = [
        replace(r, slo=SLO(1e-9, 10.0, name="strict") if i % 2 else r.slo)
        for i, r in enumerate(simulation.requests)
    ]
    simulation.requests = requests
    judge = Judge(requests, Criterion())
    with pytest.raises(Decided):
        simulation.run([judge])
    assert (judge.holds, judge.reason) == (False, "TTFT")
    assert judge.attainments[0] < 1


@pytest.mark.parametrize(
    "text", ["p95", "attainment", "attainment:0", "attainment:1.1", "attainment:nan", ""]
)
def test_criteria_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="need p99, or attainment:SHARE"):
        Criterion.parse(text)


def test_criteria_read_back() -> None:
    assert str(Criterion.parse("p99")) == "p99"
    assert str(Criterion.parse("attainment:0.9")) == "attainment:0.9"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "each once"),
        ({"requests": 0}, "requests"),
        ({"lifetimes": -1}, "lifetimes"),
        ({"lifetimes": math.nan}, "lifetimes"),
        ({"tolerance": 0}, "tolerance"),
    ],
)
def test_plans_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        SearchPlan(**settings)


# ------------------------------------------------------------------------------------- tuning and seeds


def test_budgets_are_tuned_and_choices_left_alone(registry: Registry) -> None:
    assert tunable(registry, "chunked-prefill") == ("token_budget", TOKEN_BUDGETS)
    assert tunable(registry, "chunked-prefill:max_batch_tokens=100") == ("token_budget", TOKEN_BUDGETS)
    assert tunable(registry, "chunked-prefill:token_budget=512") is None
    assert tunable(registry, "gang") is None


class _Plugin:
    def __init__(self, factory: Callable[..., Any]) -> None:
        self._factory = factory

    @hookimpl
    def drift_dispatch_policies(self) -> dict[str, Callable[..., Any]]:
        return {"mine": self._factory}


def test_a_plugin_names_what_to_tune() -> None:
    class Mine(ChunkedPrefill):
        tunable = {"token_budget": (32, 256)}  # noqa: RUF012

    class Wrong(ChunkedPrefill):
        tunable = {"token_budget": ()}  # noqa: RUF012

    found = load([("kit", _Plugin(Mine))], installed=False)
    assert tunable(found, "mine") == ("token_budget", (32, 256))
    with pytest.raises(PluginError, match="tunable must map one option"):
        tunable(load([("kit", _Plugin(Wrong))], installed=False), "mine")


def answer(search: Generator[Any, Any, Any], rate_of: Callable[[str, int], float]) -> Any:
    """Drive a policy search with a made-up device: the rate that dispatch and seed can do."""
    trials = next(search)
    while True:
        outcomes = []
        for trial in trials:
            scenario = trial.scenario
            holds = scenario.rate <= rate_of(scenario.dispatch, scenario.seed)
            report = {"slo": {"met": holds}, "rate": scenario.rate} if trial.criterion is None else None
            outcomes.append(Outcome(scenario.rate, holds, "" if holds else "TBT", report=report))
        try:
            trials = search.send(outcomes)
        except StopIteration as stop:
            return stop.value


def test_tuning_finds_the_best_budget_wherever_it_is(registry: Registry) -> None:
    for best in TOKEN_BUDGETS:
        can = {f"chunked-prefill:token_budget={b}": 8.0 if b != best else 16.0 for b in TOKEN_BUDGETS}
        scenario = replace(CHAT, dispatch="chunked-prefill")
        found = answer(policy_search(registry, scenario, SearchPlan(), START), lambda d, s, can=can: can[d])
        assert found.policy == "chunked-prefill"
        assert found.dispatch == f"chunked-prefill:token_budget={best}"
        assert found.tuned["value"] == best
        assert list(found.tuned["tried"]) == [str(b) for b in TOKEN_BUDGETS]
        assert found.rate == pytest.approx(16, rel=0.02)


def test_seeds_are_averaged_and_the_report_is_the_first_seed_s(registry: Registry) -> None:
    found = answer(
        policy_search(registry, CHAT, SearchPlan(), START), lambda d, seed: 10.0 * (1 + 0.05 * seed)
    )
    assert [f.seed for f in found.seeds] == [0, 1, 2]
    assert found.rate == pytest.approx(10.5, rel=0.02)
    low, high = found.interval
    assert low < found.rate < high
    assert found.report["rate"] == found.seeds[0].rate


def test_a_trace_without_chance_is_searched_once(registry: Registry, tmp_path: Any) -> None:
    path = tmp_path / "t.jsonl"
    lines = [{"arrival_ms": 50 * i, "input_tokens": 100, "output_tokens": 8} for i in range(80)]
    path.write_text("\n".join(map(json.dumps, lines)))
    scenario = replace(CHAT, workload=str(path))
    start = begin(scenario, QUICK, registry)
    assert not start.seeds_matter
    assert begin(replace(scenario, noise=0.1), QUICK, registry).seeds_matter
    found = answer(policy_search(registry, scenario, QUICK, start), lambda d, seed: start.rate)
    assert len(found.seeds) == 1
    assert found.interval is None


def test_intervals_are_student_s() -> None:
    assert t_interval([1.0]) is None
    assert t_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    low, high = t_interval([9.0, 10.0, 11.0]) or (0, 0)
    assert (low, high) == pytest.approx((10 - 4.303 / math.sqrt(3), 10 + 4.303 / math.sqrt(3)))
    low, high = t_interval([0.0, 1.0] * 50) or (0, 0)
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.01)


def goodput_of(*rates: float) -> PolicyGoodput:
    seeds = [Found(i, rate, rate * 1.02, "TBT", True, ()) for i, rate in enumerate(rates)]
    return PolicyGoodput("p", "p", tuple(seeds))


def test_ratios_are_paired_by_seed() -> None:
    ratio, interval = ratios(goodput_of(20.0, 40.0), goodput_of(10.0, 20.0))
    assert ratio == 2.0
    assert interval == (2.0, 2.0)
    assert ratios(goodput_of(1.0), goodput_of(0.0)) == (None, None)
    assert ratios(goodput_of(1.0, 1.0), goodput_of(0.0, 1.0)) == (2.0, None)


def test_the_document_has_the_keys_of_the_design() -> None:
    found = {"gang": goodput_of(20.0, 40.0), "chunked-prefill": goodput_of(10.0, 20.0)}
    assert base_of(list(found)) == "chunked-prefill"
    document = to_document(CHAT, SearchPlan(), found, "chunked-prefill")
    assert document["schema"] == "drift.goodput/1"
    assert document["ratio_to"] == {"chunked-prefill": {"gang": 2.0, "chunked-prefill": 1.0}}
    assert document["policies"]["gang"]["rate"] == 30.0
    assert document["slo"]["tbt_s"] == 0.025
    json.dumps(document, allow_nan=False)


# ---------------------------------------------------------------------------------------- end to end


def test_processes_change_nothing(registry: Registry) -> None:
    plan = SearchPlan(requests=40, lifetimes=0.5, tolerance=0.2, seeds=(0, 1))

    def searches() -> dict[str, Generator[Any, Any, PolicyGoodput]]:
        made = {}
        for dispatch in ("gang", "prefill-first"):
            scenario = replace(CHAT, workload=SHORT, dispatch=dispatch)
            made[dispatch] = policy_search(registry, scenario, plan, begin(scenario, plan, registry))
        return made

    seen: list[str] = []
    here = run_searches(searches(), 1, registry)
    spread = run_searches(searches(), 2, on_trial=lambda name, outcome: seen.append(name))
    assert {n: [f.rate for f in g.seeds] for n, g in here.items()} == {
        n: [f.rate for f in g.seeds] for n, g in spread.items()
    }
    assert set(seen) == {"gang", "prefill-first"}
    with pytest.raises(DriftError, match="jobs is 0"):
        run_searches(searches(), 0, registry)


KILLED = f"""
import multiprocessing
from dataclasses import replace
from drift_scheduler.domain import SLO
from drift_scheduler.goodput import Criterion, Trial
from drift_scheduler.simulation.run import Scenario
from drift_scheduler.workers import run_searches

def endless():
    scenario = Scenario("{SHORT}", "h200", "llama-3.1-8b", "gang", SLO(1.0, 0.1), rate=1.0, requests=2)
    while True:
        yield [Trial(scenario, Criterion())]

if __name__ == "__main__":
    def tell(name, outcome):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    run_searches({{"a": endless(), "b": endless()}}, 2, on_trial=tell)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
        assert pids
        deadline = time.monotonic() + 120
        while any(map(_runs, pids)):
            assert time.monotonic() < deadline, "workers outlived their parent"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def drift(*args: str) -> Result:
    return CliRunner().invoke(cli.drift, ["goodput", *args], prog_name="drift")


CHEAP = (
    *("--workload", SHORT, "--device", "h200", "--model", "llama-3.1-8b", "--requests", "40"),
    *(
        "--lifetimes",
        "0.5",
        "--tolerance",
        "0.2",
        "--slo-ttft",
        "0.2",
        "--slo-tbt",
        "0.025",
        "--seeds",
        "0,1",
    ),
)


def test_the_command_finds_and_compares_and_simulate_agrees() -> None:
    result = drift(*CHEAP, "--dispatch", "gang,chunked-prefill", "--json", "-")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "drift.goodput/1"
    gang = document["policies"]["gang"]
    assert gang["rate"] > 0
    assert gang["report"]["schema"] == "drift.report/1"
    assert gang["report"]["slo"]["met"]
    assert gang["report"]["config"]["rate"] == gang["seeds"][0]["rate"]
    assert document["ratio_to"]["chunked-prefill"]["chunked-prefill"] == 1.0
    tuned = document["policies"]["chunked-prefill"]
    assert tuned["dispatch"] == f"chunked-prefill:token_budget={tuned['tuned']['value']}"


def test_the_table_names_policies_and_the_window() -> None:
    result = drift(*CHEAP, "--dispatch", "prefill-first")
    assert result.exit_code == 0, result.output
    assert "prefill-first" in result.stdout
    assert "ramp included" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--dispatch", "gang,gang"), "each once"),
        (("--dispatch", "gang,,drift"), "separated by commas"),
        (("--dispatch", "nonsense"), "no dispatch policy 'nonsense'"),
        (("--dispatch", "gang", "--base", "drift"), "base 'drift' is not among the policies: gang"),
        (("--dispatch", "gang", "--seeds", "a,b"), "seeds 'a,b'"),
        (("--dispatch", "gang", "--criterion", "p50"), "criterion 'p50'"),
        (("--dispatch", "gang", "--tolerance", "nan"), "tolerance"),
        (("--dispatch", "gang", "--jobs", "0"), "jobs"),
        (("--dispatch", "gang", "--slo-tbt", "nan"), "slo-tbt"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], said: str) -> None:
    result = drift(*CHEAP, *args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_goodput_that_is_the_fallbacks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Raises:
        def choose(self, *_: Any) -> None:
            raise RuntimeError("no plan")

    hook = hookimpl(lambda: {"mine": Raises})
    hook.__name__ = "drift_dispatch_policies"
    registry = load([("acme", SimpleNamespace(drift_dispatch_policies=hook))], installed=False)
    monkeypatch.setattr("drift_scheduler.plugins.load", lambda strict=True: registry)
    result = drift(*CHEAP, "--dispatch", "mine,alternate")
    assert result.exit_code == 0
    said = " ".join(result.stdout.split())
    assert "mine was at fault 100 times and the fallback decided instead, first: Raises raised" in said
    assert "RuntimeError: no plan" in said
    assert "alternate was at fault" not in said


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_any_criterion_text_is_read_or_refused(text: str) -> None:
    try:
        share = Criterion.parse(text).attainment
    except OptionError:
        return
    assert share is None or 0 < share <= 1
