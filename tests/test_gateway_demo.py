"""The pieces of the demo that draw and choose; the whole of it runs in test_gateway_end_to_end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from drift_gateway import client as api
from drift_gateway.observe.timeline_chart import Span, bins, chart
from drift_gateway.terminal import demo


def test_stretches_are_averaged_over_time() -> None:
    spans = [
        Span(0.0, 5.0, 0, 0, "idle"),
        Span(5.0, 6.0, 4, 0, "exclusive"),
        Span(6.0, 8.0, 2, 2, "spatial"),
        Span(8.0, 9.0, 0, 4, "exclusive"),
        Span(9.0, 20.0, 0, 0, "idle"),
    ]
    first, second = bins(spans, 2)
    assert (first.start, first.prefill_units, first.decode_units, first.sharing) == (
        0.0,
        3.0,
        1.0,
        "exclusive",
    )
    assert (second.start, second.prefill_units, second.decode_units, second.sharing) == (
        2.0,
        1.0,
        3.0,
        "spatial",
    )


def test_nothing_is_drawn_of_an_idle_run() -> None:
    assert bins([Span(0.0, 5.0, 0, 0, "idle")], 3) == []
    assert chart([], 4) == []


@given(st.lists(st.tuples(st.floats(0.01, 2.0), st.integers(0, 8)), min_size=1, max_size=30))
def test_every_bar_is_as_wide_as_the_device(pieces: list[tuple[float, int]]) -> None:
    spans, now = [], 0.0
    for length, prefill in pieces:
        spans.append(Span(now, now + length, prefill, 8 - prefill, "spatial"))
        now += length
    lines = chart(spans, 8, lines=5, width=40)
    assert len(lines) == 5
    for line in lines:
        assert sum(line.plain.count(mark) for mark in "█▒·") >= 40


def test_prompts_are_of_very_different_lengths_and_fit_the_context() -> None:
    for context in (512, 2048):
        lengths = [len(demo.prompt_of(ask, context)) for ask in demo.ASKS]
        assert min(lengths) < 80
        assert max(lengths) > 10 * min(lengths)
        assert max(lengths) < context * demo.CHARACTERS_PER_TOKEN
        assert all("\n" not in demo.prompt_of(ask, context) for ask in demo.ASKS)


def test_the_table_holds_each_request_against_its_targets() -> None:
    timing = api.Timing(
        queue=0.1, prefill=0.2, ttft=0.3, tbt_p50=0.01, tbt_p99=0.2, tbt_max=0.25, e2e=1.0, preemptions=0,
        recomputed_tokens=0, late_tokens=1, slo=api.SLO(0.5, 0.05), ttft_met=True, tbt_met=False, e2e_met=None,
        gateway=0.0,
    )  # fmt: skip
    done = api.Finished(0, "length", "", None, api.Usage(15, 0, 96), timing)
    stories = [
        demo.Story(demo.ASKS[0], "text", 15, done),
        demo.Story(demo.ASKS[1], error="UNAVAILABLE: the engine is gone"),
    ]
    console = Console(width=140)
    with console.capture() as capture:
        console.print(demo.results(stories))
    drawn = capture.get()
    for cell in ("0.300", "0.50", "10.0", "200.0", "250.0", "no", "UNAVAILABLE: the engine is gone"):
        assert cell in drawn
    assert [story.well for story in stories] == [True, False]


def test_a_server_that_ends_at_once_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    with pytest.raises(demo.DriftError, match="the server ended with status 1"):
        demo.run(console=Console(quiet=True))
