"""The access log: one JSON line per request, when it has ended. Times are seconds; never a word of any prompt.

Lines are appended with one write each, so that several processes may share a file and rotation by copying works.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from drift_gateway.observe.request_record import RequestRecord
from drift_gateway.observe.service_stats import EndedOutput
from drift_scheduler.errors import DriftError

log = logging.getLogger("drift.gateway")

STANDARD_OUTPUT: Final = "-"
MODE: Final = 0o600


class AccessLog:
    """Appends to a file of its owner's alone, or to the standard output for "-". Raises DriftError."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._encode = msgspec.json.Encoder().encode
        self._failed = False
        if path == STANDARD_OUTPUT:
            self._fd = os.dup(sys.stdout.fileno())
            return
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, MODE)
        except OSError as error:
            raise DriftError(f"access log {path}: {error.strerror or error}") from error

    def __call__(self, record: RequestRecord) -> None:
        """Append a request's line; a line that cannot be written is left out, and the first of them logged."""
        line = self._encode(line_of(record, time.time() - time.monotonic())) + b"\n"
        try:
            os.write(self._fd, line)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("access log %s: %s", self._path, error.strerror or error)
            self._failed = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


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
