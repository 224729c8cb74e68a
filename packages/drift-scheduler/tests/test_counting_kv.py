from __future__ import annotations

import random

import pytest

from drift_scheduler.domain import SLO, Request
from drift_scheduler.simulation.kv import CountingKv

ANY_SLO = SLO(ttft=1.0, tbt=0.1)


def request(name: str, keys=(), tokens: int = 64, key_tokens: int = 16, salt: str = "") -> Request:
    return Request(name, 0.0, tokens, 16, ANY_SLO, prefix_keys=tuple(keys), key_tokens=key_tokens, salt=salt)


def run_to_end(kv: CountingKv, r: Request, tokens: int) -> int:
    cached = kv.admit(r, tokens, tokens)
    assert cached is not None
    kv.commit(r.id, tokens)
    kv.release(r.id)
    kv.audit()
    return cached


def test_a_prefix_is_shared_as_far_as_the_leading_keys_agree():
    kv = CountingKv(100, 16)
    assert run_to_end(kv, request("a", "wxyz"), 70) == 0
    assert kv.num_cached_pages == 4
    assert kv.free_pages == 100
    assert kv.lookup(request("b", "wxqz"), 70) == 32
    assert kv.lookup(request("b", "qxyz"), 70) == 0
    assert kv.admit(request("b", "wxq"), 48, 48) == 32
    assert kv.free_pages == 97
    kv.audit()


def test_at_least_one_position_is_always_computed():
    kv = CountingKv(100, 16)
    run_to_end(kv, request("a", "wx"), 32)
    assert kv.lookup(request("b", "wx"), 32) == 16
    assert kv.lookup(request("b", "wx"), 33) == 32
    assert kv.lookup(request("b", "wx"), 1) == 0


def test_all_or_nothing():
    kv = CountingKv(4, 16)
    assert kv.admit(request("a"), 40, 40) == 0
    assert kv.free_pages == 1
    assert kv.admit(request("b"), 32, 32) is None
    assert kv.free_pages == 1
    assert kv.extend("a", 64)
    assert not kv.extend("a", 65)
    assert kv.free_pages == 0
    kv.audit()
    kv.release("a")
    assert kv.free_pages == 4


def test_admitting_never_evicts_what_it_shares():
    kv = CountingKv(4, 16)
    run_to_end(kv, request("a", "wxyz"), 64)
    # Two shared pages and two more would need all four: the shared ones must not be the ones evicted.
    assert kv.admit(request("b", "wxqr"), 64, 64) == 32
    kv.audit()
    kv.release("b")
    assert kv.admit(request("c", "wxqr"), 80, 80) is None
    assert kv.lookup(request("c", "wxqr"), 80) == 32


def test_the_least_recently_released_goes_first_and_tails_before_heads():
    kv = CountingKv(8, 16)
    run_to_end(kv, request("a", "abcd"), 64)
    run_to_end(kv, request("b", "efgh"), 64)
    run_to_end(kv, request("x"), 32)  # takes two pages: the tail of a
    assert kv.lookup(request("?", "abcd"), 65) == 32
    assert kv.lookup(request("?", "efgh"), 65) == 64
    assert kv.stats.evicted_pages == 2


def test_sharing_a_prefix_makes_it_recent():
    kv = CountingKv(4, 16)
    run_to_end(kv, request("a", "a"), 17)
    run_to_end(kv, request("b", "b"), 17)
    run_to_end(kv, request("a2", "a"), 17)
    run_to_end(kv, request("x"), 48)
    assert kv.lookup(request("?", "a"), 17) == 16
    assert kv.lookup(request("?", "b"), 17) == 0


def test_the_first_copy_is_kept():
    kv = CountingKv(10, 16)
    a, b = request("a", "wx"), request("b", "wx")
    assert kv.admit(a, 32, 33) == 0
    assert kv.admit(b, 32, 33) == 0
    kv.commit("a", 32)
    kv.commit("b", 32)
    kv.audit()
    assert kv.free_pages == 4
    kv.release("b")
    assert (kv.free_pages, kv.num_cached_pages) == (7, 0)
    kv.release("a")
    assert (kv.free_pages, kv.num_cached_pages) == (10, 2)


def test_commit_publishes_full_runs_only():
    kv = CountingKv(10, 16)
    kv.admit(request("a", "wx"), 32, 32)
    kv.commit("a", 31)
    assert kv.lookup(request("b", "wx"), 40) == 16
    kv.commit("a", 32)
    assert kv.lookup(request("b", "wx"), 40) == 32
    kv.commit("a", 8)  # known already: changes nothing
    assert kv.lookup(request("b", "wx"), 40) == 32


def test_keys_of_several_pages_are_shared_whole():
    kv = CountingKv(200, 16)
    run_to_end(kv, request("a", "wx", key_tokens=512), 1400)
    assert kv.num_cached_pages == 64
    assert kv.lookup(request("b", "wy", key_tokens=512), 1400) == 512
    assert kv.admit(request("b", "wx", key_tokens=512), 1030, 1040) == 1024
    assert kv.free_pages == 200 - 65
    kv.audit()


def test_keys_finer_than_pages_are_grouped():
    kv = CountingKv(10, 64)
    run_to_end(kv, request("a", range(8), key_tokens=16), 128)
    assert kv.num_cached_pages == 2
    assert kv.lookup(request("b", [0, 1, 2, 3, 4, 5, 6, 99], key_tokens=16), 129) == 64


def test_keys_that_fit_no_page_are_an_error():
    kv = CountingKv(10, 16)
    with pytest.raises(ValueError, match="24 tokens"):
        kv.lookup(request("a", "wx", key_tokens=24), 32)


def test_a_salt_separates_tenants():
    kv = CountingKv(10, 16)
    run_to_end(kv, request("a", "wx", salt="one"), 32)
    assert kv.lookup(request("b", "wx", salt="two"), 33) == 0
    assert kv.lookup(request("b", "wx", salt="one"), 33) == 32


def test_misuse_is_an_error():
    kv = CountingKv(10, 16)
    kv.admit(request("a"), 16, 16)
    with pytest.raises(ValueError, match="already holds"):
        kv.admit(request("a"), 16, 16)
    with pytest.raises(ValueError, match="commits 17"):
        kv.commit("a", 17)
    kv.release("a")
    for act in (kv.release, lambda i: kv.extend(i, 1), lambda i: kv.commit(i, 1)):
        with pytest.raises(ValueError, match="holds no pages"):
            act("a")
    with pytest.raises(ValueError, match="at least one page"):
        CountingKv(0, 16)


def test_stats_count_hits_evictions_and_the_peak():
    kv = CountingKv(4, 16)
    run_to_end(kv, request("a", "wx"), 40)
    run_to_end(kv, request("b", "wx"), 40)
    assert (kv.stats.query_tokens, kv.stats.hit_tokens, kv.stats.admissions) == (80, 32, 2)
    assert kv.stats.hit_ratio == 0.4
    assert kv.stats.peak_pages == 3


@pytest.mark.parametrize("seed", range(3))
def test_pages_are_conserved_with_keys_of_many_pages(seed):
    chance = random.Random(seed)
    kv = CountingKv(300, 16)
    live: dict[str, int] = {}
    for i in range(1500):
        if chance.random() < 0.5 or not live:
            keys = [tuple(chance.choice("ab") for _ in range(1))]
            for _ in range(chance.randrange(5)):
                keys.append((*keys[-1], chance.choice("ab")))
            r = request(f"r{i}", keys, key_tokens=chance.choice([16, 64]), salt=chance.choice(["", "t"]))
            known = chance.randrange(1, 400)
            before = kv.free_pages
            cached = kv.admit(r, known, known + 1)
            if cached is None:
                assert kv.free_pages == before
            else:
                assert cached < known
                live[r.id] = known + 1
        else:
            name = chance.choice(sorted(live))
            act = chance.random()
            if act < 0.4:
                kv.commit(name, chance.randrange(live[name] + 1))
            elif act < 0.6:
                more = live[name] + chance.randrange(100)
                if kv.extend(name, more):
                    live[name] = more
            else:
                del live[name]
                kv.release(name)
        kv.audit()
    for name in live:
        kv.release(name)
    kv.audit()
    assert kv.free_pages == kv.total_pages
