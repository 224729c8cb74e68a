"""Names of requests: taken, left while a lane still works, free again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from drift_core.names import Names
from drift_scheduler.errors import DriftError


class Asked:
    """What the names had done, in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.names = Names()

    def note(self, what: str) -> Callable[[], None]:
        return lambda: self.done.append(what)

    def take(self, what: str) -> None:
        self.names.take("a", self.note(what), lambda error: self.done.append(f"{what} refused: {error}"))

    def leave(self, what: str) -> None:
        self.names.leave("a", self.note(what))


def test_a_name_is_one_requests_until_it_is_free() -> None:
    asked = Asked()
    asked.take("first")
    with pytest.raises(DriftError, match="'a' is in use"):
        asked.take("second")
    asked.names.free(["a", "never heard of"])
    asked.take("third")
    assert asked.done == ["first", "third"]


def test_who_comes_after_a_cancellation_waits_until_the_name_is_free() -> None:
    asked = Asked()
    asked.take("first")
    asked.leave("first cancelled")
    asked.leave("first cancelled again")
    asked.take("second")
    asked.leave("second cancelled")
    asked.take("third")
    assert asked.done == ["first", "first cancelled", "first cancelled again"]
    asked.names.free(["a"])
    assert asked.done[3:] == ["second", "second cancelled"]
    asked.names.free(["a"])
    assert asked.done[5:] == ["third"]
    with pytest.raises(DriftError):
        asked.take("fourth")


def test_what_cannot_come_leaves_its_name_free() -> None:
    def fault() -> None:
        raise DriftError("no such form")

    asked = Asked()
    with pytest.raises(DriftError, match="no such form"):
        asked.names.take("a", fault, lambda error: None)
    asked.take("first")
    asked.leave("first cancelled")
    asked.names.take("a", fault, lambda error: asked.done.append(str(error)))
    asked.names.free(["a"])
    asked.take("second")
    assert asked.done == ["first", "first cancelled", "no such form", "second"]


def test_a_cancellation_of_nobody_is_passed_on() -> None:
    asked = Asked()
    asked.leave("nobody cancelled")
    asked.take("first")
    assert asked.done == ["nobody cancelled", "first"]
