"""`drift demo`: a server with the embedded model, a handful of concurrent requests, and how each of them fared.

Everything goes through the public client and the drift.v1 API; the server is a `drift serve` of its own, unless
one is named. Exits 0 only if every request finished.
"""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Final

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from drift_gateway.client import (
    SLO,
    Accepted,
    AsyncDriftClient,
    Finished,
    RequestError,
    TokenDelta,
    Unavailable,
)
from drift_gateway.connection import Connection
from drift_gateway.observe.timeline_chart import Span, chart
from drift_gateway.v1 import info_pb2
from drift_scheduler.errors import DriftError

PLAIN_WIDTH: Final = 110
START_S: Final = 120.0
CALL_S: Final = 60.0
CHARACTERS_PER_TOKEN: Final = 3.5
"""Of this prose in a vocabulary of a few thousand; how long a prompt really is, the server says."""

SHORT: Final = SLO(ttft=1.0, tbt=0.05, name="interactive")
LONG: Final = SLO(ttft=4.0, tbt=0.1, name="document")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the demo, sent `delay` seconds after the first. `prompt_tokens`: about how many, if long."""

    name: str
    opening: str
    delay: float
    max_tokens: int
    slo: SLO
    prompt_tokens: int = 0


ASKS: Final = (
    Ask("for loops", "The for statement is used to iterate over the elements of a sequence", 0.0, 400, SHORT),
    Ask("a chapter", "class", 0.25, 128, LONG, prompt_tokens=1400),
    Ask("lists", "A list object is mutable, which means that", 0.35, 400, SHORT),
    Ask("a section", "strings", 0.55, 128, LONG, prompt_tokens=1000),
    Ask("with", "The with statement is used to wrap the execution of a block", 0.7, 320, SHORT),
    Ask("two chapters", "function", 0.9, 96, LONG, prompt_tokens=1600),
    Ask("exceptions", "When an exception is raised, the interpreter", 1.1, 320, SHORT),
)


@dataclass(slots=True)
class Story:
    """What has come of one request so far."""

    ask: Ask
    text: str = ""
    prompt_tokens: int = 0
    finished: Finished | None = None
    error: str = ""

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.error:
            return self.error
        if self.finished is not None:
            return f"{self.finished.usage.output_tokens} tokens, {self.finished.reason}"
        return "writing" if self.text else "waiting"

    @property
    def well(self) -> bool:
        """Whether it ran to its end."""
        return self.finished is not None and self.finished.reason in {"stop", "length"}


@dataclass(slots=True)
class History:
    """What the lanes did meanwhile."""

    units: int
    spans: list[Span] = field(default_factory=list)


def run(target: str | Connection | None = None, console: Console | None = None) -> int:
    """Run the demo against `target`, or a server of its own; the exit status."""
    if console is None:
        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    return asyncio.run(_run(target, console))


async def _run(target: str | Connection | None, console: Console) -> int:
    began = time.monotonic()
    async with _server(target) as address, AsyncDriftClient(address) as client:
        info = await client.wait_ready(10.0)
        stories = [Story(ask) for ask in ASKS]
        history = History(info.device.units)
        watching = asyncio.ensure_future(_watch(client, history))
        await _send_all(client, stories, info.model.max_context_tokens, console)
        await asyncio.sleep(0.2)  # the last stretch of the timeline
        watching.cancel()
        await asyncio.wait((watching,))
    console.print(results(stories))
    console.print(timeline(history))
    good = all(story.well for story in stories)
    ended = "every request finished" if good else "not every request finished"
    console.print(f"{ended}; {time.monotonic() - began:.0f} s in all", highlight=False)
    return 0 if good else 1


@asynccontextmanager
async def _server(target: str | Connection | None) -> AsyncIterator[str | Connection]:
    """The address of a ready server: the one named, or one that lives as long as the demo."""
    if target is not None:
        yield target
        return
    address = f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-P", "-m", "drift_gateway", "serve", "--model", "demo", "--listen", address]
    process = subprocess.Popen(command)
    try:
        await _until_ready(address, process)
        yield address
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 20.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    async with AsyncDriftClient(address) as client:
        while process.poll() is None:
            try:
                await client.wait_ready(0.5)
                return
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise DriftError(f"the server is not ready after {START_S:.0f} s: {error}") from error
    raise DriftError(f"the server ended with status {process.returncode}; what it said stands above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -------------------------------------------------------------------------------------------- requests


async def _send_all(client: AsyncDriftClient, stories: list[Story], context: int, console: Console) -> None:
    if not console.is_terminal:
        await asyncio.gather(*(_tell(client, story, context, _Lines(console, story)) for story in stories))
        return
    with Live(console=console, refresh_per_second=12, get_renderable=lambda: _panels(stories, console)):
        await asyncio.gather(*(_tell(client, story, context, None) for story in stories))


async def _tell(client: AsyncDriftClient, story: Story, context: int, lines: _Lines | None) -> None:
    """Send one request when its time comes and keep its story; an error is part of it."""
    ask = story.ask
    await asyncio.sleep(ask.delay)
    prompt = prompt_of(ask, context)
    generation = client.generate(
        prompt,
        temperature=0.7,  # greedy, so small a model repeats itself
        top_p=0.9,
        seed=len(ask.opening),
        max_tokens=ask.max_tokens,
        slo=ask.slo,
        ignore_eos=True,
        timeout=CALL_S,
    )
    try:
        async for event in generation:
            match event:
                case Accepted():
                    story.prompt_tokens = event.prompt_tokens
                case TokenDelta():
                    story.text += event.text
                case Finished():
                    story.finished = event
            if lines is not None:
                lines.news()
    except RequestError as error:
        story.error = f"{error.code.name}: {error}"


def prompt_of(ask: Ask, context: int) -> str:
    """Its opening, or for a long one so much prose from the topic of that name, within the model's context."""
    if not ask.prompt_tokens:
        return ask.opening
    tokens = min(ask.prompt_tokens, context - ask.max_tokens - 64)
    names = sorted(topics)
    start = names.index(ask.opening)
    prose = " ".join(topics[name] for name in [*names[start:], *names[:start]])
    return re.sub(r"\s+", " ", prose)[: int(tokens * CHARACTERS_PER_TOKEN)].strip()


class _Lines:
    """One request's tokens as prefixed lines, for output that is no terminal."""

    def __init__(self, console: Console, story: Story, width: int = 88) -> None:
        self._console, self._story, self._width = console, story, width
        self._shown = 0

    def news(self) -> None:
        """Print the lines that are full, and at the end the rest."""
        story = self._story
        while len(story.text) - self._shown >= self._width or (
            story.finished and self._shown < len(story.text)
        ):
            line = story.text[self._shown : self._shown + self._width]
            self._shown += len(line)
            self._say(" ".join(line.split()))
        if story.finished is not None:
            self._say(f"({story.state})")

    def _say(self, line: str) -> None:
        self._console.print(
            f"{self._story.ask.name:>12} | {line}", highlight=False, markup=False, soft_wrap=True
        )


def _panels(stories: list[Story], console: Console) -> RenderableType:
    """Each request in a panel: the end of its text, as it grows."""
    width = max(38, console.width // 3 - 1)
    panels = []
    for story in stories:
        text = " ".join(story.text.split())[-(width - 4) * 5 :]
        colour = "red" if story.error else "green" if story.finished else "cyan" if story.text else "dim"
        size = f"{story.prompt_tokens} in" if story.prompt_tokens else ""
        panels.append(
            Panel(
                Text(text),
                title=f"{story.ask.name}  {size}",
                subtitle=story.state,
                border_style=colour,
                width=width,
                height=7,
            )
        )
    return Columns(panels)


# --------------------------------------------------------------------------------------------- results


def results(stories: list[Story]) -> Table:
    """TTFT and TBT of each request against its targets, in seconds and milliseconds."""
    table = Table(title="measured by the server, against the targets", title_justify="left")
    table.add_column("request")
    for heading in ("in", "out", "TTFT s", "target", "TBT p50 ms", "p99", "max", "target"):
        table.add_column(heading, justify="right")
    table.add_column("kept")
    for story in stories:
        if story.finished is None:
            table.add_row(story.ask.name, *[""] * 8, f"[red]{story.state}")
            continue
        usage, timing = story.finished.usage, story.finished.timing
        kept = timing.ttft_met is not False and timing.tbt_met is not False
        table.add_row(
            story.ask.name,
            str(usage.prompt_tokens),
            str(usage.output_tokens),
            _number(timing.ttft, 1, 3),
            _number(timing.slo.ttft, 1, 2),
            _number(timing.tbt_p50, 1e3, 1),
            _number(timing.tbt_p99, 1e3, 1),
            _number(timing.tbt_max, 1e3, 1),
            _number(timing.slo.tbt, 1e3, 0),
            "[green]yes" if kept else "[yellow]no",
        )
    return table


def timeline(history: History) -> RenderableType:
    """How the device was divided over the run."""
    if not history.spans:
        return Text("the server reported no timeline")
    key = Text.assemble(("█ prefill", "magenta"), "  ", ("▒ decode", "cyan"), "  · idle")
    heading = Text(f"partition over time: {history.units} units, a line per stretch of time")
    return Group(heading, key, *chart(history.spans, history.units))


def _number(value: float | None, factor: float, digits: int) -> str:
    return "–" if value is None else f"{value * factor:.{digits}f}"


async def _watch(client: AsyncDriftClient, history: History) -> None:
    async for message in client.watch_stats(0.1):
        history.spans.extend(_span(stretch) for stretch in message.stretches)


def _span(stretch: info_pb2.Stretch) -> Span:
    prefill = stretch.partition.prefill_units if stretch.prefill_requests else 0
    decode = stretch.partition.decode_units if stretch.decode_requests else 0
    sharing = info_pb2.Sharing.Name(stretch.sharing).removeprefix("SHARING_").lower()
    return Span(stretch.start_us / 1e6, stretch.stop_us / 1e6, prefill, decode, sharing)
