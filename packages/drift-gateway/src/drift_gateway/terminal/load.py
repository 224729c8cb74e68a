"""`drift load`: an open-loop client. It sends every request when the workload says, whatever became of those before.

One asyncio loop over several connections. What is measured, and from when, is `load_account`'s business.
"""

from __future__ import annotations

import asyncio
import platform
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import grpc
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from drift_gateway import __version__
from drift_gateway.client import (
    CHANNEL_OPTIONS,
    AsyncDriftClient,
    RequestError,
    error_of,
    unanswered,
    waiting,
)
from drift_gateway.connection import Connection
from drift_gateway.event_loop import new_event_loop
from drift_gateway.terminal.load_account import Account, DeviceTime, Outcome
from drift_gateway.terminal.load_prompts import Prompt, PromptMaker
from drift_gateway.v1 import generation_pb2 as pb
from drift_gateway.v1 import generation_pb2_grpc, info_pb2
from drift_scheduler.domain import SLO, FinishReason, Request
from drift_scheduler.errors import DriftError, OptionError
from drift_scheduler.plugins import Registry
from drift_scheduler.report import Report
from drift_scheduler.simulation.run import Scenario, workload

LOAD_CHANNEL_OPTIONS: Final = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
WATCH_S: Final = 0.25
START_S: Final = 120.0
REFUSED: Final = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION})
ON_INFEASIBLE: Final = {
    "best-effort": pb.ON_INFEASIBLE_BEST_EFFORT,
    "reject": pb.ON_INFEASIBLE_REJECT,
    "demote": pb.ON_INFEASIBLE_DEMOTE,
}
# protoc's grpc plug-in writes no types.
_STUB: Final[Callable[[Any], Any]] = generation_pb2_grpc.GenerationServiceStub


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to send where. `slo_ttft`, `slo_tbt` `None`: the server's defaults. `slo_e2e` `None`: no such target.
    `priority`: of every request, in place of the workload's. `warm`: let the run reuse prefixes that earlier runs left
    in the server's cache. `timeout`: seconds that one request may take. `duration`: stop sending after so many
    seconds."""

    connection: Connection
    workload: str
    rate: float | None = None
    requests: int | None = None
    slo_ttft: float | None = None
    slo_tbt: float | None = None
    slo_e2e: float | None = None
    slo_class: str | None = None
    priority: int | None = None
    on_infeasible: str | None = None
    seed: int = 0
    connections: int = 4
    timeout: float = 600.0
    duration: float | None = None
    temperature: float = 0.0
    warm: bool = False

    def check(self) -> None:
        """Raises OptionError."""
        for name, value in (
            ("rate", self.rate),
            ("slo-ttft", self.slo_ttft),
            ("slo-tbt", self.slo_tbt),
            ("slo-e2e", self.slo_e2e),
            ("duration", self.duration),
            ("timeout", self.timeout),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise OptionError(f"{name} is {value}, need a positive number")

    def config(self, info: info_pb2.GetServerInfoResponse, slo: SLO) -> dict[str, Any]:
        """Every setting and what is served there, under the names `drift simulate` uses, for the report."""
        return {
            "workload": self.workload,
            "rate": self.rate,
            "requests": self.requests,
            "device": info.device.name,
            "model": info.model.name,
            "dispatch": info.policies.dispatch,
            "partition": info.policies.partition,
            "slo_ttft": slo.ttft,
            "slo_tbt": slo.tbt,
            "slo_e2e": slo.e2e,
            "slo_class": slo.name,
            "priority": self.priority,
            "on_infeasible": self.on_infeasible,
            "seed": self.seed,
            "kv_pages": info.kv_pool.total_pages,
            "page_tokens": info.kv_pool.page_tokens,
            "max_running": info.kv_pool.max_running,
            "max_context_tokens": info.model.max_context_tokens,
            "target": self.connection.target,
            "connections": self.connections,
            "timeout": self.timeout,
            "duration": self.duration,
            "temperature": self.temperature,
            "warm": self.warm,
            "interrupted": False,
            "versions": {
                "drift-gateway": __version__,
                "server": info.version,
                "python": platform.python_version(),
            },
        }


def run(options: LoadOptions, registry: Registry, console: Console) -> Report:
    """Send the workload and report. `console` gets progress and notes. Raises DriftError."""
    options.check()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(measure(options, registry, console))


async def measure(options: LoadOptions, registry: Registry, console: Console) -> Report:
    """As `run`, on the running loop of the main thread."""
    async with AsyncDriftClient(options.connection) as client:
        info = await _served(client, options.connection.target, console)
        slo = _targets(options, info)
        account = Account(info.device.units)
        async with _watching(client) as device:
            run = LoadRun(options, slo, info, account)
            config = options.config(info, slo)
            config["interrupted"] = await run.drive(_requests(options, slo, registry), console)
            await _until_seen(device, account)
        for note in run.notes():
            console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
        return account.report(config, device)


async def _served(client: AsyncDriftClient, target: str, console: Console) -> info_pb2.GetServerInfoResponse:
    """What is served there; waits for a server that is starting, not for one that is not there."""
    try:
        info = await client.server_info(5.0)
        if info.readiness == info_pb2.READINESS_READY:
            return info
        console.print(waiting(target, info), highlight=False, markup=False, soft_wrap=True)
        return await client.wait_ready(START_S)
    except RequestError as error:
        raise DriftError(unanswered(target, str(error))) from error


def _targets(options: LoadOptions, info: info_pb2.GetServerInfoResponse) -> SLO:
    defaults = info.slo_defaults
    return SLO(
        options.slo_ttft if options.slo_ttft is not None else defaults.ttft_ms / 1e3,
        options.slo_tbt if options.slo_tbt is not None else defaults.tbt_ms / 1e3,
        options.slo_e2e,
        name=options.slo_class or "default",
    )


def _requests(options: LoadOptions, slo: SLO, registry: Registry) -> Iterable[Request]:
    """The same requests that `drift simulate` would serve."""
    return workload(
        registry,
        Scenario(
            options.workload, "", "", "", slo, rate=options.rate, requests=options.requests, seed=options.seed
        ),
    )


# ------------------------------------------------------------------------------------------- statistics


@asynccontextmanager
async def _watching(client: AsyncDriftClient) -> AsyncIterator[DeviceTime]:
    """The server's statistics as long as the block lasts; incomplete where the server has none."""
    device = DeviceTime()
    task = asyncio.create_task(_watch(client, device))
    try:
        yield device
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _watch(client: AsyncDriftClient, device: DeviceTime) -> None:
    with suppress(RequestError):
        async for message in client.watch_stats(WATCH_S):
            device.add(message, time.monotonic())


async def _until_seen(device: DeviceTime, account: Account) -> None:
    """Wait, a few intervals at most, until the statistics reach the end of the run."""
    deadline = time.monotonic() + 8 * WATCH_S
    end = account.metrics.now
    while time.monotonic() < deadline:
        if device.seen_until is not None and device.seen_until >= end:
            device.complete = device.dropped == 0
            return
        await asyncio.sleep(WATCH_S / 5)


# ------------------------------------------------------------------------------------------ the run


class LoadRun:
    """Sends requests at their times over several connections and keeps the account."""

    def __init__(
        self,
        options: LoadOptions,
        slo: SLO,
        info: info_pb2.GetServerInfoResponse,
        account: Account,
    ) -> None:
        self._options = options
        self._slo = slo
        self._account = account
        room = min(info.model.max_context_tokens, info.kv_pool.total_tokens or info.model.max_context_tokens)
        self._room = room
        self._prompts = PromptMaker(info.model.vocab_size, room, options.seed)
        self._template = _template(options)
        self._name = uuid4().hex[:8]
        self._running: set[asyncio.Task[None]] = set()
        self._calls: list[Any] = []
        self._sent = 0

    async def drive(self, requests: Iterable[Request], console: Console) -> bool:
        """Send all and wait for their ends; whether it was interrupted (the first Ctrl-C)."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, stop.set)
        channels = [
            self._options.connection.open_async(LOAD_CHANNEL_OPTIONS)
            for _ in range(self._options.connections)
        ]
        self._calls = [_STUB(channel).Generate for channel in channels]
        try:
            with _Progress(console, self._options.requests, self._account) as progress:
                drawing = asyncio.create_task(progress.keep_drawing(lambda: len(self._running)))
                await self._send_all(requests, stop)
                await self._settle(stop)
                drawing.cancel()
                await asyncio.wait((drawing,))
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            await self._abandon()
            for channel in channels:
                await channel.close()
        return stop.is_set()

    async def _send_all(self, requests: Iterable[Request], stop: asyncio.Event) -> None:
        """Every request at its time; a prompt is made while its time has not come."""
        start: float | None = None
        for number, request in enumerate(requests):
            prompt = self._prompts.make(request)
            message = self._message(request, prompt)
            if start is None:
                start = time.monotonic()
            if self._options.duration is not None and request.arrival > self._options.duration:
                return
            due = start + request.arrival
            await _sleep_until(due, stop)
            if stop.is_set():
                return
            self._account.due(request, due, max(due, time.monotonic()), prompt.cut)
            call = self._calls[number % len(self._calls)]
            task = asyncio.create_task(self._one(call, message, Outcome(request, due)))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _settle(self, stop: asyncio.Event) -> None:
        """Wait for what runs, or give it up when told to stop."""
        rest = asyncio.gather(*self._running, return_exceptions=True)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((rest, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        await self._abandon()
        await rest

    async def _abandon(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def _message(self, request: Request, prompt: Prompt) -> pb.GenerateRequest:
        message = pb.GenerateRequest()
        message.CopyFrom(self._template)
        message.request_id = f"load-{self._name}-{self._sent}"
        self._sent += 1
        message.token_ids.ids.extend(prompt.token_ids)
        message.stopping.max_tokens = prompt.output_tokens
        message.slo.MergeFrom(_wire_slo(request.slo))
        priority = self._options.priority if self._options.priority is not None else request.priority
        if priority:
            message.priority = priority
        if request.session is not None:
            message.prefix.session = request.session[:128]
        if not self._options.warm:
            message.prefix.cache_salt = self._name
        return message

    async def _one(self, call: Any, message: pb.GenerateRequest, outcome: Outcome) -> None:
        stream = call(message, timeout=self._options.timeout)
        self._account.sent(outcome, time.monotonic())
        try:
            async for response in stream:
                kind = response.WhichOneof("event")
                if kind == "token_delta":
                    outcome.delta(response.token_delta, time.monotonic())
                elif kind == "finished":
                    outcome.end(response.finished)
            if outcome.reason is None:
                outcome.reason = FinishReason.FAILED
                outcome.error = "the stream ended before its output did"
        except grpc.RpcError as error:
            _failed(outcome, error)
        finally:  # on cancellation as well, which goes on
            stream.cancel()
            self._account.ended(outcome, time.monotonic())

    def notes(self) -> list[str]:
        """What the reader of the report should know about this run."""
        account = self._account
        found = ["latencies count from the moment each request was meant to be sent"]
        if account.server_tbt.count:
            ttft, tbt = account.server_ttft.quantile(0.99), account.server_tbt.quantile(0.99)
            found.append(
                "on the server's own clock, before network and client: TTFT p99 "
                f"{ttft or 0.0:.4f} s, TBT p50 {account.server_tbt.quantile(0.5):.4f} s, p99 {tbt:.4f} s"
            )
        if account.cut:
            found.append(
                f"{account.cut} of {account.metrics.offered} requests were shortened to the {self._room} tokens "
                "that the server has room for"
            )
        lag = account.send_lag.quantile(0.99)
        if lag is not None and lag > max(0.005, 0.1 * min(self._slo.ttft, 1.0)):
            found.append(
                f"this client sent late (p99 {lag * 1e3:.0f} ms after the intended time, which the latencies include); "
                "give it a core of its own, or split the load over several clients"
            )
        if account.faults:
            found.append(f"{account.faults} messages were lost, repeated or out of order")
        found += [f"{count} x {error}" for error, count in account.errors.most_common(5)]
        return found


def _template(options: LoadOptions) -> pb.GenerateRequest:
    message = pb.GenerateRequest(
        sampling=pb.Sampling(temperature=options.temperature, seed=options.seed),
        stopping=pb.Stopping(ignore_eos=True),
        labels={"client": "drift load"},
    )
    if options.on_infeasible is not None:
        message.slo.on_infeasible = ON_INFEASIBLE[options.on_infeasible]
    return message


def _wire_slo(slo: SLO) -> pb.SLO:
    """Its class is sent where it has a name of its own."""
    message = pb.SLO(ttft_ms=slo.ttft * 1e3, tbt_ms=slo.tbt * 1e3)
    if slo.e2e is not None:
        message.e2e_ms = slo.e2e * 1e3
    if slo.name != "default":
        setattr(message, "class", slo.name)
    return message


def _failed(outcome: Outcome, error: grpc.RpcError) -> None:
    known = error_of(error)
    refused = known.code in REFUSED and not outcome.tokens
    outcome.reason = FinishReason.REJECTED if refused else FinishReason.FAILED
    name = known.code.name
    outcome.error = f"{name} {known.reason}" if known.reason and known.reason != name else name


async def _sleep_until(due: float, stop: asyncio.Event) -> None:
    """Return at `due`, or at once when told to stop; gives way to the loop in any case."""
    delay = due - time.monotonic()
    if delay <= 0:
        await asyncio.sleep(0)
        return
    if delay < 0.05:
        await asyncio.sleep(delay)
        return
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), delay)


class _Progress:
    """Requests done, in flight and late, on a terminal; nothing elsewhere."""

    def __init__(self, console: Console, total: int | None, account: Account) -> None:
        self._account = account
        self._progress = Progress(
            TextColumn("sending"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("requests", total=total, state="")

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    async def keep_drawing(self, running: Callable[[], int]) -> None:
        """Until cancelled."""
        while True:
            account = self._account
            late = sum(c.late_first_tokens + c.lost for c in account.metrics.classes.values())
            state = f"{running()} in flight, {late} missed their TTFT target"
            self._progress.update(self._task, completed=account.done, state=state)
            await asyncio.sleep(0.1)
