"""The life of a request as one transition table.

```
            ADMIT            PREFILLED           END
 WAITING ─────────► PREFILLING ─────────► DECODING ────► ENDED
    ▲  ▲              │      │                │
    │  └──────────────┘ PART │                │
    └────────────────────────┴────────────────┘ PREEMPT
```

PART: a chunk is done and more of the prompt is to come; the request keeps its pages. PREEMPT: it loses them and
computes them again later (a part-way prompt in the queue stays WAITING). END is legal from every live state, and
nothing is legal from ENDED: a request ends once.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a request is."""

    __hash__ = object.__hash__  # members are one of a kind; Enum's own takes ten times as long

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


class Signal(Enum):
    """What moves it on."""

    __hash__ = object.__hash__

    ADMIT = "admit"
    PART = "part"
    PREFILLED = "prefilled"
    PREEMPT = "preempt"
    END = "end"


TRANSITIONS: dict[tuple[State, Signal], State] = {
    (State.WAITING, Signal.ADMIT): State.PREFILLING,
    (State.PREFILLING, Signal.PART): State.WAITING,
    (State.PREFILLING, Signal.PREFILLED): State.DECODING,
    (State.DECODING, Signal.PREEMPT): State.WAITING,
    (State.PREFILLING, Signal.PREEMPT): State.WAITING,
    (State.WAITING, Signal.PREEMPT): State.WAITING,
    (State.WAITING, Signal.END): State.ENDED,
    (State.PREFILLING, Signal.END): State.ENDED,
    (State.DECODING, Signal.END): State.ENDED,
}


def advance(state: State, signal: Signal) -> State:
    """The state after `signal`; an illegal pair is a bug of ours and asserts."""
    after = TRANSITIONS.get((state, signal))
    assert after is not None, f"no transition {signal.name} from {state.name}"
    return after
