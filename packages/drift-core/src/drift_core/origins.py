"""Whose requests are whose, in an engine that several gateways share: ids on the way in, steps shared out again.

Inside the engine a request of gateway 2 is called "2#ID": no gateway's own ids have two '#'. Those of the gateway that
started the engine keep their names, so with one gateway nothing is renamed. A step is told to every gateway: its own
requests in full, others' as far as forecasts need them. Knows no sockets and no models.

`new`, `join`, `leave`, `enter` and `end` may be called from any thread, `share` on the engine's thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from drift_core.frames import (
    AcceptedItem,
    FinishedItem,
    OtherItem,
    Others,
    StepFrame,
    ToGateway,
    TokensItem,
    pack_ids,
)
from drift_scheduler.errors import DriftError
from drift_scheduler.tracked import Tracked

Send = Callable[[ToGateway], None]


class IdInUseError(DriftError):
    """Another gateway has a request of this id in the engine."""


class Origin:
    """One gateway. `send` takes its frames; `requests` are its live ones, by their ids in the engine."""

    __slots__ = ("fresh", "gone", "number", "prefix", "requests", "send")

    def __init__(self, number: int, send: Send) -> None:
        self.number = number
        self.send = send
        self.prefix = f"{number}#" if number else ""
        self.requests: set[str] = set()
        self.fresh = number > 0
        """Whether it is still to be told of the requests that were there before it."""
        self.gone = False

    def inside(self, request_id: str) -> str:
        """What one of its requests is called in the engine."""
        return self.prefix + request_id

    def outside(self, request_id: str) -> str:
        """And back."""
        return request_id[len(self.prefix) :]


@dataclass(slots=True)
class _Told:
    """What one step tells of one gateway's requests: to itself, and to the others."""

    accepted: list[AcceptedItem] = field(default_factory=list)
    queued: list[OtherItem] = field(default_factory=list)
    tokens: list[TokensItem] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    count: int = 0
    finished: list[FinishedItem] = field(default_factory=list)
    ended: list[FinishedItem] = field(default_factory=list)


class Origins:
    """The gateways of one engine. `first`: the one that started it."""

    def __init__(self, send: Send) -> None:
        self.first = Origin(0, send)
        self._all = [self.first]
        self._joined = 0
        self._owners: dict[str, Origin] = {}
        self._least: dict[str, int] = {}
        self._inside: dict[str, str] = {}
        self._lock = threading.Lock()
        self._grouped: tuple[list[str], list[_Group]] = ([], [])

    # ------------------------------------------------------------------------------ whoever comes and goes

    def new(self) -> Origin:
        """One more gateway, for `join` once it can be sent to. Numbers are not used again: what a gateway left behind
        is not its successor's."""
        with self._lock:
            self._joined += 1
            return Origin(self._joined, _unheard)

    def join(self, origin: Origin, greeting: ToGateway) -> bool:
        """Begin to tell it of steps, after the greeting; `False` when it has left already."""
        with self._lock:
            if not origin.gone:
                origin.send(
                    greeting
                )  # it has no requests before it is greeted, and no step before it is here
                self._all = [*self._all, origin]
            return not origin.gone

    def leave(self, origin: Origin) -> list[str]:
        """It is gone: the engine's ids of its requests, which nobody waits for any more."""
        with self._lock:
            origin.gone = True
            self._all = [other for other in self._all if other is not origin]
            return list(origin.requests)

    @property
    def news_due(self) -> bool:
        """Whether a gateway waits to hear what is there."""
        return any(origin.fresh for origin in self._all)

    def enter(self, origin: Origin, request_id: str, least_tokens: int = 0) -> bool:
        """A request comes, of at least so many tokens; `False` when the same gateway has one of this id, which the
        engine judges.

        Raises IdInUseError when another gateway has.
        """
        inside = origin.inside(request_id)
        with self._lock:
            known = self._inside.get(request_id)
            if known is not None and known != inside:
                raise IdInUseError(f"request id '{request_id}' is in flight already")
            if known is not None:
                return False
            self._inside[request_id] = inside
            self._owners[inside] = origin
            self._least[inside] = least_tokens
            origin.requests.add(inside)
        return True

    def end(self, inside: str) -> None:
        """A request ended, by its id in the engine."""
        with self._lock:
            origin = self._owners.pop(inside, None)
            self._least.pop(inside, None)
            if origin is not None:
                origin.requests.discard(inside)
                self._inside.pop(origin.outside(inside), None)

    # --------------------------------------------------------------------------------------------- a step

    def share(self, frame: StepFrame, live: Mapping[str, Tracked]) -> Iterator[tuple[Origin, StepFrame]]:
        """What each gateway is to be told of a step whose frame has the engine's ids.

        The names of what ended are free before that is told: a gateway that hears of it may use them at once.
        """
        with self._lock:
            everybody = self._all
        if len(everybody) == 1 and everybody[0] is self.first and not self._joined:
            parts = [(self.first, frame)]
        else:
            told = self._told(frame, live)
            parts = [(origin, self._frame_for(origin, frame, told, live)) for origin in everybody]
        for item in frame.finished:
            self.end(item.id)
        yield from parts

    def _told(self, frame: StepFrame, live: Mapping[str, Tracked]) -> dict[Origin, _Told]:
        """What the step says, by whose request it is about."""
        told: dict[Origin, _Told] = {}
        for accepted in frame.accepted:
            if (owner := self._owners.get(accepted.id)) is None:
                continue
            of = told.setdefault(owner, _Told())
            of.accepted.append(msgspec.structs.replace(accepted, id=owner.outside(accepted.id)))
            if (tracked := live.get(accepted.id)) is not None:
                of.queued.append(self._other(accepted.id, tracked, accepted.cached_tokens))
        for item in frame.tokens:
            for group in self._groups(item.ids):
                of = told.setdefault(group.owner, _Told())
                of.tokens.append(group.part(item))
                of.count += len(group.ids)
                if item.first:
                    of.first += group.inside
        for finished in frame.finished:
            if (owner := self._owners.get(finished.id)) is None:
                continue
            of = told.setdefault(owner, _Told())
            of.finished.append(msgspec.structs.replace(finished, id=owner.outside(finished.id)))
            of.ended.append(finished)
        return told

    def _frame_for(
        self, origin: Origin, frame: StepFrame, told: Mapping[Origin, _Told], live: Mapping[str, Tracked]
    ) -> StepFrame:
        own = told.get(origin) or _Told()
        rest = [of for owner, of in told.items() if owner is not origin]
        others = Others(
            accepted=[item for of in rest for item in of.queued],
            first=[request_id for of in rest for request_id in of.first],
            tokens=sum(of.count for of in rest),
            finished=[item for of in rest for item in of.ended],
        )
        if origin.fresh:
            origin.fresh = False
            others = msgspec.structs.replace(others, **self._there(origin, live))
        something = others.accepted or others.tokens or others.finished
        return msgspec.structs.replace(
            frame,
            accepted=own.accepted,
            tokens=own.tokens,
            finished=own.finished,
            others=others if something else None,
        )

    def _there(self, origin: Origin, live: Mapping[str, Tracked]) -> dict[str, list[OtherItem] | list[str]]:
        """What a gateway that has just come has to know of: others' requests, and which of them have a token.

        Not of those whose end was told already, and whose lane is not done yet: it would never hear of that end.
        """
        found = [
            (name, tracked)
            for name, tracked in live.items()
            if name in self._owners and name not in origin.requests
        ]
        return {
            "accepted": [self._other(name, tracked, tracked.cached) for name, tracked in found],
            "first": [name for name, tracked in found if tracked.first_token_at is not None],
        }

    def _other(self, name: str, tracked: Tracked, cached_tokens: int | None) -> OtherItem:
        request = tracked.request
        return OtherItem(
            name,
            request.prompt_tokens,
            request.max_output_tokens,
            request.priority,
            request.slo.tbt,
            request.slo.name,
            cached_tokens,
            self._least.get(name, 0),
        )

    def _groups(self, ids: list[str]) -> list[_Group]:
        """Those ids by gateway. Remembered: while nobody comes or goes, each decode step has the same."""
        known, groups = self._grouped
        if known == ids:
            return groups
        places: dict[Origin, list[int]] = {}
        for place, request_id in enumerate(ids):
            if (owner := self._owners.get(request_id)) is not None:
                places.setdefault(owner, []).append(place)
        groups = [
            _Group(owner, [ids[place] for place in found], found, whole=len(found) == len(ids))
            for owner, found in places.items()
        ]
        self._grouped = (ids, groups)
        return groups


class _Group:
    """Some of the requests of a TokensItem, all of one gateway."""

    __slots__ = ("_places", "ids", "inside", "owner")

    def __init__(self, owner: Origin, inside: list[str], places: list[int], whole: bool) -> None:
        self.owner = owner
        self.inside = inside
        self.ids = [owner.outside(request_id) for request_id in inside]
        self._places = None if whole else places

    def part(self, item: TokensItem) -> TokensItem:
        """What the item says of them."""
        tokens, logprobs = item.token_ids, None
        if self._places is not None:
            tokens = pack_ids(tokens[place] for place in self._places)
        if item.logprobs:
            pairs = zip(self.ids, self.inside, strict=True)
            logprobs = {own: item.logprobs[inside] for own, inside in pairs if inside in item.logprobs}
        return TokensItem(self.ids, tokens, item.first, logprobs or None)


def _unheard(frame: ToGateway) -> None:
    raise AssertionError("nobody can be sent to yet")
