"""How one request wants its tokens chosen: names, meanings and defaults of vLLM's `SamplingParams`.

Every value is bounded above and below, checked when the object is made, by whoever makes it (a user, the
gateway, the decoder of a frame); `validate` adds what needs the vocabulary. Knows nothing of logits, and imports
no torch: the gateway uses it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from drift_scheduler.errors import DriftError

MAX_N: Final = 16
MAX_TEMPERATURE: Final = 100.0
MAX_TOP_K: Final = 1_000_000
MAX_OUTPUT_TOKENS: Final = 1 << 20
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 128
MAX_LOGIT_BIAS_ENTRIES: Final = 300
MAX_LOGPROBS: Final = 20
MAX_TOKEN_ID: Final = (1 << 31) - 1

GREEDY_BELOW: Final = 1e-5
"""Temperatures below this mean greedy, as in vLLM."""

_RANDOM_SEED: Final = -1  # vLLM's other way to say "no seed"


class SamplingError(DriftError, ValueError):
    """A sampling parameter that is not one of ours, or out of its range; `field` names it."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} must be {expected}, not {_shown(value)}")
        self.field = field


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How to choose one request's tokens.

    Raises SamplingError when a value is out of its range; NaN and infinity always are.

    `n`: outputs per prompt, 1 to 16.
    `temperature`: 0 to 100; 0 is greedy.
    `top_p`: above 0, at most 1: the likeliest tokens whose mass reaches it. `top_k`: the k likeliest; 0 or -1 is
    all. `min_p`: 0 to 1: tokens at least that likely relative to the likeliest one.
    `presence_penalty`, `frequency_penalty`: -2 to 2, over generated tokens: once, and per occurrence.
    `repetition_penalty`: 0.01 to 10, over prompt and generated tokens; 1 is none.
    `seed`: 64 bits; `None` or -1 draws one.
    `logit_bias`: at most 300 entries, token id to -100 to 100.
    `max_tokens`: 1 to 1048576; `None` is what the context has room for. `min_tokens`: before that many, neither
    end-of-text nor stop tokens.
    `stop`: one string or at most 16 of them, each of 1 to 256 characters; the text ends before the earliest one,
    or after it with `include_stop_str_in_output`. `stop_token_ids`: at most 128. `ignore_eos`: go on past the
    model's end-of-text tokens.
    `logprobs`: 0 to 20: log probabilities of the chosen token and of that many likeliest ones.
    `skip_special_tokens`: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._check_collections()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(name, getattr(self, name), "true or false")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, however it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def child(self, index: int) -> SamplingParams:
        """Parameters of output `index` of `n`: one output of its own seed. Output 0 is what `n=1` would give."""
        seed = self.seed if self.seed is None or not index else (self.seed + index) % (1 << 64)
        return msgspec.structs.replace(self, n=1, seed=seed)

    def validate(self, vocab_size: int) -> None:
        """Check token ids against a vocabulary. Raises SamplingError."""
        ids = f"token ids of 0 to {vocab_size - 1}"
        for token in self.stop_token_ids or ():
            if token >= vocab_size:
                raise SamplingError("stop_token_ids", token, ids)
        for token in self.logit_bias or ():
            if token >= vocab_size:
                raise SamplingError("logit_bias", token, ids)
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise SamplingError("logprobs", self.logprobs, f"at most the vocabulary's {vocab_size}")

    def _check_numbers(self) -> None:
        self._number("temperature", 0.0, MAX_TEMPERATURE)
        if not self._number("top_p", 0.0, 1.0) > 0.0:
            raise SamplingError("top_p", self.top_p, "above 0 and at most 1")
        self._number("min_p", 0.0, 1.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("repetition_penalty", 0.01, 10.0)

    def _check_lengths(self) -> None:
        self._integer("n", 1, MAX_N)
        if self._integer("top_k", -1, MAX_TOP_K) == -1:
            self._set("top_k", 0)
        if self.seed is not None and self._integer("seed", -(1 << 63), (1 << 64) - 1) == _RANDOM_SEED:
            self._set("seed", None)
        if self.max_tokens is not None:
            self._integer("max_tokens", 1, MAX_OUTPUT_TOKENS)
        self._integer("min_tokens", 0, MAX_OUTPUT_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)

    def _check_collections(self) -> None:
        stop = _tuple("stop", self.stop_strings if isinstance(self.stop, str) else self.stop)
        if len(stop) > MAX_STOP_STRINGS:
            raise SamplingError("stop", len(stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise SamplingError("stop", text, f"strings of 1 to {MAX_STOP_CHARACTERS} characters")
        self._set("stop", stop or None)
        ids = _tuple("stop_token_ids", self.stop_token_ids)
        if len(ids) > MAX_STOP_TOKEN_IDS:
            raise SamplingError("stop_token_ids", len(ids), f"at most {MAX_STOP_TOKEN_IDS} ids")
        for token in ids:
            _check_token("stop_token_ids", token)
        self._set("stop_token_ids", ids or None)
        self._check_logit_bias()

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        if len(self.logit_bias) > MAX_LOGIT_BIAS_ENTRIES:
            raise SamplingError(
                "logit_bias", len(self.logit_bias), f"at most {MAX_LOGIT_BIAS_ENTRIES} entries"
            )
        for token, bias in self.logit_bias.items():
            _check_token("logit_bias", token)
            _check_number(f"logit_bias[{token}]", bias, -100.0, 100.0)
        self._set("logit_bias", dict(self.logit_bias) or None)

    def _set(self, name: str, value: Any) -> None:
        msgspec.structs.force_setattr(self, name, value)

    def _number(self, name: str, low: float, high: float) -> float:
        return _check_number(name, getattr(self, name), low, high)

    def _integer(self, name: str, low: int, high: int) -> int:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise SamplingError(name, value, f"a whole number from {low} to {high}")
        return value


def _check_number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SamplingError(name, value, f"a number from {low:g} to {high:g}")
    if not (low <= value <= high and math.isfinite(value)):
        raise SamplingError(name, value, f"from {low:g} to {high:g}")
    return float(value)


def _check_token(name: str, token: object) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_TOKEN_ID:
        raise SamplingError(name, token, "token ids of 0 or more")


def _tuple(name: str, values: object) -> tuple[Any, ...]:
    if values is None:
        return ()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise SamplingError(name, values, "a list")
    return tuple(values)


def _shown(value: object) -> str:
    """The value as a user would write it, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
