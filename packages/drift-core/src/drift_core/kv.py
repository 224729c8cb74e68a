"""The shared KV manager: which page belongs to whom, and which pages cache a prefix for later.

One pool serves both phases and every request. Pages are reference-counted; full pages are published under
chained hashes, so a later request with the same leading tokens (and the same tenant salt) shares them. It
knows pages and token ids, not tensors: what lies in a page is the model's business.

The rules are those of `drift_scheduler.simulation.kv.CountingKv`, with real pages:

* A page is *referenced* (some request holds it), *cached* (published, held by nobody) or *empty*.
  `free_pages` is cached plus empty.
* New pages come from the empty ones; when there are none, the least recently released cached page goes.
  Releasing a request frees its last page first, so that a prefix outlives its continuations.
* What lies behind a request's `reuse_tokens`, where it names them, goes before any other cached page.
* `commit` publishes full pages. A page whose content somebody published already stays private: page tables
  of running work never change under it, and the first copy serves everyone.
* `admit` shares the cached prefix and never evicts what it is about to share.

Hashes are BLAKE2b, keyed with a secret of the process and seeded with the tenant's salt: nobody can craft two
prompts that collide, and no tenant can learn from timing what another one cached (CVE-2025-46570).
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from drift_scheduler.domain import Request
from drift_scheduler.errors import DriftError
from drift_scheduler.simulation.kv import KvStats

DIGEST_BYTES = 16
REMEMBERED_CHAINS = 64  # waiting requests whose hashes are kept between questions


class CapacityError(DriftError):
    """The KV pool cannot hold even one request of the model's context."""


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """A KV pool that fits a memory budget: `num_pages` pages of `page_tokens` positions."""

    num_pages: int
    page_tokens: int
    bytes_per_page: int
    max_context: int

    @property
    def tokens(self) -> int:
        """Positions in the pool."""
        return self.num_pages * self.page_tokens

    @property
    def memory_bytes(self) -> int:
        """What the pages take."""
        return self.num_pages * self.bytes_per_page

    @property
    def concurrency(self) -> int:
        """Requests of the full context that fit at once."""
        return self.num_pages // -(-self.max_context // self.page_tokens)

    def describe(self) -> str:
        """The line printed at start-up."""
        noun = "request" if self.concurrency == 1 else "requests"
        return (
            f"KV pool: {self.num_pages:,} pages of {self.page_tokens} tokens = {self.tokens:,} tokens, "
            f"{_mebibytes(self.memory_bytes)}; {self.concurrency:,} {noun} of {self.max_context:,} tokens at once"
        )


def pool_pages(memory_bytes: int, bytes_per_page: int) -> int:
    """Whole pages that fit into `memory_bytes`; `bytes_per_page` counts K and V of every layer."""
    if bytes_per_page < 1:
        raise ValueError(f"bytes_per_page must be positive, not {bytes_per_page}")
    return max(0, memory_bytes) // bytes_per_page


def plan_pool(memory_bytes: int, bytes_per_page: int, page_tokens: int, max_context: int) -> PoolPlan:
    """The pool that `memory_bytes` buys. Raises CapacityError if one request of `max_context` does not fit."""
    plan = PoolPlan(pool_pages(memory_bytes, bytes_per_page), page_tokens, bytes_per_page, max_context)
    if not plan.concurrency:
        needed = -(-max_context // page_tokens) * bytes_per_page
        shorter = f", or limit the context to at most {plan.tokens} tokens" if plan.tokens else ""
        raise CapacityError(
            f"KV memory of {_mebibytes(memory_bytes)} holds {plan.tokens} tokens, less than one request of "
            f"{max_context}; give it at least {_mebibytes(needed)}{shorter}"
        )
    return plan


def _mebibytes(size: int) -> str:
    mebibytes = size / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.2f} MiB"


class _Chain:
    """The page hashes of one request's leading tokens, as far as anybody asked."""

    __slots__ = ("hashes", "request", "root")

    def __init__(self, request: Request, root: bytes) -> None:
        self.request = request
        self.root = root
        self.hashes: list[bytes] = []


class _Held:
    """What one request holds: its pages in order, the first `len(pages)` entries of `table`."""

    __slots__ = ("chain", "committed", "covered_tokens", "next_publish", "pages", "table")

    def __init__(self, chain: _Chain, shared: list[int], page_tokens: int) -> None:
        self.chain = chain
        self.pages = shared
        self.committed = len(shared)  # leading pages already dealt with
        self.covered_tokens = len(shared) * page_tokens
        self.next_publish = (len(shared) + 1) * page_tokens  # tokens at which the next page fills
        self.table: npt.NDArray[np.int32] = np.array(shared, dtype=np.int32)

    def append(self, fresh: list[int], page_tokens: int) -> None:
        start = len(self.pages)
        self.pages += fresh
        self.covered_tokens = len(self.pages) * page_tokens
        if len(self.pages) > len(self.table):
            # A new array: tables handed out before stay as they are.
            grown = np.empty(max(8, 2 * len(self.pages)), dtype=np.int32)
            grown[:start] = self.table[:start]
            self.table = grown
        if len(fresh) == 1:
            self.table[start] = fresh[0]
        else:
            self.table[start : len(self.pages)] = fresh


class PagedKv:
    """Implements `drift_scheduler.protocols.KvPool` with real pages `0 .. num_pages - 1`.

    `tokens_of(request_id)`: the ids of all tokens known of a request, prompt first, generated ones appended;
    asked only for tokens beyond `Request.prompt`. A request object's tokens may grow but never change.
    `hash_key`: the secret that keys the hashes (at most 64 bytes); drawn at random when not given.
    `put_off`: filled pages are published by `settle`, which whoever runs the work calls while there is time, or
    when they are next looked for; without it at once. (So a page stays cached whose twin, published before it was
    filled, is evicted before the next `settle`; without it such a page stays private.)

    Not thread-safe: the scheduler's thread owns it.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        tokens_of: Callable[[str], Sequence[int]],
        hash_key: bytes | None = None,
        *,
        put_off: bool = False,
    ) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(f"a pool needs at least one page of one token, not {num_pages} of {page_tokens}")
        self.page_tokens = page_tokens
        self.total_pages = num_pages
        self.stats = KvStats()
        self._tokens_of = tokens_of
        self._hash_key = os.urandom(32) if hash_key is None else hash_key
        self._empty = list(range(num_pages - 1, -1, -1))  # taken from the end
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached pages, least recently released first
        self._refs = [0] * num_pages
        self._published: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._held: dict[str, _Held] = {}
        self._puts_off = put_off
        self._unpublished: dict[str, int] = {}  # of these requests so many leading pages are filled
        self._waiting: OrderedDict[str, _Chain] = OrderedDict()

    @property
    def free_pages(self) -> int:
        """Pages no request references, those that still cache a prefix included."""
        return len(self._empty) + len(self._idle)

    @property
    def num_cached_pages(self) -> int:
        """Pages that cache a prefix and that no request references."""
        return len(self._idle)

    def lookup(self, request: Request, known_tokens: int) -> int:
        """Leading cached positions among `known_tokens`, at least one position short of all of them."""
        held = self._held.get(request.id)
        if held is not None and held.chain.request is request:
            chain = held.chain
        else:
            chain = self._waiting_chain(request)
        return len(self._match(chain, known_tokens)) * self.page_tokens

    def admit(self, request: Request, known_tokens: int, reserve_tokens: int) -> int | None:
        """Share the cached prefix and cover `reserve_tokens`; the cached positions, or `None` if pages lack."""
        if request.id in self._held:
            raise ValueError(f"request '{request.id}' already holds pages")
        chain = self._waiting_chain(request)
        shared = self._match(chain, known_tokens)
        fresh = max(0, -(-reserve_tokens // self.page_tokens) - len(shared))
        revived = sum(not self._refs[page] for page in shared)
        if fresh + revived > self.free_pages:
            return None
        for page in shared:
            if not self._refs[page]:
                del self._idle[page]
            self._refs[page] += 1
        cached = len(shared) * self.page_tokens
        held = _Held(chain, shared, self.page_tokens)
        held.append(self._take(fresh), self.page_tokens)
        self._held[request.id] = held
        del self._waiting[request.id]
        self.stats.admissions += 1
        self.stats.query_tokens += known_tokens
        self.stats.hit_tokens += cached
        return cached

    def extend(self, request_id: str, tokens: int) -> bool:
        """Cover `tokens` positions in all; `False` with nothing changed when pages run out."""
        held = self._held.get(request_id) or self._holder(request_id)
        if tokens <= held.covered_tokens:
            return True
        fresh = -(-tokens // self.page_tokens) - len(held.pages)
        if fresh > len(self._empty) + len(self._idle):
            return False
        held.append(self._take(fresh), self.page_tokens)
        return True

    def commit(self, request_id: str, tokens: int) -> None:
        """Positions `[0, tokens)` hold computed KV: publish the pages they fill."""
        held = self._held.get(request_id) or self._holder(request_id)
        if tokens > held.covered_tokens:
            raise ValueError(f"request '{request_id}' commits {tokens} tokens, covers {held.covered_tokens}")
        if tokens < held.next_publish:
            return
        stop = tokens // self.page_tokens
        held.next_publish = (stop + 1) * self.page_tokens
        if self._puts_off:
            self._unpublished[request_id] = stop
        else:
            self._publish(held, stop)

    def grow(self, request_ids: Sequence[str], tokens: Sequence[int]) -> int:
        """`commit` all positions of each request but the last of `tokens`, `extend` it to all of them, in order.

        Stops where pages run out; how many it were. Raises ValueError where more than one position is new.
        """
        page_tokens, refs, empty, helds = self.page_tokens, self._refs, self._empty, self._held
        put_off = self._unpublished if self._puts_off else None
        done = 0
        for request_id, wanted in zip(
            request_ids, tokens, strict=True
        ):  # some of them in every step: no calls here
            held = helds.get(request_id) or self._holder(request_id)
            covered = held.covered_tokens
            if wanted > covered + 1:
                raise ValueError(f"request '{request_id}' grows to {wanted}, covers {covered}")
            if wanted > held.next_publish:
                if put_off is None:
                    self.commit(request_id, wanted - 1)
                else:
                    put_off[request_id] = stop = (wanted - 1) // page_tokens
                    held.next_publish = (stop + 1) * page_tokens
            if wanted > covered:
                if empty:
                    page = empty.pop()
                elif self._idle:
                    page = self._evict()
                else:
                    break
                refs[page] = 1
                pages = held.pages
                index = len(pages)
                if index < len(held.table):
                    pages.append(page)
                    held.table[index] = page
                    held.covered_tokens = covered + page_tokens
                else:
                    held.append([page], page_tokens)
            done += 1
        self._note_peak()
        return done

    def settle(self, pages: int | None = None) -> int:
        """Publish what was put off, in order, at most so many `pages` of it; how many it were."""
        published = 0
        while self._unpublished and published != pages:
            request_id, stop = next(iter(self._unpublished.items()))
            held = self._held[request_id]
            last = stop if pages is None else min(stop, held.committed + pages - published)
            published += last - held.committed
            self._publish(held, last)
            if last == stop:
                del self._unpublished[request_id]
        return published

    def _publish(self, held: _Held, stop: int) -> None:
        """Publish the first `stop` pages, as far as that is still to be done."""
        self._hash_up_to(held.chain, stop)
        for index in range(held.committed, stop):
            digest, page = held.chain.hashes[index], held.pages[index]
            if digest not in self._published:
                self._published[digest] = page
                self._hash_of[page] = digest
        held.committed = stop

    def release(self, request_id: str) -> None:
        """Drop every reference of the request; published pages stay cached until evicted."""
        held = self._holder(request_id)
        self.settle()
        del self._held[request_id]
        refs, hash_of, empty, idle = self._refs, self._hash_of, self._empty, self._idle
        for page in reversed(held.pages):  # `idle.update` takes four times as long
            left = refs[page] = refs[page] - 1
            if left:
                continue
            if hash_of[page] is None:
                empty.append(page)
            else:
                idle[page] = None
        if held.chain.request.reuse_tokens is not None:
            self._give_up_first(held.pages[held.chain.request.reuse_tokens // self.page_tokens :])

    def withdraw(self, request_id: str, known_tokens: int) -> None:
        """Release a request that was just admitted with so many tokens: it was not an admission after all."""
        held = self._holder(request_id)
        self.stats.admissions -= 1
        self.stats.query_tokens -= known_tokens
        self.stats.hit_tokens -= held.committed * self.page_tokens
        self.release(request_id)

    def _give_up_first(self, pages: list[int]) -> None:
        """Evict these before all others, the last of them first; those that somebody uses stay as they are."""
        for page in pages:
            if page in self._idle:
                self._idle.move_to_end(page, last=False)

    def flush(self) -> int:
        """Forget every cached prefix that no request uses; how many pages those were."""
        self.settle()
        for page in self._idle:
            digest = self._hash_of[page]
            assert digest is not None, f"page {page} is idle and caches nothing"
            del self._published[digest]
            self._hash_of[page] = None
            self._empty.append(page)
        pages = len(self._idle)
        self._idle.clear()
        return pages

    def page_table(self, request_id: str) -> npt.NDArray[np.int32]:
        """The request's pages in order; a read-only view that later calls on the pool leave as it is."""
        held = self._holder(request_id)
        table = held.table[: len(held.pages)]
        table.flags.writeable = False
        return table

    def page_at(self, request_id: str, index: int) -> int:
        """One entry of the request's page table."""
        return (self._held.get(request_id) or self._holder(request_id)).pages[index]

    def audit(self) -> None:
        """Assert that pages are conserved and each is in exactly one place; for tests."""
        references = [0] * self.total_pages
        for held in self._held.values():
            assert held.pages == held.table[: len(held.pages)].tolist(), "page table out of step"
            assert len(set(held.pages)) == len(held.pages), "a page twice in one request"
            for page in held.pages:
                references[page] += 1
        assert references == self._refs, "reference counts wrong"
        empty = set(self._empty)
        referenced = {page for page, count in enumerate(references) if count}
        assert len(empty) == len(self._empty), "a page is empty twice"
        assert not empty & referenced, "a page is empty and referenced"
        assert not self._idle.keys() & (empty | referenced), "an idle page is elsewhere too"
        assert len(empty) + len(self._idle) + len(referenced) == self.total_pages, "pages lost or made up"
        hashed = {digest: page for page, digest in enumerate(self._hash_of) if digest is not None}
        assert hashed == self._published, "published pages out of step with their hashes"
        assert all(self._hash_of[page] is not None for page in self._idle), "an idle page caches nothing"
        assert all(self._hash_of[page] is None for page in empty), "an empty page is published"

    def _waiting_chain(self, request: Request) -> _Chain:
        """The hashes of a request that holds no pages; remembered for the most recent askers.

        Tied to the request object, not to its id alone: an id that comes back names other tokens.
        """
        chain = self._waiting.get(request.id)
        if chain is None or chain.request is not request:
            salt = request.salt.encode()
            chain = _Chain(request, blake2b(salt, digest_size=DIGEST_BYTES, key=self._hash_key).digest())
            self._waiting[request.id] = chain
            if len(self._waiting) > REMEMBERED_CHAINS:
                self._waiting.popitem(last=False)
        self._waiting.move_to_end(request.id)
        return chain

    def _match(self, chain: _Chain, known_tokens: int) -> list[int]:
        """Published pages of the leading tokens that lie within `known_tokens - 1` positions."""
        self.settle()
        limit = (known_tokens - 1) // self.page_tokens
        published, hashes = self._published, chain.hashes
        matched: list[int] = []
        for index in range(limit):
            if index == len(hashes):  # twice as far each time: whoever matches so much will need the rest
                self._hash_up_to(chain, min(limit, 2 * index + 1))
            page = published.get(hashes[index])
            if page is None:
                break
            matched.append(page)
        return matched

    def _hash_up_to(self, chain: _Chain, pages: int) -> None:
        """Make the hashes of the first `pages` pages known: each of its parent's hash and its own tokens."""
        hashes = chain.hashes
        if len(hashes) >= pages:
            return
        first, stop = len(hashes) * self.page_tokens, pages * self.page_tokens
        unhashed = array("i", self._tokens(chain.request, stop)[first:stop])
        content, size, key = unhashed.tobytes(), unhashed.itemsize * self.page_tokens, self._hash_key
        digest = hashes[-1] if hashes else chain.root
        for start in range(0, len(content), size):
            page = content[start : start + size]
            digest = blake2b(digest + page, digest_size=DIGEST_BYTES, key=key).digest()
            hashes.append(digest)

    def _tokens(self, request: Request, count: int) -> Sequence[int]:
        """At least the first `count` token ids of the request."""
        if request.prompt is not None and count <= len(request.prompt):
            return request.prompt
        tokens = self._tokens_of(request.id)
        if len(tokens) < count:
            raise ValueError(f"request '{request.id}' has {len(tokens)} known tokens, not {count}")
        return tokens

    def _take(self, count: int) -> list[int]:
        """Reference `count` fresh pages; the caller has seen that they are there."""
        refs, empty = self._refs, self._empty
        if count == 1 and empty:
            taken = [empty.pop()]
        else:
            at_once = min(count, len(empty))
            taken = empty[: -at_once - 1 : -1]
            del empty[len(empty) - at_once :]
            taken += [self._evict() for _ in range(count - at_once)]
        for page in taken:
            refs[page] = 1
        self._note_peak()
        return taken

    def _note_peak(self) -> None:
        used = self.total_pages - len(self._empty) - len(self._idle)
        self.stats.peak_pages = max(self.stats.peak_pages, used)

    def _evict(self) -> int:
        """The cached page that was released first; it caches nothing any more."""
        page, _ = self._idle.popitem(last=False)
        digest = self._hash_of[page]
        assert digest is not None
        del self._published[digest]
        self._hash_of[page] = None
        self.stats.evicted_pages += 1
        return page

    def _holder(self, request_id: str) -> _Held:
        held = self._held.get(request_id)
        if held is None:
            raise ValueError(f"request '{request_id}' holds no pages")
        return held
