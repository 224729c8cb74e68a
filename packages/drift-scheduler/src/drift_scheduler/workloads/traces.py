"""Reading traces, one request at a time: JSON Lines of ours, Mooncake JSONL, Azure and BurstGPT CSV, plain or gzip.

The format is told by the first line. Nothing is downloaded. A bad line is a DriftError `file:line: field ...`.
A trace in which every arrival is 0 is a set of lengths without times and gets Poisson arrivals.

A trace's requests end at their recorded output length; `max_output_tokens`, which policies see, is `max_output` or
the recorded length if longer, as clients rarely know how long an answer gets.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import msgspec

from drift_scheduler.domain import SLO, Request
from drift_scheduler.errors import DriftError, OptionError
from drift_scheduler.workloads.generated import NO_TARGET, poisson

MAX_OUTPUT = 4096
BLOCK_SIZES = (512, 64, 16, 32, 128, 256, 1024)
"""Tokens per prefix id that are tried, in this order, where neither trace nor caller says."""

SHARED_BLOCK = 16
"""Tokens per key of a `shared_prefix_tokens` prefix: a page."""

Tokens = Annotated[int, msgspec.Meta(ge=1, le=100_000_000)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
Target = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]


class _Ours(msgspec.Struct, frozen=True):
    """A line of our own trace schema (docs/workloads.md); further fields are ignored."""

    arrival_ms: Milliseconds
    input_tokens: Tokens
    output_tokens: Tokens
    prefix_block_hashes: tuple[int | str, ...] = ()
    block_tokens: Tokens | None = None
    shared_prefix_tokens: Count = 0
    session: int | str | None = None
    turn: Count = 0
    think_ms: Milliseconds | None = None
    slo_ttft_ms: Target | None = None
    slo_tbt_ms: Target | None = None
    slo_class: Name | None = None


class _Mooncake(msgspec.Struct, frozen=True):
    """github.com/kvcache-ai/Mooncake: times in milliseconds, one id per 512 tokens, the last for a partial block."""

    timestamp: Milliseconds
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[int | str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a trace, whatever its format. `arrival` in seconds from any origin."""

    line: int
    arrival: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int | str, ...] = ()
    block_tokens: int | None = None
    session: str | None = None
    turn: int = 0
    think: float | None = None
    ttft: float | None = None
    tbt: float | None = None
    slo_class: str | None = None

    def slo(self, usual: SLO) -> SLO:
        """Its own targets and class where the line has them."""
        if self.ttft is None and self.tbt is None and self.slo_class is None:
            return usual
        ttft = usual.ttft if self.ttft is None else self.ttft
        tbt = usual.tbt if self.tbt is None else self.tbt
        return SLO(ttft, tbt, usual.e2e, self.slo_class or usual.name)


def read_trace(
    path: str | Path,
    *,
    seed: int = 0,
    rate: float | None = None,
    requests: int | None = None,
    slo: SLO | None = None,
    block_tokens: int | None = None,
    max_output: int = MAX_OUTPUT,
    closed: bool = True,
) -> Iterator[Request]:
    """Requests of a trace file in order of arrival, streamed.

    `slo`: of requests whose lines have no targets of their own.
    Sessions with think times are a closed loop (see `drift_scheduler.simulation.arrivals`) unless `closed` is false.

    `rate`: rescales the trace's own times to that mean (one more pass over the file), or draws Poisson arrivals where
    it has none. `requests`: only the first so many. `block_tokens`: prompt positions per prefix id. Raises DriftError
    for a file that cannot be read or is no trace, at once; for a bad line, when it is reached.
    """
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise OptionError(f"rate is {rate} requests per second, need more than 0")
    if requests is not None and requests < 1:
        raise OptionError(f"{requests} requests, need at least 1")
    if max_output < 1 or (block_tokens is not None and block_tokens < 1):
        raise OptionError("max_output and block_tokens need to be at least 1")
    if requests is not None:
        requests = min(requests, sys.maxsize)  # islice counts no further
    first = next(_records(path), None)
    if first is None:
        raise DriftError(f"{path}: holds no requests")
    timing = _timing(path, requests, rate)
    think = closed and _has_think(path, first, requests)
    return _requests(path, timing, seed, requests, slo or NO_TARGET, block_tokens, max_output, think)


def _has_think(path: str | Path, first: Record, requests: int | None) -> bool:
    """Whether sessions have think times; only then must the first turns, which have none, be told from open loop."""
    return first.session is not None and any(r.think is not None for r in islice(_records(path), requests))


@dataclass(frozen=True, slots=True)
class _Timing:
    """How recorded times become arrivals: `(t - start) * scale`, or Poisson at `rate` where `scale` is `None`."""

    start: float
    scale: float | None
    rate: float | None


def _timing(path: str | Path, requests: int | None, rate: float | None) -> _Timing:
    """From a first pass that stops as soon as it knows enough."""
    start = last = 0.0
    count = 0
    for record in islice(_records(path), requests):
        if not count:
            start = record.arrival
        last = record.arrival
        count += 1
        if rate is None and last > start:
            return _Timing(start, 1.0, None)
    if last <= start:
        return _Timing(start, None, rate)
    assert rate is not None
    return _Timing(start, (count - 1) / (last - start) / rate, rate)


def _requests(
    path: str | Path,
    timing: _Timing,
    seed: int,
    requests: int | None,
    slo: SLO,
    block_tokens: int | None,
    max_output: int,
    closed: bool,
) -> Iterator[Request]:
    name = Path(path).name.split(".")[0]
    arrivals = poisson(seed, timing.rate, requests or 1 << 62) if timing.scale is None else None
    previous = timing.start
    turns: dict[str, int] = {}
    for i, record in enumerate(islice(_records(path), requests)):
        if record.arrival < previous:
            raise DriftError(f"{path}:{record.line}: field arrival: earlier than the line before")
        previous = record.arrival
        think = None
        if closed and record.session is not None:
            if record.turn <= turns.get(record.session, -1):
                raise DriftError(
                    f"{path}:{record.line}: field turn: {record.turn} of session {record.session} comes after turn "
                    f"{turns[record.session]}"
                )
            turns[record.session] = record.turn
            think = record.think or 0.0
        if record.blocks and block_tokens is None:
            block_tokens = record.block_tokens or _block_size(path, record)
        size = record.block_tokens or block_tokens or 16
        scale = timing.scale
        yield Request(
            id=f"{name}-{i}",
            arrival=next(arrivals)
            if arrivals is not None
            else (record.arrival - timing.start) * (scale or 1.0),
            prompt_tokens=record.input_tokens,
            max_output_tokens=max(max_output, record.output_tokens),
            slo=record.slo(slo),
            prefix_keys=record.blocks[: record.input_tokens // size],
            key_tokens=size,
            output_tokens=record.output_tokens,
            session=record.session,
            turn=record.turn,
            think=think,
        )


def _block_size(path: str | Path, record: Record) -> int:
    """Tokens per id such that the ids of this line cover its prompt, a partial last block counted or not."""
    n, blocks = record.input_tokens, len(record.blocks)
    for size in BLOCK_SIZES:
        if blocks in (n // size, -(-n // size)):
            return size
    raise DriftError(
        f"{path}:{record.line}: field prefix_block_hashes: {blocks} ids for {n} tokens fit no block size of "
        f"{', '.join(map(str, sorted(BLOCK_SIZES)))}; give the option block_tokens"
    )


# ------------------------------------------------------------------------------------------ formats


def _records(path: str | Path) -> Iterator[Record]:
    with _open(path) as lines:
        try:
            yield from _parse(path, lines)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise DriftError(f"{path}: cannot be read: {reason}") from error


@contextmanager
def _open(path: str | Path) -> Iterator[TextIO]:
    try:
        raw = Path(path).open("rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DriftError(f"{path}: {error.strerror or error}") from error
    with raw:
        magic = raw.read(2)
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw
        yield io.TextIOWrapper(stream, encoding="utf-8", newline="")


def _parse(path: str | Path, lines: TextIO) -> Iterator[Record]:
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    head = next(numbered, None)
    if head is None:
        return
    if head[1].lstrip().startswith("{"):
        yield from _parse_json(path, head, numbered)
    else:
        yield from _parse_csv(path, head, numbered)


Numbered = Iterator[tuple[int, str]]


def _parse_json(path: str | Path, head: tuple[int, str], rest: Numbered) -> Iterator[Record]:
    try:
        keys = msgspec.json.decode(head[1])
    except (msgspec.DecodeError, RecursionError) as error:
        raise DriftError(f"{path}:{head[0]}: not JSON: {error}") from error
    convert = _from_mooncake if "hash_ids" in keys or "input_length" in keys else _from_ours
    yield convert(path, *head)
    for number, line in rest:
        yield convert(path, number, line)


_OURS = msgspec.json.Decoder(_Ours)
_MOONCAKE = msgspec.json.Decoder(_Mooncake)
Line = TypeVar("Line", _Ours, _Mooncake)


def _decode(decoder: msgspec.json.Decoder[Line], path: str | Path, number: int, line: str) -> Line:
    try:
        return decoder.decode(line)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$.")
        field = f"field {at.rstrip('`')}: " if at else ""
        raise DriftError(f"{path}:{number}: {field}{message}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise DriftError(f"{path}:{number}: not JSON: {error}") from error


def _from_ours(path: str | Path, number: int, line: str) -> Record:
    row = _decode(_OURS, path, number, line)
    session = None if row.session is None else str(row.session)
    blocks, size = row.prefix_block_hashes, row.block_tokens
    if (
        row.shared_prefix_tokens and session is not None and not blocks
    ):  # a document that a session asks about
        size = size or SHARED_BLOCK
        blocks = tuple(f"{session}/{i}" for i in range(row.shared_prefix_tokens // size))
    return Record(
        number,
        row.arrival_ms / 1e3,
        row.input_tokens,
        row.output_tokens,
        blocks,
        size,
        session,
        row.turn,
        None if row.think_ms is None else row.think_ms / 1e3,
        None if row.slo_ttft_ms is None else row.slo_ttft_ms / 1e3,
        None if row.slo_tbt_ms is None else row.slo_tbt_ms / 1e3,
        row.slo_class,
    )


def _from_mooncake(path: str | Path, number: int, line: str) -> Record:
    row = _decode(_MOONCAKE, path, number, line)
    return Record(number, row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids, 512)


Row = Mapping[str, Any]


def _parse_csv(path: str | Path, head: tuple[int, str], rest: Numbered) -> Iterator[Record]:
    columns = [column.strip() for column in next(csv.reader([head[1]]))]
    convert: Callable[[str, int, Row], Record | None]
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(columns):
        convert = _from_azure
    elif {"Timestamp", "Request tokens", "Response tokens"} <= set(columns):
        convert = _from_burstgpt
    else:
        raise DriftError(
            f"{path}:{head[0]}: no trace: neither JSON Lines nor a CSV with the columns TIMESTAMP, ContextTokens, "
            "GeneratedTokens (Azure) or Timestamp, Request tokens, Response tokens (BurstGPT)"
        )
    for number, line in rest:
        cells = next(csv.reader([line]))
        if len(cells) != len(columns):
            raise DriftError(f"{path}:{number}: {len(cells)} columns instead of {len(columns)}")
        record = convert(str(path), number, dict(zip(columns, cells, strict=True)))
        if record is not None:
            yield record


def _from_azure(path: str, number: int, row: Row) -> Record | None:
    """AzurePublicDataset: TIMESTAMP is a date and time, UTC without a zone. Empty answers are left out."""
    text = row["TIMESTAMP"].strip()
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise DriftError(f"{path}:{number}: field TIMESTAMP: {text[:60]!r} is no date and time") from None
    arrival = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return _lengths(path, number, arrival, row, "ContextTokens", "GeneratedTokens")


def _from_burstgpt(path: str, number: int, row: Row) -> Record | None:
    """BurstGPT: Timestamp in seconds; failed requests (no response tokens) are left out, as its authors advise."""
    text = row["Timestamp"].strip()
    try:
        arrival = float(text)
    except ValueError:
        arrival = math.nan
    if not (arrival >= 0 and math.isfinite(arrival)):
        raise DriftError(f"{path}:{number}: field Timestamp: {text[:60]!r} is no number of seconds")
    return _lengths(path, number, arrival, row, "Request tokens", "Response tokens")


def _lengths(
    path: str, number: int, arrival: float, row: Row, input_name: str, output_name: str
) -> Record | None:
    tokens = []
    for name in (input_name, output_name):
        text = row[name].strip()
        if not (text.isascii() and text.isdecimal() and len(text) <= 9):
            raise DriftError(f"{path}:{number}: field {name}: {text[:60]!r} is no count of tokens")
        tokens.append(int(text))
    return None if min(tokens) == 0 else Record(number, arrival, tokens[0], tokens[1])
