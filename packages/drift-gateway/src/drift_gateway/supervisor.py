"""Keeps one engine running: starts it, notices its end, starts it again, and remembers what it died of.

Where several gateways share an engine, each but the one that keeps it running follows it (`Supervisor.follow`).
Knows processes and sockets, and of gRPC only the status a refused request gets. Requests are lost with the engine
that held them (their clients try again); one that was inside at two crashes is quarantined.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import sys
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

import msgspec

from drift_core.engine import EngineConfig
from drift_core.frames import Ready, Starting, StepFrame, Submit
from drift_core.link import EngineClient, EngineFailed, EngineGone, Submission
from drift_core.tokenizer import Tokenizer
from drift_gateway.access.tenants import Tenant, cache_salt, current_tenant
from drift_gateway.forms import FORMS
from drift_gateway.heartbeat import DEFAULT_HANG_TIMEOUT, hang_of
from drift_gateway.observe.elsewhere import Elsewhere
from drift_gateway.observe.service_stats import EndedOutput, ServiceStats
from drift_gateway.observe.splits_used import SplitsUsed
from drift_gateway.observe.timeline import Timeline
from drift_gateway.refusal import Reason, Refusal, refusal_of
from drift_gateway.workload_ahead import WorkloadAhead
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")
engine_log = logging.getLogger("drift.engine")

CRASHES_TO_QUARANTINE: Final = 2
REMEMBERED_SUSPECTS: Final = 4096
ORDERLY_END_S: Final = 5.0
LAST_WORDS_S: Final = 1.0
FOLLOWING_PAUSE_S: Final = 0.05


class State(Enum):
    """Whether requests are served now. DRAINING: an operator wants none to be let in, whatever the engine does."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPING = "stopping"


class EngineProcess(Protocol):
    """A started engine process."""

    async def wait(self) -> str:
        """Wait for its end; says how it ended."""

    def terminate(self) -> None:
        """Ask the system to end it."""

    def kill(self) -> None:
        """End it."""


Spawn = Callable[[Path], Awaitable[EngineProcess]]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between restarts: doubling from `first` to `longest` seconds, at most `attempts` in a row.

    An engine that stayed ready for `settled` seconds ends the row.
    """

    first: float = 0.5
    longest: float = 30.0
    attempts: int = 6
    settled: float = 60.0

    def pause(self, attempt: int) -> float:
        """Seconds to wait before the restart after the `attempt`-th crash in a row (from 1)."""
        return min(self.longest, self.first * 2.0 ** (attempt - 1))


@dataclass(frozen=True, slots=True)
class Served:
    """A running engine and the tokenizer of its model."""

    ready: Ready
    client: EngineClient
    tokenizer: Tokenizer | None


class Quarantine:
    """Requests that were in the engine when it crashed, by what they ask for.

    `on_blame` and `on_acquit` are told what happened here, so that other gateways may hear of it.
    """

    def __init__(self) -> None:
        self.on_blame: Callable[[Sequence[bytes], int], None] | None = None
        self.on_acquit: Callable[[bytes], None] | None = None
        self._crashes: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        """Of each suspect, at how many crashes it was inside, and the engine of the last one."""

    def blame(self, fingerprints: Sequence[bytes], engine: int) -> None:
        """They were inside at the crash of an engine, by its process id; each counts once however many copies there
        were, here and elsewhere."""
        for fingerprint in set(fingerprints):
            count, last = self._crashes.pop(fingerprint, (0, -1))
            self._crashes[fingerprint] = (count + (last != engine), engine)
        while len(self._crashes) > REMEMBERED_SUSPECTS:
            self._crashes.popitem(last=False)

    def acquit(self, fingerprint: bytes) -> bool:
        """It ran to its end; whether it was a suspect."""
        return self._crashes.pop(fingerprint, None) is not None

    def crashed_here(self, fingerprints: Sequence[bytes], engine: int) -> None:
        """Blame, and say so."""
        self.blame(fingerprints, engine)
        if self.on_blame is not None and fingerprints:
            self.on_blame(fingerprints, engine)

    def ended_here(self, fingerprint: bytes) -> None:
        """Acquit, and say so."""
        if self.acquit(fingerprint) and self.on_acquit is not None:
            self.on_acquit(fingerprint)

    def check(self, fingerprint: bytes) -> None:
        """Raises Refusal for one that was inside at too many crashes."""
        if self._crashes.get(fingerprint, (0, 0))[0] >= CRASHES_TO_QUARANTINE:
            raise Refusal(
                Reason.QUARANTINED,
                f"this request was in the engine at {CRASHES_TO_QUARANTINE} crashes and is quarantined until the "
                "server is started anew",
            )


class Supervisor:
    """One engine, kept running. `spawn` starts a process that connects to the given socket.

    `on_change` is called after every change of `state`, `on_starting` for every piece of news of a start-up.
    `hang_timeout`: seconds without a sign of life after which a ready engine counts as hung, and is started again.
    `patience`: seconds that the engine gets to end in order. `forms`: whether outputs are held to forms here.
    """

    def __init__(
        self,
        spawn: Spawn,
        on_starting: Callable[[Starting], None] | None = None,
        backoff: Backoff = Backoff(),
        hang_timeout: float = DEFAULT_HANG_TIMEOUT,
        patience: float = ORDERLY_END_S,
        forms: bool = True,
    ) -> None:
        self.engine_state = State.STARTING
        self.draining = False
        self.retiring = False
        """Whether the server is about to stop: requests are still served, and health says that they are not."""
        self.phase: Starting | None = None
        self.served: Served | None = None
        self.last_ready: Served | None = None
        self.restarts = 0
        self.timeline = Timeline()
        self.stats = ServiceStats()
        self.ahead = WorkloadAhead()
        self.splits = SplitsUsed()
        self.elsewhere = Elsewhere()
        self.quarantine = Quarantine()
        self.on_change: Callable[[], None] = lambda: None
        self.gateways: Callable[[], int] = lambda: 1
        """How many processes take requests for this engine."""
        self.gateway_restarts = 0
        self.known_tenants: Callable[[], Iterable[Tenant]] = tuple
        """Those who may call, for the metrics; none where nobody need log in."""
        self._spawn = spawn
        self._on_starting = on_starting
        self._backoff = backoff
        self._hang_timeout = hang_timeout
        self._patience = patience
        self._forms = forms
        self._watching: asyncio.Task[None] | None = None
        self._submissions: dict[str, Submission] = {}
        self._client: EngineClient | None = None
        self._process: EngineProcess | None = None
        self._ready_since = 0.0
        self._fingerprints: dict[str, bytes] = {}
        self._tenants: dict[str, Tenant] = {}

    async def start(self) -> Served:
        """Start the engine and wait until it serves. Raises DriftError when it never will; nothing is left over."""
        client = self._client = await EngineClient.listen(self._starting, self._step)
        client.gone.add_done_callback(self._note_crash)
        try:
            process = self._process = await self._spawn(client.path)
        except OSError as error:  # out of memory, processes or descriptors, perhaps for now only
            await self._end_engine()
            raise EngineGone(f"no engine process can be started: {error.strerror or error}") from error
        ended = asyncio.ensure_future(process.wait())
        ready = asyncio.ensure_future(client.ready())
        try:
            await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():  # it ended before it connected, or its last words are on their way
                await asyncio.wait((ready,), timeout=LAST_WORDS_S)
            if not ready.done():
                raise EngineGone(f"the engine process ended while starting: {ended.result()}")
            facts = await self._explained(ready, process)
            tokenizer = await asyncio.to_thread(load_tokenizer, facts.directory)
            if self._forms:
                await asyncio.to_thread(FORMS.learn, tokenizer, facts)
        except BaseException:
            ready.cancel()
            await self._end_engine()
            raise
        finally:
            ended.cancel()
        self.ahead.engine(
            total_pages=facts.kv_pages,
            page_tokens=facts.page_tokens,
            max_running=facts.max_running,
            prefill_seconds=facts.prefill_seconds,
            decode_seconds=facts.decode_seconds,
        )
        self.served = self.last_ready = Served(facts, client, tokenizer)
        self._ready_since = time.monotonic()
        self._watching = asyncio.ensure_future(self._watch_for_hangs(client))
        self._change(State.READY)
        return self.served

    @property
    def state(self) -> State:
        """What clients see of the engine and of what operators want."""
        if self.draining and self.engine_state is State.READY:
            return State.DRAINING
        return self.engine_state

    @property
    def healthy(self) -> bool:
        """Whether load balancers should send requests here."""
        return self.state is State.READY and not self.retiring and self.gateways() > 0

    @property
    def in_flight(self) -> int:
        """Outputs in the engine, through other gateways too."""
        return self.elsewhere.in_flight + (self.served.client.in_flight if self.served is not None else 0)

    @property
    def waiting_prefill_tokens(self) -> int:
        """Prompt tokens of those that have no token yet."""
        return self.elsewhere.waiting_prefill_tokens + self.stats.waiting_prefill_tokens

    async def keep_running(self) -> None:
        """After `start`: restart the engine whenever it ends. Raises DriftError when that is given up."""
        crashes = 0
        while True:
            assert self._client is not None, "start first"
            assert self._process is not None
            how = await _how_it_ended(await asyncio.shield(self._client.gone), self._process)
            if time.monotonic() - self._ready_since > self._backoff.settled:
                crashes = 0
            crashes += 1
            await self._bury()
            while True:
                if crashes > self._backoff.attempts:
                    raise DriftError(f"the engine crashed {crashes} times in a row, the last time: {how}")
                pause = self._backoff.pause(crashes)
                log.error("the engine is gone (%s); starting it again in %.1f s", how, pause)
                await asyncio.sleep(pause)
                self.restarts += 1
                try:
                    await self.start()
                    log.info("the engine is ready again")
                    break
                except (EngineFailed, EngineGone) as error:
                    crashes, how = crashes + 1, str(error)

    async def follow(self) -> None:
        """Instead of `start` and `keep_running`, where somebody else keeps the engine running: have it whenever it is
        there. For ever."""
        while True:
            try:
                await self.start()
            except (EngineFailed, EngineGone) as error:
                log.debug("the engine was gone at once: %s", error)
                await asyncio.sleep(FOLLOWING_PAUSE_S)
                continue
            assert self._client is not None, "it has just started"
            how = await asyncio.shield(self._client.gone)
            log.info("the engine is gone (%s)", how)
            await self._bury()

    def serving(self) -> Served:
        """The running engine. Raises Refusal (UNAVAILABLE) when there is none now."""
        if self.served is not None and self.state is State.READY:
            return self.served
        detail = f" ({self.phase.phase}, {self.phase.fraction:.0%})" if self.phase is not None else ""
        match self.state:
            case State.STOPPING:
                raise Refusal(Reason.DRAINING, "the server is stopping")
            case State.DRAINING:
                raise Refusal(Reason.DRAINING, "the server takes no new requests: an operator drains it")
            case State.RESTARTING:
                raise Refusal(
                    Reason.WORKER_RESTART, f"the engine crashed and is being started again{detail}; try again"
                )
            case _:
                raise Refusal(Reason.STARTING, f"the server is starting{detail}; try again")

    def submit(self, served: Served, frames: Sequence[Submit]) -> Submission:
        """Send one request's frames to the engine, in the name of the current tenant.

        Raises Refusal on a quarantined request, a name in use, a lost engine, or a tenant whose rate is used up.
        """
        tenant = current_tenant()
        request_id = request_id_of(frames[0].id)
        if request_id in self._submissions:
            raise in_use(name_of(request_id))
        now = time.monotonic()
        tenant.check(now, len(frames))
        fingerprint = fingerprint_of(frames[0])
        self.quarantine.check(fingerprint)
        if tenant.name:  # whatever the service, cached prefixes never cross from one tenant to another
            frames = [
                msgspec.structs.replace(frame, salt=cache_salt(tenant.name, frame.salt)) for frame in frames
            ]
        try:
            submission = served.client.submit(frames)
        except EngineGone as error:
            raise refusal_of(error) from error
        except ValueError as error:
            raise in_use(name_of(request_id)) from error
        tenant.begin(now, len(frames[0].prompt), len(frames))
        self._submissions[request_id] = submission
        for frame, progress in zip(frames, submission.requests, strict=True):
            self._tenants[frame.id] = tenant
            self._fingerprints[frame.id] = fingerprint
            self.stats.submitted(frame, progress)
        return submission

    def ended(self, submission: Submission, stopped_after: Mapping[str, int | None]) -> list[EndedOutput]:
        """A submission's reader is done with it: cancel what still runs, remember what ended well.

        How each of its outputs ended, or how far it came. `stopped_after`: by their ids in the engine, the
        tokens after which a stop string came, where one did.
        """
        if self._client is not None and self._client.gone.done():
            self._note_crash(self._client.gone)  # this reader may be told before the future's callbacks are
        submission.cancel()
        ends = []
        self._submissions.pop(request_id_of(submission.requests[0].id), None)
        for request in submission.requests:
            fingerprint = self._fingerprints.pop(request.id, None)
            if fingerprint is not None and request.finished is not None:
                self.quarantine.ended_here(fingerprint)
            end = self.stats.forget(request.id, stopped_after.get(request.id))
            tenant = self._tenants.pop(request.id, None)
            if tenant is not None:
                tenant.end(time.monotonic(), end.output_tokens if end is not None else 0)
            if end is not None:
                ends.append(end)
        return ends

    def request_ids(self) -> list[str]:
        """Requests in flight, each with its tenant before it."""
        return list(self._submissions)

    def abort(self, request_id: str, refusal: Refusal) -> bool:
        """End a request's stream with `refusal` and free what it holds; `False` when it is not in flight."""
        submission = self._submissions.get(request_id)
        if submission is None:
            return False
        submission.cancel()  # now, however long its reader takes to notice; this forgets errors, so it comes first
        submission.fail(refusal)
        return True

    def abort_by_admin(self, request_ids: Sequence[str] | None) -> list[str]:
        """An operator ends the requests of these names, whichever tenant's, or all; the names that were in flight."""
        refusal = Refusal(Reason.ABORTED_BY_ADMIN, "an operator ended the request")
        wanted = None if request_ids is None else set(request_ids)
        ended = [each for each in self.request_ids() if wanted is None or name_of(each) in wanted]
        for each in ended:
            self.abort(each, refusal)
        return list(dict.fromkeys(map(name_of, ended)))

    def drain(self, draining: bool) -> None:
        """Refuse new requests, or take them again; those in flight go on."""
        self.draining = draining
        self.on_change()

    def policies_changed(self, dispatch: str, partition: str) -> None:
        """The running engine decides by other policies now; one that is started again has those of its options."""
        if self.served is not None:
            ready = msgspec.structs.replace(self.served.ready, dispatch=dispatch, partition=partition)
            self.served = self.last_ready = replace(self.served, ready=ready)

    def retire(self) -> None:
        """The server stops soon: health says so, requests are still served."""
        self.retiring = True
        self.on_change()

    def stop_accepting(self) -> None:
        """From now on requests are refused; those in flight go on."""
        self._change(State.STOPPING)

    async def stop(self) -> None:
        """End the engine in order. No process and no socket is left."""
        self.stop_accepting()
        self.served = None
        if self._client is not None:
            self._client.shut_down()
        await self._end_engine(patience=self._patience)

    async def _explained(self, ready: asyncio.Future[Ready], process: EngineProcess) -> Ready:
        """The result of `ready`; an engine that is gone without a word gets its exit status as the reason."""
        try:
            return ready.result()
        except EngineGone as gone:
            raise EngineGone(await _how_it_ended(str(gone), process)) from gone

    async def _bury(self) -> None:
        """The engine is gone: clear away what is left of it."""
        self.served = None
        self.timeline.engine_gone(time.monotonic())
        self.elsewhere.engine_gone()
        self.phase = None
        self._change(State.RESTARTING)
        await self._end_engine()

    async def _end_engine(self, patience: float = 0.0) -> None:
        """Safe to be cancelled: what it did not get to, the next call does."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if self._process is not None:
            await _end_process(self._process, patience)
            self._process = None
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _watch_for_hangs(self, client: EngineClient) -> None:
        """A hung engine counts as gone, so that it is started again like one that crashed."""
        reason = await hang_of(client, self._hang_timeout)
        log.error("%s; it is ended", reason)
        client.end(reason)

    def _step(self, frame: StepFrame, steps: int) -> None:
        self.timeline.step(frame, steps)
        self.stats.step(frame)
        self.ahead.step(frame, steps)
        self.splits.step(frame, steps)
        self.elsewhere.step(frame)

    def _starting(self, frame: Starting) -> None:
        self.phase = frame
        if self._on_starting is not None:
            self._on_starting(frame)

    def _note_crash(self, gone: asyncio.Future[str]) -> None:
        """Blame what was inside, while that is still known: before the first reader is done with it."""
        if self.engine_state is State.READY and self.last_ready is not None:
            self.quarantine.crashed_here(list(self._fingerprints.values()), self.last_ready.ready.pid)
            self._fingerprints.clear()

    def _change(self, state: State) -> None:
        if self.engine_state is State.STOPPING:
            return
        self.engine_state = state
        self.on_change()


def fingerprint_of(frame: Submit) -> bytes:
    """What makes two requests the same one tried again: prompt and sampling."""
    digest = hashlib.blake2b(array("q", frame.prompt).tobytes(), digest_size=16)
    digest.update(msgspec.msgpack.encode(frame.sampling))
    return digest.digest()


def request_id_of(output_id: str) -> str:
    """The request that an output is of, with its tenant; see `Admitted.output_ids`."""
    return output_id.rpartition("#")[0]


def name_of(request_id: str) -> str:
    """What its tenant calls a request."""
    return request_id.rpartition(" ")[2]


def in_use(name: str) -> Refusal:
    """Its tenant has a request of that name in flight."""
    return Refusal(Reason.REQUEST_ID_IN_USE, f"request id '{name}' is in flight already")


def load_tokenizer(directory: str) -> Tokenizer | None:
    """The tokenizer in a model directory, `None` when there is none. Raises DriftError on a corrupt one."""
    if not (Path(directory) / "tokenizer.json").is_file():
        return None
    return Tokenizer.load(directory)


async def _how_it_ended(reason: str, process: EngineProcess) -> str:
    """What the socket told, and how the process ended if it does so soon."""
    try:
        return f"{reason}: {await asyncio.wait_for(process.wait(), LAST_WORDS_S)}"
    except TimeoutError:
        return reason


async def _end_process(process: EngineProcess, patience: float) -> None:
    for seconds, force in ((patience, process.terminate), (2.0, process.kill)):
        try:
            await asyncio.wait_for(process.wait(), seconds or 0.05)
            return
        except TimeoutError:
            force()
    await process.wait()


# ------------------------------------------------------------------------------------------ real processes


class ChildProcess:
    """A process of ours, out of reach of the terminal's Ctrl-C; what it says (on stdout, or stderr where that is our
    own) goes to the log."""

    def __init__(self, process: asyncio.subprocess.Process, to: logging.Logger = engine_log) -> None:
        self._process = process
        self._log = to
        self._tail: deque[str] = deque(maxlen=20)
        self._relay = asyncio.ensure_future(self._relay_output())

    @classmethod
    async def spawn(cls, config: EngineConfig, socket_path: Path) -> ChildProcess:
        """Start an engine: `drift_gateway.engine_child`."""
        return await cls.spawn_module(
            "drift_gateway.engine_child", (os.fspath(socket_path),), msgspec.json.encode(config)
        )

    @classmethod
    async def spawn_module(
        cls,
        module: str,
        arguments: Sequence[str],
        configuration: bytes,
        pass_fds: Sequence[int] = (),
        own_output: bool = True,
        to: logging.Logger = engine_log,
    ) -> ChildProcess:
        """Start a module of ours with its configuration on stdin. Without `own_output` it shares our stdout."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the working directory may be a model's: nothing in it is a module of ours
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE if own_output else None,
            stderr=asyncio.subprocess.STDOUT if own_output else asyncio.subprocess.PIPE,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
        child = cls(process, to)
        assert process.stdin is not None
        with contextlib.suppress(RuntimeError, OSError):  # it has ended already; `wait` says how
            process.stdin.write(configuration)
            process.stdin.close()
        return child

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def wait(self) -> str:
        """Wait for its end; says how it ended, with its last line of output."""
        status = await self._process.wait()
        await asyncio.wait((self._relay,), timeout=1.0)
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"{how}; it said: {self._tail[-1]}" if self._tail else how

    def terminate(self) -> None:
        """SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _relay_output(self) -> None:
        said = self._process.stdout or self._process.stderr
        assert said is not None
        rest = b""
        while data := await said.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-4096:]
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                self._tail.append(text)
                self._log.info("%s", text)
