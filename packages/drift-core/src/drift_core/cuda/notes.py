"""Tokens that have come back, on their way to the requests they belong to.

Whether a token ends its request must be known before the next launch; that it stands in the request's list need not,
and 128 lists lie in 128 places of memory. So plain rows' tokens may be noted after the launch, by `settle`, which
whoever reads a request's latest token or counts them calls first. Knows nothing of lanes or of how tokens were chosen.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from drift_core.sampler import SamplerState
from drift_core.sequences import SequenceState


@dataclass(frozen=True, slots=True)
class Plain:
    """Rows whose tokens need nothing but noting, looked through while the device computes them.

    `usable`: whether all of them are such.
    """

    states: list[SequenceState]
    usable: bool
    known: list[array[int]]
    samplers: list[SamplerState]
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, states: list[SequenceState]) -> Plain:
        """Look through a step's rows."""
        samplers = [state.sampler for state in states]
        if not all(sampler.plain and sampler.params.logprobs is None for sampler in samplers):
            return cls(states, False, [], [], frozenset())
        sets = {id(sampler.stop_ids): sampler.stop_ids for sampler in samplers}
        stop_ids: frozenset[int] = frozenset().union(*sets.values())
        return cls(states, True, [state.tokens for state in states], samplers, stop_ids)

    def stop(self, tokens: list[int], stopped: list[bool]) -> None:
        """Whether each row's token ends the row's request."""
        if not self.stop_ids.isdisjoint(tokens):
            for row, (sampler, token) in enumerate(zip(self.samplers, tokens, strict=True)):
                stopped[row] = token in sampler.stop_ids


class Notes:
    """Tokens of plain rows that are still to be noted: of one step at most."""

    def __init__(self) -> None:
        self._plain: Plain | None = None
        self._tokens: list[int] = []

    def put_off(self, plain: Plain, tokens: list[int]) -> None:
        """Note these when there is time."""
        self.settle()
        self._plain, self._tokens = plain, tokens

    def settle(self) -> None:
        """Note what was put off."""
        plain, self._plain = self._plain, None
        if plain is not None:
            for known, sampler, token in zip(plain.known, plain.samplers, self._tokens, strict=True):
                known.append(token)
                sampler.generated += 1  # what `record` does for a plain request, without the call
