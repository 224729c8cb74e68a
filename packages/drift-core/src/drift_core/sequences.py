"""What the executor keeps per request: its known tokens and how to sample the next one.

Knows nothing of pages, lanes or why a request is there. The engine's thread adds and forgets; a lane appends to
the requests of the work it runs, and no request is in two lanes at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from drift_core.sampler import SamplerState
from drift_scheduler.errors import DriftError


@dataclass(slots=True, eq=False)
class SequenceState:
    """One request: `tokens` holds the prompt and everything generated so far."""

    tokens: array[int]
    sampler: SamplerState


class SequenceTable:
    """Every request the executor knows, by id."""

    def __init__(self) -> None:
        self._states: dict[str, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def __getitem__(self, request_id: str) -> SequenceState:
        return self._states[request_id]

    def add(self, request_id: str, prompt: Sequence[int], sampler: SamplerState) -> None:
        """Remember a request. Raises DriftError when the id is in use."""
        if request_id in self._states:
            raise DriftError(f"request id '{request_id}' is in use")
        self._states[request_id] = SequenceState(array("q", prompt), sampler)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests; unknown ids are no fault (a rejected request was never added)."""
        for request_id in request_ids:
            self._states.pop(request_id, None)

    def tokens_of(self, request_id: str) -> Sequence[int]:
        """The known tokens of a request, for the KV pool's page hashes."""
        return self._states[request_id].tokens
