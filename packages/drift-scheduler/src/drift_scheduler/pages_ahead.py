"""KV pages taken before the step that needs them, while the device works on the one before.

Two kinds: of a planned prefill's requests, which are given back where the plan comes to nothing; and of decoding
requests whose next token begins a page, which they need whatever is decided. Neither is taken where pages are scarce:
then who gets some is decided when the step is. Knows nothing of policies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drift_scheduler.domain import PrefillBlock

if TYPE_CHECKING:
    from drift_scheduler.foresight import ForeseenView
    from drift_scheduler.scheduler import Scheduler
    from drift_scheduler.tracked import Tracked


class PagesAhead:
    """What one scheduler has taken ahead."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._s = scheduler
        self._reserved: dict[str, int] = {}  # cached positions of each
        self._grown: list[Tracked] = []

    def reserve(self, block: PrefillBlock, view: ForeseenView) -> None:
        """Admit a planned batch's requests to the pool, as far as all that decode then have enough left.

        Not before prompts are through that may be cached prefixes of theirs.
        """
        s = self._s
        if view.ends_prompts:
            return
        room = s.limits.max_running - view.num_running
        for chunk in block.chunks:
            tracked = s.live[chunk.request_id]
            if tracked.admitted:
                continue
            if len(self._reserved) >= room:
                break
            cached = s.kv.admit(tracked.request, tracked.known, s.positions_for(tracked))
            if cached is None:
                break
            self._reserved[chunk.request_id] = cached
            if view.num_decoding and not view.has_headroom:
                self._give_back(chunk.request_id)
                break

    def claim(self, request_id: str) -> int | None:
        """Cached positions of a request that is admitted now and has its pages; `None` where it has none yet."""
        return self._reserved.pop(request_id, None)

    def withdraw(self) -> None:
        """Give back what nobody has claimed."""
        for request_id in tuple(self._reserved):
            self._give_back(request_id)

    def _give_back(self, request_id: str) -> None:
        kv = self._s.kv
        del self._reserved[request_id]
        withdraw = getattr(kv, "withdraw", None)
        if withdraw is not None:
            withdraw(request_id, self._s.live[request_id].known)
        else:
            kv.release(request_id)

    def grow(self) -> None:
        """Extend the pages of who will need another one for the step after the one that runs, if all of them can be."""
        s, rows = self._s, self._s.rows
        flight = s.decode_flight
        short = [] if flight is None else rows.short_after(flight.rows)
        if not short or s.kv.free_pages < len(short) + s.headroom:
            return
        for row in short:
            tracked, tokens = rows.tracked[row], int(rows.context[row]) + 1
            s.kv.extend(tracked.request.id, tokens)
            rows.capacity[row] = s.rounded(tokens)
            self._grown.append(tracked)

    def grown(self) -> list[Tracked]:
        """Whose pages were extended since this was asked last: of them nothing was committed meanwhile."""
        found, self._grown = self._grown, []
        return found
