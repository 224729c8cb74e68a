"""What authentication adds to a call: medians of a unary call, of a stream's start and of a stream of 1000 tokens.

    nox -s bench -- gateway_auth

Gateways that differ in nothing but security run side by side in one process, with a scripted engine each; they are
called in turn, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import trustme
import uvloop
from rich.console import Console
from rich.table import Table

from drift_gateway.access.security import Security, SecurityOptions
from drift_gateway.access.tenants import new_token, token_entry
from drift_gateway.connection import Tls

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from gateway_under_test import UnderTest, gateway_running

TENANTS = 1000


class _Clock:
    now = time.perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1500)
    parser.add_argument("--cpu", action="store_true", help="CPU time of client and server, for busy machines")
    options = parser.parse_args()
    if options.cpu:
        _Clock.now = time.process_time
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(options.rounds))


async def measure(rounds: int) -> None:
    """Print microseconds per call, and what each kind of security adds to none."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gateways = {
            name: await stack.enter_async_context(
                gateway_running(security=Security(options), token=token, tls=tls, step_seconds=0.0)
            )
            for name, (options, token, tls) in kinds(folder).items()
        }
        table = Table("security", "unary us", "+", "stream's start us", "+", "1000 tokens ms", "+")
        calls = {"unary": unary, "start": start, "stream": stream}
        found = {
            kind: await medians(gateways, call, rounds if kind != "stream" else max(10, rounds // 20))
            for kind, call in calls.items()
        }
        for name in gateways:
            cells = []
            for kind, factor in (("unary", 1e6), ("start", 1e6), ("stream", 1e3)):
                value, base = found[kind][name] * factor, found[kind]["none"] * factor
                cells += [f"{value:.1f}", f"{value - base:+.1f}"]
            table.add_row(name, *cells)
        Console().print(table)


def kinds(folder: Path) -> dict[str, tuple[SecurityOptions, str | None, Tls | None]]:
    """Options of the server, token and TLS of the client; the tenants file has TENANTS tenants."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("server", "client"):
        issued = ca.issue_cert("localhost", "127.0.0.1", common_name=name)
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
    token, tenants = new_token(), folder / "tenants.toml"
    others = "".join(token_entry(f"t{k}", new_token()) for k in range(TENANTS))
    limits = "[tenants.acme]\nrequests-per-second = 1e6\ntokens-per-second = 1e9\nmax-in-flight = 100\n"
    tenants.write_text(f"{limits}certificates = ['client']\n{token_entry('acme', token)}{others}")
    server = (folder / "server.pem", folder / "server.key")
    own = (folder / "client.pem", folder / "client.key")
    tls = Tls(folder / "ca.pem")
    return {
        "none": (SecurityOptions(), None, None),
        "token": (SecurityOptions(tenants=tenants), token, None),
        "TLS": (SecurityOptions(*server), None, tls),
        "TLS, token": (SecurityOptions(*server, tenants=tenants), token, tls),
        "mTLS": (SecurityOptions(*server, folder / "ca.pem", tenants), None, Tls(tls.ca, *own)),
    }


async def medians(
    gateways: dict[str, UnderTest], call: Callable[[UnderTest], Awaitable[float]], rounds: int
) -> dict[str, float]:
    """Median seconds of a call to each gateway, called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in gateways}
    for _ in range(rounds):
        for name, gateway in gateways.items():
            seconds[name].append(await call(gateway))
    return {name: statistics.median(values[rounds // 10 :]) for name, values in seconds.items()}


async def unary(gateway: UnderTest) -> float:
    """Seconds of GetLoad."""
    began = _Clock.now()
    await gateway.client.load()
    return _Clock.now() - began


async def start(gateway: UnderTest) -> float:
    """Seconds until the first event of a stream."""
    began = _Clock.now()
    events = aiter(gateway.client.generate(token_ids=[1, 2, 3], max_tokens=1))
    await anext(events)
    seconds = _Clock.now() - began
    async for _ in events:
        pass
    return seconds


async def stream(gateway: UnderTest) -> float:
    """Seconds of a whole stream."""
    began = _Clock.now()
    await gateway.client.generate(token_ids=[1, 2, 3], max_tokens=1000).complete()
    return _Clock.now() - began


if __name__ == "__main__":
    main()
