"""The engine behind its sockets, one for each gateway: frames in, one frame out per step and gateway.

The gateway that started it has the first connection, and the engine ends when that does; `Join` names others, which
come and go. Knows nothing of models: it translates between frames and the engine's calls and outputs.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import msgspec

from drift_core.engine import Engine, EngineConfig, engine_config
from drift_core.frames import (
    AcceptedItem,
    Answer,
    Cancel,
    Failed,
    FinishedItem,
    Join,
    LoadItem,
    Ready,
    Shutdown,
    Starting,
    StepFrame,
    Submit,
    ToEngine,
    ToGateway,
    TokenLogprob,
    TokensItem,
    pack_ids,
)
from drift_core.lanes_now import IDLE, LanesNow
from drift_core.link import EngineLink
from drift_core.operations import Operations
from drift_core.origins import IdInUseError, Origin, Origins
from drift_core.starting import start_engine
from drift_kernels.process import prepare_process
from drift_scheduler.domain import Accepted, Finished, FinishReason, Lane, Nudged, Step, Tokens
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.engine")

EXIT_AFTER_S = 5.0
"""How long an engine outlives its gateway at most."""


def run_engine(config: EngineConfig | Mapping[str, Any], socket_path: str) -> None:
    """Body of the spawned engine process: connect, start, serve until the gateway is gone or says so.

    Exits with code 2 when what it was asked to serve is at fault; the gateway has been told in a `Failed` frame.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's to handle
    prepare_process()
    settings = config if isinstance(config, EngineConfig) else engine_config(**config)
    serve_socket(settings, socket_path)


def serve_socket(config: EngineConfig, socket_path: str) -> None:
    """Start an engine and serve the gateway that listens at `socket_path`. Ends the process on a fault."""
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    session = _Session()
    link = EngineLink(socket_path, session.receive, session.gateway_gone, EXIT_AFTER_S)
    session.link = link
    try:
        engine = start_engine(config, lambda phase, fraction: link.send(Starting(phase, fraction)))
    except DriftError as error:
        _give_up(session, Failed(str(error)), 2)
    except Exception as error:
        log.exception("the engine could not start")
        _give_up(session, Failed(f"the engine could not start: {_line(error)}", usage=False), 1)
    try:
        session.serve(engine)
    except Exception as error:
        log.exception("the engine failed")
        _give_up(session, Failed(f"the engine failed: {_line(error)}", usage=False), 1)
    engine.close()
    session.close()


def _give_up(session: _Session, failed: Failed, status: int) -> NoReturn:
    session.close(failed)
    sys.exit(status)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Session:
    """What the reader threads and the engine's thread share."""

    link: EngineLink

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._operations: Operations | None = None
        self._ending = False
        self._last: LanesNow | None = None
        self._telling = threading.Lock()  # a refusal tells of the same lanes as the step before it
        self._origins = Origins(self._send_first)
        self._joined: dict[Origin, EngineLink] = {}

    def _send_first(self, frame: ToGateway) -> None:
        self.link.send(frame)  # the link is made after this object

    # ------------------------------------------------------------------------------ the reader threads

    def receive(self, frame: ToEngine) -> None:
        """One frame of the gateway that started the engine."""
        match frame:
            case Shutdown():
                self._end()
            case _ if self._engine is None:
                log.error("a frame came before the engine was ready: %s", type(frame).__name__)
            case Join(call, path):
                self.link.send(Answer(call, self._join(self._engine, path)))
            case _:
                self._act(self._engine, self._origins.first, frame)

    def gateway_gone(self) -> None:
        """The socket of the gateway that started the engine ended."""
        self._end()

    def _join(self, engine: Engine, path: str) -> str:
        """Serve one more gateway; why not, in a line, or nothing."""
        origin = self._origins.new()
        try:
            link = EngineLink(
                path, functools.partial(self._receive_of, origin), functools.partial(self._leave, origin)
            )
        except OSError as error:
            return f"no gateway listens at {path}: {error.strerror or error}"
        origin.send, self._joined[origin] = link.send, link
        if not self._origins.join(origin, self._facts(engine)):
            self._leave(origin)
            return f"the gateway at {path} was gone at once"
        engine.executor.post(Nudged())  # so that it is told of what is there
        return ""

    def _receive_of(self, origin: Origin, frame: ToEngine) -> None:
        """One frame of a gateway that joined."""
        match frame:
            case Shutdown():
                self._leave(origin)
            case Join():
                log.error("gateway %d asked for another one to join", origin.number)
            case _:
                assert self._engine is not None, "a gateway joined before the engine was ready"
                self._act(self._engine, origin, frame)

    def _leave(self, origin: Origin) -> None:
        """A gateway that joined is gone: nobody waits for its requests any more."""
        for request_id in self._origins.leave(origin):
            if self._engine is not None:
                self._engine.cancel(request_id)
        link = self._joined.pop(origin, None)
        if link is not None:
            link.close()

    def _act(self, engine: Engine, origin: Origin, frame: ToEngine) -> None:
        match frame:
            case Submit():
                self._submit(engine, origin, frame)
            case Cancel(request_id, stop):
                engine.cancel(origin.inside(request_id), stop=stop)
            case Shutdown() | Join():
                raise AssertionError("whoever called this acts on those")
            case _:
                assert self._operations is not None, "an engine without operations"
                self._operations.receive(frame, origin.send)

    def _submit(self, engine: Engine, origin: Origin, frame: Submit) -> None:
        inside = origin.inside(frame.id)
        entered = False

        def refused(error: Exception) -> None:
            if entered:
                self._origins.end(inside)
            now = time.monotonic()
            item = FinishedItem(
                frame.id,
                FinishReason.REJECTED.value,
                _plain(error),
                arrival=frame.arrival,
                finished=now,
                id_in_use=isinstance(error, IdInUseError),
            )
            with self._telling:
                origin.send(StepFrame(now, finished=[item], **_told_of(self._last or IDLE)))

        try:
            entered = self._origins.enter(origin, frame.id, frame.sampling.least_tokens)
            named = frame if inside == frame.id else msgspec.structs.replace(frame, id=inside)
            engine.submit(named, refused)
        except (DriftError, ValueError) as error:
            refused(error)

    def _end(self) -> None:
        self._ending = True
        if self._engine is not None:
            self._engine.shut_down()

    # ------------------------------------------------------------------------------ the engine's thread

    def serve(self, engine: Engine) -> None:
        """Say that it is ready and serve until told to end."""
        operations = self._operations = Operations(engine)
        self._engine = engine
        if self._ending:
            return
        self.link.send(self._facts(engine))
        engine.run(self._deliver)
        operations.close()

    def close(self, failed: Failed | None = None) -> None:
        """Close the sockets; every gateway is told first how it `failed`, if it did."""
        for link in (*list(self._joined.values()), self.link):
            if failed is not None:
                link.send(failed)
            link.close()

    def _facts(self, engine: Engine) -> Ready:
        """As the engine is now: operators may have changed its policies."""
        assert self._operations is not None, "an engine without operations"
        dispatch, partition = self._operations.policies
        return msgspec.structs.replace(engine.facts(os.getpid()), dispatch=dispatch, partition=partition)

    def _deliver(self, step: Step) -> None:
        """Send what a step has to tell, unless that is nothing."""
        engine, operations = self._engine, self._operations
        assert engine is not None, "delivering before serving"
        assert operations is not None
        operations.after_step(step)
        lanes = engine.executor.lanes_now()
        if not step.outputs and lanes == self._last and not self._origins.news_due:
            return
        frame = step_frame(engine, step, lanes, operations.errors, operations.overload_s())
        with self._telling:
            self._last = lanes
            for origin, part in self._origins.share(frame, engine.scheduler.live):
                origin.send(part)


def step_frame(
    engine: Engine,
    step: Step,
    lanes: LanesNow,
    errors: Mapping[Lane, float] = MappingProxyType({}),
    overload_s: float = 0.0,
) -> StepFrame:
    """One step in the gateway's words. `errors`: how far the cost model was off lately, by lane. `overload_s`: as in
    `LoadItem`."""
    accepted: list[AcceptedItem] = []
    tokens: list[TokensItem] = []
    finished: list[FinishedItem] = []
    for output in step.outputs:
        match output:
            case Tokens():
                ids = output.token_ids
                assert ids is not None, "a model's tokens have ids"
                tokens.append(
                    TokensItem(list(output.request_ids), pack_ids(ids), output.first, _logprobs(output))
                )
            case Accepted():
                accepted.append(
                    AcceptedItem(
                        output.request_id, output.queue_position, engine.cached_tokens(output.request_id)
                    )
                )
            case Finished():
                finished.append(_finished(output))
    scheduler = engine.scheduler
    return StepFrame(
        time=scheduler.now,
        accepted=accepted,
        tokens=tokens,
        finished=finished,
        **_told_of(lanes),
        load=LoadItem(
            len(scheduler.queue),
            scheduler.running,
            engine.executor.kv.free_pages,
            scheduler.preemptions,
            errors.get(Lane.PREFILL),
            errors.get(Lane.DECODE),
            overload_s,
        ),
    )


def _told_of(lanes: LanesNow) -> dict[str, Any]:
    """The fields of a StepFrame that tell of the lanes."""
    partition, sharing = lanes.partition, lanes.sharing
    return {
        "partition": None if partition is None else (partition.prefill, partition.decode),
        "sharing": None if sharing is None else sharing.value,
        "prefill_requests": lanes.prefill_requests,
        "decode_requests": lanes.decode_requests,
    }


def _logprobs(output: Tokens) -> dict[str, TokenLogprob] | None:
    return dict(output.details) if output.details else None


def _finished(output: Finished) -> FinishedItem:
    timing = output.timing
    return FinishedItem(
        id=output.request_id,
        reason=output.reason.value,
        message=output.message,
        arrival=timing.arrival,
        scheduled=timing.scheduled,
        first_token=timing.first_token,
        finished=timing.finished,
        prompt_tokens=timing.prompt_tokens,
        output_tokens=timing.output_tokens,
        cached_tokens=timing.cached_tokens,
        recomputed_tokens=timing.recomputed_tokens,
        preemptions=timing.preemptions,
        tbt_max=timing.tbt_max,
        late_tokens=timing.late_tokens,
    )


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())
