"""The HTTP routes that operators' tools read: `/metrics` for Prometheus, `/health` for whatever restarts servers."""

from __future__ import annotations

import time

from aiohttp import web

from drift_gateway.http.metrics import CONTENT_TYPE, MetricsPage
from drift_gateway.http.port import HttpPort
from drift_gateway.supervisor import Supervisor


def add_operations(port: HttpPort, supervisor: Supervisor) -> None:
    """Add `/metrics`, `/health` (200 while the process answers) and `/ready` (200 when requests are served)."""
    page = MetricsPage(supervisor)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=page.text(time.monotonic()), headers={"Content-Type": CONTENT_TYPE})

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": supervisor.state.value})

    async def ready(request: web.Request) -> web.Response:
        return web.json_response(
            {"status": supervisor.state.value}, status=200 if supervisor.healthy else 503
        )

    port.add("/metrics", metrics)
    port.add("/health", health)
    port.add("/ready", ready)
