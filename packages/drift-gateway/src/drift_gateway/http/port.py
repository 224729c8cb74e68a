"""The optional HTTP port: a small place where other modules put their routes.

Read-only pages for people and their tools (metrics, health, the dashboard); nothing here changes the server or
generates text. Knows no route by itself: `add` puts one there before `open`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from drift_gateway.server import Address
from drift_scheduler.errors import DriftError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES: Final = 64 * 1024
SHUTDOWN_S: Final = 1.0
HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class HttpPort:
    """Serves GET routes. `port` is the one taken, once `open` has returned."""

    def __init__(self) -> None:
        self.port = 0
        self._loopback = True
        self._app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        self._app.on_response_prepare.append(_set_headers)
        self._runner: web.AppRunner | None = None

    def add(self, path: str, handler: Handler) -> None:
        """Answer GET (and HEAD) of `path` with `handler`. A handler that waits is cancelled at `close`."""
        self._app.router.add_get(path, handler)

    async def open(self, address: Address) -> None:
        """Take the port and answer. Raises DriftError when it cannot be had."""
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        self._runner = runner
        self._loopback = address.host == "localhost" or _is_loopback(address.host)
        site = web.TCPSite(runner, address.host, address.port)
        try:
            await site.start()
        except OSError as error:
            await self.close()
            raise DriftError(f"cannot serve HTTP on {address}: {error.strerror or error}") from error
        self.port = int(runner.addresses[0][1])

    async def close(self) -> None:
        """Stop answering; answers under way get a second."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A page of another site must not read this port through a name that it makes mean 127.0.0.1."""
        name = request.host.rpartition(":")[0] if not request.host.endswith("]") else request.host
        name = (name or request.host).strip("[]")
        if self._loopback and name != "localhost" and not _is_address(name):
            raise web.HTTPForbidden(text=f"this port is not called {name!r}; use 127.0.0.1 or localhost\n")
        return await handler(request)


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback
