"""The access log: one JSON line per request, when it has ended. Times are seconds; never a word of any prompt.

Lines are appended with one write each, so that several processes may share a file and rotation by copying works. What
is no file (a pipe, a terminal) may keep its writer waiting, so a thread writes there, and nobody waits for it.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any, Final

import msgspec

from drift_gateway.observe.request_record import RequestRecord
from drift_gateway.observe.service_stats import EndedOutput
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")

STANDARD_OUTPUT: Final = "-"
MODE: Final = 0o600
MAX_WAITING: Final = 1000
"""Lines that wait for the reader of a pipe; what comes beyond is dropped."""
CLOSE_S: Final = 1.0
"""What a reader gets to take the lines that wait when the log is closed."""
TOLD_EVERY_S: Final = 10.0


class AccessLog:
    """Appends to a file of its owner's alone, or to the standard output for "-". Raises DriftError.

    `most`: lines that wait for the reader of what is no file.
    """

    def __init__(self, path: str, most: int = MAX_WAITING) -> None:
        self._path = path
        self._encode = msgspec.json.Encoder().encode
        self._failed = False
        self._fd = _open(path)
        is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._thread = None if is_file else WritingThread(self._write, f"access log {path}", most)

    def __call__(self, record: RequestRecord) -> None:
        """Append a request's line; a line that cannot be written is left out, and the first of them logged."""
        line = self._encode(line_of(record, time.time() - time.monotonic())) + b"\n"
        if self._thread is None:
            self._write(line)
        else:
            self._thread.add(line)

    def _write(self, line: bytes) -> None:
        try:
            os.write(self._fd, line)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("access log %s: %s", self._path, error.strerror or error)
            self._failed = True

    def close(self) -> None:
        """Close the file; a reader of a pipe gets a second to take what waits."""
        if self._thread is None or self._thread.end(CLOSE_S):
            os.close(self._fd)


def _open(path: str) -> int:
    """For appending. Raises DriftError."""
    if path == STANDARD_OUTPUT:
        return os.dup(sys.stdout.fileno())
    try:  # O_NONBLOCK: to open a FIFO that nobody reads is an error then, and no wait
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, MODE)
    except OSError as error:
        fault = "nobody reads it" if error.errno == errno.ENXIO else error.strerror or error
        raise DriftError(f"access log {path}: {fault}") from error
    os.set_blocking(fd, True)
    return fd


class WritingThread:
    """Hands lines to `write` in a thread of its own, as far as it keeps up: of those that wait at most `most` are kept.

    How many were dropped is logged as `name`'s when it has caught up, and while it has not every TOLD_EVERY_S.
    """

    def __init__(self, write: Callable[[bytes], None], name: str, most: int) -> None:
        self._write = write
        self._name = name
        self._most = most
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._dropped = 0  # counted by who adds, and told by the thread: neither writes the other's number
        self._told = 0
        self._thread = threading.Thread(target=self._run, name="drift-access-log", daemon=True)
        self._thread.start()

    def add(self, line: bytes) -> None:
        """Have it written, or drop it where too much waits already. Never waits."""
        if self._lines.qsize() >= self._most:
            self._dropped += 1
        else:
            self._lines.put(line)

    def end(self, patience: float) -> bool:
        """Wait for so many seconds until all is written; whether it is, and the thread has ended."""
        self._lines.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            lost = self._dropped - self._told + self._lines.qsize()  # None stands for the line being written
            log.warning("%s: nobody reads it; %d lines are lost", self._name, lost)
        return not self._thread.is_alive()

    def _run(self) -> None:
        told_at = 0.0
        while (line := self._lines.get()) is not None:
            self._write(line)
            if self._dropped == self._told:
                continue
            now = time.monotonic()
            if self._lines.empty() or now - told_at >= TOLD_EVERY_S:
                dropped, told_at = self._dropped, now
                log.warning("%s: %d lines were dropped, as it was not read", self._name, dropped - self._told)
                self._told = dropped


def line_of(record: RequestRecord, epoch: float) -> dict[str, Any]:
    """What is written of a request. `epoch`: the time since 1970 at which the monotonic clock was 0."""
    arrived = datetime.fromtimestamp(record.call.arrival + epoch, UTC)
    return {
        "time": arrived.isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "tenant": record.tenant,
        "peer": record.call.peer,
        "session": record.session,
        "labels": record.labels,
        "class": record.slo_class,
        "priority": record.priority,
        "demoted": record.demoted,
        "code": record.code,
        "reason": record.reason,
        "incident": record.incident,
        "seconds": _seconds(record.ended - record.call.arrival),
        "outputs": [_output(output) for output in record.outputs],
    }


def _output(end: EndedOutput) -> dict[str, Any]:
    def since(later: float | None, earlier: float | None) -> float | None:
        return None if later is None or earlier is None else _seconds(later - earlier)

    return {
        "reason": end.reason,
        "prompt_tokens": end.prompt_tokens,
        "cached_tokens": end.cached_tokens,
        "output_tokens": end.output_tokens,
        "queue_s": since(end.scheduled, end.arrival),
        "prefill_s": since(end.first_token, end.scheduled),
        "ttft_s": since(end.first_token, end.arrival),
        "e2e_s": since(end.last_token, end.arrival),
        "tbt_p50_s": _seconds(end.tbt_p50),
        "tbt_p99_s": _seconds(end.tbt_p99),
        "tbt_max_s": _seconds(end.tbt_max),
        "preemptions": end.preemptions,
        "met": end.met,
    }


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
