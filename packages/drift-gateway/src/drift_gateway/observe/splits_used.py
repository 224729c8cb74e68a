"""Under which split of the device each output's tokens were decoded, from the engine's step frames.

Counts decode steps by split: once per step, not per token; an output's share is what was counted between its first
token and its end. Knows no sockets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from drift_core.frames import StepFrame

Split = tuple[int, int]
"""Units of the prefill lane and of the decode lane."""


class SplitsUsed:
    """Told of every frame; asked when an output has ended. `watch` first, `forget` last, however late the engine is."""

    def __init__(self) -> None:
        self._steps: Counter[Split] = Counter()
        self._since: dict[str, Counter[Split] | None] = {}  # `None` before its first token
        self._used: dict[str, Split] = {}
        self._partition: Split | None = None

    def watch(self, output_ids: Iterable[str]) -> None:
        """These are on their way to the engine."""
        self._since.update(dict.fromkeys(output_ids))

    def step(self, frame: StepFrame, steps: int = 1) -> None:
        """Take in one frame, the last of so many steps alike: its tokens were made under the split that was in force
        before it."""
        decoded, firsts = False, []
        for item in frame.tokens:
            if item.first:
                firsts += item.ids
            else:
                decoded = True
        if decoded and self._partition is not None:
            self._steps[self._partition] += steps
        for output_id in firsts:
            if output_id in self._since:
                self._since[output_id] = self._steps.copy()
        for finished in frame.finished:
            since = self._since.pop(finished.id, None)
            if since is not None and finished.output_tokens > 1 and (used := self._steps - since):
                self._used[finished.id] = used.most_common(1)[0][0]
        self._partition = frame.partition

    def of(self, output_id: str) -> Split | None:
        """The split under which most of an ended output's tokens were decoded; `None` with fewer than two tokens."""
        return self._used.get(output_id)

    def forget(self, output_ids: Iterable[str]) -> None:
        """Nobody asks for these any more."""
        for output_id in output_ids:
            self._since.pop(output_id, None)
            self._used.pop(output_id, None)
