"""`drift top`: how a running server is doing, live in the terminal, once, or as JSON lines.

Everything it knows comes from GetServerInfo and WatchStats; a server that goes away is waited for.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Container, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import grpc
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from drift_gateway.client import AsyncDriftClient, RequestError, unanswered
from drift_gateway.connection import Connection
from drift_gateway.observe.readings import Reading, Readings
from drift_gateway.observe.timeline_chart import Bin, Span, columns, strip
from drift_scheduler.errors import DriftError

STRIP_S: Final = 30.0
RETRY_S: Final = 0.5
INFO_S: Final = 1.0
FIRST_S: Final = 0.25
FIRST_READINGS: Final = 4
"""What `--once` waits for."""
HOPELESS: Final = frozenset(
    {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED}
)
STATE_STYLES: Final = {"ready": "bold green", "starting": "yellow", "restarting": "bold red"}
LABEL_WIDTH: Final = 9
UNIMPORTANT: Final = ("p50", "target", "done", "goodput", "kept")
"""Columns of classes that a narrow terminal does without, the first of them first."""
NAME_WIDTH: Final = 20
"""Of a class, whose name may be longer: what is beside it is what one looks for."""
NAME_LEAST: Final = 12
"""What is left of a longer name before columns are left out."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The server does not answer; `why` in a line."""

    why: str


def run(
    connection: Connection,
    console: Console,
    *,
    once: bool = False,
    lines: bool = False,
    interval: float = 0.5,
) -> int:
    """Show until Ctrl-C, or one frame; the exit status. Raises DriftError."""
    try:
        return asyncio.run(_run(connection, console, once, lines, interval))
    except KeyboardInterrupt:
        return 0


async def _run(connection: Connection, console: Console, once: bool, lines: bool, interval: float) -> int:
    async with AsyncDriftClient(connection) as client:
        if once:
            reading, history = await _first(client, connection.target)
            if lines:
                print(json.dumps(reading), flush=True)
            else:
                console.print(frame(connection.target, reading, history))
        elif lines:
            await _lines(client, connection.target, interval)
        else:
            await _live(client, connection.target, console, interval)
    return 0


async def follow(client: AsyncDriftClient, interval: float) -> AsyncGenerator[Reading | Lost]:
    """Readings for ever; `Lost` where the server does not answer, and then readings of its successor.

    Raises DriftError where waiting will not help.
    """
    while True:
        try:
            info, asked = await client.server_info(5.0), time.monotonic()
            readings = Readings()
            async for message in client.watch_stats(interval):
                if time.monotonic() - asked > INFO_S:
                    info, asked = await client.server_info(5.0), time.monotonic()
                yield readings.take(info, message)
            yield Lost("the server is gone")
        except RequestError as error:
            if error.code in HOPELESS:
                raise DriftError(f"{error}; see --token and --tls-ca") from error
            yield Lost(str(error))
        await asyncio.sleep(RETRY_S)


async def _first(client: AsyncDriftClient, target: str) -> tuple[Reading, History]:
    """A reading with rates, and the time it took to get it."""
    history = History(FIRST_READINGS * FIRST_S)
    count = 0
    async with aclosing(follow(client, FIRST_S)) as news:
        async for reading in news:
            if isinstance(reading, Lost):
                raise DriftError(unanswered(target, reading.why))
            history.add(reading)
            count += 1
            if count > FIRST_READINGS:
                return reading, history
    raise AssertionError("follow never ends by itself")


async def _lines(client: AsyncDriftClient, target: str, interval: float) -> None:
    lost = False
    async with aclosing(follow(client, interval)) as news:
        async for reading in news:
            if isinstance(reading, Lost):
                if not lost:
                    print(f"{target}: {reading.why}; waiting for it", file=sys.stderr, flush=True)
                lost = True
            else:
                lost = False
                print(json.dumps(reading), flush=True)


async def _live(client: AsyncDriftClient, target: str, console: Console, interval: float) -> None:
    history = History()
    latest: Reading | None = None
    screen = console.is_terminal
    with Live(console=console, screen=screen, auto_refresh=False, transient=screen) as live:
        async with aclosing(follow(client, interval)) as news:
            async for reading in news:
                if isinstance(reading, Lost):
                    live.update(frame(target, latest, history, reading.why), refresh=True)
                else:
                    latest = reading
                    history.add(reading)
                    live.update(frame(target, latest, history), refresh=True)


class History:
    """The last half minute of the device's use."""

    def __init__(self, seconds: float = STRIP_S) -> None:
        self.seconds = seconds
        self.now = 0.0
        self._spans: deque[Span] = deque()

    def add(self, reading: Reading) -> None:
        """Take in a reading's strip; a clock that went back is that of another server."""
        if reading["time_s"] < self.now:
            self._spans.clear()
        self.now = reading["time_s"]
        for start, stop, prefill, decode, mixed, sharing in reading["strip"]:
            self._spans.append(Span(start, stop, prefill, decode, sharing, mixed))
        while self._spans and self._spans[0].stop < self.now - self.seconds:
            self._spans.popleft()

    def bins(self, count: int) -> list[Bin]:
        """The last `seconds` in so many columns."""
        return columns(self._spans_list(), self.now - self.seconds, self.now, count)

    def _spans_list(self) -> list[Span]:
        return list(self._spans)


# ------------------------------------------------------------------------------------------ drawing


def frame(target: str, reading: Reading | None, history: History, lost: str | None = None) -> RenderableType:
    """All of it: state, bars, classes, strip. `lost`: why the server does not answer, where it does not."""
    heading = Text.assemble(("drift top ", "bold"), target)
    if reading is None:
        return Group(heading, Text(f"no answer: {lost or 'not asked yet'}; trying again", "yellow"))
    parts: list[RenderableType] = [heading, _state(reading, lost), Text(""), _Bars(reading), Text("")]
    parts += [_Classes(reading["classes"]), Text(""), _Strip(history, reading["server"]["units"] or 1)]
    return Group(*parts)


def _state(reading: Reading, lost: str | None) -> Text:
    server = reading["server"]
    if lost is not None:
        return Text(f"no answer: {lost}; trying again, below is what was last seen", "bold red")
    text = Text(server["readiness"], STATE_STYLES.get(server["readiness"], "yellow"))
    if server["phase"] is not None:
        text.append(f" ({server['phase']}, {server['fraction']:.0%})")
    if server["model"] is not None:
        text.append(
            f"  {server['model']} on {server['device']}, {server['units']} units; "
            f"dispatch {server['dispatch']}, partition {server['partition']}"
        )
    if server["restarts"]:
        text.append(f"; engine restarted {server['restarts']} times", "yellow")
    return text


class _Bars:
    """Split, requests, KV pages and prefix hits as bars, each with its numbers; rates in a line."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(12, min(60, options.max_width - LABEL_WIDTH - 42))
        yield self._split(width)
        for label, share, words in self._shares():
            yield Text.assemble(
                f"{label:<{LABEL_WIDTH}}",
                *_filled(share, width),
                f" {words}",
                no_wrap=True,
                overflow="ellipsis",
            )
        yield self._rates()

    def _split(self, width: int) -> Text:
        split, units = self._reading["split"], self._reading["server"]["units"] or 1
        prefill = round(split["prefill_units"] / units * width)
        decode = min(round(split["decode_units"] / units * width), width - prefill)
        mixed = min(round(split["mixed_units"] / units * width), width - prefill - decode)
        lanes = " + ".join(
            f"{name} {_number(split[f'{name}_units'], 0 if units >= 20 else 1)}"
            for name in ("prefill", "decode")
        )
        words = f" {lanes} of {units} units"
        if split["mixed_units"] > units / 2:
            words = f" {split['sharing']}: both on all {units} units"
        return Text.assemble(
            f"{'device':<{LABEL_WIDTH}}",
            ("█" * prefill, "magenta"),
            ("▓" * mixed, "yellow"),
            ("·" * (width - prefill - decode - mixed), "dim"),
            ("▒" * decode, "cyan"),
            words,
            no_wrap=True,
            overflow="ellipsis",
        )

    def _shares(self) -> Iterable[tuple[str, float | None, str]]:
        load, server = self._reading["load"], self._reading["server"]
        running, most = load["running"], server["max_running"]
        share = running / most if running is not None and most else None
        yield "running", share, f"{_count(running)} of {_count(most)}"
        queued = f"{_count(load['waiting'])} waiting ({_count(load['waiting_prefill_tokens'])} tokens)"
        room = load["in_flight"] / load["max_in_flight"] if load["max_in_flight"] else None
        yield "queue", room, f"{_count(load['in_flight'])} in flight, {queued}"
        yield "KV pages", load["kv_share"], f"{_count(load['used_pages'])} of {_count(load['total_pages'])}"
        hits = load["prefix_hit_share"]
        yield "prefix", hits, f"{_share(hits)} of prompt tokens were cached"

    def _rates(self) -> Text:
        rates, load = self._reading["rates"], self._reading["load"]
        return Text.assemble(
            f"{'rates':<{LABEL_WIDTH}}",
            (f"{_number(rates['output_tokens_per_s'])} tokens/s", "bold"),
            f"   {_number(rates['requests_per_s'], 2)} requests/s   goodput ",
            (f"{self._reading['goodput']:.2f}/s", "bold"),
            f"   {_count(load['preemptions'])} preemptions",
        )


def _filled(share: float | None, width: int) -> tuple[tuple[str, str], tuple[str, str]]:
    full = 0 if share is None else round(min(1.0, share) * width)
    style = "green" if share is None or share < 0.8 else "yellow" if share < 0.95 else "red"
    return ("━" * full, style), ("─" * (width - full), "dim")


Cells = dict[tuple[str, str], Text]
"""By group and heading, in their order."""


class _Classes:
    """TTFT and TBT of the last minute against target; columns that do not fit are left out whole."""

    def __init__(self, classes: list[dict[str, Any]]) -> None:
        self._names = [Text(entry["name"]) for entry in classes]
        self._rows = [_class_cells(entry) for entry in classes]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._rows:
            yield Text("no request ended in the last minute", "dim")
            return
        columns = self._fitting(options.max_width)
        room = options.max_width - sum(width for _, width in columns.values())
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
        table.add_column("last\nminute", no_wrap=True, overflow="ellipsis", max_width=min(NAME_WIDTH, room))
        for (_, heading), (group, _) in columns.items():
            table.add_column(f"{group}\n{heading}", justify="right", no_wrap=True)
        for name, cells in zip(self._names, self._rows, strict=True):
            table.add_row(name, *(cells[column] for column in columns))
        yield table

    def _fitting(self, width: int) -> dict[tuple[str, str], tuple[str, int]]:
        """The columns that fit beside names cut to NAME_LEAST, without the least important ones; see `_drawn`."""
        names = max(len("minute"), *(min(name.cell_len, NAME_LEAST) for name in self._names))
        left_out: set[str] = set()
        for least in (*UNIMPORTANT, ""):
            columns = self._drawn(left_out)
            if names + sum(width for _, width in columns.values()) <= width:
                break
            left_out.add(least)
        return columns

    def _drawn(self, left_out: Container[str]) -> dict[tuple[str, str], tuple[str, int]]:
        """Columns with what stands above each (its group, over the first of it) and its width, a space on either side
        included."""
        found: dict[tuple[str, str], tuple[str, int]] = {}
        above = ""
        for column in self._rows[0]:
            group, heading = column
            if heading in left_out:
                continue
            label = group if group != above else ""
            above = group
            content = max(cells[column].cell_len for cells in self._rows)
            found[column] = label, 2 + max(len(label), len(heading), content)
        return found


def _class_cells(entry: dict[str, Any]) -> Cells:
    cells = {("", "done"): Text(str(entry["finished"]))}
    for group, metric, factor, digits in (("TTFT s", "ttft", 1.0, 2), ("TBT ms", "tbt", 1e3, 1)):
        target = entry[f"{metric}_target_s"]
        cells |= {
            (group, "p50"): Text(_scaled(entry[f"{metric}_p50_s"], factor, digits)),
            (group, "p99"): _against(entry[f"{metric}_p99_s"], target, factor, digits),
            (group, "target"): Text(_scaled(target, factor, digits)),
            (group, "kept"): _kept(entry[f"{metric}_attainment"]),
        }
    cells["", "goodput"] = Text(f"{entry['goodput']:.2f}/s")
    return cells


class _Strip:
    """The last half minute, from left to right."""

    def __init__(self, history: History, units: int) -> None:
        self._history = history
        self._units = units

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        entries = self._history.bins(max(20, options.max_width))
        yield from strip(entries, self._units, rows=min(8, max(2, self._units)))
        key = Text.assemble(
            ("█ prefill", "magenta"), "  ", ("▒ decode", "cyan"), "  ", ("▓ shared", "yellow"), "  · idle"
        )
        left = f"{self._history.seconds:g} s ago"
        gap = max(1, (options.max_width - len(left) - key.cell_len - len("now")) // 2)
        yield Text.assemble((left, "dim"), " " * gap, key, " " * gap, ("now", "dim"), no_wrap=True)


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _scaled(value: float | None, factor: float, digits: int) -> str:
    return "–" if value is None else f"{value * factor:,.{digits}f}"


def _against(value: float | None, target: float | None, factor: float, digits: int) -> Text:
    late = value is not None and target is not None and value > target
    return Text(_scaled(value, factor, digits), "red" if late else "green" if target is not None else "")


def _kept(share: float | None) -> Text:
    if share is None:
        return Text("–")
    return Text(f"{share:.1%}", "green" if share >= 0.99 else "yellow" if share >= 0.9 else "red")
