"""Decision logs: written, read back, followed decision by decision, and served anew under other policies."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_scheduler import cli
from drift_scheduler.cost.fitted import FittedCost
from drift_scheduler.cost.table import CostTable, DecodeRow, PrefillRow
from drift_scheduler.decision_log import DecisionLog
from drift_scheduler.dispatch import CLUSTER_ONLY, FACTORIES
from drift_scheduler.domain import SLO, Device, Partition, Request, StepRecord, Tokens
from drift_scheduler.errors import DriftError
from drift_scheduler.log_facts import Sample, Timed, gather, measured_device
from drift_scheduler.log_reader import open_log
from drift_scheduler.loop import serve
from drift_scheduler.partition.tightest_decode import TightestDecode
from drift_scheduler.plugins import load
from drift_scheduler.replay import kendall, ranks, replay
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.simulation.executor import Overheads, SimulatedExecutor
from drift_scheduler.simulation.kv import CountingKv

LAYERS, UNITS, PAGE = 6, 4, 16
MENU = tuple(Partition(UNITS - d, d) for d in range(UNITS + 1))
DEVICE = Device(UNITS, MENU, LAYERS, name="four units")


@pytest.fixture(autouse=True)
def only_built_in_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drift_scheduler.plugins.entry_points", lambda group: ())
    monkeypatch.setattr(cli.drift, "_found", None, raising=False)


def drift(*args: str) -> Result:
    return CliRunner().invoke(cli.drift, args, prog_name="drift")


def simulated_log(path: Path, dispatch: str, *more: str) -> Path:
    result = drift(
        *("simulate", "--device", "a100-80gb", "--model", "llama-3.1-8b", "--workload", "tool-agent"),
        *("--requests", "30", "--rate", "4", "--dispatch", dispatch, "--log", str(path), *more),
    )
    assert result.exit_code == 0, result.stderr
    return path


def replayed(*args: str) -> dict[str, Any]:
    result = drift("replay", *args, "--json", "-")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def table() -> CostTable:
    prefill = [
        PrefillRow(
            units=u, requests=1, new=n, reused=r, new_squared=n * n, new_times_reused=n * r,
            seconds=(2e-3 + 1e-4 * n + 1e-7 * n * (n + r)) / u**0.9,
        )
        for u in range(1, UNITS + 1) for n, r in ((16, 0), (128, 0), (400, 0), (64, 200))
    ]  # fmt: skip
    decode = [
        DecodeRow(units=u, batch=b, context_tokens=b * c, seconds=(3e-3 + 1e-4 * b + 1e-6 * b * c) / u**0.4)
        for u in range(1, UNITS + 1) for b in (1, 8) for c in (32, 256)
    ]  # fmt: skip
    return CostTable(
        device="four units", model="made up", num_layers=LAYERS, total_units=UNITS,
        menu=tuple((p.prefill, p.decode) for p in MENU), prefill=tuple(prefill), decode=tuple(decode),
    )  # fmt: skip


def served_requests(seed: int = 1, count: int = 40) -> list[Request]:
    """Real prompts, of which many begin alike, at an engine's large clock values."""
    draw = random.Random(seed)
    common = [draw.randrange(1000) for _ in range(96)]
    now, requests = 70_000.0, []
    for i in range(count):
        now += draw.choice((0.0, 0.004, 0.03))
        prompt = common[: draw.choice((0, 48, 96))] + [
            draw.randrange(1000) for _ in range(draw.randrange(3, 220))
        ]
        requests.append(
            Request(
                f"r{i}", now, len(prompt), draw.randrange(2, 60), SLO(0.5, draw.choice((0.006, 0.02))),
                prompt=prompt, salt=draw.choice(("", "tenant")),
                prefix_keys=[(*prompt[: (k + 1) * PAGE],) for k in range(len(prompt) // PAGE)],
            )
        )  # fmt: skip
    return requests


def engine_log(
    path: Path, dispatch: str, slower: float = 1.0, *, with_table: bool = True, pages: int = 60
) -> Path:
    """A log as an engine writes it: real prompts, a cost table, a device that is not what the table says."""
    costs = FittedCost(table())
    truth = FittedCost(table(), slowdown_prefill=1.3, slowdown_decode=1.4)
    scheduler = Scheduler(
        DEVICE,
        CountingKv(pages, PAGE),
        FACTORIES[dispatch](),
        TightestDecode(),
        costs,
        Limits(max_running=12),
    )
    if not with_table:
        del costs.table
    config = {
        "model": "made-up",
        "dispatch": dispatch,
        "partition": "tightest-decode",
        "dispatch_options": {},
    }

    class Slower:
        """The table's times, all of them longer."""

        def __getattr__(self, name: str) -> Callable[..., Any]:
            if name == "slowdown":
                return truth.slowdown
            return lambda *work: getattr(truth, name)(*work) * slower

    executor = SimulatedExecutor(DEVICE, Slower(), served_requests(), overheads=Overheads(noise=0.1), seed=4)
    with DecisionLog(path, scheduler, config) as log:
        if not with_table:
            costs.table = table()
        serve(scheduler, executor, lambda step: None, [log])
    return path


# ---------------------------------------------------------------------------------- simulated logs


@pytest.mark.parametrize("dispatch", ["drift", "gang", "chunked-prefill", "temporal", "streams"])
def test_a_simulated_log_replays_without_any_error(tmp_path: Path, dispatch: str) -> None:
    log = simulated_log(tmp_path / "a.jsonl", dispatch, "--noise", "0.1", "--seed", "3")
    (found,) = replayed(str(log))["logs"]
    assert set(found["error"].values()) == {0.0}
    own = found["decisions"]
    assert own["ratio"] == 1.0
    assert own["stopped"] is None
    assert own["states_differ"] == 0
    assert own["followed_steps"] == found["steps"]


def test_a_pool_under_pressure_is_followed_as_well(tmp_path: Path) -> None:
    log = simulated_log(
        tmp_path / "a.jsonl",
        "gang",
        "--workload",
        "synthetic:output_mean=400",
        "--kv-pages",
        "200",
        "--rate",
        "40",
    )
    (found,) = replayed(str(log), "--dispatch", "chunked-prefill")["logs"]
    assert found["decisions"]["ratio"] == 1.0
    assert found["error"]["ttft_p99"] == 0.0
    assert any(json.loads(line)["view"]["blocked"] for line in log.read_text().splitlines()[1:])


def test_another_policy_is_asked_at_every_decision_and_served_anew(tmp_path: Path) -> None:
    log = simulated_log(tmp_path / "a.jsonl", "gang")
    (found,) = replayed(str(log), "--dispatch", "chunked-prefill:token_budget=256,gang:max_batch_tokens=64")[
        "logs"
    ]
    chunked, small = found["others"]
    decisions = chunked["decisions"]
    assert decisions["compared"] == found["decisions"]["compared"] == small["decisions"]["compared"]
    assert 0 < decisions["ratio"] < 1
    assert decisions["agreed"] + sum(decisions["differ"].values()) == decisions["compared"]
    first = decisions["first_difference"]
    line = json.loads(log.read_text().splitlines()[first["line"] - 1])
    assert (line["step"], line["gang"]["sharing"]) == (first["step"], "spatial")
    assert first["other"].startswith("fused")
    outcome = chunked["report"]
    assert outcome["requests"]["finished"] == 30
    assert outcome["config"]["dispatch"] == "chunked-prefill:token_budget=256"
    direct = simulate_directly("chunked-prefill:token_budget=256")
    assert outcome["ttft_s"] == direct["ttft_s"]


def simulate_directly(dispatch: str) -> dict[str, Any]:
    result = drift(
        *("simulate", "--device", "a100-80gb", "--model", "llama-3.1-8b", "--workload", "tool-agent"),
        *("--requests", "30", "--rate", "4", "--dispatch", dispatch, "--json", "-"),
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_another_partition_policy_is_asked(tmp_path: Path) -> None:
    log = simulated_log(tmp_path / "a.jsonl", "gang", "--rate", "8")
    (found,) = replayed(str(log), "--partition", "static:decode_units=64")["logs"]
    (other,) = found["others"]
    assert other["dispatch"] == "gang"
    assert other["decisions"]["differ"]["partition"] > 0


def test_a_policy_that_cannot_run_there_says_why_and_is_still_served_where_it_can(tmp_path: Path) -> None:
    log = simulated_log(tmp_path / "a.jsonl", "gang", "--device", "8xa100-80gb")
    (found,) = replayed(str(log), "--dispatch", "nanoflow")["logs"]
    (other,) = found["others"]
    assert "simulated clusters only" in other["decisions"]["reason"]
    assert other["report"]["requests"]["finished"] == 30


@pytest.mark.parametrize("system", sorted(CLUSTER_ONLY))
def test_logs_of_other_systems_are_read_and_served_as_they_were(tmp_path: Path, system: str) -> None:
    log = simulated_log(tmp_path / "a.jsonl", system, "--device", "8xa100-80gb", "--workload", "sharegpt")
    (found,) = replayed(str(log), "--dispatch", "gang")["logs"]
    assert found["decisions"]["ratio"] == 1.0
    (other,) = found["others"]
    assert other["report"]["requests"]["finished"] == 30


def test_a_table_for_people_says_both(tmp_path: Path) -> None:
    log = simulated_log(tmp_path / "a.jsonl", "gang")
    result = drift("replay", str(log), "--dispatch", "chunked-prefill")
    assert result.exit_code == 0, result.stderr
    for words in ("simulator's error", "chunked-prefill first differs at line", "+0.0%"):
        assert words in result.stdout


def test_several_logs_are_ranked(tmp_path: Path) -> None:
    logs = [
        str(simulated_log(tmp_path / f"{name}.jsonl", name)) for name in ("gang", "decode-first", "drift")
    ]
    ranking = replayed(*logs)["ranking"]
    assert ranking["policies"] == ["gang", "decode-first", "drift"]
    assert {name: found["tau"] for name, found in ranking["statistics"].items()} == dict.fromkeys(
        ("ttft_p50", "ttft_p99", "tbt_p50", "tbt_p99"), pytest.approx(1.0)
    )


# ------------------------------------------------------------------------------------ engines' logs


@pytest.mark.parametrize("dispatch", ["gang", "chunked-prefill", "prefill-first"])
def test_an_engines_log_is_followed_exactly_prefixes_and_all(tmp_path: Path, dispatch: str) -> None:
    log = engine_log(tmp_path / "a.jsonl", dispatch)
    (found,) = replay([str(log)], ["drift"], None, load(installed=False))["logs"]
    assert found["source"] == "engine"
    assert found["decisions"]["ratio"] == 1.0
    assert found["decisions"]["states_differ"] == 0
    assert found["others"][0]["report"]["requests"]["finished"] == 40


def test_the_simulator_learns_from_an_engines_log_how_slow_its_device_is(tmp_path: Path) -> None:
    log = engine_log(tmp_path / "a.jsonl", "gang", slower=3.0)
    (found,) = replay([str(log)], [], None, load(installed=False))["logs"]
    assert abs(found["error"]["tbt_p50"]) < 0.15
    assert abs(found["error"]["ttft_p50"]) < 0.3
    fitted = measured_device(open_log(log), gather(open_log(log)))
    assert fitted.typical.factor("decode", UNITS) == pytest.approx(3.0, rel=0.15)


def test_without_a_cost_table_one_is_fitted_to_the_log(tmp_path: Path) -> None:
    log = engine_log(tmp_path / "a.jsonl", "gang", with_table=False)
    opened = open_log(log)
    assert opened.table is None
    (found,) = replay([str(log)], ["chunked-prefill"], None, load(installed=False))["logs"]
    assert abs(found["error"]["tbt_p50"]) < 0.25


def test_engines_logs_rank_by_the_costs_of_the_first(tmp_path: Path) -> None:
    logs = [
        str(engine_log(tmp_path / f"{name}.jsonl", name))
        for name in ("gang", "prefill-first", "decode-first")
    ]
    statistics = replay(logs, [], None, load(installed=False))["ranking"]["statistics"]
    assert statistics["ttft_p99"]["tau"] == pytest.approx(1.0)
    assert statistics["ttft_p99"]["logged"][-1] == "decode-first"


def test_a_log_has_neither_token_ids_nor_names_that_recur_in_another_log(tmp_path: Path) -> None:
    names = []
    for run in range(2):
        log = engine_log(tmp_path / f"{run}.jsonl", "gang")
        lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
        arrived = [event["arrived"] for line in lines for event in line["events"] if "arrived" in event]
        assert all("prompt" not in request for request in arrived)
        names.append({key for request in arrived for key in request["keys"]})
    assert not names[0] & names[1]


def test_pages_of_output_are_named_when_a_request_ends(tmp_path: Path) -> None:
    scheduler = Scheduler(
        DEVICE, CountingKv(9, 4), FACTORIES["gang"](), TightestDecode(), FittedCost(table())
    )
    path = tmp_path / "a.jsonl"
    with DecisionLog(path, scheduler, {}) as log:
        from dataclasses import replace

        from drift_scheduler.domain import DecodeDone, PrefillDone, RequestArrived

        def feed(now: float, *events: Any, tokens: list[int] | None = None) -> None:
            step = scheduler.step(now, events)
            outputs = tuple(
                replace(o, token_ids=tokens) if isinstance(o, Tokens) else o for o in step.outputs
            )
            log.on_step(StepRecord(scheduler.steps, now, events, replace(step, outputs=outputs)))

        first = Request("a", 0.0, 6, 3, SLO(1, 1), prompt=[1, 2, 3, 4, 5, 6])
        again = Request("b", 0.0, 9, 3, SLO(1, 1), prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9])
        other = Request("c", 0.0, 9, 3, SLO(1, 1), prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9], salt="other")
        feed(0.0, RequestArrived(first))
        feed(0.1, PrefillDone(0.1, [7]), tokens=[7])
        feed(0.2, DecodeDone(0.1, [8]), tokens=[8])
        feed(0.3, DecodeDone(0.1, [9]), tokens=[9])
        feed(0.4, RequestArrived(again), RequestArrived(other))
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    prompt_of_a = lines[0]["events"][0]["arrived"]["keys"]
    (end,) = lines[3]["finished"]
    of_b, of_c = (event["arrived"]["keys"] for event in lines[4]["events"])
    assert (len(prompt_of_a), len(end["keys"])) == (1, 1)
    assert of_b == prompt_of_a + end["keys"]
    assert not set(of_b) & set(of_c)


# ------------------------------------------------------------------------------------------- readers


@pytest.fixture(scope="module")
def log_lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path = engine_log(tmp_path_factory.mktemp("log") / "a.jsonl", "gang")
    return path.read_bytes().splitlines(keepends=True)


def written(folder: Path, lines: list[bytes]) -> Path:
    path = folder / "a.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def test_a_last_line_cut_short_is_dropped_and_said(tmp_path: Path, log_lines: list[bytes]) -> None:
    path = written(tmp_path, [*log_lines[:-1], log_lines[-1][: len(log_lines[-1]) // 2]])
    (found,) = replay([str(path)], [], None, load(installed=False))["logs"]
    assert found["truncated_line"] == len(log_lines)
    assert found["steps"] == len(log_lines) - 2
    assert "is cut short" in drift("replay", str(path)).stdout


def test_a_log_of_a_killed_process_leaves_out_what_never_ended(
    tmp_path: Path, log_lines: list[bytes]
) -> None:
    path = written(tmp_path, log_lines[: len(log_lines) // 2])
    (found,) = replay([str(path)], ["drift"], None, load(installed=False))["logs"]
    assert found["requests"]["unfinished"] > 0
    assert found["others"][0]["report"]["requests"]["offered"] == found["requests"]["finished"]


def edited(lines: list[bytes], number: int, change: Callable[[dict[str, Any]], Any]) -> list[bytes]:
    value = json.loads(lines[number - 1])
    change(value)
    return [*lines[: number - 1], json.dumps(value).encode() + b"\n", *lines[number:]]


@pytest.mark.parametrize(
    ("number", "change", "complaint"),
    [
        (1, lambda v: v.update(schema="drift.log/9"), ":1: field schema: Invalid enum value 'drift.log/9'"),
        (1, lambda v: v["device"].update(menu=[[9, 9]]), ":1: field device.menu: 9+9 units of 4"),
        (
            1,
            lambda v: v["device"]["menu"].pop(),
            ":1: field device.menu: lacks 0+4, the whole device for one lane",
        ),
        (1, lambda v: v["kv"].update(total_pages=-1), ":1: field kv.total_pages: Expected `int` >= 1"),
        (1, lambda v: v["config"].pop("dispatch"), ":1: field config.dispatch: None is no name of a policy"),
        (2, lambda v: v.update(now="soon"), ":2: field now: Expected `float`, got `str`"),
        (3, lambda v: v.update(now=-1e9), ":3: field now: -1000000000.0 after"),
        (3, lambda v: v.update(step=0), ":3: field step: 0 after 0"),
        (3, lambda v: v.update(events=[{}]), ":3: field events: an event without any of arrived"),
        (
            2,
            lambda v: v.update(events=[{"decode_done": 1.0}]),
            ":2: the decode lane ends work that no gang began",
        ),
        (3, lambda v: v.pop("view"), ":3: Object missing required field `view`"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, log_lines, number: int, change, complaint: str) -> None:
    path = written(tmp_path, edited(log_lines, number, change))
    result = drift("replay", str(path), "--dispatch", "drift")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert complaint in result.stderr, result.stderr


@pytest.mark.parametrize("content", [b"", b"\n\n", b"not json\n", b"[]\n", b"\xff\xfe\n", b'{"schema": 1}\n'])
def test_what_is_no_log_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    result = drift("replay", str(path))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"drift: log {path}")


def names_used_again(lines: list[bytes]) -> list[bytes]:
    """The same log of clients that use a name again as soon as its request has ended."""
    called: dict[str, str] = {}
    free: list[str] = []
    steps = [json.loads(line) for line in lines[1:]]
    for step in steps:
        for event in step["events"]:
            if (arrived := event.get("arrived")) is not None:
                called[arrived["id"]] = arrived["id"] = free.pop() if free else arrived["id"]
            if "stopped" in event:
                event["stopped"] = [called[name] for name in event["stopped"]]
        for chunk in step.get("gang", {}).get("prefill", {}).get("chunks", ()):
            chunk[0] = called[chunk[0]]
        for end in step.get("finished", ()):
            end["id"] = called[end["id"]]
            free.append(end["id"])
    return [lines[0], *(json.dumps(step).encode() + b"\n" for step in steps)]


def test_a_name_that_was_used_again_is_another_request(tmp_path: Path, log_lines: list[bytes]) -> None:
    """Served by another policy the two may be there at once."""
    again = names_used_again(log_lines)
    assert again != log_lines
    found = []
    for lines in (log_lines, again):
        report = replay([str(written(tmp_path, lines))], ["prefill-first"], None, load(installed=False))
        found.append(report["logs"])
    assert found[0] == found[1]


def test_a_request_cancelled_with_its_last_token_under_way_is_no_fault(
    tmp_path: Path, log_lines: list[bytes]
) -> None:
    """Its end is told at once; the lane that works on it says later that it stopped."""
    steps = [json.loads(line) for line in log_lines[1:]]
    launched = 0
    for index, step in enumerate(steps):
        if any("decode_done" in event for event in step["events"]) and step.get("finished"):
            break
        if "decode" in step.get("gang", {}):
            launched = index
    end = step["finished"].pop()
    next(event for event in step["events"] if "decode_done" in event)["stopped"] = [end["id"]]
    steps[launched].setdefault("finished", []).append(end)
    lines = [log_lines[0], *(json.dumps(each).encode() + b"\n" for each in steps)]
    assert len(list(open_log(written(tmp_path, lines)).steps())) == len(steps)


def test_a_missing_log_and_an_unknown_policy_are_one_line(tmp_path: Path) -> None:
    assert "No such file" in drift("replay", str(tmp_path / "absent.jsonl")).stderr
    log = engine_log(tmp_path / "a.jsonl", "gang")
    assert "no dispatch policy 'edf'" in drift("replay", str(log), "--dispatch", "edf").stderr


def test_logs_of_different_devices_are_not_ranked(tmp_path: Path, log_lines: list[bytes]) -> None:
    first = engine_log(tmp_path / "b.jsonl", "gang")
    other = edited(
        log_lines, 1, lambda v: v["device"].update(units=5, menu=[[5, 0], [0, 5], *v["device"]["menu"]])
    )
    result = drift("replay", str(first), str(written(tmp_path, other)))
    assert result.exit_code == 2
    assert "logs of different devices" in result.stderr


def test_a_log_that_was_edited_is_followed_as_far_as_it_goes(tmp_path: Path, log_lines: list[bytes]) -> None:
    number = next(i for i, line in enumerate(log_lines, 1) if i > 20 and json.loads(line).get("gang"))
    path = written(tmp_path, edited(log_lines, number, lambda v: v["gang"].update(partition=[4, 4])))
    (found,) = replay([str(path)], [], None, load(installed=False))["logs"]
    assert found["decisions"]["stopped"]["line"] == number
    assert "off the menu" in found["decisions"]["stopped"]["reason"]


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_fuzzed_logs_give_one_line_errors(
    tmp_path_factory, log_lines: list[bytes], data: st.DataObject
) -> None:
    lines = log_lines[:60]
    number = data.draw(st.integers(1, len(lines)))
    value = json.loads(lines[number - 1])
    holder, key = data.draw(st.sampled_from(list(_places(value))))
    values = [None, -1, 1e300, "x", [], {}, True, [[]], 2**70]
    holder[key] = data.draw(st.sampled_from(values))
    lines = [*lines[: number - 1], json.dumps(value).encode() + b"\n", *lines[number:]]
    path = written(tmp_path_factory.mktemp("fuzz"), lines)
    complaint = ""
    try:
        replay([str(path)], [], None, load(installed=False))
    except DriftError as error:
        complaint = str(error)
    assert "\n" not in complaint


def _places(value: Any) -> Any:
    """Every (container, key) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield value, key
        yield from _places(inside)


# -------------------------------------------------------------------------------------------- numbers


def test_kendalls_tau() -> None:
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5)
    assert kendall([1, 1], [1, 2]) is None


def test_ranks_name_policies_in_both_orders() -> None:
    def times(ttft: float) -> dict[str, Any]:
        return {"ttft_s": {"p50": ttft, "p99": ttft}, "tbt_s": {"p50": None, "p99": None}}

    found = ranks(["a", "b"], [times(1), times(2)], [times(5), times(3)])
    assert found.keys() == {"ttft_p50", "ttft_p99"}
    assert found["ttft_p50"] == {"tau": -1.0, "logged": ["a", "b"], "simulated": ["b", "a"]}


def test_a_sample_stays_small_and_even() -> None:
    sample = Sample(8)
    values: list[Any] = [Timed(None, float(i)) for i in range(100)]
    for value in values:
        sample.add(value)
    assert len(sample.values) <= 9
    seconds = [timed.seconds for timed in sample.values]
    assert len({b - a for a, b in pairwise(seconds)}) == 1
