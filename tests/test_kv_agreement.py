"""The counting KV of simulations and the real one answer alike: the same calls, the same answers."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_core.kv import PagedKv
from drift_scheduler.domain import SLO, Request
from drift_scheduler.simulation.kv import CountingKv

ANY_SLO = SLO(ttft=1.0, tbt=0.1)


@dataclass
class Live:
    request: Request
    known: int  # tokens whose ids exist so far
    covered: int
    computed: int


class Both:
    """Drives the two pools in step and compares every answer."""

    def __init__(self, pages: int, page_tokens: int, put_off: bool = False) -> None:
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.paged = PagedKv(pages, page_tokens, self.tokens.__getitem__, put_off=put_off)
        self.counting = CountingKv(pages, page_tokens)
        self.page_tokens = page_tokens
        self.live: dict[str, Live] = {}
        self.preempted: list[tuple[Request, int]] = []

    def request(self, name: str, prompt: list[int], output: list[int], salt: str = "") -> Request:
        everything = tuple(prompt + output)
        self.tokens[name] = everything
        size = self.page_tokens
        keys = tuple(everything[:stop] for stop in range(size, len(everything) + 1, size))
        return Request(
            name, 0.0, len(prompt), max(1, len(output)), ANY_SLO,
            prompt=tuple(prompt), salt=salt, prefix_keys=keys, key_tokens=size,
        )  # fmt: skip

    def same(self, call: str, *args: object, most_pages: int = 0) -> object:
        """Make a call that takes `most_pages` at most."""
        if most_pages > self.paged.free_pages - self.paged.num_cached_pages:
            self.paged.settle()  # what is put off is not compared with what was evicted meanwhile
        real = getattr(self.paged, call)(*args)
        counted = getattr(self.counting, call)(*args)
        assert real == counted, f"{call}{args}: {real} of the real pool, {counted} of the counting one"
        assert self.paged.free_pages == self.counting.free_pages
        assert self.paged.num_cached_pages == self.counting.num_cached_pages
        assert self.paged.stats == self.counting.stats
        return real

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def admit(self, request: Request, known: int, reserve: int) -> bool:
        cached = self.same("admit", request, known, reserve, most_pages=self.pages(reserve))
        if cached is None:
            return False
        assert isinstance(cached, int)
        self.live[request.id] = Live(request, known, max(reserve, cached), cached)
        return True

    def extend(self, name: str, tokens: int) -> None:
        if self.same("extend", name, tokens, most_pages=self.pages(tokens)):
            self.live[name].covered = max(self.live[name].covered, tokens)

    def commit(self, name: str, tokens: int) -> None:
        live = self.live[name]
        tokens = min(tokens, live.covered, len(self.tokens[name]))
        self.same("commit", name, tokens)
        live.known, live.computed = max(live.known, tokens), max(live.computed, tokens)

    def release(self, name: str) -> None:
        self.same("release", name)
        live = self.live.pop(name)
        self.preempted.append((live.request, live.known))

    def grow_all(self) -> None:
        """One position more for everyone who decodes, as far as pages go, then the token that it is for."""
        decoding = [
            (name, live)
            for name, live in self.live.items()
            if live.computed == live.known < len(self.tokens[name])
        ]
        names, tokens = [name for name, _ in decoding], [live.known + 1 for _, live in decoding]
        done = self.same("grow", names, tokens, most_pages=len(names))
        assert isinstance(done, int)
        for name, live in decoding[:done]:
            live.covered = max(live.covered, live.known + 1)
            self.commit(name, live.known + 1)

    def audit(self) -> None:
        self.paged.audit()
        self.counting.audit()
        assert self.paged.free_pages == self.counting.free_pages


TOKENS = st.lists(st.integers(0, 1), max_size=20)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "readmit", "lookup", "extend", "commit", "release"]),
        st.integers(0, 10_000), TOKENS, TOKENS,
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    operations=OPERATIONS, pages=st.integers(1, 20), page_tokens=st.sampled_from([1, 3, 4]),
    put_off=st.booleans(),
)  # fmt: skip
def test_any_sequence_of_calls_gets_the_same_answers(operations, pages, page_tokens, put_off):
    both = Both(pages, page_tokens, put_off)
    for index, (kind, number, prompt, output) in enumerate(operations):
        if kind in ("admit", "lookup"):
            request = both.request(f"r{index}", [number % 2, *prompt], output, salt="xy"[number % 5 == 0])
            if kind == "lookup":
                both.same("lookup", request, 1 + number % (len(prompt) + 1))
            else:
                both.admit(request, len(prompt) + 1, len(prompt) + 1 + number % 4)
        elif kind == "readmit" and both.preempted:
            request, known = both.preempted.pop(number % len(both.preempted))
            both.same("lookup", request, known)
            both.admit(request, known, known)
        elif both.live:
            name = sorted(both.live)[number % len(both.live)]
            if kind == "extend":
                both.extend(name, number % 40)
            elif kind == "commit":
                both.commit(name, number % 40)
            elif kind == "release":
                both.release(name)
        if number % 3 == 0:
            both.paged.settle(number % 2 + 1)
        both.audit()
    for name in list(both.live):
        both.release(name)
    assert both.paged.free_pages == pages


@pytest.mark.parametrize("put_off", [False, True])
@pytest.mark.parametrize(
    ("seed", "pages", "page_tokens"), [(1, 40, 4), (2, 200, 16), (3, 60, 16), (4, 12, 2), (5, 500, 8)]
)
def test_long_runs_of_served_requests_get_the_same_answers(seed, pages, page_tokens, put_off):
    """What a scheduler does: admit, prefill in chunks, decode token by token, preempt, cancel, come back."""
    chance = random.Random(seed)
    both = Both(pages, page_tokens, put_off)
    stems = [[chance.randrange(50) for _ in range(page_tokens * 6)] for _ in range(6)]
    waiting: list[tuple[Request, int]] = []
    for step in range(2500):
        if len(waiting) < 5:
            stem = chance.choice(stems)[: chance.randrange(page_tokens * 6)]
            prompt = stem + [chance.randrange(50) for _ in range(chance.randrange(1, page_tokens * 3))]
            output = [chance.randrange(3) for _ in range(chance.randrange(1, page_tokens * 3))]
            request = both.request(f"r{step}", prompt, output, salt=chance.choice(["", "", "tenant"]))
            waiting.append((request, len(prompt)))
        for request, known in waiting:
            both.same("lookup", request, known)
        if waiting and chance.random() < 0.6:
            request, known = waiting[0]
            if both.admit(request, known, known):
                waiting.pop(0)
        for name, live in list(both.live.items()):
            if live.computed < live.known:
                both.commit(name, min(live.known, live.computed + chance.randrange(1, 3 * page_tokens)))
            elif live.known == len(both.tokens[name]) or chance.random() < 0.02:
                both.release(name)
                both.preempted.clear()
            elif both.same("extend", name, live.known + 1):
                live.covered = max(live.covered, live.known + 1)
                both.commit(name, live.known + 1)
            else:
                both.release(max(both.live, key=lambda n: int(n[1:])))
                waiting.insert(0, both.preempted.pop())
                break
        if step % 3 == 0:
            both.grow_all()
        if step % 50 == 0:
            both.audit()
    both.audit()
    assert both.paged.stats.hit_tokens > 0
    assert both.paged.stats.evicted_pages > 0


def test_misuse_is_refused_by_both():
    both = Both(4, 4)
    request = both.request("a", [1, 2, 3], [])
    both.admit(request, 3, 3)
    for pool in (both.paged, both.counting):
        with pytest.raises(ValueError, match="already holds"):
            pool.admit(replace(request, priority=1), 3, 3)
        pool.release("a")
        with pytest.raises(ValueError, match="holds no pages"):
            pool.release("a")
