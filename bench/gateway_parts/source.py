"""An engine that takes next to nothing: `python -m gateway_parts.source SOCKET STEP_MS`, a process.

Each request gets a token at every step, in the frames that the real engine sends, until it has all it asked for. What
a step brings is cut out of a table, so that hundreds of requests cost some tens of microseconds: where a gateway is to
be driven to its limit on a machine of few cores, an engine that works for its tokens would be the limit.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from heapq import heappop, heappush
from pathlib import Path

from drift_core.frames import (
    AcceptedItem,
    Cancel,
    FinishedItem,
    LoadItem,
    Ping,
    Pong,
    Ready,
    Shutdown,
    StepFrame,
    Submit,
    ToEngine,
    TokenIds,
    TokensItem,
    pack_ids,
)
from drift_core.link import EngineLink
from drift_core.tokenizer import Tokenizer
from drift_kernels.process import prepare_process

VOCAB, EOS = 3072, 2  # the demo model's
PAGES = 1_000_000
MOST_LATE_S = 1.0
"""Steps later than this are left out."""

TEXT = Path(__file__).parents[2] / "README.md"
"""What it says: tokens drawn by chance would be half characters mostly, which no model writes."""

TABLE_TOKENS, MOST_REQUESTS = 20_011, 4096


class Source:
    """Serves the gateway that listens at `path`."""

    def __init__(self, path: Path, directory: str, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._lock = threading.Lock()
        self._came: list[Submit | Cancel] = []
        self._over = threading.Event()
        self._steps = itertools.count()
        self._running: dict[str, tuple[Submit, int]] = {}  # with its last step
        self._ends: list[tuple[int, str]] = []
        self._ids: list[str] = []
        self._table = _table(directory)
        self._link = EngineLink(path, self._receive, self._over.set, exit_after=1.0)
        self._link.send(_ready(directory))

    def _receive(self, frame: ToEngine) -> None:
        match frame:
            case Ping(number):
                self._link.send(Pong(number))
            case Shutdown():
                self._over.set()
            case Submit() | Cancel():
                with self._lock:
                    self._came.append(frame)

    def run(self) -> None:
        """Until the gateway is gone; steps come `step_seconds` apart, those that are late at once: on a machine that is
        busy with the gateway it still makes as many as it should."""
        due = time.monotonic()
        while not self._over.is_set():
            due = max(due + self._step_seconds, time.monotonic() - MOST_LATE_S)
            if (early := due - time.monotonic()) > 0:
                time.sleep(early)
            frame = self._step(next(self._steps))
            if frame is not None:
                self._link.send(frame)
        self._link.close()

    def _step(self, step: int) -> StepFrame | None:
        now = time.monotonic()
        with self._lock:
            came, self._came = self._came, []
        tokens, ids = [], self._ids
        if ids:
            begin = step % TABLE_TOKENS
            tokens.append(TokensItem(ids, self._table[begin : begin + len(ids)]))
        finished = [_end(*self._running.pop(name), step, now) for name in self._over_by(step)]
        finished += self._cancelled([frame for frame in came if isinstance(frame, Cancel)], step, now)
        begun = [frame for frame in came if isinstance(frame, Submit)]
        for frame in begun:
            last = step + (frame.sampling.max_tokens or 1) - 1
            self._running[frame.id] = frame, last
            heappush(self._ends, (last, frame.id))
        if begun:
            tokens.append(TokensItem([frame.id for frame in begun], self._table[: len(begun)], first=True))
        finished += [_end(*self._running.pop(name), step, now) for name in self._over_by(step)]
        if came or finished:
            self._ids = list(self._running)
        if not (tokens or finished):
            return None
        count = len(self._running)
        return StepFrame(
            now,
            [AcceptedItem(frame.id) for frame in begun],
            tokens,
            finished,
            (1, 1) if count else None,
            "spatial" if count else None,
            0,
            count,
            LoadItem(0, count, PAGES - count),
        )

    def _over_by(self, step: int) -> list[str]:
        """Those whose last token came at this step."""
        found = []
        while self._ends and self._ends[0][0] <= step:
            last, name = heappop(self._ends)
            if (running := self._running.get(name)) is not None and running[1] == last:
                found.append(name)
        return found

    def _cancelled(self, cancels: list[Cancel], step: int, now: float) -> list[FinishedItem]:
        gone = [self._running.pop(cancel.id) for cancel in cancels if cancel.id in self._running]
        return [_end(frame, last, step, now, "cancelled") for frame, last in gone]


def _table(directory: str) -> TokenIds:
    """Tokens of the text again and again, and as many more as there are requests at most."""
    token_ids = Tokenizer.load(directory).encode(TEXT.read_text())
    return pack_ids(itertools.islice(itertools.cycle(token_ids), TABLE_TOKENS + MOST_REQUESTS))


def _end(submit: Submit, last: int, step: int, now: float, reason: str = "length") -> FinishedItem:
    output = (submit.sampling.max_tokens or 1) - max(0, last - step)
    return FinishedItem(
        submit.id, reason, "", submit.arrival, now, now, now, len(submit.prompt), output_tokens=output
    )


def _ready(directory: str) -> Ready:
    return Ready(
        model="source",
        directory=directory,
        pid=os.getpid(),
        vocab_size=VOCAB,
        max_context=32768,
        num_layers=1,
        dtype="none",
        device="source",
        units=2,
        menu=[(1, 1), (2, 0), (0, 2)],
        dispatch="drift",
        partition="tightest-decode",
        page_tokens=16,
        kv_pages=PAGES,
        kv_tokens=16 * PAGES,
        max_running=MOST_REQUESTS,
        slo_ttft=60.0,
        slo_tbt=0.1,
        eos_token_ids=[EOS],
        prefill_seconds=[(100, 0.001), (1000, 0.01)],
    )


def main() -> None:
    prepare_process()
    path, directory, step_ms = sys.argv[1:]
    Source(Path(path), directory, float(step_ms) / 1e3).run()


if __name__ == "__main__":
    main()
