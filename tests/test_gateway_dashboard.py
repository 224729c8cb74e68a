"""The dashboard: its data over HTTP, and what it draws, looked at in a real headless browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import uvloop
from browser import Page, browsing, chromium
from gateway_under_test import PATIENCE_S, UnderTest, gateway_running

from drift_core.frames import LoadItem, StepFrame
from drift_gateway.client import SLO
from drift_gateway.http import dashboard
from drift_gateway.http.dashboard import add_dashboard
from drift_gateway.http.port import HttpPort
from drift_gateway.server import Address

PROGRAM = chromium()
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed")

COLOURS = "(() => { const s = getComputedStyle(document.documentElement); return Object.fromEntries(" \
    "['prefill', 'decode', 'mixed', 'idle'].map(n => [n, s.getPropertyValue('--' + n).trim()])) })()"  # fmt: skip
WIDTHS = "Object.fromEntries(['prefill', 'mixed', 'idle', 'decode'].map(n => " \
    "[n, document.getElementById('split-' + n).getBoundingClientRect().width]))"  # fmt: skip
# Colours of columns of the timeline, `PARTS` of the way from left to right, at 5 %, 15 %, … 95 % of its height.
COLUMNS = """(() => {
  const c = document.getElementById('timeline'), pen = c.getContext('2d');
  return PARTS.map(part => [...Array(10).keys()].map(i => {
    const x = Math.min(c.width - 1, Math.floor(c.width * part)), y = Math.floor((c.height * (i + 0.5)) / 10);
    const [r, g, b] = pen.getImageData(x, y, 1, 1).data;
    return '#' + [r, g, b].map(v => v.toString(16).padStart(2, '0')).join('');
  }));
})()"""


@asynccontextmanager
async def pages_on(under: UnderTest, port: int = 0) -> AsyncIterator[str]:
    pages = HttpPort()
    add_dashboard(pages, under.gateway.information)
    await pages.open(Address("127.0.0.1", port))
    try:
        yield f"http://127.0.0.1:{pages.port}/"
    finally:
        await pages.close()


def run_with_pages(body: Callable[[UnderTest, str], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with gateway_running(**options) as under, pages_on(under) as url:
            await asyncio.wait_for(body(under, url), 4 * PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def use(
    under: UnderTest,
    partition: tuple[int, int],
    sharing: str | None,
    prefill: int,
    decode: int,
    free: int = 1000,
) -> None:
    """The engine says that from now on its device is used like this."""
    frame = StepFrame(
        time.monotonic(),
        partition=partition,
        sharing=sharing,
        prefill_requests=prefill,
        decode_requests=decode,
        load=LoadItem(7, 3, free),
    )
    under.supervisor.timeline.step(frame)


async def readings(session: aiohttp.ClientSession, url: str) -> AsyncIterator[dict[str, Any]]:
    async with session.get(url + "events") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        async for line in answer.content:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


# ------------------------------------------------------------------------------------------- the data


def test_events_are_readings_and_the_first_goes_back() -> None:
    async def body(under: UnderTest, url: str) -> None:
        use(under, (1, 1), "spatial", 1, 1)
        await asyncio.sleep(0.3)
        use(under, (2, 0), "exclusive", 1, 0)
        async with aiohttp.ClientSession() as session:
            stream = readings(session, url)
            first = await anext(stream)
            assert first["schema"] == "drift.stats/1"
            assert first["server"]["readiness"] == "ready"
            assert (first["load"]["waiting"], first["load"]["running"]) == (7, 3)
            assert [1, 1] in [piece[2:4] for piece in first["strip"]], "what was before the viewer came"
            second = await anext(stream)
            assert second["split"]["prefill_units"] == pytest.approx(2.0)
            assert second["strip"][0][0] >= first["strip"][-1][1] - 1e-6
            await stream.aclose()
            async with session.get(url + "stats.json") as answer:
                assert (await answer.json())["split"]["sharing"] == "exclusive"

    run_with_pages(body, paused=True)


def test_pages_come_from_here_only_and_may_run_nothing_else() -> None:
    async def body(under: UnderTest, url: str) -> None:
        async with aiohttp.ClientSession() as session:
            for path, kind in (
                ("", "text/html"),
                ("dashboard.js", "text/javascript"),
                ("dashboard.css", "text/css"),
            ):
                async with session.get(url + path) as answer:
                    assert answer.status == 200
                    assert answer.content_type == kind
                    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
                    text = await answer.text()
                    for outside in ('src="http', 'href="http', "url(http", "@import", "innerHTML", "eval("):
                        assert outside not in text, (path, outside)

    run_with_pages(body)


def test_viewers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "MAX_VIEWERS", 2)

    async def body(under: UnderTest, url: str) -> None:
        async with aiohttp.ClientSession() as session:
            streams = [readings(session, url) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            async with session.get(url + "events") as answer:
                assert answer.status == 503
            await streams[0].aclose()
            for _ in range(200):
                async with session.get(url + "events") as answer:
                    if answer.status == 200:
                        break
                await asyncio.sleep(0.05)
            assert answer.status == 200, "who left makes room"
            await streams[1].aclose()

    run_with_pages(body)


# ---------------------------------------------------------------------------------------- the browser


@asynccontextmanager
async def looking_at(url: str, **view: Any) -> AsyncIterator[Page]:
    assert PROGRAM is not None
    async with browsing(PROGRAM) as page:
        await page.look(**{"width": 1100, "height": 800, **view})
        await page.open(url)
        await page.until("document.getElementById('state')?.textContent === 'ready'")
        yield page


async def columns(page: Page, parts: Sequence[float]) -> list[list[str]]:
    """What the timeline shows at one moment, by name."""
    names = {code: name for name, code in (await page.evaluate(COLOURS)).items()}
    found = await page.evaluate(COLUMNS.replace("PARTS", json.dumps(list(parts))))
    return [[names.get(code, code) for code in column] for column in found]


async def until_drawn(page: Page, wanted: list[str]) -> None:
    """Wait, boundedly, until the timeline's right edge looks like this."""
    for _ in range(600):
        if (found := await columns(page, [0.999])) == [wanted]:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the timeline shows {found}, not {wanted}")


@needs_browser
def test_the_timeline_and_the_split_are_drawn_while_requests_run() -> None:
    async def body(under: UnderTest, url: str) -> None:
        running = asyncio.create_task(under.client.generate(token_ids=[1], max_tokens=50).complete())
        await under.until(lambda engine: len(engine.submits()) == 1)
        under.engine.step(3)
        async with looking_at(url) as page:
            use(under, (1, 1), "spatial", 1, 1)
            half = ["prefill"] * 5 + ["decode"] * 5
            await until_drawn(page, half)
            use(under, (2, 0), "exclusive", 1, 0)
            await until_drawn(page, ["prefill"] * 10)
            use(under, (0, 2), "fused", 1, 1)
            await until_drawn(page, ["mixed"] * 10)
            use(under, (1, 1), "spatial", 0, 2, free=250)
            await until_drawn(page, ["idle"] * 5 + ["decode"] * 5)
            # What was drawn scrolls to the left and stays what it was.
            places = await columns(page, [1 - 0.001 * step for step in range(1, 1000)])
            assert places.index(["mixed"] * 10) < places.index(["prefill"] * 10) < places.index(half)
            await page.until(
                "document.getElementById('split-words').textContent.startsWith('prefill 0.0 + decode 1.0')"
            )
            await split_is_the_apis(page, under)
            assert await page.evaluate("document.getElementById('kv').textContent") == "750"
            assert await page.evaluate("document.getElementById('queue').textContent") == "7 waiting"
            assert page.errors == []
            assert page.failures == []
            assert {address.removeprefix(url) for address in page.requests if address.startswith("http")} == {
                "", "dashboard.css", "dashboard.js", "events",
            }  # fmt: skip
        under.engine.step(1000)
        await running

    run_with_pages(body, paused=True)


async def split_is_the_apis(page: Page, under: UnderTest) -> None:
    """The bar's widths are the units that WatchStats tells of, which no longer change."""
    count = 0
    async for message in under.client.watch_stats(0.2):
        count += 1
        if count < 3 or not message.stretches:
            continue
        now = message.stretches[-1]
        prefill = now.partition.prefill_units * (now.prefill_requests > 0)
        decode = now.partition.decode_units * (now.decode_requests > 0)
        break
    widths = await page.evaluate(WIDTHS)
    whole = sum(widths.values())
    assert widths["prefill"] / whole == pytest.approx(prefill / 2, abs=0.005)
    assert widths["decode"] / whole == pytest.approx(decode / 2, abs=0.005)
    assert widths["mixed"] == 0
    assert whole == pytest.approx(
        await page.evaluate("document.getElementById('split').clientWidth"), abs=1.0
    )


SMALL = {"width": 360, "height": 740, "scale": 2.0}
ROWS = "Object.fromEntries([...document.querySelectorAll('#classes tr')].map(r => " \
    "[r.cells[0].textContent, [...r.cells].map(c => [c.textContent, c.className])]))"  # fmt: skip
OVERFLOWING = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)" \
    ".map(e => e.id || e.tagName)"  # fmt: skip
BRIGHTNESS = "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]" \
    ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)) })()"  # fmt: skip


@needs_browser
def test_targets_are_shown_by_class_and_all_is_readable_on_a_phone_light_and_dark() -> None:
    async def body(under: UnderTest, url: str) -> None:
        for slo in (SLO(60.0, 1e-6, name="slow"), SLO(60.0, 60.0, name="fast")):
            await under.client.generate(token_ids=[1], max_tokens=20, slo=slo).complete()
        async with looking_at(url) as page:
            await page.until("document.querySelectorAll('#classes tr').length === 2")
            cells = await page.evaluate(ROWS)
            assert cells["fast"][9] == ["100.0 %", "good"]
            assert cells["slow"][9] == ["0.0 %", "bad"]
            assert cells["slow"][5] == ["100.0 %", "good"]
            ground, ink = await page.evaluate(BRIGHTNESS)
            assert ground > 600 > 150 > ink
            for dark in (False, True):
                await page.look(**SMALL, dark=dark)
                await page.until("innerWidth === 360")
                assert await page.evaluate(OVERFLOWING) == []
            ground, ink = await page.evaluate(BRIGHTNESS)
            assert ground < 150 < 600 < ink
            assert page.errors == []

    run_with_pages(body)


@needs_browser
def test_it_recovers_when_the_server_comes_back() -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as browser:
            async with gateway_running() as under, pages_on(under) as url:
                page = await browser.enter_async_context(looking_at(url))
                assert await page.evaluate("document.getElementById('lost').hidden")
                under.engine.crash()
                await page.until("document.getElementById('what').textContent.includes('restarted 1')")
                await page.until("document.getElementById('state').textContent === 'ready'")
            await page.until("!document.getElementById('lost').hidden")
            assert await page.evaluate("document.getElementById('state').textContent") == "no answer"
            port = int(url.rstrip("/").rpartition(":")[2])
            async with gateway_running() as under, pages_on(under, port):
                await page.until("document.getElementById('lost').hidden")
                use(under, (2, 0), "exclusive", 1, 0)
                await until_drawn(page, ["prefill"] * 10)
                assert page.errors == []

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
