"""Requests that other gateways have in the same engine, as far as its step frames tell of them: how many, how long.

Knows no sockets and reads no clock. Empty where a gateway has the engine to itself.
"""

from __future__ import annotations

from drift_core.frames import StepFrame


class Elsewhere:
    """Outputs in flight through other gateways."""

    def __init__(self) -> None:
        self.waiting_prefill_tokens = 0
        """Prompt tokens of those that have no token yet."""
        self._waiting: dict[str, int] = {}
        self._running: set[str] = set()

    @property
    def in_flight(self) -> int:
        """How many there are, as of the engine's last step."""
        return len(self._waiting) + len(self._running)

    def step(self, frame: StepFrame) -> None:
        """Take in one frame."""
        others = frame.others
        if others is None:
            return
        for item in others.accepted:
            self._waiting[item.id] = item.prompt_tokens
            self.waiting_prefill_tokens += item.prompt_tokens
        for request_id in others.first:
            self._no_longer_waits(request_id)
            self._running.add(request_id)
        for finished in others.finished:
            self._no_longer_waits(finished.id)
            self._running.discard(finished.id)

    def engine_gone(self) -> None:
        """Nothing is in flight any more."""
        self._waiting.clear()
        self._running.clear()
        self.waiting_prefill_tokens = 0

    def _no_longer_waits(self, request_id: str) -> None:
        self.waiting_prefill_tokens -= self._waiting.pop(request_id, 0)
