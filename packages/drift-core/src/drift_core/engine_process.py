"""The engine behind its socket: frames in, one frame out per step.

Knows nothing of models: it translates between frames and the engine's calls and outputs.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from drift_core.engine import Engine, EngineConfig
from drift_core.frames import (
    AcceptedItem,
    Cancel,
    Failed,
    FinishedItem,
    LoadItem,
    Shutdown,
    Starting,
    StepFrame,
    Submit,
    ToEngine,
    TokenLogprob,
    TokensItem,
)
from drift_core.lanes_now import LanesNow
from drift_core.link import EngineLink
from drift_core.operations import Operations
from drift_scheduler.domain import Accepted, Finished, FinishReason, Lane, Step, Tokens
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.engine")

EXIT_AFTER_S = 5.0
"""How long an engine outlives its gateway at most."""


def serve_socket(config: EngineConfig, socket_path: str) -> None:
    """Start an engine and serve the gateway that listens at `socket_path`. Ends the process on a fault."""
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    session = _Session()
    link = EngineLink(socket_path, session.receive, session.gateway_gone, EXIT_AFTER_S)
    session.link = link
    try:
        engine = Engine.start(config, lambda phase, fraction: link.send(Starting(phase, fraction)))
    except DriftError as error:
        _give_up(link, Failed(str(error)), 2)
    except Exception as error:
        log.exception("the engine could not start")
        _give_up(link, Failed(f"the engine could not start: {_line(error)}", usage=False), 1)
    try:
        session.serve(engine)
    except Exception as error:
        log.exception("the engine failed")
        _give_up(link, Failed(f"the engine failed: {_line(error)}", usage=False), 1)
    engine.close()
    link.close()


def _give_up(link: EngineLink, failed: Failed, status: int) -> NoReturn:
    link.send(failed)
    link.close()
    sys.exit(status)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Session:
    """What the reader thread and the engine's thread share."""

    link: EngineLink

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._operations: Operations | None = None
        self._ending = False
        self._last: LanesNow | None = None

    def receive(self, frame: ToEngine) -> None:
        """One frame of the gateway, on the reader thread."""
        engine = self._engine
        match frame:
            case Shutdown():
                self._end()
            case _ if engine is None:
                log.error("a frame came before the engine was ready: %s", type(frame).__name__)
            case Submit():
                self._submit(engine, frame)
            case Cancel(request_id, stop):
                engine.cancel(request_id, stop=stop)
            case _:
                assert self._operations is not None, "an engine without operations"
                self._operations.receive(frame)

    def gateway_gone(self) -> None:
        """The socket ended."""
        self._end()

    def serve(self, engine: Engine) -> None:
        """Say that it is ready and serve until told to end."""
        operations = self._operations = Operations(engine, self.link.send)
        self._engine = engine
        if self._ending:
            return
        self.link.send(engine.facts(os.getpid()))
        engine.run(self._deliver)
        operations.close()

    def _end(self) -> None:
        self._ending = True
        if self._engine is not None:
            self._engine.shut_down()

    def _submit(self, engine: Engine, frame: Submit) -> None:
        def refused(error: Exception) -> None:
            now = time.monotonic()
            reason = FinishReason.REJECTED.value
            item = FinishedItem(frame.id, reason, _plain(error), arrival=frame.arrival, finished=now)
            self.link.send(StepFrame(now, finished=[item]))

        try:
            engine.submit(frame, refused)
        except (DriftError, ValueError) as error:
            refused(error)

    def _deliver(self, step: Step) -> None:
        """Send what a step has to tell, unless that is nothing."""
        engine, operations = self._engine, self._operations
        assert engine is not None, "delivering before serving"
        assert operations is not None
        operations.after_step(step)
        lanes = engine.executor.lanes_now()
        if not step.outputs and lanes == self._last:
            return
        self._last = lanes
        self.link.send(step_frame(engine, step, lanes, operations.errors, operations.overload_s()))


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
                    TokensItem(list(output.request_ids), list(ids), output.first, _logprobs(output))
                )
            case Accepted():
                accepted.append(
                    AcceptedItem(
                        output.request_id, output.queue_position, engine.cached_tokens(output.request_id)
                    )
                )
            case Finished():
                finished.append(_finished(output))
    scheduler, partition = engine.scheduler, lanes.partition
    return StepFrame(
        time=scheduler.now,
        accepted=accepted,
        tokens=tokens,
        finished=finished,
        partition=None if partition is None else (partition.prefill, partition.decode),
        sharing=None if lanes.sharing is None else lanes.sharing.value,
        prefill_requests=lanes.prefill_requests,
        decode_requests=lanes.decode_requests,
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
