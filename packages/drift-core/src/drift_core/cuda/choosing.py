"""How each row's next token is chosen: what a pass's buffers say of it, what is launched after its logits, the answer.

The likeliest token is part of every pass. Drawing, and forms that forbid tokens, are launches after it; bits of forms
are worked out on the host meanwhile, so that the last launch of such a pass comes later. Few requests have theirs
chosen on the host from fetched logits. Knows rows and samplers; nothing of pages or work lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor

from drift_core.cuda.buffers import Array
from drift_core.cuda.cells import TokenCells, chosen_on_host, draws
from drift_core.cuda.decode_work import Ints
from drift_core.cuda.device import Accelerator, Stream, Touches, Work
from drift_core.cuda.masks import Formed
from drift_core.cuda.notes import Notes
from drift_core.cuda.passes import Outputs, Pass
from drift_core.cuda.rows import Served
from drift_core.sampler import MIN_TEMPERATURE
from drift_core.sequences import SequenceState


@dataclass(frozen=True, slots=True)
class Sampled:
    """A pass's tokens on the host; those of `host_rows` are still to be chosen, from `logits`."""

    ids: tuple[str, ...]
    states: list[SequenceState]
    tokens: list[int]
    host_rows: list[int]
    logits: Tensor | None


@dataclass(slots=True)
class _Asked:
    """What the pass under way will yield."""

    ids: tuple[str, ...] = ()
    rows: list[SequenceState] = field(default_factory=list)
    host_rows: list[int] = field(default_factory=list)
    served: Served | None = None

    @property
    def states(self) -> list[SequenceState]:
        """Of `ids`."""
        return self.rows if self.served is None else self.served.states


@dataclass(slots=True, eq=False)
class _Wishes:
    """How the rows of `states`, a list that never changes, want their tokens: read once, good for many steps.

    `host_rows`: chosen on the host. `formed`: held to a form on the device. `columns`: what drawing needs, when any
    row draws. `drawn`: tokens that each had at the first step.
    """

    states: list[SequenceState]
    host_rows: list[int] = field(default_factory=list)
    formed: Formed = ()
    columns: dict[str, Array] | None = None
    drawn: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """What is launched after a pass's logits: `begin` at once, `finish` when the bits of forms are worked out.

    `count`: rows that the pass samples from.
    """

    chooser: Chooser
    asked: _Asked
    each: Pass
    count: int
    drawn: bool
    formed: Formed

    @property
    def waits(self) -> bool:
        """Whether there is anything to `finish`."""
        return bool(self.formed)

    def begin(self, stream: Stream, units: int) -> None:
        """What needs nothing more of the host."""
        chooser, each, count = self.chooser, self.each, self.count
        chooser.asked = self.asked
        if self.formed:
            chooser.outputs.masks.open(self.formed)
        elif self.drawn:
            self._choose_again(stream, units)
        if self.asked.host_rows:
            logits, room = chooser.outputs.logits, chooser.outputs.host_logits
            fetch = Work("logits", lambda: each.fetch_logits(count), lambda: Touches([logits], [room]))
            chooser.accelerator.launch(stream, fetch)

    def finish(self, stream: Stream, units: int) -> None:
        """Forbid what forms do not allow, and choose from what is left."""
        self.chooser.outputs.masks.send(stream)
        self._choose_again(stream, units)

    def _choose_again(self, stream: Stream, units: int) -> None:
        run = partial(self.each.choose_again, self.count, units, drawn=self.drawn, formed=len(self.formed))
        work = Work("mask" if self.formed else "draw", run, self.chooser.touches(self.each))
        self.chooser.accelerator.launch(stream, work)


class Chooser:
    """Fills in how each row's token is chosen, and adds the launches that the likeliest token does not do for."""

    def __init__(self, accelerator: Accelerator, outputs: Outputs, cells: TokenCells, notes: Notes) -> None:
        self.accelerator, self.outputs, self._cells, self._notes = accelerator, outputs, cells, notes
        self.asked = _Asked()
        self._wishes: _Wishes | None = None

    def ask(
        self,
        ids: tuple[str, ...],
        states: list[SequenceState],
        host: dict[str, Array],
        each: Pass,
        served: Served | None = None,
    ) -> Choice:
        """How the next tokens of `ids` are chosen.

        served: who gets an answer, where that is not all rows in order.
        """
        wishes = self._wishes
        if wishes is None or wishes.states is not states:
            wishes = self._wishes = self._read(ids, states)
        else:
            wishes.steps += 1
        formed, count = wishes.formed, len(ids)
        if served is None:
            asked = _Asked(ids, states, wishes.host_rows)
        else:
            assert not wishes.host_rows, "rows without a request beside rows chosen on the host"
            asked = _Asked(served.ids, states, [], served)
            if formed:
                rows = set(served.order.tolist())
                formed = [(row, sampler) for row, sampler in formed if row in rows]
        if wishes.columns is not None:
            for name, column in wishes.columns.items():
                host[name][:count] = column
            host["drawn"][:count] = wishes.drawn + wishes.steps
        return Choice(self, asked, each, count, wishes.columns is not None, formed)

    def look_ahead(self, ids: tuple[str, ...], states: list[SequenceState]) -> bool:
        """Read how the next pass's rows want their tokens while this one runs; whether that was to be done."""
        wishes = self._wishes
        if wishes is not None and wishes.states is states:
            return False
        wishes = self._wishes = self._read(ids, states)
        wishes.steps = -1  # as of the pass before the one that is asked for next
        if wishes.columns is not None:
            under_way = set(self.asked.ids)
            wishes.drawn += np.array([request_id in under_way for request_id in ids])
        return True

    def rehearse(self, stream: Stream, units: int, each: Pass) -> None:
        """Compile what a pass without draws and forms does not run; the buffers hold one row that is nobody's."""
        self.outputs.masks.rehearse(stream)
        for formed in (0, 1):
            run = partial(each.choose_again, 1, units, drawn=True, formed=formed)
            self.accelerator.launch(stream, Work("rehearsal", run, self.touches(each)))

    def touches(self, each: Pass) -> Callable[[], Touches]:
        """Of whatever chooses among a pass's logits."""
        return lambda: Touches([each.buffers.device, self.outputs.masks.device], self.outputs.own())

    def answer(self) -> Sampled:
        """The tokens, once the pass is done."""
        asked, out = self.asked, self.outputs
        self.accelerator.host_reads(out.host_tokens)
        logits = None
        if asked.host_rows:
            self.accelerator.host_reads(out.host_logits)
            logits = out.host_logits
        served = asked.served
        chosen = out.chosen[: len(asked.ids)] if served is None else out.chosen[served.order]
        tokens: list[int] = chosen.tolist()
        return Sampled(asked.ids, asked.states, tokens, asked.host_rows, logits)

    def _read(self, ids: tuple[str, ...], states: list[SequenceState]) -> _Wishes:
        """What these requests want of their tokens."""
        if not self._cells.choosy:
            return _Wishes(states)
        self._notes.settle()
        samplers = [state.sampler for state in states]
        host_rows = [row for row, sampler in enumerate(samplers) if chosen_on_host(sampler)]
        left = set(host_rows)
        formed = [
            (row, sampler) for row, sampler in enumerate(samplers) if sampler.formed and row not in left
        ]
        if not any(draws(sampler) for row, sampler in enumerate(samplers) if row not in left):
            return _Wishes(states, host_rows, formed)
        params = [sampler.params for sampler in samplers]
        columns = {
            "temperature": np.array(
                [0.0 if p.greedy else max(p.temperature, MIN_TEMPERATURE) for p in params]
            ),
            "top_k": np.array([max(p.top_k, 0) for p in params]),
            "top_p": np.array([p.top_p for p in params]),
            "min_p": np.array([p.min_p for p in params]),
            "seeds": np.array([self._cells.seed(request_id) for request_id in ids]),
        }
        return _Wishes(
            states, host_rows, formed, columns, np.array([sampler.generated for sampler in samplers])
        )
