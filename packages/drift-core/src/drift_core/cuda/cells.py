"""Where the device keeps each request's last token, and who must have tokens chosen on the host instead.

A request has a cell from its arrival to its end; when there are more requests than cells, the later ones do
without and the host hands their token over each step. Knows nothing of streams.
"""

from __future__ import annotations

from collections.abc import Sequence

from drift_core.cuda.rows import HOST_TOKEN
from drift_core.sampler import SamplerState


class TokenCells:
    """`count` cells; the one after them takes tokens that go nowhere."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._cells: dict[str, int] = {}
        self._seeds: dict[str, int] = {}
        self.choosy: set[str] = set()
        """Requests that want another token than the likeliest one; a step without any asks no further."""

    @property
    def free(self) -> int:
        """Cells that no request has."""
        return len(self._free)

    @property
    def spare(self) -> int:
        """The cell that nobody reads."""
        return self.count

    def admit(self, request_id: str, state: SamplerState, seed: int, *, chosen_before: bool = False) -> None:
        """Note a new request; its cell is taken when it first needs one.

        `chosen_before`: its latest token was not chosen on this device, so that no cell can hold it.
        """
        if chosen_on_host(state) or draws(state) or state.formed:
            self.choosy.add(request_id)
        if chosen_before:
            self._cells[request_id] = HOST_TOKEN
        self._seeds[request_id] = seed if seed < 1 << 63 else seed - (1 << 64)

    def seed(self, request_id: str) -> int:
        """The request's, as a signed number of 64 bits; 0 where it has ended and its row is nobody's for a step."""
        return self._seeds.get(request_id, 0)

    def cell(self, request_id: str, state: SamplerState) -> int:
        """The request's cell, or `HOST_TOKEN`."""
        if chosen_on_host(state):
            return HOST_TOKEN
        cell = self._cells.get(request_id)
        if cell is None:
            if not self._free:
                return HOST_TOKEN
            cell = self._cells[request_id] = self._free.pop()
        return cell

    def forget(self, request_ids: Sequence[str]) -> None:
        """Ended requests give their cells back."""
        self.choosy.difference_update(request_ids)
        for request_id in request_ids:
            self._seeds.pop(request_id, None)
            cell = self._cells.pop(request_id, HOST_TOKEN)
            if cell != HOST_TOKEN:
                self._free.append(cell)


def chosen_on_host(state: SamplerState) -> bool:
    """Penalties, biases, a bar on ending without a form, and log probabilities are the host sampler's."""
    return not (state.plain or state.formed) or state.params.logprobs is not None


def draws(state: SamplerState) -> bool:
    """Whether the token is drawn, not the likeliest one."""
    return not state.params.greedy
