"""The dashboard: one page on the HTTP port that shows what `drift top` shows, fed by server-sent events.

Routes: `/` with its style and script, `/events` (a reading every quarter second as long as somebody looks) and
`/stats.json` (one reading). Readings are made of the very messages that WatchStats sends. Everything comes from this
package; the page loads nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from importlib.resources import files
from typing import Final

from aiohttp import web

from drift_gateway.http.port import HttpPort
from drift_gateway.info import InfoService
from drift_gateway.observe.readings import STRIP_LIMIT, Reading, Readings

INTERVAL_S: Final = 0.25
HISTORY_S: Final = 31.0
HISTORY_SPANS: Final = 2000
RETRY_MS: Final = 500
MAX_VIEWERS: Final = 32
PAGES: Final = {
    "/": ("dashboard.html", "text/html"),
    "/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard.js": ("dashboard.js", "text/javascript"),
}
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_dashboard(port: HttpPort, information: InfoService) -> None:
    """Put the page and its data on the port."""
    dashboard = Dashboard(information)
    for path, (name, kind) in PAGES.items():
        port.add(path, _page(name, kind))
    port.add("/events", dashboard.events)
    port.add("/stats.json", dashboard.stats)


class Dashboard:
    """Readings for the page's viewers, of whom there are at most MAX_VIEWERS at a time."""

    def __init__(self, information: InfoService) -> None:
        self._information = information
        self._viewers = 0

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Readings as server-sent events until the viewer leaves or the server stops."""
        if self._viewers >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_VIEWERS} others are looking already\n")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self._viewers += 1
        try:
            await response.prepare(request)
            await response.write(f"retry: {RETRY_MS}\n\n".encode())
            async with aclosing(self._readings()) as readings:
                async for reading in readings:
                    await response.write(f"data: {json.dumps(reading)}\n\n".encode())
        except ConnectionError:
            return response  # the viewer left
        finally:
            self._viewers -= 1
        return response

    async def stats(self, request: web.Request) -> web.Response:
        """One reading, over a quarter second."""
        async with aclosing(self._readings()) as readings:
            await anext(readings)
            return web.json_response(await anext(readings))

    async def _readings(self) -> AsyncGenerator[Reading]:
        """The first goes back over what the page shows, the others to the one before."""
        readings = Readings()
        watcher = self._information.watcher(time.monotonic() - HISTORY_S)
        limit = HISTORY_SPANS
        while not self._information.stopping:
            message = self._information.stats(watcher, time.monotonic())
            yield readings.take(self._information.describe(), message, limit)
            limit = STRIP_LIMIT
            await asyncio.sleep(INTERVAL_S)


def _page(name: str, kind: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    text = (files("drift_gateway.http") / "web" / name).read_text(encoding="utf-8")

    async def page(request: web.Request) -> web.Response:
        return web.Response(
            text=text, content_type=kind, charset="utf-8", headers={"Content-Security-Policy": POLICY}
        )

    return page
