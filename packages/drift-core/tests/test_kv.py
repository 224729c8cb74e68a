from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_core.kv import CapacityError, PagedKv, plan_pool, pool_pages
from drift_scheduler.domain import SLO, Request

ANY_SLO = SLO(ttft=1.0, tbt=0.1)
PAGE = 4


class Pool:
    """A PagedKv with the tokens of its requests."""

    def __init__(self, pages: int = 16, page_tokens: int = PAGE) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.kv = PagedKv(pages, page_tokens, self.tokens.__getitem__)

    def request(self, name: str, tokens: list[int], salt: str = "") -> Request:
        self.tokens[name] = list(tokens)
        return Request(name, 0.0, len(tokens), 8, ANY_SLO, prompt=tuple(tokens), salt=salt)

    def run_to_end(self, name: str, tokens: list[int], salt: str = "") -> int | None:
        cached = self.kv.admit(self.request(name, tokens, salt), len(tokens), len(tokens))
        self.kv.commit(name, len(tokens))
        self.kv.release(name)
        self.kv.audit()
        return cached


def test_tables_list_the_pages_in_order_and_sharing_reuses_them():
    pool = Pool()
    a = pool.request("a", list(range(10)))
    assert pool.kv.admit(a, 10, 11) == 0
    table = pool.kv.page_table("a")
    assert table.dtype == np.int32
    assert len(set(table.tolist())) == len(table) == 3
    pool.kv.commit("a", 10)
    b = pool.request("b", [*range(8), 99, 98])
    assert pool.kv.lookup(b, 10) == 8
    assert pool.kv.admit(b, 10, 10) == 8
    other = pool.kv.page_table("b")
    assert other[:2].tolist() == table[:2].tolist()
    assert other[2] != table[2]
    pool.kv.audit()


def test_publishing_can_be_put_off_until_there_is_time():
    pool = Pool()
    pool.kv = kv = PagedKv(16, PAGE, pool.tokens.__getitem__, put_off=True)
    kv.admit(pool.request("a", list(range(20))), 20, 20)
    kv.commit("a", 20)
    assert not kv._published
    assert kv.settle(2) == 2
    assert len(kv._published) == 2
    kv.audit()
    assert kv.lookup(pool.request("b", [*range(16), 99]), 17) == 16  # whoever asks finds everything
    assert kv.settle() == 0
    kv.extend("a", 24)
    pool.tokens["a"] += [20, 21, 22, 23]
    kv.commit("a", 24)
    kv.release("a")
    assert kv.num_cached_pages == 6
    kv.audit()


def test_growing_many_is_committing_and_extending_each():
    alone, together = Pool(10), Pool(10)
    for pool in (alone, together):
        for name, first in (("a", 0), ("b", 100), ("c", 200)):
            tokens = list(range(first, first + 8))
            assert pool.kv.admit(pool.request(name, tokens), 8, 8) == 0
    alone.kv._hash_key = together.kv._hash_key
    for pool in (alone, together):
        for tokens in pool.tokens.values():
            tokens.append(7)
    assert together.kv.grow(["a", "b", "c"], [9, 8, 9]) == 3
    for name, tokens in (("a", 9), ("b", 8), ("c", 9)):
        alone.kv.commit(name, tokens - 1)
        assert alone.kv.extend(name, tokens)
    for pool in (alone, together):
        pool.kv.extend("a", 16)
    assert together.kv.grow(["b", "c"], [9, 10]) == 2
    alone.kv.commit("b", 8)
    assert alone.kv.extend("b", 9)
    assert [alone.kv.page_table(i).tolist() for i in "abc"] == [
        together.kv.page_table(i).tolist() for i in "abc"
    ]
    assert alone.kv.stats == together.kv.stats
    assert len(alone.kv._published) == len(together.kv._published)
    assert together.kv.free_pages == 0
    together.tokens["a"] += [7] * 8
    assert together.kv.grow(["a", "b"], [17, 13]) == 0
    with pytest.raises(ValueError, match="grows to 30"):
        together.kv.grow(["a"], [30])
    together.kv.audit()


def test_prefixes_put_off_are_found_by_whoever_looks():
    pool = Pool(64)
    pool.kv = kv = PagedKv(64, PAGE, pool.tokens.__getitem__, put_off=True)
    system = list(range(8))
    for name, rest in (("a", [50, 51, 52, 53, 54]), ("b", [60, 61, 62, 63, 64]), ("z", [1, 2, 3, 4, 5])):
        tokens = rest + system if name == "z" else system + rest
        kv.admit(pool.request(name, tokens), 13, 13)
        kv.commit(name, 13)
    assert set(kv._unpublished) == {"z"}  # admitting looks, too
    assert kv.lookup(pool.request("c", [*system, 60, 61, 62, 63, 9]), 13) == 12
    kv.release("z")
    assert not kv._unpublished
    assert kv.lookup(pool.request("y", [1, 2, 3, 4, 5, 0, 1, 2, 9]), 9) == 8
    kv.audit()


def test_a_table_once_handed_out_never_changes():
    pool = Pool(64)
    pool.kv.admit(pool.request("a", [1, 2, 3]), 3, 3)
    before = pool.kv.page_table("a")
    copy = before.tolist()
    for tokens in range(4, 120):
        assert pool.kv.extend("a", tokens)
    assert before.tolist() == copy
    assert pool.kv.page_table("a")[:1].tolist() == copy
    assert len(pool.kv.page_table("a")) == 30
    with pytest.raises(ValueError, match="read-only"):
        before[0] = 5


def test_generated_tokens_are_published_too():
    pool = Pool()
    pool.kv.admit(pool.request("a", [1, 2, 3]), 3, 4)
    pool.tokens["a"] += [4, 5, 6, 7, 8]
    assert pool.kv.extend("a", 8)
    pool.kv.commit("a", 7)
    assert pool.kv.lookup(pool.request("b", [1, 2, 3, 4, 5, 6, 7, 8, 9]), 9) == 4
    pool.kv.commit("a", 8)
    assert pool.kv.lookup(pool.request("c", [1, 2, 3, 4, 5, 6, 7, 8, 9]), 9) == 8


def test_a_preempted_request_finds_its_own_pages_again():
    pool = Pool()
    a = pool.request("a", [1, 2, 3])
    pool.kv.admit(a, 3, 8)
    pool.tokens["a"] += [4, 5, 6]
    pool.kv.commit("a", 5)
    pool.kv.release("a")
    assert pool.kv.admit(a, 6, 6) == 4
    pool.kv.audit()


def test_an_id_that_comes_back_with_other_tokens_shares_nothing():
    pool = Pool()
    pool.run_to_end("keep", [1] * 8)
    old = pool.request("a", [1] * 9)
    assert pool.kv.lookup(old, 9) == 8
    new = pool.request("a", [2] * 9)
    assert pool.kv.lookup(new, 9) == 0
    assert pool.kv.admit(new, 9, 9) == 0


def test_a_page_depends_on_everything_before_it_and_on_the_salt():
    pool = Pool()
    pool.run_to_end("a", [1] * 4 + [2] * 4, salt="tenant")
    assert pool.kv.lookup(pool.request("b", [3] * 4 + [2] * 4 + [0], salt="tenant"), 9) == 0
    assert pool.kv.lookup(pool.request("c", [1] * 4 + [2] * 4 + [0]), 9) == 0
    assert pool.kv.lookup(pool.request("d", [1] * 4 + [2] * 4 + [0], salt="tenant"), 9) == 8


def test_two_pools_hash_differently():
    one, two = Pool(), Pool()
    one.run_to_end("a", [1] * 4)
    two.run_to_end("a", [1] * 4)
    assert not one.kv._published.keys() & two.kv._published.keys()


def test_eviction_takes_the_oldest_tail_and_what_remains_is_intact():
    pool = Pool(6)
    pool.run_to_end("a", list(range(12)))
    pool.run_to_end("b", list(range(50, 62)))
    pool.run_to_end("x", [9, 9, 9, 9, 9])
    assert pool.kv.stats.evicted_pages == 2
    assert pool.kv.lookup(pool.request("?", list(range(13))), 13) == 4
    assert pool.kv.lookup(pool.request("!", list(range(50, 63))), 13) == 12


def test_duplicates_keep_the_first_copy_and_their_own_tables():
    pool = Pool()
    a, b = pool.request("a", [1] * 9), pool.request("b", [1] * 9)
    pool.kv.admit(a, 9, 9)
    pool.kv.admit(b, 9, 9)
    mine = pool.kv.page_table("b").tolist()
    pool.kv.commit("a", 9)
    pool.kv.commit("b", 9)
    pool.kv.audit()
    assert pool.kv.page_table("b").tolist() == mine
    pool.kv.release("b")
    assert pool.kv.num_cached_pages == 0
    pool.kv.release("a")
    assert pool.kv.num_cached_pages == 2


def test_misuse_is_an_error():
    pool = Pool()
    a = pool.request("a", [1, 2])
    pool.kv.admit(a, 2, 2)
    with pytest.raises(ValueError, match="already holds"):
        pool.kv.admit(a, 2, 2)
    with pytest.raises(ValueError, match="commits 5"):
        pool.kv.commit("a", 5)
    with pytest.raises(ValueError, match="2 known tokens, not 4"):
        pool.kv.commit("a", 4)
    pool.kv.release("a")
    for act in (
        pool.kv.release,
        pool.kv.page_table,
        lambda i: pool.kv.extend(i, 1),
        lambda i: pool.kv.commit(i, 1),
    ):
        with pytest.raises(ValueError, match="holds no pages"):
            act("a")


def test_questions_change_nothing():
    pool = Pool(4)
    pool.run_to_end("a", list(range(8)))
    pool.run_to_end("b", list(range(20, 28)))
    for i in range(200):
        pool.kv.lookup(pool.request(f"q{i}", list(range(9))), 9)
    assert len(pool.kv._waiting) <= 64
    pool.run_to_end("x", [7] * 5)  # evicts a, the least recently released, however often it was asked about
    assert pool.kv.lookup(pool.request("?", list(range(9))), 9) == 0
    assert pool.kv.lookup(pool.request("!", list(range(20, 29))), 9) == 8


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["admit", "extend", "commit", "release"]), st.integers(0, 1_000_000), TOKENS),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(operations=OPERATIONS, pages=st.integers(1, 24))
def test_pages_are_conserved_under_any_order_of_operations(operations, pages):
    pool = Pool(pages)
    live: dict[str, int] = {}
    for index, (kind, number, tokens) in enumerate(operations):
        before = pool.kv.free_pages
        if kind == "admit":
            known, reserve = len(tokens), len(tokens) + number % 3
            r = pool.request(f"r{index}", tokens + [number % 2] * 64, salt="ab"[number % 2])
            expected = pool.kv.lookup(r, known)
            cached = pool.kv.admit(r, known, reserve)
            if cached is None:
                assert pool.kv.free_pages == before
            else:
                assert cached == expected < known
                live[r.id] = reserve
        elif live:
            name = sorted(live)[number % len(live)]
            if kind == "extend":
                more = live[name] + number % 9
                if pool.kv.extend(name, more):
                    live[name] = more
                else:
                    assert pool.kv.free_pages == before
            elif kind == "commit":
                pool.kv.commit(name, number % (live[name] + 1))
            else:
                del live[name]
                pool.kv.release(name)
        pool.kv.audit()
    for name in live:
        pool.kv.release(name)
    pool.kv.audit()
    assert pool.kv.free_pages == pages


def test_shared_pages_hold_equal_tokens():
    """Simulate the cache's content: what a request reads through shared pages is what it would have written."""
    chance = random.Random(5)
    pool = Pool(40)
    content: dict[int, tuple[int, ...]] = {}
    live: dict[str, int] = {}
    for i in range(3000):
        if len(live) < 6 and chance.random() < 0.7:
            tokens = [chance.randrange(2) for _ in range(chance.randrange(1, 30))]
            r = pool.request(f"r{i}", tokens)
            cached = pool.kv.admit(r, len(tokens), len(tokens))
            if cached is None:
                continue
            table = pool.kv.page_table(r.id).tolist()
            for page, start in zip(table, range(0, len(tokens), PAGE), strict=True):
                expected = tuple(tokens[: start + PAGE])  # KV depends on everything before
                if start < cached:
                    assert content[page] == expected
                else:
                    content[page] = expected
            live[r.id] = len(tokens)
        elif live:
            name = chance.choice(sorted(live))
            pool.kv.commit(name, live.pop(name))
            pool.kv.release(name)


def test_the_pool_is_sized_from_memory_and_described():
    assert pool_pages(1000, 300) == 3
    plan = plan_pool(512 * 2**20, 2**15, 16, 2048)
    assert plan.num_pages == 16384
    assert plan.describe() == (
        "KV pool: 16,384 pages of 16 tokens = 262,144 tokens, 512 MiB; 128 requests of 2,048 tokens at once"
    )


def test_a_pool_too_small_for_one_request_is_an_error_with_choices():
    with pytest.raises(CapacityError, match="at least 256 MiB, or limit the context to at most 16384 tokens"):
        plan_pool(2**25, 2**15, 16, 131072)
    with pytest.raises(
        CapacityError, match="holds 0 tokens, less than one request of 2048; give it at least 4"
    ):
        plan_pool(100, 2**15, 16, 2048)


def test_flushing_forgets_cached_pages_and_leaves_those_in_use():
    pool = Pool()
    pool.run_to_end("gone", list(range(100, 112)))
    used = pool.request("used", list(range(12)))
    assert pool.kv.admit(used, 12, 13) == 0
    pool.kv.commit("used", 12)
    assert pool.kv.num_cached_pages == 3
    assert pool.kv.flush() == 3
    pool.kv.audit()
    assert (pool.kv.num_cached_pages, pool.kv.flush()) == (0, 0)
    assert pool.kv.lookup(pool.request("again", list(range(100, 112))), 12) == 0
    assert pool.kv.lookup(pool.request("like", list(range(12))), 12) == 8, "still shared by who uses it"
    pool.kv.release("used")
    assert pool.kv.num_cached_pages == 3
    pool.kv.audit()


def test_what_lies_behind_the_reuse_hint_is_evicted_first():
    pool = Pool(12)
    plain, hinted = list(range(8)), list(range(100, 108))
    pool.run_to_end("plain", plain)
    request = replace(pool.request("hinted", hinted), reuse_tokens=6)  # one page of four lies within it
    pool.kv.admit(request, 8, 8)
    pool.kv.commit("hinted", 8)
    pool.kv.release("hinted")
    pool.kv.audit()
    pool.kv.admit(pool.request("filler", list(range(200, 234))), 34, 36)  # nine pages: one must go
    again = [pool.request(name, [*tokens, 1]) for name, tokens in (("p", plain), ("h", hinted))]
    assert [pool.kv.lookup(one, 9) for one in again] == [8, 4], (
        "the one behind the hint, though it is the fresher"
    )
    pool.kv.audit()


def test_with_a_hint_of_nothing_all_goes_first_and_a_shared_page_stays():
    pool = Pool(12)
    prompt = list(range(8))
    pool.run_to_end("old", list(range(50, 58)))
    pool.kv.admit(pool.request("holder", [*prompt, 9]), 9, 9)
    pool.kv.commit("holder", 8)
    request = replace(pool.request("hinted", [*prompt, 7, 6, 5, 4]), reuse_tokens=0)
    assert pool.kv.admit(request, 12, 12) == 8
    pool.kv.commit("hinted", 12)
    pool.kv.release("hinted")
    pool.kv.audit()
    pool.kv.admit(pool.request("filler", list(range(200, 226))), 26, 28)
    assert pool.kv.lookup(pool.request("o", [*range(50, 58), 1]), 9) == 8
    assert pool.kv.lookup(pool.request("h", [*prompt, 7, 6, 5, 4, 1]), 13) == 8, (
        "its own page went, not the holder's"
    )
    pool.kv.audit()
