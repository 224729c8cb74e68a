"""How one request wants its tokens chosen: names, meanings and defaults of vLLM's `SamplingParams`.

Every value is bounded above and below, checked when the object is made, by whoever makes it (a user, the
gateway, the decoder of a frame); `validate` adds what needs the vocabulary. Knows nothing of logits, and imports
no torch: the gateway uses it too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

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
MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_REGEX_BYTES: Final = 8 * 1024
MAX_CHOICES: Final = 1024
MAX_CHOICES_BYTES: Final = 64 * 1024
MAX_NESTING: Final = 64
"""Levels of brackets in a schema or of groups in a regular expression."""

GREEDY_BELOW: Final = 1e-5
"""Temperatures below this mean greedy, as in vLLM."""

_RANDOM_SEED: Final = -1  # vLLM's other way to say "no seed"


class SamplingError(DriftError, ValueError):
    """A sampling parameter that is not one of ours, or out of its range; `field` names it."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} must be {expected}, not {_shown(value)}")
        self.field = field


FormKind = Literal["json_schema", "regex", "choice"]


class Structured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form an output must have. Raises SamplingError when it is larger than any form may be.

    `kind` "json_schema": a JSON value that satisfies the JSON Schema `value` (at most 64 KiB of JSON text).
    "regex": a text that the regular expression `value` (at most 8 KiB) matches as a whole. "choice": one of the
    texts `value` (at most 1024 of them, 64 KiB in all, none empty, no two the same). Whether there is such a form
    is found when it is compiled (`drift_core.structured`).
    """

    kind: FormKind
    value: str | tuple[str, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(FormKind):
            raise SamplingError("structured", self.kind, f"one of {', '.join(get_args(FormKind))}")
        if self.kind == "choice":
            self._check_choices()
            return
        if not isinstance(self.value, str):
            raise SamplingError(self.field, self.value, "a text")
        most = MAX_SCHEMA_BYTES if self.kind == "json_schema" else MAX_REGEX_BYTES
        if not 0 < (size := _utf8_bytes(self.field, self.value)) <= most:
            raise SamplingError(self.field, size, f"1 to {most} bytes")
        if (depth := _depth(self.kind, self.value)) > MAX_NESTING:
            raise SamplingError(self.field, depth, f"nested at most {MAX_NESTING} levels deep")

    @property
    def field(self) -> str:
        """Its path in a request, for messages."""
        return f"structured.{self.kind}"

    def _check_choices(self) -> None:
        choices = _tuple(self.field, self.value)
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise SamplingError(self.field, len(choices), f"1 to {MAX_CHOICES} texts")
        for text in choices:
            if not isinstance(text, str) or not text:
                raise SamplingError(self.field, text, "texts that are not empty")
        if len(set(choices)) < len(choices):
            twice = next(text for text in choices if choices.count(text) > 1)
            raise SamplingError(self.field, twice, "texts of which no two are the same")
        if (size := sum(_utf8_bytes(self.field, text) for text in choices)) > MAX_CHOICES_BYTES:
            raise SamplingError(self.field, size, f"at most {MAX_CHOICES_BYTES} bytes in all")
        msgspec.structs.force_setattr(self, "value", choices)


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
    `structured`: the form of the output. The model's end-of-text tokens are allowed exactly where the form is
    complete, and end the output there; `min_tokens` gives way where only they are left.
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
    structured: Structured | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._check_collections()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(name, getattr(self, name), "true or false")
        if self.structured is not None and not isinstance(self.structured, Structured):
            raise SamplingError("structured", self.structured, "a Structured")
        if self.structured is not None and self.ignore_eos:
            raise SamplingError(
                "ignore_eos", True, "false with `structured`, whose end is the end of the output"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, however it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def least_tokens(self) -> int:
        """Tokens before which no output ends by itself: all it may have, where nothing can stop it."""
        if self.ignore_eos and not self.stop and not self.stop_token_ids:
            return self.max_tokens or 1
        return self.min_tokens

    def child(self, index: int) -> SamplingParams:
        """Parameters of output `index` of `n`: one output of its own seed. Output 0 is what `n=1` would give."""
        if self.n == 1 and not index:
            return self
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


def _utf8_bytes(name: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise SamplingError(name, text, "text that UTF-8 can encode") from error


_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_REGEX_IRRELEVANT: Final = re.compile(r"\\.|\[\^?\]?(?:[^\\\]]|\\.)*\]", re.DOTALL)


def _depth(kind: FormKind, text: str) -> int:
    """How deep brackets nest, whether or not they are balanced; a linear scan."""
    irrelevant, opening, closing = (
        (_STRING, "[{", "]}") if kind == "json_schema" else (_REGEX_IRRELEVANT, "(", ")")
    )
    depth = deepest = 0
    for character in irrelevant.sub("", text):
        if character in opening:
            depth += 1
            deepest = max(deepest, depth)
        elif character in closing:
            depth -= 1
    return deepest


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
