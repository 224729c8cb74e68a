"""`drift serve`: takes the port, starts the engine, shows how far it is, serves until told to stop.

Knows the terminal and the signals; what is served and how is the supervisor's and the server's business.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from drift_core.frames import Starting
from drift_core.link import EngineFailed, EngineGone
from drift_gateway import garbage
from drift_gateway.access.security import NO_SECURITY, Security, SecurityOptions
from drift_gateway.admin import AdminPort, check_admin_address
from drift_gateway.event_loop import new_event_loop
from drift_gateway.fleet import Fleet
from drift_gateway.http.dashboard import add_dashboard
from drift_gateway.http.operations import add_operations
from drift_gateway.http.port import HttpPort
from drift_gateway.observe.access_log import AccessLog
from drift_gateway.observe.spans import Spans
from drift_gateway.serve_options import OperationsOptions, ServeOptions, recorders_of
from drift_gateway.server import Address, Gateway, check_address
from drift_gateway.supervisor import ChildProcess, EngineProcess, Served, Supervisor
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")

__all__ = ["OperationsOptions", "ServeOptions", "StartUpDisplay", "client_line", "serve"]

EVERYWHERE: Final = ("0.0.0.0", "::")
"""Names of no machine: who listens there is called by a name, which a certificate can have."""


def serve(options: ServeOptions, console: Console) -> int:
    """Serve until SIGINT or SIGTERM; the exit status. Raises DriftError on what the user can put right."""
    check_address(options.address, options.insecure_bind, options.security)
    security = Security(options.security)
    if options.http is not None:
        check_address(options.http, options.insecure_bind, option="--http")
    if options.operations.admin is not None:
        check_admin_address(options.operations.admin)
    if options.engine.log is not None:
        check_output("--log", Path(options.engine.log))
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(options, security, console))


def check_output(option: str, path: Path) -> None:
    """Raises DriftError where no file could be written there, and leaves everything as it is.

    What the engine writes after minutes of loading and measuring is so refused before.
    """
    if path.is_dir():
        fault = errno.EISDIR
    elif path.exists():
        fault = 0 if os.access(path, os.W_OK) else errno.EACCES
    elif not path.parent.is_dir():
        fault = errno.ENOTDIR if path.parent.exists() else errno.ENOENT
    else:
        fault = 0 if os.access(path.parent, os.W_OK | os.X_OK) else errno.EACCES
    if fault:
        raise DriftError(f"{option} {path}: {os.strerror(fault)}")


async def _serve(options: ServeOptions, security: Security, console: Console) -> int:
    async def spawn(path: Path) -> EngineProcess:
        return await ChildProcess.spawn(options.engine, path)

    display = StartUpDisplay(console)
    operations = options.operations

    def news(frame: Starting) -> None:
        display.news(frame)
        if isinstance(gateway, Fleet):
            gateway.starting(frame)

    supervisor = Supervisor(
        spawn, on_starting=news, hang_timeout=operations.hang_timeout, forms=options.gateways == 1
    )
    gateway, recorders = _front(options, supervisor, security)
    await gateway.open(options.address)
    pages = HttpPort()
    add_operations(pages, supervisor)
    add_dashboard(pages, gateway.information)
    if options.http is not None:
        await pages.open(options.http)
    operated = gateway if isinstance(gateway, Fleet) else None
    admin = AdminPort(supervisor, security, operations.traces, operated)
    if operations.admin is not None:
        await admin.open(operations.admin)
    stop = _stop_signals()
    if not security.absent:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, security, gateway)
    try:
        with display:
            started = asyncio.ensure_future(_start(supervisor, gateway, display))
            await _first(started, stop)
            if not started.done():
                started.cancel()
                await asyncio.wait((started,))
                return 0
            served = started.result()
        garbage.settle()
        display.summarise(served)
        if options.gateways > 1:
            console.print(f"{options.gateways} gateway processes share the port", highlight=False)
        if options.http is not None:
            pages_at = Address(options.http.host, pages.port)
            console.print(
                f"dashboard on http://{pages_at}/, metrics on http://{pages_at}/metrics", highlight=False
            )
        if operations.admin is not None:
            admin_at = Address(operations.admin.host, admin.port)
            console.print(f"administration on {admin_at}", highlight=False)
        display.invite(served, Address(options.address.host, gateway.port), options.security)
        keeping = asyncio.ensure_future(supervisor.keep_running())
        await _first(keeping, stop)
        if keeping.done():
            return _say_why(console, keeping.exception())
        keeping.cancel()
        log.info("stopping; running requests get %g s", options.grace)
        return 0
    except EngineFailed as failed:
        if failed.usage:
            raise
        return _say_why(console, failed)
    except EngineGone as gone:
        return _say_why(console, gone)
    finally:
        stop.clear()  # the next signal ends the grace time
        await gateway.close(options.grace, hurry=stop, lame_duck=operations.lame_duck)
        await admin.close()
        for recorder in recorders:
            recorder.close()
        await pages.close()


def _front(
    options: ServeOptions, supervisor: Supervisor, security: Security
) -> tuple[Gateway | Fleet, list[AccessLog | Spans]]:
    """What serves the public port: a gateway in this process, or several in their own; and who keeps account of
    requests here. Raises DriftError when one cannot."""
    if options.gateways > 1:
        for recorder in recorders_of(
            options.operations
        ):  # what is wrong with one is said before anything starts
            recorder.close()
        return Fleet(supervisor, options, security), []
    gateway = Gateway(supervisor, security=security, compat=options.compat, limits=options.limits)
    recorders = recorders_of(options.operations)
    gateway.generations.recorders += recorders
    return gateway, recorders


async def _start(supervisor: Supervisor, gateway: Gateway | Fleet, display: StartUpDisplay) -> Served:
    """Start the engine, and wait until all that is to serve does."""
    if not isinstance(gateway, Fleet):
        return await supervisor.start()
    engine = asyncio.ensure_future(supervisor.start())
    ready = asyncio.ensure_future(gateway.ready())
    try:
        await asyncio.wait((engine, ready), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()  # before the engine is ready, only trouble comes
        served = await engine
        display.news(Starting("wait for the gateways"))
        await ready
        return served
    finally:
        ready.cancel()
        engine.cancel()
        await asyncio.wait((engine,))


def _reload(security: Security, gateway: Gateway | Fleet) -> None:
    security.reload()
    if isinstance(gateway, Fleet):
        gateway.reload()


def _say_why(console: Console, error: BaseException | None) -> int:
    console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
    return 1


async def _first(task: asyncio.Future[Any], stop: asyncio.Event) -> None:
    """Wait until the task is done or a signal came."""
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()


def _stop_signals() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


class StartUpDisplay:
    """Start-up phases as progress bars (plain lines where there is no terminal), and as a table in the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._over = False

    def __enter__(self) -> None:
        self._progress.start()
        self.news(Starting("start the engine process"))

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._over = True
        self._began[""] = time.monotonic()

    def news(self, frame: Starting) -> None:
        """One piece of news of the start-up; news of a later restart goes to the log."""
        if self._over:
            if frame.fraction == 0:
                log.info("engine: %s", frame.phase)
            return
        if frame.phase not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, completed=1.0)
            self._tasks[frame.phase] = self._progress.add_task(frame.phase, total=1.0)
            self._began[frame.phase] = time.monotonic()
            if not self._console.is_terminal:
                self._console.print(f"{frame.phase} …", highlight=False)
        self._progress.update(self._tasks[frame.phase], completed=frame.fraction)

    def summarise(self, served: Served) -> None:
        """The phase table, and what is served."""
        ready = served.ready
        table = Table("phase", "seconds", title="start-up", title_justify="left")
        table.columns[1].justify = "right"
        times = list(self._began.items())
        for (phase, began), (_, ended) in pairwise(times):
            table.add_row(phase, f"{ended - began:.2f}")
        console = self._console
        console.print(table)
        console.print(
            f"[bold]{ready.model}[/], {ready.num_layers} layers, {ready.dtype}, on {ready.device}; "
            f"dispatch {ready.dispatch}, partition {ready.partition}",
            highlight=False,
            soft_wrap=True,
        )
        console.print(
            f"KV pool: {ready.kv_pages} pages of {ready.page_tokens} tokens = {ready.kv_tokens} tokens: "
            f"{ready.kv_tokens // ready.max_context} requests of the full context ({ready.max_context}) at once, "
            f"{ready.max_running} at most",
            highlight=False,
            soft_wrap=True,
        )

    def invite(self, served: Served, address: Address, security: SecurityOptions) -> None:
        """Where it serves, and as the last line a command to try it with."""
        console, has_text = self._console, served.tokenizer is not None
        summary = escape(security.summary())
        console.print(f"[bold green]serving on {address}[/]{summary}; try:", highlight=False, soft_wrap=True)
        here = Address("localhost", address.port) if address.host in EVERYWHERE else address
        if security == NO_SECURITY:
            talk = "chat" if has_text else "top"
            console.print(f"  drift {talk} --target {here}", highlight=False, markup=False)
        line = client_line(here, has_text, security)
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def client_line(address: Address, text: bool = True, security: SecurityOptions = NO_SECURITY) -> str:
    """A command for a shell that sends one request there, as text or as token ids.

    With TLS it trusts the server's own certificate. What only the client has is named: its certificate, its token.
    """
    prompt, field = ("'A list is'", "text") if text else ("token_ids=[1, 2, 3]", "token_ids")
    imports, arguments = "from drift_gateway.client import DriftClient", f"'{address}'"
    if security.certificate is not None:
        own = ", 'client.pem', 'client.key'" if security.client_ca is not None else ""
        imports += "; from drift_gateway.connection import Tls"
        arguments += f", tls=Tls({str(security.certificate)!r}{own})"
    if security.tenants is not None and security.client_ca is None:
        arguments += ", token='TOKEN'"
    program = (
        f"{imports}; "
        f"print(DriftClient({arguments}).generate({prompt}, max_tokens=40, temperature=0.0).complete().{field})"
    )
    return 'python -c "' + re.sub(r'([\\"$`])', r"\\\1", program) + '"'
