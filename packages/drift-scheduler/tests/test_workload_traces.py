"""Reading traces: the published formats, rates, laziness, and one line for everything that can be wrong."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift_scheduler.domain import SLO, Request
from drift_scheduler.errors import DriftError
from drift_scheduler.workloads.traces import read_trace

SHARED = Path(__file__).parents[4] / "shared" / "traces"

MOONCAKE = [
    {"timestamp": 27482, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]},
    {"timestamp": 30535, "input_length": 1024, "output_length": 26, "hash_ids": [46, 57]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,0
2023-11-16 18:15:51.3910170,91,16
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
120.5,GPT-4,1360,276,1636,API log
"""


def ours(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(arrival: float = 0, **more: object) -> dict[str, object]:
    return {"arrival_ms": arrival, "input_tokens": 100, "output_tokens": 10, **more}


def write(tmp_path: Path, text: str, name: str = "t.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def read(path: Path, **options: object) -> list[Request]:
    return list(read_trace(path, **options))  # type: ignore[arg-type]


def test_json_lines_plain_and_gzip(tmp_path: Path) -> None:
    text = ours(
        row(1000, prefix_block_hashes=list(range(6)), session=3, turn=2, think_ms=1500),
        row(2500, prefix_block_hashes=list(range(6)), extra="ignored"),
    )
    plain = read(write(tmp_path, text), slo=SLO(1, 0.1))
    (tmp_path / "t.gz").write_bytes(gzip.compress(text.encode()))
    zipped = read(tmp_path / "t.gz")
    assert [r.arrival for r in plain] == [r.arrival for r in zipped] == [0.0, 1.5]
    first = plain[0]
    assert (first.prompt_tokens, first.output_tokens, first.max_output_tokens) == (100, 10, 4096)
    assert (first.session, first.turn, first.think) == ("3", 2, 1.5)
    assert (first.key_tokens, tuple(first.prefix_keys)) == (16, (0, 1, 2, 3, 4, 5))
    assert first.slo == SLO(1, 0.1)
    assert first.id != plain[1].id


def test_mooncake_blocks_are_512_tokens_and_a_partial_one_is_dropped(tmp_path: Path) -> None:
    first, second = read(write(tmp_path, ours(*MOONCAKE)))
    assert second.arrival == pytest.approx(3.053)
    assert first.key_tokens == 512
    assert tuple(first.prefix_keys) == (46,)
    assert tuple(second.prefix_keys) == (46, 57)


@pytest.mark.parametrize(
    ("text", "arrivals", "inputs"),
    [(AZURE, [0.0, 4.314579, 4.710427], [374, 396, 91]), (BURSTGPT, [0.0, 40.0, 115.5], [472, 1087, 1360])],
)
def test_csv_formats_leave_empty_answers_out(
    tmp_path: Path, text: str, arrivals: list[float], inputs: list[int]
) -> None:
    found = read(write(tmp_path, text, "t.csv"))
    assert [r.arrival for r in found] == pytest.approx(arrivals, abs=1e-5)
    assert [r.prompt_tokens for r in found] == inputs


def test_a_rate_rescales_a_traces_own_times(tmp_path: Path) -> None:
    path = write(tmp_path, ours(*(row(100 * i * i) for i in range(11))))
    own = read(path)
    scaled = read(path, rate=5.0)
    assert scaled[-1].arrival == pytest.approx(2.0)  # ten gaps of 0.2 s on average
    ratio = scaled[-1].arrival / own[-1].arrival
    assert [r.arrival for r in scaled] == pytest.approx([r.arrival * ratio for r in own])
    assert read(path, rate=5.0, requests=3)[-1].arrival == pytest.approx(0.4)


def test_lengths_without_times_get_poisson_arrivals(tmp_path: Path) -> None:
    path = write(tmp_path, ours(*(row(0) for _ in range(2000))))
    times = [r.arrival for r in read(path, rate=4.0, seed=1)]
    assert times[-1] == pytest.approx(500, rel=0.1)
    assert times == [r.arrival for r in read(path, rate=4.0, seed=1)]
    assert times != [r.arrival for r in read(path, rate=4.0, seed=2)]


def test_reading_stops_where_the_caller_does(tmp_path: Path) -> None:
    path = write(tmp_path, ours(row(0), row(5)) + "not json\n")
    assert len(read(path, requests=2)) == 2
    with pytest.raises(DriftError, match=r"t\.jsonl:3: not JSON"):
        read(path)


def test_documents_shared_by_a_session_become_prefix_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path, ours(row(0, session=1, shared_prefix_tokens=90), row(1, session=2, shared_prefix_tokens=90))
    )
    first, second = read(path)
    assert len(first.prefix_keys) == 5
    assert not set(first.prefix_keys) & set(second.prefix_keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no requests"),
        ("\n\n", "holds no requests"),
        ("hello\n", "no trace"),
        ("{\n", ":1: not JSON"),
        (ours(row()) + "[1]\n", ":2: "),
        (ours(row(input_tokens=0)), ":1: field input_tokens"),
        (ours(row(input_tokens="x")), ":1: field input_tokens"),
        (ours(row(input_tokens=10**12)), ":1: field input_tokens"),
        (ours(row(output_tokens=-1)), ":1: field output_tokens"),
        (ours(row(-1)), ":1: field arrival_ms"),
        ('{"arrival_ms": NaN, "input_tokens": 1, "output_tokens": 1}\n', ":1: not JSON"),
        ('{"arrival_ms": 1e400, "input_tokens": 1, "output_tokens": 1}\n', ":1: "),
        (ours({"arrival_ms": 1}), "input_tokens"),
        (ours(row(5), row(4)), ":2: field arrival"),
        (
            ours(row(prefix_block_hashes=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])),
            ":1: field prefix_block_hashes",
        ),
        (ours(row(prefix_block_hashes=[{}])), ":1: field prefix_block_hashes"),
        ("[" * 10_000 + "\n", "no trace"),
        ('{"a": ' + "[" * 100_000 + "\n", ":1: "),
        (AZURE.replace("374", "many"), ":2: field ContextTokens"),
        (AZURE.replace("374", "-4"), ":2: field ContextTokens"),
        (AZURE.replace("2023-11-16 18:15:46.6805900", "yesterday"), ":2: field TIMESTAMP"),
        (AZURE.replace(",44", ""), ":2: 2 columns instead of 3"),
        (BURSTGPT.replace("\n5,", "\nnan,"), ":2: field Timestamp"),
    ],
)
def test_a_bad_trace_is_one_line_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DriftError) as caught:
        read(path)
    assert message in str(caught.value)
    assert "t.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(DriftError, match="No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DriftError, match="directory"):
        read(tmp_path)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(ours(*(row(i) for i in range(500))).encode())[:-20])
    with pytest.raises(DriftError, match=r"cut\.gz: cannot be read"):
        read(tmp_path / "cut.gz")
    (tmp_path / "latin.jsonl").write_bytes(ours(row()).encode() + b"\xff\xfe\n")
    with pytest.raises(DriftError, match="not UTF-8"):
        read(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": float("nan")}, {"requests": 0}, {"max_output": 0}])
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, float]) -> None:
    path = write(tmp_path, ours(row()))
    with pytest.raises(DriftError):
        read_trace(path, **options)  # type: ignore[arg-type]


def test_more_requests_than_can_be_counted_are_all_there_are(tmp_path: Path) -> None:
    path = write(tmp_path, ours(row(), row(5)))
    assert len(read(path, requests=10**30)) == 2


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), keep=st.integers(0, 120))
def test_no_bytes_whatever_raise_anything_else(tmp_path: Path, data: bytes, keep: int) -> None:
    path = tmp_path / "fuzz.jsonl"
    for start in (ours(row(), row(1)).encode(), AZURE.encode(), gzip.compress(ours(row()).encode())):
        path.write_bytes(start[:keep] + data)
        with suppress(DriftError):
            read(path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared traces are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "count", "inputs", "outputs", "block"),
    [
        ("mooncake_conversation", 12_031, 144_793_823, 4_122_048, 512),
        ("mooncake_synthetic", 3_993, 61_194_628, 595_432, 512),
        ("azure2023_code", 8_819, 18_059_974, 245_896, 16),
        ("claude_code_agent", 2_962, 139_006_703, 1_279_965, 64),
        ("loogle_sample_lengths", 222, 5_330_721, 5_513, 16),
    ],
)
def test_the_shared_traces_read_completely(
    name: str, count: int, inputs: int, outputs: int, block: int
) -> None:
    requests = read(SHARED / f"{name}.jsonl.gz", rate=3.0)
    assert len(requests) == count
    assert sum(r.prompt_tokens for r in requests) == inputs
    assert sum(r.output_tokens or 0 for r in requests) == outputs
    assert requests[0].key_tokens == block
    assert requests[-1].arrival == pytest.approx(count / 3.0, rel=0.1)
    assert all(a.arrival <= b.arrival for a, b in pairwise(requests))


def test_lines_may_have_targets_and_a_class_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "classes.jsonl"
    row = {"arrival_ms": 0, "input_tokens": 10, "output_tokens": 4}
    own = {**row, "slo_ttft_ms": 30_000, "slo_tbt_ms": 500, "slo_class": "batch"}
    path.write_text("\n".join(json.dumps(line) for line in (row, own, {**row, "slo_class": "half"})))
    usual = SLO(1.0, 0.05)
    found = [request.slo for request in read_trace(path, slo=usual)]
    assert found == [usual, SLO(30.0, 0.5, name="batch"), SLO(1.0, 0.05, name="half")]
    for bad in ({"slo_ttft_ms": 0}, {"slo_tbt_ms": -1}, {"slo_class": ""}, {"slo_class": 3}):
        path.write_text(json.dumps({**row, **bad}))
        with pytest.raises(DriftError, match=rf"classes\.jsonl:1: field {next(iter(bad))}: "):
            list(read_trace(path, slo=usual))
