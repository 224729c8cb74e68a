"""What operators have done to a running engine: between two steps, on the engine's own thread.

The reader thread hands frames in and wakes the executor; the engine's thread carries them out after a step and
answers. A ping is answered the same way, so an answer says that the loop itself is alive. Knows no sockets.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from drift_core.composition import installed_registry, policy
from drift_core.engine import Engine
from drift_core.frames import Answer, Call, FlushPrefixes, Ping, Pong, SetPolicy, StartTrace, StopTrace
from drift_scheduler.decision_log import DecisionLog
from drift_scheduler.domain import (
    DecodeDone,
    Event,
    Lane,
    LaneFailed,
    Nudged,
    PrefillDone,
    Request,
    RequestArrived,
    Step,
    StepRecord,
)
from drift_scheduler.errors import DriftError
from drift_scheduler.overload import OverloadWatch

log = logging.getLogger("drift.engine")

Send = Callable[[Pong | Answer], None]
"""To the gateway that asked; may be called from any thread."""

RECENT: Final = 0.05
"""Weight of the newest observation in the mean of the cost model's errors: about the last twenty count."""


class Operations:
    """The engine's side of AdminService and of the gateways' heartbeats."""

    def __init__(self, engine: Engine) -> None:
        self.errors: dict[Lane, float] = {}
        """By lane, how far predictions were off lately."""
        self._engine = engine
        self._pending: deque[tuple[Call | Ping, dict[str, Any], Send]] = deque()
        self._names = {"dispatch": engine.config.dispatch, "partition": engine.config.partition}
        self._options = {
            "dispatch": engine.config.dispatch_options,
            "partition": engine.config.partition_options,
        }
        self._trace: Trace | None = None
        self._overload = OverloadWatch(engine.scheduler)
        engine.observe(self)

    # -------------------------------------------------------------------------------- the reader thread

    def receive(self, frame: Call | Ping, send: Send) -> None:
        """Take a frame, to be answered by `send`; what can be refused without the engine is refused here."""
        made: dict[str, Any] = {}
        if isinstance(frame, SetPolicy):
            try:
                made = _policies(frame)
            except DriftError as error:
                send(Answer(frame.call, _line(error)))
                return
        self._pending.append((frame, made, send))
        self._engine.executor.post(Nudged())

    # -------------------------------------------------------------------------------- the engine's thread

    def after_step(self, step: Step) -> None:
        """Note what the step says of the cost model, and do what is pending."""
        for seen in step.observations:
            if seen.measured > 0:
                error = abs(seen.predicted / seen.measured - 1)
                known = self.errors.get(seen.lane, error)
                self.errors[seen.lane] = known + RECENT * (error - known)
        while self._pending:
            frame, made, send = self._pending.popleft()
            if isinstance(frame, Ping):
                send(Pong(frame.number, *self._longest()))
                continue
            try:
                answer = self._carry_out(frame, made)
            except DriftError as error:
                answer = Answer(frame.call, _line(error))
            send(answer)

    @property
    def policies(self) -> tuple[str, str]:
        """Dispatch and partition policy in force."""
        return self._names["dispatch"], self._names["partition"]

    def overload_s(self) -> float:
        """What admission is told, as in `LoadItem`."""
        try:
            said = self._overload.now()
        except (
            Exception
        ) as error:  # a third party's cost model may raise anything; the scheduler counts its faults
            log.debug("the cost model could not tell overload: %s", _line(error))
            return 0.0
        return said.backlog if said.certain else 0.0

    def on_step(self, record: StepRecord) -> None:
        """Implements `Observer`: one line of the decision log, while one is written."""
        trace = self._trace
        if trace is None:
            return
        try:
            trace.on_step(record)
        except Exception as error:  # a full disk must not keep a later trace from being written
            self._trace = None
            log.error("decision log %s was ended: %s", trace.path, _line(error))
            trace.close()

    def close(self) -> None:
        """End the decision log, if one is written."""
        if self._trace is not None:
            self._trace.close()
            self._trace = None

    def _longest(self) -> tuple[float, float]:
        """Seconds that a lane has been at its work, the longer of the two, and seconds predicted for it."""
        scheduler = self._engine.scheduler
        flights = [f for f in (scheduler.prefill_flight, scheduler.decode_flight) if f is not None]
        now = self._engine.executor.now()
        return max(((now - flight.started, flight.predicted) for flight in flights), default=(0.0, 0.0))

    def _carry_out(self, frame: Call, made: dict[str, Any]) -> Answer:
        """Raises DriftError, with nothing changed, when it cannot be done."""
        match frame:
            case SetPolicy():
                self._engine.scheduler.set_policies(made.get("dispatch"), made.get("partition"))
                for kind, choice in (("dispatch", frame.dispatch), ("partition", frame.partition)):
                    if choice is not None:
                        self._names[kind] = choice
                        self._options[kind] = {}
                return Answer(
                    frame.call, dispatch=self._names["dispatch"], partition=self._names["partition"]
                )
            case FlushPrefixes():
                return Answer(frame.call, pages=self._engine.scheduler.forget_prefixes())
            case StartTrace():
                return self._start_trace(frame)
            case StopTrace():
                if self._trace is None:
                    raise DriftError("no decision log is being written")
                trace, self._trace = self._trace, None
                trace.close()
                return Answer(frame.call, path=trace.path, steps=trace.steps)

    def _start_trace(self, frame: StartTrace) -> Answer:
        if self._trace is not None:
            raise DriftError(f"a decision log is being written already: {self._trace.path}")
        settings: dict[str, Any] = msgspec.to_builtins(self._engine.config)
        for kind in ("dispatch", "partition"):
            settings[kind] = self._names[kind].partition(":")[0]
            settings[f"{kind}_options"] = self._options[kind] or _options_of(self._names[kind])
        self._trace = Trace(frame.path, self._engine, settings)
        return Answer(frame.call, path=frame.path)


def _policies(frame: SetPolicy) -> dict[str, Any]:
    """The policies that it names. Raises DriftError listing the installed ones."""
    registry = installed_registry()
    choices = {"dispatch": frame.dispatch, "partition": frame.partition}
    return {
        kind: policy(registry, f"{kind} policy", choice, {})
        for kind, choice in choices.items()
        if choice is not None
    }


def _options_of(choice: str) -> dict[str, Any]:
    from drift_scheduler.simulation.run import parse_choice

    return parse_choice(choice)[1]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(slots=True)
class _Begun:
    """Whether the log has seen the beginning of what a lane does."""

    prefill: bool = False
    decode: bool = False


class Trace:
    """A decision log that begins while the engine runs, readable like one from the start.

    Its first line has the arrivals of all requests that are there; the ends of work that began before it are left out.
    The file is new and its owner's alone.
    """

    def __init__(self, path: str, engine: Engine, settings: dict[str, Any]) -> None:
        self.path = path
        self.steps = 0
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            raise DriftError(f"log {path}: {error.strerror or error}") from error
        self._log = DecisionLog(path, engine.scheduler, settings)
        self._here: list[Request] | None = [tracked.request for tracked in engine.scheduler.live.values()]
        self._begun = _Begun()

    def on_step(self, record: StepRecord) -> None:
        """Append one step."""
        events: list[Event] = []
        if self._here is not None:
            arriving = {e.request.id for e in record.events if isinstance(e, RequestArrived)}
            events = [RequestArrived(r) for r in self._here if r.id not in arriving]
            self._here = None
        events += [event for event in record.events if self._begun_here(event)]
        self._note(record.step)
        self._log.on_step(
            StepRecord(record.index, record.now, tuple(events), record.step, record.step_seconds)
        )
        self.steps += 1

    def close(self) -> None:
        """Flush and close the file."""
        self._log.close()

    def _begun_here(self, event: Event) -> bool:
        """Whether what the event ends began in this log."""
        begun = self._begun
        match event:
            case PrefillDone() | LaneFailed(Lane.PREFILL):
                known, begun.prefill = begun.prefill, False
                return known
            case DecodeDone() | LaneFailed(Lane.DECODE):
                known, begun.decode = begun.decode, False
                return known
            case _:
                return True

    def _note(self, step: Step) -> None:
        if step.gang is not None:
            self._begun.prefill |= step.gang.prefill is not None
            self._begun.decode |= step.gang.decode is not None
