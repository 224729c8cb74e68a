"""`drift top`: what messages become, what is drawn of it, and that a server that goes away is waited for."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from gateway_under_test import PATIENCE_S, UnderTest, run_with_gateway
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from drift_gateway.client import AsyncDriftClient
from drift_gateway.connection import Connection
from drift_gateway.observe.readings import Reading, Readings, compact, span_of, split_of
from drift_gateway.observe.timeline_chart import Span, columns, strip
from drift_gateway.terminal.top import History, Lost, follow, frame, run
from drift_gateway.v1 import info_pb2 as pb
from drift_scheduler.errors import DriftError

INFO = pb.GetServerInfoResponse(
    version="1",
    readiness=pb.READINESS_READY,
    model=pb.Model(name="m"),
    device=pb.Device(name="d", units=4),
    policies=pb.Policies(dispatch="gang", partition="tightest-decode"),
    kv_pool=pb.KvPool(page_tokens=16, total_pages=100, max_running=64),
)


def stretch(
    start: float, stop: float, how: int, prefill: int, decode: int, partition: tuple[int, int]
) -> Any:
    return pb.Stretch(
        start_us=int(start * 1e6),
        stop_us=int(stop * 1e6),
        sharing=how,  # type: ignore[arg-type]
        prefill_requests=prefill,
        decode_requests=decode,
        partition=pb.Partition(prefill_units=partition[0], decode_units=partition[1]),
    )


def message(time: float = 10.0, tokens: int = 100, **load: Any) -> pb.WatchStatsResponse:
    return pb.WatchStatsResponse(
        time_us=int(time * 1e6),
        load=pb.Load(
            in_flight=5, max_in_flight=50, waiting=2, running=3, free_pages=25, total_pages=100,
            tokens_generated=tokens, requests_finished=tokens // 10, prompt_tokens=200, cached_tokens=50, **load,
        ),
        stretches=[
            stretch(time - 0.5, time - 0.25, pb.SHARING_SPATIAL, 1, 2, (3, 1)),
            stretch(time - 0.25, time, pb.SHARING_EXCLUSIVE, 0, 2, (0, 4)),
        ],
        classes=[
            pb.ClassStats(
                **{"class": "default"}, finished=7, goodput=1.5, ttft_attainment=0.5, ttft_p50_ms=100,
                ttft_p99_ms=900, ttft_target_ms=500, tbt_p50_ms=10, tbt_p99_ms=12,
            )
        ],
    )  # fmt: skip


def test_a_reading_says_what_the_message_said() -> None:
    reading = Readings().take(INFO, message())
    assert reading["schema"] == "drift.stats/1"
    assert (reading["server"]["model"], reading["server"]["units"]) == ("m", 4)
    load = reading["load"]
    assert (load["used_pages"], load["kv_share"], load["prefix_hit_share"]) == (75, 0.75, 0.25)
    assert reading["split"] == {
        "prefill_units": pytest.approx(1.5),
        "decode_units": pytest.approx(2.5),
        "mixed_units": 0.0,
        "sharing": "spatial",
    }
    (entry,) = reading["classes"]
    assert (entry["ttft_p99_s"], entry["ttft_target_s"], entry["tbt_target_s"]) == (0.9, 0.5, None)
    assert reading["goodput"] == 1.5
    json.dumps(reading, allow_nan=False)


def test_rates_are_of_the_last_seconds_and_start_again_with_the_engine() -> None:
    readings = Readings()
    assert readings.take(INFO, message(10.0, 100))["rates"]["output_tokens_per_s"] is None
    assert readings.take(INFO, message(11.0, 150))["rates"]["output_tokens_per_s"] == pytest.approx(50)
    assert readings.take(INFO, message(12.0, 10))["rates"]["output_tokens_per_s"] is None
    for second in range(13, 30):
        rates = readings.take(INFO, message(float(second), 10 + (second - 12) * 7))["rates"]
    assert rates["output_tokens_per_s"] == pytest.approx(7)


def test_an_engine_that_says_nothing_leaves_blanks() -> None:
    reading = Readings().take(
        pb.GetServerInfoResponse(
            readiness=pb.READINESS_STARTING, start_up=pb.StartUp(phase="load weights", fraction=0.5)
        ),
        pb.WatchStatsResponse(time_us=5),
    )
    assert reading["server"]["phase"] == "load weights"
    assert (reading["load"]["waiting"], reading["load"]["kv_share"]) == (None, None)
    assert "load weights, 50%" in drawn(reading)


@pytest.mark.parametrize(
    ("how", "prefill", "decode", "partition", "units"),
    [
        (pb.SHARING_IDLE, 0, 0, (0, 0), (0, 0, 0)),
        (pb.SHARING_SPATIAL, 1, 2, (3, 1), (3, 1, 0)),
        (pb.SHARING_SPATIAL, 0, 2, (3, 1), (0, 1, 0)),
        (pb.SHARING_EXCLUSIVE, 1, 0, (4, 0), (4, 0, 0)),
        (pb.SHARING_FUSED, 1, 2, (0, 4), (0, 0, 4)),
        (pb.SHARING_TEMPORAL, 1, 2, (0, 4), (0, 0, 4)),
    ],
)
def test_units_belong_to_a_lane_or_to_both(
    how: int, prefill: int, decode: int, partition: tuple[int, int], units: tuple[int, int, int]
) -> None:
    span = span_of(stretch(0.0, 1.0, how, prefill, decode, partition))
    assert (span.prefill_units, span.decode_units, span.mixed_units) == units


PIECES = st.lists(st.tuples(st.floats(0.001, 0.5), st.integers(0, 8)), min_size=1, max_size=200)


def spans_of(pieces: list[tuple[float, int]]) -> list[Span]:
    spans, now = [], 5.0
    for length, prefill in pieces:
        spans.append(Span(now, now + length, prefill, 8 - prefill, "spatial"))
        now += length
    return spans


@given(PIECES)
def test_averaging_down_keeps_the_unit_seconds(pieces: list[tuple[float, int]]) -> None:
    spans = spans_of(pieces)
    fewer = compact(spans, 16)
    assert len(fewer) <= 16

    def unit_seconds(of: list[Span]) -> float:
        return sum((span.stop - span.start) * span.prefill_units for span in of)

    assert unit_seconds(fewer) == pytest.approx(unit_seconds(spans), rel=1e-6, abs=1e-6)
    split = split_of(spans)
    assert split["prefill_units"] + split["decode_units"] == pytest.approx(8)


@given(PIECES, st.integers(1, 80), st.integers(1, 9))
def test_a_strip_is_as_wide_as_asked_and_as_high_as_the_device(
    pieces: list[tuple[float, int]], width: int, rows: int
) -> None:
    entries = columns(spans_of(pieces), 5.0, 8.0, width)
    lines = strip(entries, 8, rows)
    assert [len(line.plain) for line in lines] == [width] * rows
    assert all(set(line.plain) <= set("█▒▓·") for line in lines)


def drawn(reading: Reading | None, lost: str | None = None, width: int = 100) -> str:
    history = History()
    if reading is not None:
        history.add(reading)
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(frame("host:1", reading, history, lost))
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_frame_shows_everything_in_any_width(width: int) -> None:
    reading = Readings().take(INFO, message())
    text = drawn(reading, width=width)
    assert all(len(line) <= width for line in text.splitlines())
    for words in (
        "ready",
        "prefill 1.5 + dec",
        "3 of 64",
        "5 in flight",
        "75 of 100",
        "25% of",
        "goodput",
        "0.90",
    ):
        assert words in text, words
    bar = next(line for line in text.splitlines() if line.startswith("device"))
    assert bar.count("█") / (bar.count("█") + bar.count("▒") + bar.count("·")) == pytest.approx(
        1.5 / 4, abs=0.07
    )


@pytest.mark.parametrize("width", [80, 140])
def test_a_long_name_of_a_class_takes_no_room_from_its_numbers(width: int) -> None:
    told = message()
    setattr(told.classes[0], "class", "interactive-of-the-mobile-application-in-the-north-europe-region")
    text = drawn(Readings().take(INFO, told), width=width)
    line = next(line for line in text.splitlines() if line.startswith("inter"))
    assert "0.90" in line
    assert line.rstrip().endswith("1.50/s")


@settings(deadline=None)
@given(
    st.integers(40, 140),
    st.lists(
        st.tuples(st.sampled_from("abcdefghij"), st.integers(1, 60), st.floats(0, 1e6)),
        min_size=1,
        max_size=3,
    ),
)
def test_columns_are_left_out_whole_and_never_cut(width: int, classes: list[tuple[str, int, float]]) -> None:
    told = message()
    del told.classes[:]
    for letter, length, late in classes:
        name = {"class": letter * length}
        told.classes.add(
            **name, finished=1234, ttft_p99_ms=late, tbt_p99_ms=late, tbt_target_ms=50, goodput=1.5
        )
    lines = drawn(Readings().take(INFO, told), width=width).splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("minute"))
    assert "p99" in lines[head]
    for line, (letter, length, late) in zip(lines[head + 1 :], classes, strict=False):
        name, *cells = line.split()
        assert name.rstrip("…") == letter * len(name.rstrip("…"))
        assert len(name) >= min(length, 12)
        assert "…" not in "".join(cells)
        assert len(cells) == len(lines[head].split()) - 1
        assert f"{late / 1e3:,.2f}" in cells


def test_the_least_important_columns_go_first() -> None:
    def headings(width: int) -> set[str]:
        text = drawn(Readings().take(INFO, message()), width=width)
        return set(next(line for line in text.splitlines() if line.startswith("minute")).split())

    everything = {"minute", "done", "p50", "p99", "target", "kept", "goodput"}
    assert headings(100) == everything
    assert headings(70) == everything - {"p50"}
    assert headings(60) == everything - {"p50", "target"}
    assert headings(45) == {"minute", "p99", "kept", "goodput"}
    assert headings(30) == {"minute", "p99"}


def test_a_frame_without_a_server_says_so() -> None:
    assert "no answer: gone" in drawn(None, "gone")
    reading = Readings().take(INFO, message())
    assert "last seen" in drawn(reading, "gone")


async def next_reading(news: AsyncGenerator[Reading | Lost]) -> Reading:
    while isinstance(item := await asyncio.wait_for(anext(news), PATIENCE_S), Lost):
        continue
    return item


def test_top_shows_running_requests_and_survives_a_restart_of_the_engine() -> None:
    async def body(under: UnderTest) -> None:
        running = asyncio.create_task(under.client.generate(token_ids=[1], max_tokens=4000).complete())
        async with aclosing(follow(under.client, 0.05)) as news:
            while (reading := await next_reading(news))["load"]["running"] != 1:
                pass
            assert reading["server"]["readiness"] == "ready"
            while (reading := await next_reading(news))["split"]["decode_units"] != 1.0:
                pass
            under.engine.crash()
            while (reading := await next_reading(news))["server"]["restarts"] != 1:
                pass
            while (reading := await next_reading(news))["server"]["readiness"] != "ready":
                pass
        running.cancel()
        await asyncio.wait((running,))

    run_with_gateway(body, step_seconds=0.01)


def test_a_server_that_goes_away_is_waited_for() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def body(under: UnderTest, news: AsyncGenerator[Reading | Lost]) -> None:
        reading = await next_reading(news)
        assert reading["server"]["model"] == "fake"

    async def both() -> None:
        from gateway_under_test import gateway_running

        async with AsyncDriftClient(f"127.0.0.1:{port}") as client, aclosing(follow(client, 0.05)) as news:
            assert isinstance(await anext(news), Lost)
            async with gateway_running(port=port) as under:
                await body(under, news)
            while not isinstance(await asyncio.wait_for(anext(news), PATIENCE_S), Lost):
                pass
            async with gateway_running(port=port) as under:
                await body(under, news)

    asyncio.run(both())


def test_once_and_lines_of_json_from_the_command_line() -> None:
    async def command(under: UnderTest, *options: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "drift_scheduler.cli", "top", "--target", under.target, *options,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        if "--once" in options:
            out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
            assert process.returncode == 0
            return out.decode()
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
        process.terminate()
        await process.communicate()
        return line.decode()

    async def body(under: UnderTest) -> None:
        assert "fake on fake, 2 units" in await command(under, "--once")
        assert json.loads(await command(under, "--once", "--json"))["schema"] == "drift.stats/1"
        assert json.loads(await command(under, "--json"))["load"]["max_in_flight"] == 1024

    run_with_gateway(body)


def test_nobody_there_is_one_line_that_says_what_to_do() -> None:
    with pytest.raises(
        DriftError, match=r"^127\.0\.0\.1:1: nobody answers \(.*drift serve --listen 127\.0\.0\.1:1`$"
    ):
        run(Connection("127.0.0.1:1"), Console(quiet=True), once=True)
