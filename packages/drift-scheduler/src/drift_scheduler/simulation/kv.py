"""A KV pool by counts alone: what a simulation needs of the shared KV cache, and nothing else.

It knows how many pages each request holds and which prefixes are cached, by the requests' `prefix_keys`;
it knows no page ids, no tokens and no hashes. Its answers are those of `drift_core.kv.PagedKv` for the same
calls; `tests/test_kv_agreement.py` holds the two together.

The rules both follow:

* A page is *referenced* (some request holds it), *cached* (published, held by nobody) or *empty*.
  `free_pages` is cached plus empty.
* New pages come from the empty ones; when there are none, the least recently released cached page goes.
  Releasing a request frees its last page first, so that a prefix outlives its continuations.
* `commit` publishes full pages. A page whose prefix somebody published already stays private: the first copy
  serves everyone, the second returns to the empty pages when its request ends.
* `admit` shares the cached prefix and never evicts what it is about to share.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from drift_scheduler.domain import Request

NEVER = sys.maxsize


@dataclass(slots=True)
class KvStats:
    """Counters of a pool since it was made. `hit_tokens / query_tokens` is the prefix hit ratio.

    `query_tokens`: known tokens of every admitted request, each admission counted; `hit_tokens`: those whose
    KV was cached; `evicted_pages`: cached pages reused for something else; `peak_pages`: most pages
    referenced at once.
    """

    admissions: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0
    peak_pages: int = 0

    @property
    def hit_ratio(self) -> float:
        """Share of queried tokens that were cached; 0 before the first query."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0


class _Run:
    """The pages of one published key. Compared by identity: one object per cached run."""

    __slots__ = ("key", "refs", "table")

    def __init__(self, key: Hashable, table: dict[Hashable, _Run]) -> None:
        self.key = key
        self.table = table
        self.refs = 1


class _Held:
    """What one request holds: published or shared runs in order, and how many pages of its own."""

    __slots__ = ("committed", "covered_tokens", "keys", "next_publish", "pages", "run_pages", "runs", "table")

    def __init__(
        self, keys: Sequence[Hashable], run_pages: int, table: dict[Hashable, _Run], runs: list[_Run]
    ) -> None:
        self.keys = keys
        self.run_pages = run_pages
        self.table = table
        self.runs = runs
        self.committed = len(runs)  # leading keys already dealt with
        self.pages = 0  # in all, those of runs included
        self.covered_tokens = 0  # pages * page_tokens
        self.next_publish = NEVER  # tokens at which the next key fills


class CountingKv:
    """Implements `drift_scheduler.protocols.KvPool` without pages. Every operation is O(1) per key it touches.

    A request's `key_tokens` must be a multiple or a divisor of `page_tokens`; runs of several pages are shared,
    published and evicted whole.
    """

    def __init__(self, total_pages: int, page_tokens: int = 16) -> None:
        if total_pages < 1 or page_tokens < 1:
            raise ValueError(
                f"a pool needs at least one page of one token, not {total_pages} of {page_tokens}"
            )
        self.page_tokens = page_tokens
        self.total_pages = total_pages
        self.free_pages = total_pages
        self.stats = KvStats()
        self._empty = total_pages
        self._tables: dict[tuple[str, int], dict[Hashable, _Run]] = {}  # (salt, run pages): key -> run
        self._idle: OrderedDict[_Run, int] = OrderedDict()  # cached, least recently released first -> pages
        self._held: dict[str, _Held] = {}

    @property
    def num_cached_pages(self) -> int:
        """Pages that cache a prefix and that no request references."""
        return self.free_pages - self._empty

    def lookup(self, request: Request, known_tokens: int) -> int:
        """Leading cached positions among `known_tokens`, at least one position short of all of them."""
        keys, run_pages = self._keys(request)
        return len(self._match(request, keys, run_pages, known_tokens)) * run_pages * self.page_tokens

    def admit(self, request: Request, known_tokens: int, reserve_tokens: int) -> int | None:
        """Share the cached prefix and cover `reserve_tokens`; the cached positions, or `None` if pages lack."""
        if request.id in self._held:
            raise ValueError(f"request '{request.id}' already holds pages")
        keys, run_pages = self._keys(request)
        shared = self._match(request, keys, run_pages, known_tokens)
        shared_pages = len(shared) * run_pages
        fresh_pages = max(0, -(-reserve_tokens // self.page_tokens) - shared_pages)
        revived = sum(run_pages for run in shared if not run.refs)
        if fresh_pages + revived > self.free_pages:
            return None
        for run in shared:
            if not run.refs:
                del self._idle[run]
            run.refs += 1
        self.free_pages -= revived
        self._take(fresh_pages)
        held = _Held(keys, run_pages, self._tables.setdefault((request.salt, run_pages), {}), shared)
        held.pages = shared_pages + fresh_pages
        held.covered_tokens = held.pages * self.page_tokens
        if len(shared) < len(keys):
            held.next_publish = (len(shared) + 1) * run_pages * self.page_tokens
        self._held[request.id] = held
        cached = shared_pages * self.page_tokens
        self.stats.admissions += 1
        self.stats.query_tokens += known_tokens
        self.stats.hit_tokens += cached
        return cached

    def extend(self, request_id: str, tokens: int) -> bool:
        """Cover `tokens` positions in all; `False` with nothing changed when pages run out."""
        held = self._holder(request_id)
        if tokens <= held.covered_tokens:
            return True
        fresh = -(-tokens // self.page_tokens) - held.pages
        if fresh > self.free_pages:
            return False
        self._take(fresh)
        held.pages += fresh
        held.covered_tokens = held.pages * self.page_tokens
        return True

    def grow(self, request_ids: Sequence[str], tokens: Sequence[int]) -> int:
        """`commit` all positions of each request but the last of `tokens`, `extend` it to all of them, in order.

        Stops where pages run out; how many it were. Raises ValueError where more than one position is new.
        """
        helds, page_tokens = self._held, self.page_tokens
        done = 0
        for request_id, wanted in zip(request_ids, tokens, strict=True):
            held = helds.get(request_id) or self._holder(request_id)
            covered = held.covered_tokens
            if wanted > covered + 1:
                raise ValueError(f"request '{request_id}' grows to {wanted}, covers {covered}")
            if wanted > held.next_publish:
                self.commit(request_id, wanted - 1)
            if wanted > covered:
                if not self.free_pages:
                    break
                if not self._empty:
                    self._evict()
                self._empty -= 1
                self.free_pages -= 1
                held.pages += 1
                held.covered_tokens = covered + page_tokens
            done += 1
        self._note_peak()
        return done

    def commit(self, request_id: str, tokens: int) -> None:
        """Positions `[0, tokens)` hold computed KV: publish the keys they fill."""
        held = self._holder(request_id)
        if tokens > held.covered_tokens:
            raise ValueError(f"request '{request_id}' commits {tokens} tokens, covers {held.covered_tokens}")
        if tokens < held.next_publish:
            return
        key_tokens = held.run_pages * self.page_tokens
        stop = tokens // key_tokens
        table = held.table
        for key in held.keys[held.committed : stop]:
            if key not in table:
                table[key] = run = _Run(key, table)
                held.runs.append(run)
        held.committed = stop
        held.next_publish = (stop + 1) * key_tokens if stop < len(held.keys) else NEVER

    def release(self, request_id: str) -> None:
        """Drop every reference of the request; published runs stay cached until evicted."""
        held = self._holder(request_id)
        del self._held[request_id]
        run_pages, idle = held.run_pages, self._idle
        for run in reversed(held.runs):
            run.refs -= 1
            if not run.refs:
                idle[run] = run_pages
                self.free_pages += run_pages
        private = held.pages - len(held.runs) * run_pages
        self.free_pages += private
        self._empty += private

    def withdraw(self, request_id: str, known_tokens: int) -> None:
        """Release a request that was just admitted with so many tokens: it was not an admission after all."""
        held = self._holder(request_id)
        self.stats.admissions -= 1
        self.stats.query_tokens -= known_tokens
        self.stats.hit_tokens -= len(held.runs) * held.run_pages * self.page_tokens
        self.release(request_id)

    def flush(self) -> int:
        """Forget every cached prefix that no request uses; how many pages those were."""
        pages = sum(self._idle.values())
        for run in self._idle:
            del run.table[run.key]
        self._idle.clear()
        self._empty += pages
        return pages

    def audit(self) -> None:
        """Assert that pages are conserved; for tests."""
        references: dict[_Run, int] = {}
        referenced = 0
        for held in self._held.values():
            for run in held.runs:
                if run not in references:
                    referenced += held.run_pages
                references[run] = references.get(run, 0) + 1
            referenced += held.pages - len(held.runs) * held.run_pages
            assert held.pages * self.page_tokens == held.covered_tokens, "coverage out of step with pages"
        cached = sum(self._idle.values())
        assert self._empty >= 0, "more pages handed out than there are"
        assert self._empty + cached + referenced == self.total_pages, "pages lost or made up"
        assert self.free_pages == self._empty + cached, "free pages miscounted"
        published = [run for table in self._tables.values() for run in table.values()]
        assert len(published) == len(self._idle) + len(references), "a run is neither idle nor referenced"
        for run in published:
            assert run.refs == references.get(run, 0), "reference count wrong"
            assert (run.refs == 0) == (run in self._idle), "a run is both idle and referenced"

    def _keys(self, request: Request) -> tuple[Sequence[Hashable], int]:
        """The request's keys at a grain of whole pages, and the pages each covers."""
        pages, rest = divmod(request.key_tokens, self.page_tokens)
        if not rest:
            return request.prefix_keys, pages
        stride, rest = divmod(self.page_tokens, request.key_tokens)
        if rest:
            raise ValueError(
                f"request '{request.id}' has keys of {request.key_tokens} tokens, neither a multiple nor a "
                f"divisor of pages of {self.page_tokens}"
            )
        return request.prefix_keys[stride - 1 :: stride], 1

    def _match(
        self, request: Request, keys: Sequence[Hashable], run_pages: int, known_tokens: int
    ) -> list[_Run]:
        """Published runs of the leading keys that lie within `known_tokens - 1` positions."""
        table = self._tables.get((request.salt, run_pages))
        matched: list[_Run] = []
        if not table:
            return matched
        limit = (known_tokens - 1) // (run_pages * self.page_tokens)
        for key in keys if limit >= len(keys) else keys[: max(0, limit)]:
            run = table.get(key)
            if run is None:
                break
            matched.append(run)
        return matched

    def _take(self, pages: int) -> None:
        """Reference `pages` fresh pages; the caller has seen that they are there."""
        while self._empty < pages:
            self._evict()
        self._empty -= pages
        self.free_pages -= pages
        self._note_peak()

    def _evict(self) -> None:
        """Empty the pages of the cached run that was released least recently."""
        run, run_pages = self._idle.popitem(last=False)
        del run.table[run.key]
        self._empty += run_pages
        self.stats.evicted_pages += run_pages

    def _note_peak(self) -> None:
        used = self.total_pages - self.free_pages
        self.stats.peak_pages = max(self.stats.peak_pages, used)

    def _holder(self, request_id: str) -> _Held:
        held = self._held.get(request_id)
        if held is None:
            raise ValueError(f"request '{request_id}' holds no pages")
        return held
