"""The ledger of work ahead, alone: what it counts, what it learns, and what it predicts from that."""

from __future__ import annotations

import random
from math import inf

import pytest

from drift_core.frames import AcceptedItem, FinishedItem, LoadItem, StepFrame, TokensItem, pack_ids
from drift_gateway.workload_ahead import Forecast, Line, Newcomer, WorkloadAhead

RATE = ((100, 0.1), (1000, 1.0))
"""A thousand tokens a second."""


def ledger(
    max_running: int = 4, total_pages: int = 1000, prefill: tuple[tuple[int, float], ...] = RATE
) -> WorkloadAhead:
    ahead = WorkloadAhead()
    ahead.engine(total_pages=1000, page_tokens=10, max_running=max_running, prefill_seconds=prefill)
    return ahead


def first(ahead: WorkloadAhead, now: float, *ids: str, **fields: object) -> None:
    ahead.step(StepFrame(now, tokens=[TokensItem(list(ids), pack_ids([1] * len(ids)), True)], **fields))  # type: ignore[arg-type]


def decode(ahead: WorkloadAhead, now: float, *ids: str, prefill_requests: int = 0) -> None:
    tokens = [TokensItem(list(ids), pack_ids([1] * len(ids)))]
    ahead.step(StepFrame(now, tokens=tokens, decode_requests=len(ids), prefill_requests=prefill_requests))


def test_nothing_is_predicted_where_nothing_is_known() -> None:
    assert ledger(prefill=()).forecast(Newcomer(100, 10), 0.0) == Forecast()


def test_prompts_ahead_are_computed_first() -> None:
    ahead = ledger()
    assert ahead.forecast(Newcomer(500, 10), 0.0).ttft == pytest.approx(0.5)
    ahead.add(["a", "b"], Newcomer(1000, 10, outputs=2), 0.0)
    assert (ahead.waiting_tokens, ahead.outputs) == (2000, 2)
    assert ahead.forecast(Newcomer(500, 10), 0.0).ttft == pytest.approx(2.5)
    first(ahead, 1.0, "a")
    assert ahead.waiting_tokens == 1000
    assert ahead.forecast(Newcomer(500, 10), 1.0).ttft == pytest.approx(1.5, rel=0.1)
    ahead.remove("b")
    ahead.remove("a")
    ahead.remove("a")
    assert (ahead.waiting_tokens, ahead.outputs, ahead.promised_pages) == (0, 0, 0)


def test_those_with_a_better_priority_go_first_and_others_do_not_count() -> None:
    ahead = ledger()
    ahead.add(["late"], Newcomer(3000, 10, priority=5), 0.0)
    ahead.add(["soon"], Newcomer(1000, 10, priority=-5), 0.0)
    assert ahead.forecast(Newcomer(500, 10), 0.0).ttft == pytest.approx(1.5)
    assert ahead.forecast(Newcomer(500, 10, priority=9), 0.0).ttft == pytest.approx(4.5)
    assert ahead.forecast(Newcomer(500, 10, priority=-9), 0.0).ttft == pytest.approx(0.5)


def test_what_is_under_way_counts_as_partly_done() -> None:
    ahead = ledger()
    ahead.add(["a"], Newcomer(1000, 10), 0.0)
    ahead.step(StepFrame(0.0, accepted=[AcceptedItem("a")], prefill_requests=1))
    assert ahead.forecast(Newcomer(500, 10), 0.4).ttft == pytest.approx(1.1)
    assert ahead.forecast(Newcomer(500, 10), 9.0).ttft == pytest.approx(0.5), "never less than its own"


def test_what_the_cache_has_need_not_be_computed() -> None:
    ahead = ledger()
    ahead.add(["a"], Newcomer(1000, 10), 0.0)
    ahead.step(StepFrame(0.0, accepted=[AcceptedItem("a", 0, 800)]))
    assert ahead.waiting_tokens == 200
    assert ahead.forecast(Newcomer(1000, 10), 0.0).ttft == pytest.approx(0.2 + 0.2), "newcomers find as much"


def test_the_pace_of_prefill_is_learned_whatever_the_cost_model_said() -> None:
    ahead = ledger(prefill=((100, 0.5), (1000, 5.0)))
    now = 0.0
    for number in range(60):
        request, tokens = f"r{number}", 200 + 100 * (number % 5)
        ahead.add([request], Newcomer(tokens, 10), now)
        ahead.step(StepFrame(now, accepted=[AcceptedItem(request, 0, 0)], prefill_requests=1))
        now += 0.01 + tokens / 2000  # twice a thousand a second, and ten milliseconds more
        first(ahead, now, request)
        ahead.remove(request)
    forecast = ahead.forecast(Newcomer(600, 10), now)
    assert forecast.ttft == pytest.approx(0.31, rel=0.35)
    short = ahead.forecast(Newcomer(200, 10), now).ttft
    assert short is not None
    assert 0.08 < short < 0.25


def test_the_gap_is_the_cost_models_until_steps_were_seen() -> None:
    ahead = WorkloadAhead()
    ahead.engine(
        total_pages=1000, page_tokens=10, max_running=64,
        prefill_seconds=RATE, decode_seconds=((1, 0.021), (8, 0.028), (64, 0.084)),
    )  # fmt: skip
    assert ahead.forecast(Newcomer(10, 10), 0.0).gap == pytest.approx(0.021)
    assert ahead.forecast(Newcomer(10, 10, outputs=16), 0.0).gap == pytest.approx(0.036)
    assert not ahead.crowds_out(Newcomer(10, 10)), (
        "nobody is turned away for others' sake before steps were seen"
    )
    now = running(ahead, 1, expected=1000, gap=0.005)
    ahead.remove("r0")
    assert ahead.forecast(Newcomer(10, 10), now).gap == pytest.approx(0.005, rel=0.1)


def running(ahead: WorkloadAhead, count: int, *, expected: int, gap: float, tbt: float = inf) -> float:
    """So many decode, each of `expected` tokens; their first came at 0. Steps until now, which is returned."""
    for number in range(30):
        ahead.step(StepFrame(0.0, finished=[FinishedItem(f"old{number}", "length", output_tokens=expected)]))
    ids = [f"r{number}" for number in range(count)]
    for request in ids:
        ahead.add([request], Newcomer(10, expected, tbt=tbt), 0.0)
    first(ahead, 0.0, *ids, decode_requests=count)
    now = 0.0
    for _ in range(60):
        now += gap
        decode(ahead, now, *ids)
    return now


def test_with_no_place_free_it_waits_for_one_to_end() -> None:
    ahead = ledger(max_running=4)
    now = running(ahead, 4, expected=100, gap=0.1)
    forecast = ahead.forecast(Newcomer(100, 10), now)
    assert forecast.ttft == pytest.approx(40 * 0.1 + 0.1, rel=0.05)
    ahead.add(["w0", "w1", "w2", "w3"], Newcomer(100, 10, outputs=4), now)
    later = ahead.forecast(Newcomer(100, 10), now).ttft
    assert later is not None
    assert later > 2 * 40 * 0.1, "a round more"


def test_with_no_pages_free_it_waits_for_some() -> None:
    ahead = ledger(max_running=64)
    now = running(ahead, 2, expected=100, gap=0.1)
    ahead.step(StepFrame(now, load=LoadItem(0, 2, 5)))
    assert ahead.forecast(Newcomer(40, 10), now).ttft == pytest.approx(0.04, rel=0.01)
    assert ahead.forecast(Newcomer(100, 10), now).ttft == pytest.approx(4.0 + 0.1, rel=0.05)
    assert ahead.seconds_until_pages(3, now) == pytest.approx(4.0, rel=0.05)


def test_a_demoted_one_is_behind_everyone() -> None:
    ahead = ledger()
    ahead.add(["a"], Newcomer(1000, 10, priority=1000), 0.0)
    assert ahead.forecast(Newcomer(100, 10, priority=10_000), 0.0).ttft == pytest.approx(1.1)


def test_pages_are_promised_for_what_outputs_usually_have() -> None:
    ahead = ledger()
    assert ahead.pages_of(Newcomer(100, 10_000)) == 10 + 26, "256 tokens, for want of better"
    for number in range(300):
        ahead.step(StepFrame(0.0, finished=[FinishedItem(f"old{number}", "length", output_tokens=20)]))
    assert ahead.pages_of(Newcomer(100, 10_000)) == 10 + 2 + 1, "rounded up"
    assert ahead.pages_of(Newcomer(100, 10, outputs=3)) == 3 * 11


def test_one_short_answer_is_not_what_outputs_usually_have() -> None:
    ahead = ledger()
    ahead.step(StepFrame(0.0, finished=[FinishedItem("short", "stop", output_tokens=10)]))
    assert ahead.pages_of(Newcomer(100, 10_000)) == 10 + 18, "a third of the way from 256 to 10"
    for number in range(50):
        ahead.step(StepFrame(0.0, finished=[FinishedItem(f"short{number}", "stop", output_tokens=10)]))
    assert ahead.pages_of(Newcomer(100, 10_000)) == 10 + 2, "but fifty are"


def test_an_output_that_may_not_end_sooner_is_expected_to_be_as_long() -> None:
    ahead = ledger()
    assert ahead.pages_of(Newcomer(100, 1000, min_tokens=900)) == 10 + 90
    assert ahead.pages_of(Newcomer(100, 1000, min_tokens=1000)) == 10 + 100
    assert ahead.pages_of(Newcomer(100, 20, min_tokens=0)) == 10 + 2


def test_alone_it_would_not_have_to_wait() -> None:
    ahead = ledger(max_running=64)
    assert ahead.alone(Newcomer(500, 10)) == Forecast(pytest.approx(0.5), None, None)
    now = running(ahead, 4, expected=100, gap=0.1)
    ahead.add(["a", "b"], Newcomer(1000, 10, outputs=2), now)
    alone = ahead.alone(Newcomer(500, 11, outputs=4))
    assert alone.ttft == pytest.approx(0.5)
    assert alone.gap == pytest.approx(0.1)
    assert alone.e2e == pytest.approx(1.5)


def test_prompts_that_were_slow_beside_others_are_not_thought_to_be_so_alone() -> None:
    ahead = ledger()
    for number in range(60):
        ahead.add([f"r{number}"], Newcomer(500, 10), 10.0 * number)
        ahead.step(StepFrame(10.0 * number, accepted=[AcceptedItem(f"r{number}", 0, 0)], prefill_requests=1))
        first(ahead, 10.0 * number + 5, f"r{number}")
        ahead.remove(f"r{number}")
    assert ahead.alone(Newcomer(500, 10)).ttft == pytest.approx(0.5)
    assert ledger(prefill=()).alone(Newcomer(500, 10)) == Forecast()


def test_a_newcomer_that_pushes_a_kept_target_is_seen() -> None:
    ahead = ledger(max_running=64)
    ids: list[str] = []
    now = 0.0
    for number in range(8):  # each more makes a step 2 ms longer
        ids.append(f"r{number}")
        ahead.add([ids[-1]], Newcomer(10, 10_000, tbt=0.0205), now)
        first(ahead, now, ids[-1], decode_requests=len(ids))
        for _ in range(20):
            now += 0.002 + 0.002 * len(ids)
            decode(ahead, now, *ids)
    assert not ahead.crowds_out(Newcomer(10, 10)), "nine take 20 ms"
    assert ahead.crowds_out(Newcomer(10, 10, outputs=2))


def test_targets_that_are_missed_anyway_hold_nobody_back() -> None:
    ahead = ledger(max_running=64)
    now = running(ahead, 4, expected=1000, gap=0.05, tbt=0.001)
    assert not ahead.crowds_out(Newcomer(10, 10))
    assert ahead.forecast(Newcomer(10, 10), now).gap == pytest.approx(0.05, rel=0.3)


def test_forecasts_that_do_not_hold_make_cautious() -> None:
    ahead = ledger()
    begun = ahead.caution
    for number in range(20):
        ahead.add([f"r{number}"], Newcomer(100, 10), 0.0, Forecast(0.1))
        first(ahead, 5.0, f"r{number}")
    cautious = ahead.caution
    assert cautious > begun + 0.5
    for number in range(200):
        ahead.add([f"s{number}"], Newcomer(100, 10), 0.0, Forecast(9.0))
        first(ahead, 5.0, f"s{number}")
    assert ahead.caution < cautious


def test_a_new_engine_starts_with_nothing_and_knows_what_was_learned() -> None:
    ahead = ledger()
    ahead.add(["a"], Newcomer(1000, 10), 0.0)
    ahead.engine(total_pages=5, page_tokens=10, max_running=1)
    assert (ahead.outputs, ahead.waiting_tokens, ahead.promised_pages, dict(ahead.queued)) == (0, 0, 0, {})
    assert ahead.prefill_rate == pytest.approx(1000)


def test_the_queue_is_counted_by_class() -> None:
    ahead = ledger()
    ahead.add(["a", "b"], Newcomer(10, 10, outputs=2, slo_class="batch"), 0.0)
    ahead.add(["c"], Newcomer(10, 10), 0.0)
    assert dict(ahead.queued) == {"batch": 2, "default": 1}
    first(ahead, 1.0, "a")
    ahead.remove("c")
    assert dict(ahead.queued) == {"batch": 1}


def test_lines_of_sizes_all_alike_go_through_the_origin() -> None:
    line = Line(memory=50)
    assert not line.known
    for _ in range(5):
        line.add(100, 0.5)
    assert line.fit() == pytest.approx((0.0, 0.005, 100))
    line.add(200, 0.7)
    fixed, slope, _ = line.fit()
    assert (fixed, slope) == pytest.approx((0.3, 0.002))


def test_whatever_comes_in_whatever_order_nothing_is_left_over() -> None:
    chance = random.Random(7)
    ahead, alive, now = ledger(), [], 0.0
    for number in range(2000):
        now += chance.random() / 100
        match chance.randrange(5):
            case 0 | 1:
                newcomer = Newcomer(
                    chance.randrange(1, 500), 50, 2, chance.randrange(3), slo_class="ab"[number % 2]
                )
                ids = [f"r{number}#0", f"r{number}#1"]
                ahead.add(ids, newcomer, now, ahead.forecast(newcomer, now))
                alive += ids
            case 2 if alive:
                ahead.step(
                    StepFrame(now, accepted=[AcceptedItem(chance.choice(alive), 0, chance.randrange(400))])
                )
            case 3 if alive:
                first(ahead, now, chance.choice(alive), prefill_requests=chance.randrange(2))
            case _ if alive:
                ahead.remove(alive.pop(chance.randrange(len(alive))))
        assert ahead.outputs == len(alive)
        assert min([0, *ahead.queued.values(), ahead.waiting_tokens, ahead.promised_pages]) == 0
    for request in alive:
        ahead.step(StepFrame(now, finished=[FinishedItem(request, "length", output_tokens=3)]))
    assert (ahead.outputs, ahead.waiting_tokens, ahead.promised_pages, ahead._prompt_pages) == (0, 0, 0, 0)
    assert not ahead.queued


def test_an_engine_that_says_it_is_overloaded_is_believed_by_all_who_queue_last() -> None:
    ahead = ledger()
    ahead.step(StepFrame(0.0, load=LoadItem(9, 2, 900, overload_s=7.0)))
    assert ahead.forecast(Newcomer(500, 10), 0.0).ttft == pytest.approx(7.5)
    ahead.add(["later"], Newcomer(100, 10, priority=5), 0.0)
    assert ahead.forecast(Newcomer(500, 10), 0.0).ttft == pytest.approx(0.5)
    ahead.step(StepFrame(0.1, load=LoadItem(0, 2, 900)))
    assert ahead.forecast(Newcomer(500, 10, priority=5), 0.1).ttft == pytest.approx(0.6, rel=0.2)


def test_steps_told_of_together_teach_what_each_would() -> None:
    def taught(together: int) -> Forecast:
        ahead = ledger(max_running=64)
        for batch in (2, 4):
            ids = [f"{batch}-{k}" for k in range(batch)]
            ahead.add(ids, Newcomer(10, 1000, outputs=batch), 0.0)
            begun = batch * 100.0
            first(ahead, begun, *ids, decode_requests=batch)
            for name in [f"2-{k}" for k in range(2)] if batch == 4 else []:
                ahead.remove(name)
            for step in range(together, 241, together):
                tokens = [TokensItem(ids, pack_ids([1] * batch))]
                now = begun + step * 0.01 * batch
                ahead.step(StepFrame(now, tokens=tokens, decode_requests=batch), together)
        return ahead.forecast(Newcomer(10, 1000), 500.0)

    alone, several = taught(1), taught(4)
    assert alone.gap == pytest.approx(0.05, rel=0.05)
    assert several.gap == pytest.approx(alone.gap, rel=0.05)
    assert several.e2e == pytest.approx(alone.e2e, rel=0.05)
