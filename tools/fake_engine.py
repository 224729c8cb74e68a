"""An engine that speaks frames and computes nothing: for tests of the gateway and measurements of what it adds.

Runs as a thread, or as a process: `python tools/fake_engine.py SOCKET [STEP_SECONDS]`. What a request generates is
what its script says; steps come every `step_seconds`, or one by one when it is paused.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from drift_core.frames import (
    AcceptedItem,
    Answer,
    Call,
    Cancel,
    FinishedItem,
    FlushPrefixes,
    LoadItem,
    Ping,
    Pong,
    Ready,
    SetPolicy,
    Shutdown,
    Starting,
    StartTrace,
    StepFrame,
    StopTrace,
    Submit,
    ToEngine,
    TokenLogprob,
    TokensItem,
    pack_ids,
)
from drift_core.link import EngineLink

READY = Ready(
    model="fake",
    directory="/nowhere",
    pid=0,
    vocab_size=300,
    max_context=4096,
    num_layers=4,
    dtype="float32",
    device="fake",
    units=2,
    menu=[(1, 1), (2, 0), (0, 2)],
    dispatch="gang",
    partition="tightest-decode",
    page_tokens=16,
    kv_pages=1000,
    kv_tokens=16000,
    max_running=64,
    slo_ttft=2.0,
    slo_tbt=0.1,
    eos_token_ids=[299],
)
PATIENCE_S = 30.0
_PIDS = itertools.count(10**7)  # of engines that are threads: no two the same, and no process has them

Script = Callable[[Submit], Sequence[int]]


def count_up(submit: Submit) -> list[int]:
    """`max_tokens` tokens: 0, 1, 2 … modulo 200."""
    return [token % 200 for token in range(submit.sampling.max_tokens or 1)]


@dataclass
class _Running:
    submit: Submit
    tokens: Iterator[int]
    left: int
    scheduled: float
    sent: int = 0
    first_token: float | None = None


@dataclass
class FakeEngine:
    """The engine's end of the socket at `path`. Its inbox and counters may be read by tests."""

    path: Path
    script: Script = count_up
    step_seconds: float = 0.001
    ready: Ready = READY
    paused: bool = False
    end_reason: str = "length"
    reject: str = ""
    hung: bool = False
    """Alive, and deaf to pings."""
    busy: float = 0.0
    """What it answers to a ping: seconds that a lane has been at its work."""
    received: list[ToEngine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.ended = threading.Event()
        self._waiting: list[Submit] = []
        self._running: dict[str, _Running] = {}
        self._cancelled: list[Cancel] = []
        self._steps = 0
        self.trace = ""
        self._tokens_of: dict[str, Sequence[int]] = {}
        self.link = EngineLink(self.path, self._receive, self._stop)
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------------------- for tests

    def step(self, count: int = 1) -> None:
        """While paused: take so many steps."""
        with self.changed:
            self._steps += count
            self.changed.notify_all()

    def crash(self) -> None:
        """The socket ends as if the process had been killed."""
        self._stop()
        self.link.close(timeout=0.0)

    def until(self, condition: Callable[[FakeEngine], bool]) -> None:
        """Wait, boundedly, until what was received makes the condition true."""
        with self.changed:
            if not self.changed.wait_for(lambda: condition(self), PATIENCE_S):
                raise AssertionError(f"it did not come to that; received: {self.received}")

    def submits(self) -> list[Submit]:
        """Requests received so far."""
        return [frame for frame in self.received if isinstance(frame, Submit)]

    def cancels(self) -> list[Cancel]:
        """Cancellations received so far."""
        return [frame for frame in self.received if isinstance(frame, Cancel)]

    # ----------------------------------------------------------------------------- the engine

    def _receive(self, frame: ToEngine) -> None:
        if isinstance(frame, Ping):
            if not self.hung:
                self.link.send(Pong(frame.number, self.busy, 0.001))
            return
        with self.changed:
            self.received.append(frame)
            match frame:
                case Submit():
                    self._waiting.append(frame)
                case Cancel():
                    self._cancelled.append(frame)
                case Shutdown():
                    self.ended.set()
                case SetPolicy() | FlushPrefixes() | StartTrace() | StopTrace():
                    self.link.send(self._answer(frame))
            self.changed.notify_all()

    def _answer(self, frame: Call) -> Answer:
        """Policies and logs as a real engine has them, without any."""
        match frame:
            case SetPolicy(call, dispatch, partition):
                if dispatch == "edf":
                    return Answer(call, "no dispatch policy 'edf'; installed: gang")
                return Answer(call, dispatch=dispatch or "gang", partition=partition or "tightest-decode")
            case FlushPrefixes(call):
                return Answer(call, pages=3)
            case StartTrace(call, path):
                if self.trace:
                    return Answer(call, "a decision log is being written already")
                self.trace = path
                return Answer(call, path=path)
            case StopTrace(call):
                path, self.trace = self.trace, ""
                return Answer(call, "" if path else "no decision log is being written", path=path, steps=7)

    def _stop(self) -> None:
        with self.changed:
            self.ended.set()
            self.changed.notify_all()

    def _run(self) -> None:
        self.link.send(Starting("load weights", 0.0))
        self.link.send(Starting("load weights", 1.0))
        self.link.send(msgspec.structs.replace(self.ready, pid=self.ready.pid or next(_PIDS)))
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.ended.is_set() or self._may_step())
                if self.ended.is_set():
                    break
                self._steps -= self.paused
                frame = self._step()
            self.link.send(frame)
            time.sleep(self.step_seconds)
        self.link.close()

    def _may_step(self) -> bool:
        work = bool(self._waiting or self._running or self._cancelled)
        return work and (self._steps > 0 or not self.paused)

    def _step(self) -> StepFrame:
        now = time.monotonic()
        accepted, finished = self._admit(now)
        for cancel in self._cancelled:
            if (running := self._running.pop(cancel.id, None)) is not None:
                finished.append(_end(running, "stop" if cancel.stop else "cancelled", now))
        self._cancelled.clear()
        tokens = self._advance(now, finished)
        decoding = len(self._running)
        return StepFrame(
            now,
            accepted,
            tokens,
            finished,
            partition=(1, 1) if decoding else None,
            sharing="spatial" if decoding else None,
            decode_requests=decoding,
            load=LoadItem(0, decoding, 1000 - decoding),
        )

    def _admit(self, now: float) -> tuple[list[AcceptedItem], list[FinishedItem]]:
        accepted, finished = [], []
        for submit in self._waiting:
            if self.reject:
                finished.append(
                    FinishedItem(submit.id, "rejected", self.reject, submit.arrival, finished=now)
                )
                continue
            accepted.append(AcceptedItem(submit.id, len(self._running)))
            tokens = self.script(submit)
            self._running[submit.id] = _Running(submit, iter(tokens), len(tokens), now)
        self._waiting.clear()
        return accepted, finished

    def _advance(self, now: float, finished: list[FinishedItem]) -> list[TokensItem]:
        firsts, others = TokensItem([], pack_ids(()), True, {}), TokensItem([], pack_ids(()), False, {})
        for request_id, running in list(self._running.items()):
            if not running.left:
                finished.append(_end(running, self.end_reason, now))
                del self._running[request_id]
                continue
            item = others if running.sent else firsts
            token = next(running.tokens)
            item.ids.append(request_id)
            item.token_ids.append(token)
            if running.submit.sampling.logprobs is not None:
                assert item.logprobs is not None
                item.logprobs[request_id] = TokenLogprob(-0.5, [(token, -0.5)])
            running.first_token = running.first_token or now
            running.sent += 1
            running.left -= 1
            if not running.left:
                finished.append(_end(running, self.end_reason, now))
                del self._running[request_id]
        return [item for item in (firsts, others) if item.ids]


def _end(running: _Running, reason: str, now: float) -> FinishedItem:
    return FinishedItem(
        running.submit.id,
        reason,
        arrival=running.submit.arrival,
        scheduled=running.scheduled,
        first_token=running.first_token,
        finished=now,
        prompt_tokens=len(running.submit.prompt),
        output_tokens=running.sent,
        cached_tokens=1,
        preemptions=2,
        recomputed_tokens=3,
    )


def main() -> None:
    """Serve the gateway at the given socket until it is gone."""
    ready = msgspec.structs.replace(READY, pid=os.getpid())
    step_seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.01
    FakeEngine(Path(sys.argv[1]), step_seconds=step_seconds, ready=ready).ended.wait()


if __name__ == "__main__":
    main()
