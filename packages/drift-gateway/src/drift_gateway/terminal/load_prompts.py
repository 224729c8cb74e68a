"""Token-id prompts for requests that have only lengths and prefix keys, as traces and generated workloads do.

Two prompts begin alike exactly as far as their leading prefix keys agree, so a prefix cache finds what the trace says
is shared. What a trace's next turn holds of the previous answer is made up like the rest, so a real server finds the
prompts of a session's earlier turns in its cache but not its answers. Knows nothing of servers or clocks.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from drift_scheduler.domain import IntArray, Request
from drift_scheduler.errors import DriftError


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to send for a request. `cut`: whether prompt or output were shortened to fit."""

    token_ids: list[int]
    output_tokens: int
    cut: bool


class PromptMaker:
    """Makes prompts of tokens below `vocab_size`; prompt and output together are at most `max_tokens`.

    The same seed, workload and vocabulary give the same prompts. Raises DriftError where nothing could fit.
    """

    def __init__(self, vocab_size: int, max_tokens: int, seed: int = 0) -> None:
        if vocab_size < 1 or max_tokens < 2:
            raise DriftError(
                f"the server has room for {max_tokens} tokens of {vocab_size} kinds; nothing can be sent to it"
            )
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._seed = seed

    def make(self, request: Request) -> Prompt:
        """The prompt of a request, and how many tokens to ask for."""
        wanted = request.max_output_tokens if request.output_tokens is None else request.output_tokens
        prompt_tokens, output_tokens = fit(request.prompt_tokens, max(1, wanted), self._max_tokens)
        runs = [self._run(("key", key), request.key_tokens) for key in request.prefix_keys]
        known = len(runs) * request.key_tokens
        if known < prompt_tokens:
            runs.append(self._run(("rest", request.id), prompt_tokens - known))
        token_ids: list[int] = np.concatenate(runs)[:prompt_tokens].tolist()
        cut = (prompt_tokens, output_tokens) != (request.prompt_tokens, wanted)
        return Prompt(token_ids, output_tokens, cut)

    def _run(self, name: tuple[str, Hashable], tokens: int) -> IntArray:
        digest = blake2b(repr((self._seed, name)).encode(), digest_size=8).digest()
        draw = np.random.default_rng(int.from_bytes(digest, "little"))
        return draw.integers(0, self._vocab_size, size=tokens, dtype=np.int64)


def fit(prompt_tokens: int, output_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Lengths that fit `max_tokens` together: the longer one gives, and neither gives below half of the room."""
    if prompt_tokens + output_tokens <= max_tokens:
        return prompt_tokens, output_tokens
    half = max(1, max_tokens // 2)
    if output_tokens <= half:
        return max_tokens - output_tokens, output_tokens
    if prompt_tokens <= half:
        return prompt_tokens, max_tokens - prompt_tokens
    return max_tokens - half, half
