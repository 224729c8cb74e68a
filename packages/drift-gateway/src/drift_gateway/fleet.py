"""Several gateway processes on one port and one engine: started, kept running, told what all of them have to know.

This process keeps the engine (its supervisor does) and the members; it serves administration, metrics and the
dashboard, and no request. A member that ends is started again; neither the engine nor the others' streams notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from drift_core.frames import Join, Starting
from drift_core.link import EngineClient, EngineGone
from drift_gateway.access.security import Security
from drift_gateway.fleet_link import (
    TO_FLEET,
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
    ToFleet,
    ToMember,
    Trouble,
)
from drift_gateway.heartbeat import hang_of
from drift_gateway.info import InfoService
from drift_gateway.serve_options import ServeOptions, encoded
from drift_gateway.server import Address, reserve_port
from drift_gateway.sharing import News, Sharing, TenantUse
from drift_gateway.supervisor import Backoff, ChildProcess, State, Supervisor
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")

MEMBER: Final = "drift_gateway.fleet_member"
RESTARTS: Final = Backoff()
"""Pauses between restarts; there is no end to them while others serve."""
ANSWER_S: Final = 5.0
"""How long a member may take to answer; one that hangs is ended anyway."""
OVERTIME_S: Final = 10.0
"""How long a member may take to stop beyond the times it was given."""
STARTS: Final = 6
"""Hang timeouts that a member has from its start, or the engine's, until it serves."""


class _Member:
    """One gateway process, started again and again. `number` from 1."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.log = log.getChild(str(number))
        self.process: ChildProcess | None = None
        self.link: FleetLink[ToFleet] | None = None
        self.waiting_at: str | None = None
        """Where it waits for an engine to connect."""
        self.socket_path: Path | None = None
        """The latest of those places; a process that is killed leaves it behind."""
        self.asked: EngineClient | None = None
        """The engine that was asked to connect there."""
        self.serving = False
        self.has_served = False
        """Whether any of its processes ever did; one whose first never does is not started again."""
        self.trouble = ""
        self.tenants: Counter[str] = Counter()
        """Outputs that tenants have in flight through it."""
        self.answers: dict[int, asyncio.Future[ToFleet | None]] = {}

    def send(self, frame: ToMember) -> None:
        """Dropped while there is no process."""
        if self.link is not None:
            self.link.send(frame)

    def forget(self) -> None:
        """The process is gone."""
        if self.link is not None:
            self.link.close()
        self.process = self.link = self.waiting_at = self.asked = None
        self.serving = False
        self.tenants.clear()
        if self.socket_path is not None:
            with contextlib.suppress(OSError):  # it has cleared away after itself
                self.socket_path.unlink()
                self.socket_path.parent.rmdir()
            self.socket_path = None
        for answer in self.answers.values():
            if not answer.done():
                answer.set_result(None)


class Fleet:
    """The members behind one address. Stands where a `Gateway` does in a server of one process.

    `options.gateways` says how many. `port` is the one they share, once `open` has returned.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        options: ServeOptions,
        security: Security,
        backoff: Backoff = RESTARTS,
    ) -> None:
        self.supervisor = supervisor
        self.port = 0
        self._options = options
        self._backoff = backoff
        self._stopping = asyncio.Event()
        self._sharing = Sharing(supervisor, security)
        self._members = [_Member(number) for number in range(1, options.gateways + 1)]
        self._keeping: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._calls = 0
        self._held: socket.socket | None = None
        self._given_up = ""
        self.information = InfoService(
            supervisor, options.limits.max_in_flight, self._stopping, (0, options.gateways)
        )
        supervisor.on_change = self._engine_changed
        supervisor.gateways = lambda: sum(member.serving for member in self._members)
        supervisor.known_tenants = security.known_tenants

    # ----------------------------------------------------------------------------- as a Gateway does

    async def open(self, address: Address) -> None:
        """Hold the port and start the members. Raises DriftError when the port cannot be had, or not be shared."""
        self._held, address = reserve_port(address)
        self.port = address.port
        self._keeping = [asyncio.ensure_future(self._keep(member, address)) for member in self._members]

    async def ready(self) -> None:
        """Wait until all members serve. Raises DriftError when one cannot."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._given_up or all(member.serving for member in self._members)
            )
        if self._given_up:
            raise DriftError(self._given_up)

    async def close(self, grace: float, hurry: asyncio.Event | None = None, lame_duck: float = 0.0) -> None:
        """Have all members stop in the order that a gateway does, then end the engine; see `Gateway.close`."""
        hurry = hurry or asyncio.Event()
        self._stopping.set()
        self.supervisor.retire()
        for member in self._members:
            if member.serving:
                member.send(Stop(grace, lame_duck))
            elif member.process is not None:
                member.process.kill()
        hurrying = asyncio.ensure_future(self._hurry(hurry))
        if lame_duck and self.supervisor.state is State.READY and self._keeping:
            await asyncio.wait((hurrying, *self._keeping), timeout=lame_duck, return_when="FIRST_COMPLETED")
        self.supervisor.stop_accepting()
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=lame_duck + grace + OVERTIME_S)
        hurrying.cancel()
        await self._end_members()
        await self.supervisor.stop()
        if self._held is not None:
            self._held.close()

    def reload(self) -> None:
        """Have the members take up changed files."""
        self._tell(Reload())

    def starting(self, frame: Starting) -> None:
        """A piece of news of the engine's start-up."""
        self._tell(EngineIs(self.supervisor.restarts, frame.phase, frame.fraction))

    # ----------------------------------------------------------------------------- as operators act (`Operated`)

    async def drain(self, draining: bool) -> None:
        """All members refuse new requests, or take them again; so does one that is started anew."""
        self.supervisor.drain(draining)
        self._tell(Drain(draining))

    async def in_flight(self) -> int:
        """Outputs in flight in all members, by what they say themselves: the engine has not heard of all yet."""
        answers = await self._ask(Count)
        return sum(answer.in_flight for answer in answers if isinstance(answer, Counted))

    async def abort(self, request_ids: Sequence[str] | None) -> list[str]:
        """End these requests, or all, wherever they are; those that were in flight."""
        names = None if request_ids is None else list(request_ids)
        answers = await self._ask(lambda call: Abort(call, names))
        return [name for answer in answers if isinstance(answer, Aborted) for name in answer.request_ids]

    async def policies_changed(self, dispatch: str, partition: str) -> None:
        """The running engine decides by other policies now."""
        self.supervisor.policies_changed(dispatch, partition)
        self._tell(PoliciesAre(dispatch, partition))

    # ----------------------------------------------------------------------------- processes

    async def _keep(self, member: _Member, address: Address) -> None:
        """Start a member whenever there is none, until the fleet stops."""
        crashes = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                how = await self._run(member, address)
            except OSError as error:  # out of memory, processes or descriptors, perhaps for now only
                how = f"no process can be started: {error.strerror or error}"
            await self._lost(member)
            if self._stopping.is_set():
                return
            if not member.has_served:
                await self._give_up(member.trouble or f"gateway {member.number} ended while starting: {how}")
                return
            settled = time.monotonic() - began > self._backoff.settled
            crashes = 1 if settled else min(crashes + 1, 16)
            pause = self._backoff.pause(crashes)
            log.error(
                "gateway %d is gone (%s); starting it again in %.1f s",
                member.number, member.trouble or how, pause,
            )  # fmt: skip
            await _either(self._stopping, pause)
            self.supervisor.gateway_restarts += 1

    async def _run(self, member: _Member, address: Address) -> str:
        """One process of a member, from its start to its end; how it ended."""
        ours, theirs = socket.socketpair()
        when = "now" if self.supervisor.served is None else "served"
        arguments = [str(theirs.fileno()), str(member.number), str(address.port), when]
        member.trouble = ""
        try:
            member.process = await ChildProcess.spawn_module(
                MEMBER,
                arguments,
                encoded(self._options),
                pass_fds=(theirs.fileno(),),
                own_output=False,
                to=member.log,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        process = member.process
        if self._stopping.is_set():  # since it is being started, and nobody told it
            process.kill()
        link = FleetLink(TO_FLEET, lambda frame: self._receive(member, frame), lambda: None)
        await link.open(ours)
        member.link = link
        self._greet(member)
        watching = asyncio.ensure_future(self._watch_for_hangs(member, process, link))
        try:
            return await process.wait()
        finally:
            watching.cancel()
            process.kill()  # nothing, unless this was cancelled

    def _greet(self, member: _Member) -> None:
        """What a new process has missed."""
        supervisor = self.supervisor
        phase = supervisor.phase or Starting("", 0.0)
        member.send(EngineIs(supervisor.restarts, phase.phase or None, phase.fraction))
        member.send(Drain(supervisor.draining))
        busy = sum((other.tenants for other in self._members if other is not member), Counter[str]())
        if busy:
            member.send(News([TenantUse(name, in_flight=count) for name, count in busy.items()]))

    async def _watch_for_hangs(
        self, member: _Member, process: ChildProcess, link: FleetLink[ToFleet]
    ) -> None:
        """Its loop answers from when it serves: before, it may be busy with its tokenizer, but not for ever."""
        timeout = self._options.operations.hang_timeout
        if await self._begins(member, STARTS * timeout):
            await hang_of(link, timeout)
            member.trouble = f"its loop did not answer for {timeout:g} s"
        else:
            member.trouble = f"it did not serve within {STARTS * timeout:g} s of the engine's being ready"
        process.kill()

    async def _begins(self, member: _Member, seconds: float) -> bool:
        """Whether a member serves within `seconds` in which there is an engine."""
        while True:
            engine = self.supervisor.served
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds), self._changed:
                    await self._changed.wait_for(lambda: member.serving)
                    return True
            if engine is not None and engine is self.supervisor.served:
                return False

    async def _lost(self, member: _Member) -> None:
        """Its process is gone; what tenants had in flight through it is not any more."""
        left = [TenantUse(name, in_flight=-count) for name, count in member.tenants.items() if count]
        member.forget()
        if left:
            self._spread(News(left), member)
        await self._notify()

    async def _give_up(self, why: str) -> None:
        self._given_up = self._given_up or why
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _hurry(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        self._tell(Hurry())

    async def _end_members(self) -> None:
        """None is left, however far it was."""
        for task in self._keeping:
            task.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping)
        for member in self._members:
            member.forget()

    # ----------------------------------------------------------------------------- what is said

    def _receive(self, member: _Member, frame: ToFleet) -> None:
        match frame:
            case Attach(path):
                member.waiting_at, member.asked, member.serving = path, None, False
                member.socket_path = Path(path)
                self._join(member)
            case Serving(ready):
                member.serving = ready
                member.has_served |= ready
                if ready:  # it has an engine; when that is gone, it asks for another
                    member.waiting_at = None
                self._soon(self._notify())
                self.supervisor.on_change()
            case Trouble(message):
                member.trouble = message
            case News():
                for use in frame.tenants:
                    member.tenants[use.tenant] += use.in_flight
                self._spread(frame, member)
            case Counted(call) | Aborted(call):
                answer = member.answers.get(call)
                if answer is not None and not answer.done():
                    answer.set_result(frame)
            case _:
                raise AssertionError(f"the link keeps {type(frame).__name__} to itself")

    def _spread(self, news: News, source: _Member) -> None:
        """News of one member, for us and for all others."""
        self._sharing.learn(news, time.monotonic())
        for member in self._members:
            if member is not source:
                member.send(news)

    def _tell(self, frame: ToMember) -> None:
        for member in self._members:
            member.send(frame)

    async def _ask(self, make: Callable[[int], ToMember]) -> Iterable[ToFleet | None]:
        """What each member that is there answers; `None` where it ended, or hangs."""
        self._calls += 1
        call = self._calls
        asked = [member for member in self._members if member.link is not None]
        answers = []
        for member in asked:
            answer: asyncio.Future[ToFleet | None] = asyncio.get_running_loop().create_future()
            member.answers[call] = answer
            member.send(make(call))
            answers.append(answer)
        if answers:
            await asyncio.wait(answers, timeout=ANSWER_S)
        for member in asked:
            member.answers.pop(call, None)
        return [answer.result() if answer.done() else None for answer in answers]

    # ----------------------------------------------------------------------------- the engine

    def _engine_changed(self) -> None:
        phase = self.supervisor.phase
        if self.supervisor.engine_state is State.READY or phase is None:
            self._tell(EngineIs(self.supervisor.restarts))
        for member in self._members:
            self._join(member)

    def _join(self, member: _Member) -> None:
        """Have the engine connect to a member that waits for it, once there is one."""
        served = self.supervisor.served
        if served is None or member.waiting_at is None or member.asked is served.client:
            return
        member.asked = served.client
        self._soon(self._ask_to_join(member, served.client, member.waiting_at))

    async def _ask_to_join(self, member: _Member, client: EngineClient, path: str) -> None:
        process = member.process
        try:
            answer = await client.ask(lambda call: Join(call, path))
        except EngineGone:
            return  # the next engine is asked when it is ready
        if answer.error and member.process is process and member.waiting_at == path and process is not None:
            member.trouble = f"the engine could not reach it: {answer.error}"
            process.kill()

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _either(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set or the time is over."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait((waiting,), timeout=seconds)
    waiting.cancel()
