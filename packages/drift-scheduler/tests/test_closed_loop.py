"""Sessions in simulation: a turn waits for the end of the one before and its think time; open loop keeps nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from drift_scheduler.domain import SLO, Finished, Request, StepRecord
from drift_scheduler.errors import DriftError, OptionError
from drift_scheduler.simulation.arrivals import Arrivals
from drift_scheduler.simulation.run import Scenario, Simulation
from drift_scheduler.workloads.traces import read_trace

SCENARIO = Scenario(
    "tool-agent:think=3", "h200", "llama-3.1-8b", "gang", SLO(10.0, 0.05), rate=4.0, requests=80
)
BASE = Request("base", 0.0, 8, 8, SLO(1.0, 1.0))


def turn(
    name: str, arrival: float, session: str | None = None, number: int = 0, think: float | None = None
) -> Request:
    return replace(BASE, id=name, arrival=arrival, session=session, turn=number, think=think)


class Ends:
    """Arrivals and ends of every request, as the scheduler saw them."""

    def __init__(self) -> None:
        self.arrived: dict[str, Request] = {}
        self.ended: dict[str, float] = {}

    def on_step(self, record: StepRecord) -> None:
        for event in record.events:
            request = getattr(event, "request", None)
            if request is not None:
                self.arrived[request.id] = request
        for output in record.step.outputs:
            if isinstance(output, Finished):
                self.ended[output.request_id] = record.now


def by_session(requests: Sequence[Request]) -> list[list[Request]]:
    found: dict[str, list[Request]] = {}
    for request in requests:
        assert request.session is not None
        found.setdefault(request.session, []).append(request)
    return list(found.values())


def test_every_turn_arrives_its_think_time_after_the_end_of_the_one_before() -> None:
    ends = Ends()
    report = Simulation(SCENARIO).run([ends])
    assert report["requests"]["finished"] == 80
    planned = {request.id: request for request in Simulation(SCENARIO).requests}
    followed = 0
    for session in by_session(list(planned.values())):
        for before, after in pairwise(session):
            assert after.think is not None
            assert ends.arrived[after.id].arrival == pytest.approx(
                ends.ended[before.id] + after.think, abs=1e-9
            )
            followed += 1
        assert ends.arrived[session[0].id].arrival == planned[session[0].id].arrival
    assert followed > 20


def test_a_closed_loop_waits_for_a_slow_server_where_an_open_one_does_not() -> None:
    """At a rate far above what the device can take, only an open loop piles its requests up."""
    fast = replace(SCENARIO, rate=1000.0, requests=300)
    open_loop = Simulation(replace(fast, workload="tool-agent")).run()
    closed = Simulation(replace(fast, workload="tool-agent:think=3")).run()
    assert closed["queue_s"]["p50"] < 0.5 * open_loop["queue_s"]["p50"]


def test_simulated_twice_it_is_the_same() -> None:
    assert Simulation(SCENARIO).run() == Simulation(SCENARIO).run()


def test_an_open_loop_is_read_one_request_ahead() -> None:
    read = 0

    def endless() -> Iterator[Request]:
        nonlocal read
        while True:
            read += 1
            yield turn(f"r{read}", float(read), session="s", number=read)

    arrivals = Arrivals(endless())
    for _ in range(5):
        arrivals.advance()
        arrivals.ended(("r1",), 2.0)
    assert read == 6


def test_turns_overtake_later_arrivals_and_wait_for_none() -> None:
    arrivals = Arrivals(
        [
            turn("a0", 0.0, "a", 0, 0.0),
            turn("a1", 1.0, "a", 1, 2.0),
            turn("b", 50.0),
            turn("c0", 90.0, "c", 3, 7.0),
        ]
    )
    assert following(arrivals) == ("a0", 0.0)
    arrivals.advance()
    assert following(arrivals) == ("b", 50.0), "the second turn waits for the end of the first"
    arrivals.ended(("a0", "unknown"), 30.0)
    assert following(arrivals) == ("a1", 32.0)
    arrivals.advance()
    assert following(arrivals) == ("b", 50.0)
    arrivals.advance()
    assert following(arrivals) == ("c0", 90.0), "a session's first turn in the workload waits for nothing"
    arrivals.advance()
    assert arrivals.next is None


def following(arrivals: Arrivals) -> tuple[str, float]:
    assert arrivals.next is not None
    return arrivals.next.id, arrivals.next.arrival


def test_arrivals_and_turns_out_of_order_are_named() -> None:
    with pytest.raises(ValueError, match=r"'y' arrives at 1\.0 s, before 'x'"):
        Arrivals([turn("x", 2.0), turn("y", 1.0)]).advance()
    for never in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"request 'x' arrives at {never} s"):
            Arrivals([turn("x", never)])
    with pytest.raises(ValueError, match="request 'y' is turn 1 of session 's'"):
        Arrivals([turn("x", 0.0, "s", 1, 0.0), turn("y", 1.0, "s", 1, 0.0)])


@pytest.mark.parametrize("think", [-1, "nan", "inf"])
def test_think_has_to_be_a_time(think: object) -> None:
    with pytest.raises(OptionError, match="think is"):
        Simulation(replace(SCENARIO, workload=f"conversation:think={think}"))


def write(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(arrival: int, session: int, number: int, think: int | None = None) -> dict[str, object]:
    fields = {
        "arrival_ms": arrival,
        "input_tokens": 20,
        "output_tokens": 5,
        "session": session,
        "turn": number,
    }
    return fields if think is None else fields | {"think_ms": think}


def test_a_trace_with_think_times_is_a_closed_loop_unless_asked_not_to_be(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [row(0, 1, 0), row(10, 2, 0), row(500, 1, 1, 250), row(600, 2, 1)])
    assert [request.think for request in read_trace(path)] == [0.0, 0.0, 0.25, 0.0]
    assert [request.think for request in read_trace(path, closed=False)] == [None] * 4
    assert [request.think for request in read_trace(path, requests=2)] == [None] * 2


def test_a_session_whose_turns_go_round_is_an_error_of_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [row(0, 1, 0), row(10, 1, 1, 5), row(20, 1, 0, 5)])
    with pytest.raises(DriftError, match=r"t\.jsonl:3: field turn: 0 of session 1 comes after turn 1"):
        list(read_trace(path))
