"""`python -m drift_gateway.fleet_member FD NUMBER PORT WHEN`: one of several gateway processes; options on stdin.

A gateway like any other, but for its engine, which the fleet keeps and has connect here; FD is this end of the socket
pair to the fleet. When that ends, so does this process: no gateway outlives its service. WHEN says when to open the
port: `now`, to tell clients how far the engine is, or `served`, where others serve already and nobody need be told
that this process starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from math import inf
from pathlib import Path
from typing import Final

from drift_core.frames import Ping, Pong, Starting
from drift_gateway import garbage
from drift_gateway.access.security import Security
from drift_gateway.event_loop import new_event_loop
from drift_gateway.fleet_link import (
    TO_MEMBER,
    Abort,
    Aborted,
    Attach,
    Count,
    Counted,
    Drain,
    EngineIs,
    FleetLink,
    Hurry,
    PoliciesAre,
    Reload,
    Serving,
    Stop,
    ToMember,
    Trouble,
)
from drift_gateway.serve_options import ServeOptions, decoded, recorders_of
from drift_gateway.server import Address, Gateway
from drift_gateway.sharing import News, Sharing
from drift_gateway.supervisor import EngineProcess, State, Supervisor
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")

NEWS_S: Final = 0.02
"""How often the others are told what happened here."""
ENGINE_S: Final = 10.0
"""How long to wait for an engine that is there."""
EXIT_AFTER_S: Final = 5.0
"""How long this process outlives its fleet at most."""
EXIT_STATUS_ORPHANED: Final = 70
EXIT_STATUS_TROUBLE: Final = 2


class BorrowedEngine:
    """An engine that somebody else keeps: all that can be ended here is its connection."""

    def __init__(self) -> None:
        self._let_go = asyncio.Event()

    async def wait(self) -> str:
        """As `EngineProcess`."""
        await self._let_go.wait()
        return "it was let go"

    def terminate(self) -> None:
        """As `EngineProcess`."""
        self._let_go.set()

    def kill(self) -> None:
        """As `EngineProcess`."""
        self._let_go.set()


class Member:
    """One gateway process. `number` from 1."""

    def __init__(self, options: ServeOptions, number: int) -> None:
        self._options = options
        self._security = Security(options.security)
        hang_timeout = options.operations.hang_timeout
        self._supervisor = Supervisor(self._attach, hang_timeout=hang_timeout, patience=0.0)
        self._gateway = Gateway(
            self._supervisor,
            security=self._security,
            compat=options.compat,
            limits=options.limits,
            process=(number, options.gateways),
        )
        self._sharing = Sharing(self._supervisor, self._security)
        self._link: FleetLink[ToMember] = FleetLink(TO_MEMBER, self._receive, self._orphaned)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._times = Stop(options.grace, options.operations.lame_duck)
        self._open = False
        report_health = self._supervisor.on_change

        def changed() -> None:
            report_health()
            self._say_whether_serving()

        self._supervisor.on_change = changed

    async def serve(self, address: Address, end: socket.socket, at_once: bool) -> int:
        """Serve until the fleet says that it is enough, or is gone; the exit status.

        Not `at_once`: from when there is an engine.
        """
        await self._link.open(end)
        self._handle_signals()
        following = asyncio.ensure_future(self._supervisor.follow())
        if not at_once:
            await self._engine_or_else(ENGINE_S)
        try:
            recorders = recorders_of(self._options.operations)
            self._gateway.generations.recorders += recorders
            await self._gateway.open(address)
        except DriftError as error:
            self._link.send(Trouble(str(error)))
            self._link.close()
            following.cancel()
            return EXIT_STATUS_TROUBLE
        self._open = True
        self._say_whether_serving()
        settling = asyncio.ensure_future(self._settle())
        telling = asyncio.ensure_future(self._tell())
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((stopping, following), return_when=asyncio.FIRST_COMPLETED)
        if following.done():  # it goes on for ever unless something here is wrong
            log.error("this gateway cannot go on", exc_info=following.exception())
        following.cancel()
        await self._gateway.close(self._times.grace, self._hurry, self._times.lame_duck)
        telling.cancel()
        settling.cancel()
        self._tell_now()
        for recorder in recorders:
            recorder.close()
        self._link.close()
        return 0 if self._stop.is_set() else 1

    async def _engine_or_else(self, seconds: float = inf) -> None:
        """Wait for the engine, perhaps not for ever: it may be gone just now."""
        deadline = time.monotonic() + seconds
        while self._supervisor.served is None and not self._stop.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _say_whether_serving(self) -> None:
        self._link.send(Serving(self._open and self._supervisor.engine_state is State.READY))

    async def _settle(self) -> None:
        """What is there once the engine is stays for good."""
        await self._engine_or_else()
        garbage.settle()

    async def _attach(self, path: Path) -> EngineProcess:
        """Instead of starting an engine: ask for the one that is there."""
        self._link.send(Attach(os.fspath(path)))
        return BorrowedEngine()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(NEWS_S)
            self._tell_now()

    def _tell_now(self) -> None:
        news = self._sharing.take()
        if news is not None:
            self._link.send(news)

    def _receive(self, frame: ToMember) -> None:
        supervisor = self._supervisor
        match frame:
            case News():
                self._sharing.learn(frame, time.monotonic())
            case Ping(number):
                self._link.send(Pong(number))
            case EngineIs(restarts, phase, fraction):
                supervisor.restarts = restarts
                supervisor.phase = None if phase is None else Starting(phase, fraction)
            case PoliciesAre(dispatch, partition):
                supervisor.policies_changed(dispatch, partition)
            case Drain(draining):
                supervisor.drain(draining)
            case Count(call):
                served = supervisor.served
                self._link.send(Counted(call, served.client.in_flight if served is not None else 0))
            case Abort(call, request_ids):
                self._link.send(Aborted(call, supervisor.abort_by_admin(request_ids)))
            case Stop():
                self._times = frame
                self._stop.set()
            case Hurry():
                self._hurry.set()
            case Reload():
                self._security.reload()

    def _orphaned(self) -> None:
        """The fleet is gone, or has let go."""
        if self._stop.is_set():
            return
        self._times = Stop(0.0, 0.0)
        self._hurry.set()
        self._stop.set()
        timer = threading.Timer(EXIT_AFTER_S, os._exit, (EXIT_STATUS_ORPHANED,))
        timer.daemon = True
        timer.start()

    def _handle_signals(self) -> None:
        """SIGTERM to this process alone stops it in order; the fleet starts it again."""

        def stop() -> None:
            (self._hurry if self._stop.is_set() else self._stop).set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)


async def _serve(
    options: ServeOptions, number: int, address: Address, end: socket.socket, at_once: bool
) -> int:
    return await Member(options, number).serve(address, end, at_once)


def main() -> None:
    """Read the options and serve."""
    end = socket.socket(fileno=int(sys.argv[1]))
    number, port, at_once = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "now"
    options = decoded(sys.stdin.buffer.read())
    sys.stdin.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the fleet's to handle
    line = f"gateway {number}: %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=line)
    address = Address(options.address.host, port)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            sys.exit(runner.run(_serve(options, number, address, end, at_once)))
    except DriftError as error:  # the files that it reads have changed since the service was started
        log.error("%s", error)
        sys.exit(EXIT_STATUS_TROUBLE)


if __name__ == "__main__":
    main()
