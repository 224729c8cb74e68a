"""`drift load`: prompts that share what the trace says, an account that hides nothing, and runs over a real socket."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gateway_under_test import PATIENCE_S, UnderTest, run_with_gateway
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from drift_gateway.commands.clients import load as load_command
from drift_gateway.connection import Connection
from drift_gateway.terminal.load import LoadOptions, measure
from drift_gateway.terminal.load_account import Account, DeviceTime, Outcome
from drift_gateway.terminal.load_prompts import PromptMaker, fit
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import info_pb2
from drift_scheduler.domain import SLO, FinishReason, Request
from drift_scheduler.errors import DriftError
from drift_scheduler.plugins import load as load_plugins
from drift_scheduler.report import Report, print_report
from drift_scheduler.simulation.run import Scenario, simulate

TARGETS = SLO(1.0, 0.1)


def request(keys: tuple[int, ...] = (), prompt: int = 100, output: int = 10, name: str = "r") -> Request:
    return Request(name, 0.0, prompt, 4096, TARGETS, prefix_keys=keys, key_tokens=16, output_tokens=output)


def write_trace(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def burst(tmp_path: Path, count: int, prompt: int = 20, output: int = 5, every_ms: float = 1.0) -> str:
    rows = [
        {"arrival_ms": i * every_ms, "input_tokens": prompt, "output_tokens": output} for i in range(count)
    ]
    return write_trace(tmp_path / "burst.jsonl", rows)


async def load(under: UnderTest, **settings: Any) -> Report:
    options = LoadOptions(Connection(under.target), **settings)
    return await measure(options, load_plugins(), Console(quiet=True))


# ------------------------------------------------------------------------------------------ prompts


@given(
    st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.integers(0, 3), max_size=6),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_prompts_begin_alike_as_far_as_their_keys_agree(
    a: list[int], b: list[int], tail_a: int, tail_b: int
) -> None:
    # A key names its run and everything before it.
    keys_a = tuple(hash(tuple(a[: i + 1])) for i in range(len(a)))
    keys_b = tuple(hash(tuple(b[: i + 1])) for i in range(len(b)))
    maker = PromptMaker(50_000, 4096)
    one = maker.make(request(keys_a, 16 * len(a) + tail_a + 1, name="one")).token_ids
    two = maker.make(request(keys_b, 16 * len(b) + tail_b + 1, name="two")).token_ids
    agreeing = 0
    while agreeing < min(len(a), len(b)) and keys_a[agreeing] == keys_b[agreeing]:
        agreeing += 1
    assert one[: 16 * agreeing] == two[: 16 * agreeing]
    rest = slice(16 * agreeing, 16 * agreeing + 16)
    if len(one[rest]) > 3 and len(two[rest]) > 3:
        shorter = min(len(one[rest]), len(two[rest]))
        assert one[rest][:shorter] != two[rest][:shorter]


def test_prompts_are_the_same_for_the_same_seed_and_below_the_vocabulary() -> None:
    made = PromptMaker(300, 4096, seed=3).make(request((1, 2), 90))
    assert made == PromptMaker(300, 4096, seed=3).make(request((1, 2), 90))
    assert made != PromptMaker(300, 4096, seed=4).make(request((1, 2), 90))
    assert len(made.token_ids) == 90
    assert min(made.token_ids) >= 0
    assert max(made.token_ids) < 300
    assert not made.cut


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(2, 4096))
def test_lengths_fit_and_nothing_is_cut_without_need(prompt: int, output: int, room: int) -> None:
    fitted = fit(prompt, output, room)
    assert sum(fitted) <= room
    assert min(fitted) >= 1
    if prompt + output <= room:
        assert fitted == (prompt, output)
    else:
        assert sum(fitted) == room
        assert fitted[0] <= prompt
        assert fitted[1] <= output


# ------------------------------------------------------------------------------------------ account


def test_latency_counts_from_the_intended_time() -> None:
    account = Account(units=2)
    outcome = Outcome(request(output=3), due=10.0)
    account.due(outcome.request, 10.0, 10.5, cut=False)
    account.sent(outcome, 10.5)
    outcome.delta(pb.TokenDelta(sequence=0, token_ids=[1], offsets_us=[100_000]), 10.7)
    outcome.delta(pb.TokenDelta(sequence=1, token_ids=[2, 3], offsets_us=[120_000, 140_000]), 10.9)
    outcome.end(
        pb.Finished(reason=pb.FINISH_REASON_LENGTH, timing=pb.RequestTiming(queue_ms=50, ttft_ms=100))
    )
    account.ended(outcome, 10.9)
    report = account.report({}, None)
    assert report["ttft_s"]["max"] == pytest.approx(0.7)
    assert report["client"]["send_lag_s"]["max"] == pytest.approx(0.5)
    assert report["queue_s"]["max"] == pytest.approx(0.55)
    assert (report["tbt_s"]["max"], report["tbt_s"]["p50"]) == (pytest.approx(0.2), 0.0)
    assert report["server"]["tbt_s"]["max"] == pytest.approx(0.02)
    assert report["server"]["ttft_s"]["max"] == pytest.approx(0.1)
    assert report["slo"]["tbt_attainment"] == 0.5
    assert report["throughput"]["output_tokens_per_s"] == pytest.approx(3 / 0.9)
    assert report["lanes"] == {"prefill_busy": None, "decode_busy": None, "bubble_ratio": None}
    print_report(report, Console(quiet=True))


def test_lost_and_repeated_messages_are_counted() -> None:
    outcome = Outcome(request(), due=0.0)
    for sequence in (0, 1, 3, 3):
        outcome.delta(pb.TokenDelta(sequence=sequence, token_ids=[1]), 1.0)
    assert outcome.faults == 1, "one was lost; the next one is in its place again"


def test_the_devices_time_is_what_the_server_said() -> None:
    device = DeviceTime()
    split = info_pb2.Partition(prefill_units=1, decode_units=3)
    pieces = [
        (0, 1_000_000, info_pb2.SHARING_IDLE, 0, 0),
        (1_000_000, 3_000_000, info_pb2.SHARING_SPATIAL, 1, 2),
        (3_000_000, 4_000_000, info_pb2.SHARING_SPATIAL, 0, 2),
        (4_000_000, 6_000_000, info_pb2.SHARING_EXCLUSIVE, 1, 0),
    ]
    stretches = [
        info_pb2.Stretch(
            start_us=a, stop_us=b, sharing=how, partition=split, prefill_requests=p, decode_requests=d
        )
        for a, b, how, p, d in pieces
    ]
    load = info_pb2.Load(free_pages=25, total_pages=100)
    device.add(info_pb2.WatchStatsResponse(time_us=6_000_000, load=load, stretches=stretches), 106.0)
    device.complete = True
    account = Account(units=4)
    account.due(request(), 100.5, 100.5, cut=False)
    account.ended(Outcome(request(), 100.5, reason=FinishReason.FAILED), 105.0)
    report = account.report({}, device)
    assert report["sharing_s"]["idle"] == pytest.approx(0.5)
    assert report["sharing_s"]["spatial"] == pytest.approx(3.0)
    assert report["sharing_s"]["exclusive_prefill"] == pytest.approx(1.0), "cut off at the end of the run"
    assert report["lanes"]["prefill_busy"] == pytest.approx(3.0 / 4.5)
    assert report["lanes"]["bubble_ratio"] == pytest.approx(1.0 / 16.0)
    assert report["kv"]["peak_utilisation"] == pytest.approx(0.75)


def keys_of(value: Any, path: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {path}
    found = {path}
    for name, inner in value.items():
        found |= keys_of(inner, f"{path}.{name}")
    return found


def test_the_report_has_every_field_of_a_simulation(tmp_path: Path) -> None:
    trace = burst(tmp_path, 5)
    simulated = simulate(Scenario(trace, "h100", "llama-3.1-8b", "gang", TARGETS))
    reports: list[Report] = []

    async def body(under: UnderTest) -> None:
        reports.append(await load(under, workload=trace, slo_ttft=1.0, slo_tbt=0.1))

    run_with_gateway(body)
    (loaded,) = reports
    missing = keys_of(simulated) - keys_of(loaded)
    own = {".config.cost", ".config.truth", ".config.noise", ".config.versions.drift-scheduler"}
    assert missing <= own
    assert (loaded["schema"], loaded["requests"]) == ("drift.report/1", simulated["requests"])
    assert loaded["slo"]["classes"].keys() == simulated["slo"]["classes"].keys()


# --------------------------------------------------------------------------------------------- runs


def test_a_workload_arrives_as_the_trace_says(tmp_path: Path) -> None:
    rows = [
        {"arrival_ms": 0, "input_tokens": 70, "output_tokens": 7, "prefix_block_hashes": [1, 2], "block_tokens": 32},
        {"arrival_ms": 5, "input_tokens": 64, "output_tokens": 3, "prefix_block_hashes": [1, 3], "block_tokens": 32,
         "session": "s"},
        {"arrival_ms": 9, "input_tokens": 9000, "output_tokens": 50, "block_tokens": 32},
    ]  # fmt: skip
    trace = write_trace(tmp_path / "t.jsonl", rows)

    async def body(under: UnderTest) -> None:
        report = await load(under, workload=trace, slo_ttft=0.7, slo_tbt=0.03, slo_class="gold")
        first, second, third = sorted(under.engine.submits(), key=lambda submit: submit.id)
        assert (len(first.prompt), len(second.prompt)) == (70, 64)
        assert first.prompt[:32] == second.prompt[:32]
        assert first.prompt[32:64] != second.prompt[32:64]
        assert (first.sampling.max_tokens, second.sampling.max_tokens) == (7, 3)
        assert first.sampling.ignore_eos
        assert (first.slo_ttft, first.slo_tbt, first.slo_class) == (0.7, 0.03, "gold")
        assert (len(third.prompt), third.sampling.max_tokens) == (4096 - 50, 50)
        assert report["client"]["shortened_requests"] == 1
        assert report["requests"]["finished"] == 3
        assert report["config"]["slo_class"] == "gold"
        assert report["ttft_s"]["max"] >= report["ttft_s"]["p50"] > 0
        assert report["client"]["sequence_faults"] == 0

    run_with_gateway(body)


def test_a_target_for_the_whole_and_a_priority_reach_the_server_and_count(tmp_path: Path) -> None:
    trace = burst(tmp_path, 3)

    async def body(under: UnderTest) -> None:
        kept = await load(under, workload=trace, slo_ttft=60.0, slo_tbt=60.0, slo_e2e=600.0, priority=-3)
        missed = await load(under, workload=trace, slo_ttft=60.0, slo_tbt=60.0, slo_e2e=1e-5, priority=0)
        submits = under.engine.submits()
        assert [submit.slo_e2e for submit in submits] == [600.0] * 3 + [1e-5] * 3
        assert [submit.priority for submit in submits] == [-3] * 3 + [0] * 3
        assert (kept["slo"]["attainment"], missed["slo"]["attainment"]) == (1.0, 0.0)
        assert (kept["config"]["slo_e2e"], kept["config"]["priority"]) == (600.0, -3)

    run_with_gateway(body)


def test_the_command_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[LoadOptions] = []

    def remember(options: LoadOptions, *_: Any) -> Report:
        given.append(options)
        raise DriftError("enough")

    monkeypatch.setattr("drift_gateway.terminal.load.run", remember)
    asked = ["--workload", "sharegpt", "--slo-e2e", "20", "--priority", "-7"]
    assert "enough" in CliRunner().invoke(load_command, asked).output
    assert (given[0].slo_e2e, given[0].priority) == (20.0, -7)
    refused = CliRunner().invoke(load_command, ["--workload", "sharegpt", "--priority", "1001"])
    assert (refused.exit_code, "-1000<=x<=1000" in refused.output) == (2, True)


def test_where_no_report_can_go_is_seen_before_anybody_is_asked(tmp_path: Path) -> None:
    asked = [
        "--workload",
        "sharegpt",
        "--target",
        "nowhere:1",
        "--json",
        str(tmp_path / "none" / "load.json"),
    ]
    with pytest.raises(DriftError, match=r"none/load\.json: No such file or directory"):
        CliRunner().invoke(load_command, asked, catch_exceptions=False)


def test_a_stalled_server_does_not_slow_the_client_down(tmp_path: Path) -> None:
    trace = burst(tmp_path, 40, every_ms=2.0)

    async def body(under: UnderTest) -> None:
        running = asyncio.create_task(load(under, workload=trace))
        await under.until(lambda engine: len(engine.submits()) == 40)
        assert not running.done()
        last_sent = asyncio.get_running_loop().time()
        await asyncio.sleep(0.2)
        stalled = asyncio.get_running_loop().time() - last_sent
        under.engine.step(1000)
        report = await asyncio.wait_for(running, PATIENCE_S)
        assert report["requests"]["finished"] == 40
        assert report["ttft_s"]["mean"] > stalled, "the stall counts for every request that was due"

    run_with_gateway(body, paused=True)


def test_refusals_are_rejections_and_say_why(tmp_path: Path) -> None:
    trace = burst(tmp_path, 10, every_ms=1.0)

    async def body(under: UnderTest) -> None:
        report = await load(under, workload=trace, timeout=3.0)
        assert report["requests"] == {
            "offered": 10, "finished": 0, "rejected": 8, "cancelled": 0, "failed": 2,
        }  # fmt: skip
        assert report["slo"]["attainment"] == 0.0
        (refused, count), (late, _) = report["client"]["errors"].items()
        assert count == 8
        assert refused.startswith("RESOURCE_EXHAUSTED")
        assert late.startswith("DEADLINE_EXCEEDED")
        assert 0 < report["client"]["refused_after_s"]["max"] < 3.0

    run_with_gateway(body, max_in_flight=2, paused=True)


def test_a_crash_of_the_engine_fails_what_ran(tmp_path: Path) -> None:
    trace = burst(tmp_path, 3)

    async def body(under: UnderTest) -> None:
        running = asyncio.create_task(load(under, workload=trace))
        await under.until(lambda engine: len(engine.submits()) == 3)
        under.engine.crash()
        report = await asyncio.wait_for(running, PATIENCE_S)
        assert report["requests"]["failed"] == 3
        assert report["slo"]["met"] is False

    run_with_gateway(body, paused=True)


def test_ctrl_c_reports_what_was_done(tmp_path: Path) -> None:
    trace = burst(tmp_path, 1000, output=4, every_ms=20.0)
    path = tmp_path / "report.json"

    async def body(under: UnderTest) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "drift_scheduler.cli", "load", "--target", under.target, "--workload", trace,
            "--json", str(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        await under.until(lambda engine: len(engine.submits()) >= 5)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert process.returncode == 130, err
        report = json.loads(path.read_text())
        assert report["config"]["interrupted"] is True
        requests = report["requests"]
        assert 5 <= requests["offered"] < 1000
        assert requests["finished"] + requests["cancelled"] == requests["offered"]
        assert b"requests finished" in out
        assert b"meant to be sent" in err

    run_with_gateway(body, step_seconds=0.01)


def test_nobody_there_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    async def body() -> None:
        options = LoadOptions(Connection("127.0.0.1:1"), burst(tmp_path, 1))
        await measure(options, load_plugins(), Console(quiet=True))

    with pytest.raises(DriftError, match=r"^127\.0\.0\.1:1: .*drift serve --listen 127\.0\.0\.1:1"):
        asyncio.run(body())


def test_a_server_that_does_not_serve_is_waited_for_and_that_is_said(tmp_path: Path) -> None:
    async def body(under: UnderTest) -> None:
        under.supervisor.drain(True)
        said = io.StringIO()
        options = LoadOptions(Connection(under.target), burst(tmp_path, 1))
        running = asyncio.create_task(measure(options, load_plugins(), Console(file=said)))
        async with asyncio.timeout(PATIENCE_S):
            while f"{under.target}: draining; waiting for it\n" not in said.getvalue():
                await asyncio.sleep(0.01)
        under.supervisor.drain(False)
        report = await asyncio.wait_for(running, PATIENCE_S)
        assert report["requests"]["finished"] == 1

    run_with_gateway(body)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(DriftError, match="slo-tbt is -1"):
        LoadOptions(Connection("x:1"), "sharegpt", slo_tbt=-1.0).check()
    with pytest.raises(DriftError, match="slo-e2e is 0"):
        LoadOptions(Connection("x:1"), "sharegpt", slo_e2e=0.0).check()
