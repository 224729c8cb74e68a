"""The next token of each row of logits: vLLM's order of operations, one random number per token.

Per row: logit bias; repetition, frequency and presence penalties; what the output's form does not allow;
end-of-text and stop tokens barred before `min_tokens`; temperature; min-p; top-k; top-p over what those left; then
one draw. Knows nothing of requests, lanes or pages; rows do not influence each other.

The n-th generated token of a request uses the n-th number of the request's own stream, a function of its seed and
n alone: batches, preemption and recomputation do not change what it draws. Tokens as likely as the last one a
filter admits are admitted with it, so the surviving set does not depend on the order of a sort.

numpy does the work, on the host: on 64 rows of 152 thousand logits its argmax and sort took a tenth of the time of
torch's on the same core. Logits stay as they are. Log probabilities are
of the raw logits, vLLM's default. Several threads may sample at once, each with its own states.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from drift_core.frames import TokenLogprob
from drift_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from drift_core.structured import Matcher

Row = npt.NDArray[np.float32]  # logits of one row, [V]
Rows = npt.NDArray[np.float32]  # [R, V]

MIN_TEMPERATURE: Final = 0.01
"""Lower ones, if not greedy, are raised to this, as in vLLM."""

CUTS: Final = (-10.0, -20.0, -math.inf)
"""How far below the likeliest token (log scale) to look for the survivors of the filters, in turn. What lies
below -10 has a weight under 1/20000 of the likeliest one's; few filters need more."""

_CUT_ROUNDING: Final = 1e-3
_HUGE: Final = 1e30
_MINUS_INFINITY: Final = np.uint32(0xFF800000)

_RUN: Final = 128  # weights summed at once when drawing from a whole vocabulary
_CACHED: Final = 1 << 17  # logits worked on at once, so that they stay in a core's cache


class SamplerState:
    """What the sampler keeps of one request between tokens.

    `eos_token_ids`: the model's; they end the request unless `params.ignore_eos`. `fallback_seed` is used where
    `params.seed` is `None`; drawn at random when not given. `matcher`: how far the output is in the form it must
    have; of this request alone. Where it has a `fault`, the tokens chosen mean nothing any more.
    """

    __slots__ = (
        "_barred", "_counts", "_seed", "_seen", "_slots",
        "filtered", "formed", "generated", "matcher", "params", "plain", "scale", "stop_ids",
    )  # fmt: skip

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        vocab_size: int,
        fallback_seed: int | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.generated = 0
        self.scale = 1.0 / max(params.temperature, MIN_TEMPERATURE)
        limited = params.top_p < 1.0 or 0 < params.top_k < vocab_size or params.min_p > 0.0
        self.filtered = limited and not params.greedy
        stops = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops.update(eos_token_ids)
        self.stop_ids = frozenset(token for token in stops if 0 <= token < vocab_size)
        seed = params.seed if params.seed is not None else fallback_seed
        self._seed = (secrets.randbits(64) if seed is None else seed % (1 << 64)).to_bytes(8, "little")
        self._barred = sorted(self.stop_ids) if params.min_tokens else []
        self._slots: dict[int, int] | None = None  # token -> its place in the next two
        self._seen: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._counts: npt.NDArray[np.float32] = np.empty(0, np.float32)
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            self._remember_prompt(prompt_token_ids, vocab_size)
        self.plain = not (params.logit_bias or self._barred or matcher is not None or self._slots is not None)
        """Whether the row's logits are used as they are."""
        self.formed = matcher is not None and not params.logit_bias and self._slots is None
        """Whether they are but for what `form_bits` forbids."""

    def uniform(self) -> float:
        """The request's number for its next token, in [0, 1)."""
        counter = self.generated.to_bytes(8, "little")
        digest = blake2b(counter, digest_size=8, key=self._seed).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def edited(self, row: Row) -> Row:
        """A copy of one row of logits under bias, penalties and the bar on ending."""
        row = row.copy()
        if self.params.logit_bias:
            for token, bias in self.params.logit_bias.items():
                row[token] += bias
        if self._slots:
            self._penalise(row)
        if self.matcher is not None:
            self._confine(row, self.matcher.allowed())
        elif self.generated < self.params.min_tokens:
            row[self._barred] = -np.inf
        return row

    def record(self, token: int) -> bool:
        """Count a sampled token; whether it ends the request."""
        self.generated += 1
        if self._slots is not None:
            slot = self._slots.setdefault(token, len(self._slots))
            if slot == len(self._seen):
                self._seen = np.concatenate([self._seen, np.zeros_like(self._seen)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._seen[slot] = token
            self._counts[slot] += 1
        ends = token in self.stop_ids and self.generated > self.params.min_tokens
        return ends if self.matcher is None else self._record_in_form(self.matcher, token, ends)

    def _confine(self, row: Row, allowed: npt.NDArray[np.bool_]) -> None:
        """Leave what the form allows, and of that no end before `min_tokens` unless nothing else is left."""
        if self.generated < self.params.min_tokens and self._barred:
            going_on = allowed.copy()
            going_on[self._barred] = False
            allowed = going_on if going_on.any() else allowed
        _keep(row, allowed)
        if not math.isfinite(row.max()):  # a broken model; the form holds all the same
            np.nan_to_num(row, copy=False, nan=0.0, posinf=_HUGE, neginf=-_HUGE)
            _keep(row, allowed)

    def form_bits(self) -> npt.NDArray[np.int32]:
        """What `_confine` would leave of the next token's row, as `Matcher.bits` lays it out; not to be written to."""
        assert self.matcher is not None
        bits = self.matcher.bits()
        if self.generated >= self.params.min_tokens or not self._barred:
            return bits
        going_on = bits.copy()
        words = going_on.view(np.uint32)
        for token in self._barred:
            words[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
        return going_on if going_on.any() else bits

    def _record_in_form(self, matcher: Matcher, token: int, ends: bool) -> bool:
        """Note a token of the form; where the form ends the output ends, however few tokens it took."""
        complete = matcher.complete
        matcher.accept(token)
        if matcher.fault is not None:
            return False  # whoever runs the request ends it
        return ends or (complete and token in matcher.ends)

    def _remember_prompt(self, prompt_token_ids: Sequence[int], vocab_size: int) -> None:
        """Start the table of tokens that penalties concern; of the prompt, that is repetition alone."""
        prompt = set(prompt_token_ids) if self.params.repetition_penalty != 1.0 else ()
        ids = [token for token in prompt if token < vocab_size]
        self._slots = {token: slot for slot, token in enumerate(ids)}
        self._seen = np.zeros(len(ids) + 64, np.int64)
        self._seen[: len(ids)] = ids
        self._counts = np.zeros(len(ids) + 64, np.float32)

    def _penalise(self, row: Row) -> None:
        assert self._slots is not None
        ids, counts = self._seen[: len(self._slots)], self._counts[: len(self._slots)]
        values, params = row[ids], self.params
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * counts
        values -= np.float32(params.presence_penalty) * (counts > 0)
        row[ids] = values


def _keep(row: Row, allowed: npt.NDArray[np.bool_]) -> None:
    """Make the logits of all but `allowed` tokens minus infinity.

    By their bits: where half of 128 thousand tokens are allowed, `row[~allowed] = -inf` takes six times as long.
    """
    bits = row.view(np.uint32)
    kept = np.negative(allowed.view(np.uint8).astype(np.uint32))  # all ones, or none
    bits &= kept
    np.invert(kept, out=kept)
    kept &= _MINUS_INFINITY
    bits |= kept


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One entry per row. `stopped`: the token is an end-of-text or stop token. `logprobs`: `None` if nobody asked.

    `faults`: rows whose output cannot be kept in its form any longer, and why; their tokens mean nothing.
    """

    token_ids: list[int]
    stopped: list[bool]
    logprobs: list[TokenLogprob | None] | None = None
    faults: tuple[tuple[int, str], ...] = ()


def sample(logits: Tensor, states: Sequence[SamplerState]) -> SampleResult:
    """Choose the next token of each row of `logits` (float32 [R, V]) and note it in its state."""
    assert len(states) == len(logits), f"{len(logits)} rows of logits for {len(states)} states"
    logits = logits.detach()
    wanted = any(state.params.logprobs is not None for state in states)
    formed: list[int] = []
    if not wanted and all(state.params.greedy and state.plain for state in states):
        tokens = _argmax(logits)
        logprobs = None
    else:
        rows: npt.NDArray[np.float32] = logits.cpu().numpy()
        # What is infinitely unlikely may be so, and a broken model's row is no reason to stop the others.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            tokens = _choose_all(rows, states)
            formed = [row for row, state in enumerate(states) if state.matcher is not None]
            logprobs = _logprobs(rows, states, tokens) if wanted else None
    stopped = [state.record(token) for state, token in zip(states, tokens, strict=True)]
    return SampleResult(tokens, stopped, logprobs, _faults(states, formed) if formed else ())


def _faults(states: Sequence[SamplerState], formed: Sequence[int]) -> tuple[tuple[int, str], ...]:
    matchers = ((row, states[row].matcher) for row in formed)
    return tuple((row, each.fault) for row, each in matchers if each is not None and each.fault is not None)


def _argmax(logits: Tensor) -> list[int]:
    if logits.device.type == "cpu":  # numpy's is 20 times as fast
        return [int(token) for token in logits.numpy().argmax(-1)]
    return [int(token) for token in logits.argmax(-1).tolist()]


def _choose_all(rows: Rows, states: Sequence[SamplerState]) -> list[int]:
    """The next token of each row. A row without a finite maximum (a broken model) yields its argmax."""
    tokens = [0] * len(states)
    free: list[int] = []  # rows drawn from as they are: the common case, done many at once
    for index, state in enumerate(states):
        if state.filtered or not state.plain:
            row = state.edited(rows[index]) if not state.plain else rows[index]
            tokens[index] = _choose(row, state)
        elif state.params.greedy:
            tokens[index] = int(rows[index].argmax())
        else:
            free.append(index)
    step = max(1, _CACHED // rows.shape[1])
    for start in range(0, len(free), step):
        some = free[start : start + step]
        drawn = _draw_free(rows[some], [states[index] for index in some])
        for index, token in zip(some, drawn, strict=True):
            tokens[index] = token
    return tokens


def _choose(row: Row, state: SamplerState) -> int:
    """The next token of one row of edited logits."""
    params = state.params
    top = float(row.max())
    if params.greedy or not math.isfinite(top):
        return int(row.argmax())
    if not state.filtered:
        return _draw_free(row[None], [state])[0]
    below = row - top  # the largest becomes 0 first: no temperature makes it overflow
    for cut in CUTS:
        token = _choose_filtered(below, state.scale, cut, state)
        if token is not None:
            return token
    raise AssertionError("the last cut leaves nothing out")


def _draw_free(rows: Rows, states: Sequence[SamplerState]) -> list[int]:
    """One draw per row, without filters: first a run of `_RUN` tokens, then one in it, for a running sum over a
    whole vocabulary is slow."""
    count, size = rows.shape
    tops = rows.max(1)
    runs = np.full((count, -(-size // _RUN), _RUN), -np.inf, np.float32)
    weights = runs.reshape(count, -1)
    np.subtract(rows, tops[:, None], out=weights[:, :size])
    weights *= np.array([[state.scale] for state in states], np.float32)
    np.exp(weights, out=weights)
    uniform = np.array([state.uniform() for state in states])
    sums = runs.sum(2).cumsum(1, dtype=np.float64)
    targets, run = _pass(sums, uniform)
    each = np.arange(count)
    before = np.where(run > 0, sums[each, run - 1], 0.0)
    rest = ((targets - before) / (sums[each, run] - before)).clip(0.0, 1.0)
    _, place = _pass(runs[each, run].cumsum(1, dtype=np.float64), rest)
    tokens: list[int] = np.minimum(run * _RUN + place, size - 1).tolist()
    for index in np.flatnonzero(~np.isfinite(tops)):
        tokens[index] = int(rows[index].argmax())
    return tokens


def _pass(sums: npt.NDArray[np.float64], uniform: npt.NDArray[np.float64]) -> tuple[Any, Any]:
    """Per row of running sums [R, N]: `uniform` [R] of the whole, and the index at which they pass it."""
    totals = sums[:, -1]
    targets = np.minimum(uniform * totals, np.nextafter(totals, 0.0))
    return targets, np.minimum((sums <= targets[:, None]).sum(1), sums.shape[1] - 1)


def _choose_filtered(below: Row, scale: float, cut: float, state: SamplerState) -> int | None:
    """Draw under min-p, top-k and top-p, looking only at tokens for which `below * scale` reaches `cut`.

    `None` if it cannot be told from those tokens alone which ones the filters admit.
    """
    params, size = state.params, len(below)
    ids = (below >= cut / scale).nonzero()[0]
    values = below[ids] * scale
    ascending = np.sort(values)
    floor = -math.inf
    if 0 < params.top_k < size:
        if params.top_k > len(ids):
            return None
        floor = float(ascending[-params.top_k])
    if params.min_p:
        floor = max(floor, float(np.float32(math.log(params.min_p))))
    if -math.inf < floor < cut + _CUT_ROUNDING:
        return None
    if params.top_p < 1.0:
        descending = ascending[ascending.searchsorted(floor) :][::-1]
        sums = np.exp(descending, dtype=np.float64).cumsum()
        # top-p is a share of what min-p and top-k left; with neither, of everything.
        mass = sums[-1] if floor > -math.inf else np.exp(below * scale).sum(dtype=np.float64)
        last = int(sums.searchsorted(params.top_p * mass))
        if last == len(descending):
            if floor == -math.inf and len(ids) < size:
                return None
            last -= 1
        floor = float(descending[last])
    kept = values >= floor
    return int(ids[kept][_pick(np.exp(values[kept], dtype=np.float64), state.uniform())])


def _pick(weights: npt.NDArray[np.floating], uniform: float) -> int:
    """The index at which the running sum of `weights` passes `uniform` of the whole."""
    sums = weights.cumsum(dtype=np.float64)
    total = float(sums[-1])
    return int(sums.searchsorted(min(uniform * total, math.nextafter(total, 0.0)), side="right"))


def _logprobs(
    rows: npt.NDArray[np.float32], states: Sequence[SamplerState], tokens: list[int]
) -> list[TokenLogprob | None]:
    """Log probabilities under the raw logits, for the rows that want them."""
    return [
        None if state.params.logprobs is None else _logprob(row, token, state.params.logprobs)
        for row, state, token in zip(rows, states, tokens, strict=True)
    ]


def _logprob(row: Row, token: int, count: int) -> TokenLogprob:
    top = float(row.max())
    norm = top + math.log(np.exp(row - top).sum(dtype=np.float64))
    likeliest: list[tuple[int, float]] = []
    if count:
        floor = np.partition(row, len(row) - count)[len(row) - count]
        ids = np.flatnonzero(row >= floor)
        order = ids[np.argsort(-row[ids], kind="stable")][:count]  # of equals, the lowest id first
        likeliest = [(int(other), float(row[other]) - norm) for other in order]
    return TokenLogprob(float(row[token]) - norm, likeliest)
