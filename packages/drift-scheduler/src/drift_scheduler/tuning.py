"""A policy's goodput over all seeds, its tunable option set to the best value first; and `drift.goodput/1`.

A baseline with a badly chosen option flatters its rivals, so `chunked-prefill` always means the best token budget of
its cell. Values are raced on the first seed: each must hold at a rate that beats the best so far by the
tolerance, or is dropped after that one trial; then every seed is searched with the winner. A value that the caller
gives (`chunked-prefill:token_budget=512`) is left alone.

A third party's factory names what to tune in an attribute `tunable`, a mapping of one option to the values to try;
any factory that takes `token_budget` is tuned over `TOKEN_BUDGETS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from drift_scheduler.errors import PluginError
from drift_scheduler.goodput import (
    SCHEMA,
    WINDOW,
    Found,
    Outcome,
    PolicyGoodput,
    SearchPlan,
    Start,
    Trial,
    Trials,
    at_rate,
    ratios,
    seed_search,
)
from drift_scheduler.plugins import Registry
from drift_scheduler.simulation.run import Scenario, parse_choice

TOKEN_BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)

CHUNKED = "chunked-prefill"

T = TypeVar("T")
Search = Generator[Sequence[Trial], Sequence[Outcome], T]


def tunable(registry: Registry, choice: str) -> tuple[str, tuple[Any, ...]] | None:
    """The option to tune and its values; `None` where there is none or the caller chose already.

    Raises UnknownNameError, PluginError for an unusable `tunable`.
    """
    name, options = parse_choice(choice)
    plugin = registry.plugin_of("dispatch policy", name)
    factory = registry.dispatch_policies[name]
    offered = getattr(factory, "tunable", None)
    if offered is None:
        if "token_budget" not in _parameters(factory):
            return None
        offered = {"token_budget": TOKEN_BUDGETS}
    if not isinstance(offered, Mapping) or len(offered) != 1 or not all(offered.values()):
        raise PluginError(
            f"dispatch policy '{name}' (plugin {plugin}): tunable must map one option to the values to try, "
            f"not {offered!r}"
        )
    ((option, values),) = offered.items()
    return None if option in options else (str(option), tuple(values))


def _parameters(factory: Any) -> Sequence[str]:
    try:
        return list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # a callable without a signature has no option to tune
        return []


def policy_search(
    registry: Registry, scenario: Scenario, plan: SearchPlan, start: Start, with_report: bool = True
) -> Search[PolicyGoodput]:
    """Tune, then search every seed, then run the first seed whole at its own rate for the report."""
    policy = scenario.dispatch
    seeds = plan.seeds if start.seeds_matter else plan.seeds[:1]
    first_seed = replace(scenario, seed=seeds[0])
    choices = tunable(registry, policy)
    if choices is None:
        first, tuned = (yield from seed_search(first_seed, plan, start)), None
    else:
        scenario, first, tuned = yield from _tune(first_seed, plan, start, *choices)
    others = [
        seed_search(replace(scenario, seed=seed), plan, start, near=first.rate or None) for seed in seeds[1:]
    ]
    found = (first, *(yield from _abreast(others)))
    report = None
    if with_report:
        rate = first.rate or min(outcome.rate for outcome in first.trials)
        whole = at_rate(replace(scenario, seed=seeds[0]), rate, plan, start)
        (outcome,) = yield [Trial(whole)]
        report = outcome.report
    return PolicyGoodput(policy, scenario.dispatch, found, tuned, report)


def _tune(
    scenario: Scenario, plan: SearchPlan, start: Start, option: str, values: Sequence[Any]
) -> Search[tuple[Scenario, Found, dict[str, object]]]:
    """The scenario with the option's best value, and the first seed's search with it."""
    best: tuple[Scenario, Found] | None = None
    chosen: Any = None
    tried: dict[str, float | None] = {}
    for value in _from_the_middle(values):
        candidate = replace(scenario, dispatch=f"{scenario.dispatch}:{option}={value}")
        if best is None or best[1].rate <= 0:
            found = yield from seed_search(candidate, plan, start)
        else:
            found = yield from seed_search(
                candidate, plan, start, at_least=best[1].rate * (1 + plan.tolerance)
            )
        tried[str(value)] = found.rate or None
        if best is None or found.rate > best[1].rate:
            best, chosen = (candidate, found), value
    assert best is not None
    tuned: dict[str, object] = {
        "option": option,
        "value": chosen,
        "tried": {str(value): tried[str(value)] for value in values},
    }
    return *best, tuned


def _from_the_middle(values: Sequence[T]) -> list[T]:
    """The middle first, then alternately outwards: most races are then lost at once."""
    middle = len(values) // 2
    return sorted(values, key=lambda value: abs(values.index(value) - middle))


def _abreast(searches: Sequence[Trials]) -> Search[tuple[Found, ...]]:
    """Several searches at once: each round yields the trials of all that still run."""
    found: dict[int, Found] = {}
    wanted: dict[int, Sequence[Trial]] = {i: next(search) for i, search in enumerate(searches)}
    while wanted:
        outcomes = yield [trial for trials in wanted.values() for trial in trials]
        following: dict[int, Sequence[Trial]] = {}
        taken = 0
        for i, trials in wanted.items():
            share = outcomes[taken : taken + len(trials)]
            taken += len(trials)
            try:
                following[i] = searches[i].send(share)
            except StopIteration as stop:
                found[i] = stop.value
        wanted = following
    return tuple(found[i] for i in range(len(searches)))


# -------------------------------------------------------------------------------------------------- JSON


def to_document(
    scenario: Scenario, plan: SearchPlan, found: Mapping[str, PolicyGoodput], base: str
) -> dict[str, Any]:
    """`drift.goodput/1`. `base`: the policy ratios are to. A rate of 0: never met its targets."""
    config = scenario.config()
    for key in ("dispatch", "rate", "requests", "seed"):
        config.pop(key, None)
    config |= {
        "dispatch": list(found),
        "seeds": list(plan.seeds),
        "requests": plan.requests,
        "lifetimes": plan.lifetimes,
        "tolerance": plan.tolerance,
    }
    to_base = {name: ratios(result, found[base]) for name, result in found.items()}
    return {
        "schema": SCHEMA,
        "config": config,
        "slo": {
            "ttft_s": scenario.slo.ttft,
            "tbt_s": scenario.slo.tbt,
            "criterion": str(plan.criterion),
            "window": WINDOW,
        },
        "policies": {name: _policy(result) for name, result in found.items()},
        "ratio_to": {base: {name: ratio for name, (ratio, _) in to_base.items()}},
        "ratio_ci95": {base: {name: _pair(interval) for name, (_, interval) in to_base.items()}},
    }


def base_of(policies: Sequence[str]) -> str:
    """What ratios are to unless the caller says: chunked prefill, tuned or not, else the first policy."""
    chunked = [policy for policy in policies if policy.split(":")[0] == CHUNKED]
    return chunked[0] if chunked else policies[0]


def _policy(result: PolicyGoodput) -> dict[str, Any]:
    return {
        "rate": result.rate,
        "ci95": _pair(result.interval),
        "dispatch": result.dispatch,
        "tuned": result.tuned,
        "monotone": all(found.monotone for found in result.seeds),
        "seeds": [_seed(found) for found in result.seeds],
        "report": result.report,
    }


def _seed(found: Found) -> dict[str, Any]:
    return {
        "seed": found.seed,
        "rate": found.rate,
        "fails_at": found.fails_at if math.isfinite(found.fails_at) else None,
        "limited_by": found.reason,
        "trials": [
            {
                "rate": outcome.rate,
                "holds": outcome.holds,
                "limited_by": outcome.reason,
                "requests": outcome.requests,
                "simulated_s": outcome.simulated_s,
            }
            for outcome in found.trials
        ],
    }


def _pair(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
