"""Whose turn it is among readers of streams, and what becomes of those that do not read."""

from __future__ import annotations

import asyncio
import gc
import random
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from drift_core import progress
from drift_core import submission as module
from drift_core.frames import TokenLogprob
from drift_core.progress import Block, Columns, Progress
from drift_core.submission import Submission, Turns
from drift_scheduler.errors import DriftError

Forgotten = list[tuple[str, bool]]


class World:
    """Readers whose turns are noted, with what they were let go for."""

    def __init__(self, at_once: int = 2) -> None:
        self.turns = Turns(at_once)
        self.forgotten: Forgotten = []
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def forget(self, request_id: str, cancel: bool) -> None:
        self.forgotten.append((request_id, cancel))

    async def reader(self, name: str, tbt: float = 0.1, busy: asyncio.Event | None = None) -> Submission:
        """A submission and a task that reads it; with `busy` it is busy after each turn until that is set."""
        submission = Submission(self.forget, self.turns, [name], tbt)

        async def read() -> None:
            while True:
                await submission.changed()
                self.order.append(name)
                submission.requests[0].take()
                if busy is not None:
                    await busy.wait()

        self.tasks.append(asyncio.create_task(read()))
        await asyncio.sleep(0)
        return submission


def told(submission: Submission, time: float, first: bool = False) -> None:
    progress = submission.requests[0]
    progress.token_ids.append(7)
    progress.times.append(time)
    submission.notify(first)


def run(body: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        world = World()
        try:
            await asyncio.wait_for(body(world), 30)
        finally:
            for task in world.tasks:
                task.cancel()
            await asyncio.gather(*world.tasks, return_exceptions=True)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_first_tokens_go_before_tight_targets_and_those_before_loose_ones() -> None:
    async def body(world: World) -> None:
        loose = await world.reader("loose", tbt=4.0)
        tight = await world.reader("tight", tbt=0.02)
        older = await world.reader("older", tbt=0.02)
        first = await world.reader("first", tbt=4.0)
        told(loose, 10.0)
        told(tight, 10.0)
        told(older, 9.999)
        told(first, 10.0, first=True)
        world.turns.give()
        await until(lambda: len(world.order) == 4)
        assert world.order == ["first", "older", "tight", "loose"]

    run(body)


def test_a_loose_target_is_not_put_off_for_ever() -> None:
    """A quarter of its target after its token, it goes before younger tokens of tight ones."""

    async def body(world: World) -> None:
        loose, tight = await world.reader("loose", tbt=1.0), await world.reader("tight", tbt=0.1)
        told(loose, 10.0)
        told(tight, 10.3)
        world.turns.give()
        await until(lambda: len(world.order) == 2)
        assert world.order == ["loose", "tight"]

    run(body)


def test_only_so_many_go_per_pass_and_the_rest_find_more() -> None:
    async def body(world: World) -> None:
        readers = [await world.reader(str(number)) for number in range(6)]
        for reader in readers:
            told(reader, 1.0)
        world.turns.give()
        passes = 0
        while len(world.order) < 6:
            before = len(world.order)
            await asyncio.sleep(0)
            assert len(world.order) - before <= 2
            passes += 1
        assert passes >= 3
        assert world.order == [str(number) for number in range(6)]

    run(body)


def test_news_that_comes_while_a_reader_is_busy_waits_for_its_turn() -> None:
    async def body(world: World) -> None:
        free = asyncio.Event()
        reader = await world.reader("busy", busy=free)
        told(reader, 1.0)
        world.turns.give()
        await until(lambda: world.order == ["busy"])
        told(reader, 2.0)
        told(reader, 3.0)
        assert len(reader.requests[0].token_ids) == 2
        free.set()
        await until(lambda: len(world.order) == 2)
        assert reader.requests[0].token_ids == []
        assert not world.forgotten

    run(body)


def test_a_busy_reader_that_falls_too_far_behind_is_dropped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LAG_TOKENS", 3)

    async def body(world: World) -> None:
        free = asyncio.Event()
        reader = await world.reader("slow", busy=free)
        told(reader, 1.0)
        world.turns.give()
        await until(lambda: world.order == ["slow"])
        for step in range(4):
            assert not reader.lagging
            told(reader, 2.0 + step)
        assert reader.lagging
        assert world.forgotten == [("slow", True)]
        free.set()
        await until(lambda: len(world.order) == 2)

    run(body)


def test_a_reader_that_fell_behind_waits_for_those_that_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEMOTED_LAG_TOKENS", 2)

    async def body(world: World) -> None:
        free = asyncio.Event()
        behind, prompt = await world.reader("behind", busy=free), await world.reader("prompt")
        told(behind, 1.0)
        world.turns.give()
        await until(lambda: world.order == ["behind"])
        for step in range(3):
            told(behind, 2.0 + step / 100)
        told(prompt, 2.9)
        free.set()
        await until(lambda: len(world.order) == 3)
        assert world.order == ["behind", "prompt", "behind"]

    run(body)


class ShortCut:
    """Takes a submission's tokens in its reader's turn, and says when it has room for more."""

    def __init__(self, world: World, submission: Submission, name: str) -> None:
        self.submission = submission
        self.taken: list[list[int]] = []
        self.declines = False
        self._order, self._name = world.order, name
        submission.short_cut(self._take, self._pass_on)

    def _take(self) -> list[int] | None:
        return None if self.declines else self.submission.requests[0].take()[0]

    def _pass_on(self, taken: list[int]) -> None:
        self._order.append(f"{self._name} passed on")
        self.taken.append(taken)


def test_tokens_take_the_short_cut_one_message_at_a_time() -> None:
    async def body(world: World) -> None:
        reader, beside = await world.reader("a"), await world.reader("beside")
        short = ShortCut(world, reader, "a")
        told(reader, 1.0)
        told(beside, 1.0)
        world.turns.give()
        await until(lambda: len(world.order) == 2)
        assert world.order == ["a passed on", "beside"]
        told(reader, 2.0)
        told(reader, 3.0)
        world.turns.give()
        await asyncio.sleep(0)
        assert short.taken == [[7]], "the first is still on its way"
        reader.passed_on()
        await until(lambda: len(short.taken) == 2)
        assert short.taken == [[7], [7, 7]]
        reader.passed_on()
        assert world.order == ["a passed on", "beside", "a passed on"], "the reader was never woken"

    run(body)


def test_the_reader_is_woken_for_what_the_short_cut_does_not_take() -> None:
    async def body(world: World) -> None:
        reader = await world.reader("a")
        short = ShortCut(world, reader, "a")
        told(reader, 1.0, first=True)
        world.turns.give()
        await until(lambda: world.order == ["a"])
        short.declines = True
        told(reader, 2.0)
        world.turns.give()
        await until(lambda: world.order == ["a", "a"])
        assert short.taken == []

    run(body)


def test_urgent_news_waits_for_what_is_being_passed_on() -> None:
    async def body(world: World) -> None:
        reader = await world.reader("a")
        ShortCut(world, reader, "a")
        told(reader, 1.0)
        world.turns.give()
        told(reader, 2.0)
        reader.notify(urgent=True)
        world.turns.give()
        for _ in range(5):
            await asyncio.sleep(0)
        assert world.order == ["a passed on"]
        reader.passed_on()
        await until(lambda: len(world.order) == 2)
        assert world.order == ["a passed on", "a"]

    run(body)


def test_a_failure_waits_for_what_is_being_passed_on_and_its_own_failure_is_raised() -> None:
    async def body(world: World) -> None:
        failed, broken = await world.reader("failed"), await world.reader("broken")
        for reader in (failed, broken):
            ShortCut(world, reader, "it")
            told(reader, 1.0)
        world.turns.give()
        failed.fail(DriftError("gone"))
        await asyncio.sleep(0)
        assert not world.tasks[0].done()
        failed.passed_on()
        broken.passed_on(OSError("no way"))
        with pytest.raises(DriftError, match="gone"):
            await world.tasks[0]
        with pytest.raises(OSError, match="no way"):
            await world.tasks[1]

    run(body)


def test_what_cannot_be_taken_fails_its_own_reader_and_no_other() -> None:
    async def body(world: World) -> None:
        bad, good = await world.reader("bad"), await world.reader("good")
        bad.short_cut(lambda: {}["nothing"], lambda _: None)
        told(bad, 1.0)
        told(good, 1.0)
        world.turns.give()
        await until(lambda: world.order == ["good"])
        with pytest.raises(KeyError, match="nothing"):
            await world.tasks[0]

    run(body)


def test_one_that_was_left_is_gone_without_a_look_for_garbage() -> None:
    async def body(world: World) -> None:
        submission = Submission(world.forget, world.turns, ["a"], 0.1)
        submission.short_cut(lambda: submission.requests, lambda _: submission.cancel())  # noqa: F821  # deleted below
        seen = weakref.ref(submission)
        submission.cancel()
        gc.disable()
        try:
            del submission
            assert seen() is None
        finally:
            gc.enable()

    run(body)


def test_one_that_falls_behind_on_the_short_cut_is_dropped_and_hears_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_LAG_TOKENS", 3)

    async def body(world: World) -> None:
        reader = await world.reader("slow")
        ShortCut(world, reader, "slow")
        told(reader, 1.0)
        world.turns.give()
        for step in range(4):
            assert not reader.lagging
            told(reader, 2.0 + step)
        assert reader.lagging
        assert world.forgotten == [("slow", True)]
        reader.passed_on()
        await until(lambda: len(world.order) == 2)
        assert world.order == ["slow passed on", "slow"], "its task has to say why"

    run(body)


def test_failing_wakes_a_reader_at_once_and_stays() -> None:
    async def body(world: World) -> None:
        reader = await world.reader("failed")
        reader.fail(DriftError("gone"))
        with pytest.raises(DriftError, match="gone"):
            await world.tasks[0]
        with pytest.raises(DriftError, match="gone"):
            await reader.changed()

    run(body)


def test_tokens_and_times_are_taken_once_and_all_times_are_kept() -> None:
    progress = Progress("a")
    for step in range(3):
        progress.token_ids.append(step)
        progress.times.append(step / 10)
    progress.add_logprob(TokenLogprob(-1.0))
    assert progress.take() == ([0, 1, 2], [0.0, 0.1, 0.2], [None, None, TokenLogprob(-1.0)])
    assert progress.take() == ([], [], None)
    progress.token_ids.append(3)
    progress.times.append(0.3)
    assert progress.take() == ([3], [0.3], None)
    assert list(progress.times) == [0.0, 0.1, 0.2, 0.3]


def columns_of(*requests: Progress) -> Columns:
    """Columns that find these requests."""
    return Columns({request.id: request for request in requests}.get)


def test_columns_give_each_member_its_own_tokens() -> None:
    a, b = Progress("a"), Progress("b")
    columns = columns_of(a, b)
    ids = ["a", "gone", "b"]
    a.add(1, 0.0)
    columns.add(ids, [2, 99, 3], 0.1)
    assert (a.behind, a.oldest, b.behind, b.oldest) == (2, 0.0, 1, 0.1)
    assert a.take() == ([1, 2], [0.0, 0.1], None)
    columns.add(ids, [4, 99, 5], 0.2)
    columns.add(ids.copy(), [6, 99, 7], 0.3)
    assert (a.behind, a.oldest, b.behind) == (2, 0.2, 3)
    assert a.take() == ([4, 6], [0.2, 0.3], None)
    assert a.take() == ([], [], None)
    assert (a.behind, a.oldest) == (0, None)
    b.leave()
    columns.add(ids, [8, 99, 9], 0.4)
    assert b.take() == ([3, 5, 7], [0.1, 0.2, 0.3], None)
    assert a.take() == ([8], [0.4], None)
    assert list(a.times) == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_offsets_are_taken_with_the_tokens_and_times_when_it_leaves() -> None:
    request = Progress("a")
    columns = columns_of(request)
    request.add(1, 2.0)
    assert request.take_offsets(3_000_000) == ([1], [0]), "never before the beginning"
    for step in range(3):
        columns.add(["a"], [step], 2.5 + step)
    assert request.take_offsets(3_000_000) == ([0, 1, 2], [0, 500_000, 1_500_000])
    columns.add(["a"], [3], 5.5)
    assert request.take_offsets(3_000_000) == ([3], [2_500_000])
    columns.add(["b", "a"], [9, 4], 6.5)
    columns.add(["a"], [5], 7.5)
    assert request.take_offsets(3_000_000) == ([4, 5], [3_500_000, 4_500_000])
    assert request.take_offsets(3_000_000) == ([], [])
    request.leave()
    assert list(request.times) == [2.0, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


@pytest.mark.parametrize(("rows", "shared"), [(1, 1), (3, 2), (100, 2), (100, 16)])
def test_requests_come_and_go_and_each_has_its_own_tokens_in_order(
    monkeypatch: pytest.MonkeyPatch, rows: int, shared: int
) -> None:
    """Read at odd times, by either way; each token says whose it is and of which step."""
    monkeypatch.setattr(progress, "MAX_ROWS", rows)
    monkeypatch.setattr(progress, "LATE_ROWS", 3 * rows)
    monkeypatch.setattr(progress, "SHARED_ROWS", shared)
    chance = random.Random(rows)
    requests = {str(number): Progress(str(number)) for number in range(9)}
    columns = Columns(requests.get)
    due: dict[str, list[int]] = {name: [] for name in requests}
    got: dict[str, list[int]] = {name: [] for name in requests}
    members = ["1", "2"]
    for step in range(400):
        if chance.random() < 0.4:
            members = chance.sample(sorted(requests), chance.randrange(1, 9))
        if chance.random() < 0.1:
            name = chance.choice(sorted(requests))
            requests[name].add(-step, float(step))
            due[name].append(-step)
        assert columns.add(list(members), [step * 10 + int(name) for name in members], float(step))
        for name in members:
            due[name].append(step * 10 + int(name))
        for name in chance.sample(sorted(requests), 3):
            request, waiting = requests[name], due[name][len(got[name]) :]
            assert request.behind == len(waiting)
            assert request.oldest == (
                float(abs(waiting[0]) // (10 if waiting[0] > 0 else 1)) if waiting else None
            )
            if chance.random() < 0.5:
                got[name] += request.take()[0]
            else:
                ids, offsets = request.take_offsets(0)
                assert len(ids) == len(offsets)
                got[name] += ids
            assert got[name] == due[name]
            if chance.random() < 0.1:
                assert list(request.times) == sorted(request.times)
    for name, request in requests.items():
        got[name] += request.take()[0]
        assert got[name] == due[name]
        steps = [token // 10 if token > 0 else -token for token in due[name]]
        assert list(request.times) == [float(step) for step in steps]


def test_times_that_are_all_members_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MAX_ROWS", 32)
    a, b = Progress("a"), Progress("b")
    columns = columns_of(a, b)
    a.add(0, -1.0)
    a.take()
    for step in range(80):
        columns.add(["a", "b"], [1, 2], float(step))
        if step % 7 == 0:
            a.take_offsets(0)
            b.take_offsets(0)
    kept = [[id(piece) for piece in one._pieces if len(piece) >= 32] for one in (a, b)]
    assert len(kept[0]) == 2
    assert kept[0] == kept[1]
    assert len(a.take()[0]) == 80 - 78
    assert list(a.times) == [-1.0, *map(float, range(80))]
    b.take()
    assert list(b.times) == [float(step) for step in range(80)]


def test_another_request_of_the_same_id_has_tokens_of_its_own() -> None:
    requests = {"a": Progress("a")}
    columns = Columns(requests.get)
    columns.add(["a"], [1], 0.1)
    before = requests["a"]
    before.leave()
    columns.forget("a")
    requests["a"] = Progress("a")
    columns.add(["a"], [2], 0.2)
    assert (before.take()[0], requests["a"].take()[0]) == ([1], [2])


def test_a_request_that_is_there_twice_is_none_for_columns() -> None:
    request = Progress("a")
    columns = columns_of(request)
    assert not columns.add(["a", "a"], [1, 2], 0.1)
    assert (request.behind, columns.steps) == (0, 0)


def test_columns_keep_few_rows_however_late_a_member_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MAX_ROWS", 4)
    monkeypatch.setattr(progress, "LATE_ROWS", 4)
    late, prompt = Progress("late"), Progress("prompt")
    columns = columns_of(late, prompt)
    ids = ["late", "prompt"]
    taken: list[int] = []
    rows: list[weakref.ref[Block]] = []
    for step in range(20):
        columns.add(ids, [step, -step], float(step))
        rows.append(weakref.ref(columns._latest))
        if step % 3 == 0:
            taken += prompt.take()[0]
        late.let_rows_go()
    assert rows[0]() is None, "nobody reads it any more"
    assert rows[-1]() is not None
    assert (late.behind, late.oldest) == (20, 0.0)
    assert late.take() == (list(range(20)), [float(step) for step in range(20)], None)
    assert taken == [-step for step in range(19)]


def test_log_probabilities_stay_beside_tokens_that_came_by_columns() -> None:
    progress = Progress("a")
    columns = columns_of(progress)
    columns.add(["a"], [1], 0.1)
    columns.add(["a"], [2], 0.2)
    progress.add_logprob(TokenLogprob(-2.0))
    columns.add(["a"], [3], 0.3)
    assert progress.take() == ([1, 2, 3], [0.1, 0.2, 0.3], [None, TokenLogprob(-2.0)])


class Steps:
    """A world with columns of some requests, and steps at times that are told."""

    def __init__(self, world: World, interval: float, *submissions: Submission, hold: float = 1.0) -> None:
        self.turns, self.now, self.interval = world.turns, time.monotonic(), interval
        requests = [submission.requests[0] for submission in submissions]
        self.ids = [request.id for request in requests]
        self.columns = columns_of(*requests)
        world.turns.step_is(self.now - interval)
        world.turns.step_is(self.now)
        world.turns.hold = hold

    def step(self) -> None:
        self.now += self.interval
        self.columns.add(self.ids, [7] * len(self.ids), self.now)
        self.turns.look(self.now)
        self.turns.step_is(self.now)
        self.turns.give()


def test_with_others_behind_tokens_are_kept_until_the_next_step_would_be_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A quarter of 400 s is 100 s: of steps 40 s apart the third would be too late."""
    monkeypatch.setattr(module, "LONGEST_HOLD_S", 1000.0)
    monkeypatch.setattr(module, "HOLD_EASES_S", 1e9)

    async def body(world: World) -> None:
        reader = await world.reader("a", tbt=400.0)
        steps = Steps(world, 40.0, reader)
        for expected in ([], [], ["a"], ["a"], ["a"], ["a", "a"]):
            steps.step()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert world.order == expected

    run(body)


def test_what_is_kept_goes_without_a_further_step_and_urgent_news_is_not_kept() -> None:
    async def body(world: World) -> None:
        reader, other = await world.reader("a", tbt=0.2), await world.reader("b", tbt=400.0)
        steps = Steps(world, 0.001, reader)
        steps.step()
        assert not reader.queued
        told(other, steps.now, first=True)
        world.turns.give()
        await until(lambda: len(world.order) == 2)
        assert world.order == ["b", "a"]

    run(body)


def test_of_readers_alike_who_read_first_is_read_first_and_tight_targets_go_before_loose_ones() -> None:
    async def body(world: World) -> None:
        readers = [await world.reader(f"{tbt:g}s {k}", tbt) for k in range(3) for tbt in (4.0, 0.1)]
        steps = Steps(world, 0.01, *readers, hold=0.0)
        expected = [f"{tbt}s {k}" for tbt in ("0.1", "4") for k in range(3)]
        for rounds in (1, 2, 3):
            steps.step()
            await until(lambda: len(world.order) == 6 * rounds)  # noqa: B023  # awaited in the same round
            assert world.order[-6:] == expected

    run(body)


def test_tokens_of_all_targets_are_kept_each_as_long_as_its_own_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Quarters of 200 s and 400 s are 50 s and 100 s: with steps 40 s apart one more fits in, and two."""
    monkeypatch.setattr(module, "LONGEST_HOLD_S", 1000.0)
    monkeypatch.setattr(module, "HOLD_EASES_S", 1e9)

    async def body(world: World) -> None:
        readers = [await world.reader(name, tbt) for name, tbt in (("a", 400.0), ("b", 200.0), ("c", 400.0))]
        steps = Steps(world, 40.0, *readers)
        for expected in ([], ["b"], ["b", "a", "c"], ["b", "a", "c", "b"]):
            steps.step()
            for _ in range(5):
                await asyncio.sleep(0)
            assert world.order == expected

    run(body)


def test_a_reader_that_ended_while_it_waited_is_not_looked_for() -> None:
    async def body(world: World) -> None:
        reader, other = await world.reader("ended"), await world.reader("other")
        steps = Steps(world, 0.01, reader, other, hold=0.0)
        world.tasks[0].cancel()
        await asyncio.gather(world.tasks[0], return_exceptions=True)
        assert list(world.turns.idle) == [other]
        steps.step()
        await until(lambda: world.order == ["other"])

    run(body)


def test_the_process_is_behind_when_its_queue_is_never_empty_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BEHIND_S", 0.0)
    monkeypatch.setattr(module, "HOLD_EASES_S", 0.01)

    async def body(world: World) -> None:
        readers = [await world.reader(str(number)) for number in range(6)]
        assert world.turns.hold == 0.0
        for reader in readers:
            told(reader, 1.0)
        world.turns.give()
        world.turns.step_is(time.monotonic())
        assert world.turns.hold == 1.0
        await until(lambda: len(world.order) == 6)
        while world.turns.hold:
            await asyncio.sleep(0.005)
            world.turns.step_is(time.monotonic())

    run(body)
