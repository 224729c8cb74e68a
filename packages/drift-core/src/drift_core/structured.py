"""Outputs in a form: JSON Schemas, regular expressions and choices become masks over the vocabulary.

Forms are compiled by llguidance, in a small pool of threads that drop the interpreter's lock while they do. Whatever
a form asks for, it costs bounded time and memory: its text is bounded where it is made
(`drift_core.sampling_params.Structured`), compiling and each mask by the library's own limits on steps and states, and
nothing here ever waits for a form without a bound. A form that meets a limit while a request runs fails that request
alone. Knows nothing of sampling, requests or engines, and imports no torch: the gateway uses it too.

"No forcing" in the grammars: the library would else walk through text that a form leaves no choice about, at once and
at any length (a mask of `(a{1000}){1000}` took 1.3 s; without, 0.1 ms).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import llguidance
import numpy as np
import numpy.typing as npt

from drift_core.sampling_params import Structured
from drift_core.tokenizer import Tokenizer
from drift_scheduler.errors import DriftError

Allowed = npt.NDArray[np.bool_]  # [V]: which tokens may come next
Bits = npt.NDArray[
    np.int32
]  # [V / 32, rounded up]: the same; token t is bit t % 32 of word t // 32, lowest first

LIMITS: Final[Mapping[str, Any]] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
}
"""llguidance's units. With them no form tried (bench/structured.py) compiled for longer than 0.3 s; a mask is at
most some 10 ms."""

WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,16}"
"""Between the parts of a JSON value, where there is any: bounded, or a model could go on with blanks for ever."""

COMPILED_KEPT: Final = 256
WAITING: Final = 64
THREADS: Final = 2

_NO_TOKEN: Final = "no token of this model's vocabulary goes on so"
_MESSAGE_CHARACTERS: Final = 200
_POSITION: Final = re.compile(r"^at \d+\(\d+\): ")
_DRAWING: Final = re.compile(r"\n<non-verbose/>|\n +1 \|")
_REGEX_SPECIAL: Final = frozenset(r"\.+*?()|[]{}^$#&-~/")


class FormError(DriftError):
    """A form that cannot be: not valid, not supported, too complex, or impossible with this vocabulary."""


class CompilerBusyError(DriftError):
    """Too many forms wait for being compiled."""


class Vocabulary:
    """A model's tokens as bytes, ready for masks. Making one takes about a second for 128 thousand tokens, during
    which no other Python code runs. Raises FormError for tokenizers and models that masks cannot be made for.

    `definition`: the text of a `tokenizer.json`. `vocab_size`: rows of logits, which may be more or fewer than the
    tokenizer has tokens. `eos_token_ids`: the model's.
    """

    def __init__(self, definition: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._tokens_of: dict[str, npt.NDArray[np.int64]] = {}
        self.eos_token_ids = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        if not self.eos_token_ids:
            raise FormError("the model has no end-of-text token, which a form needs to end")
        try:
            self.tokens = llguidance.LLTokenizer(definition, eos_token=list(self.eos_token_ids))
            if self.tokens.vocab_size < vocab_size:
                self.tokens = llguidance.LLTokenizer(
                    definition, n_vocab=vocab_size, eos_token=list(self.eos_token_ids)
                )
        except ValueError as error:
            raise FormError(f"the model's tokenizer cannot be used for forms: {_line(str(error))}") from error

    def tokens_of(self, characters: str) -> npt.NDArray[np.int64]:
        """The tokens that are one of these ASCII characters each, where there are such tokens."""
        known = self._tokens_of.get(characters)
        if known is None:
            found = (self.tokens.tokenize_bytes(character.encode()) for character in characters)
            tokens = [split[0] for split in found if len(split) == 1 and split[0] < self.vocab_size]
            known = self._tokens_of[characters] = np.array(tokens, np.int64)
        return known

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
        """Of a tokenizer. Raises FormError."""
        return cls(tokenizer.definition, vocab_size, eos_token_ids)


class Matcher:
    """How far one output has come in its form. One thread at a time."""

    __slots__ = ("_allowed", "_bits", "_inner", "_size", "ends", "fault", "vocabulary")

    def __init__(
        self, inner: llguidance.LLMatcher, vocabulary: Vocabulary, first: tuple[Bits, Allowed] | None = None
    ) -> None:
        """first: what may come first, both ways, where that is known."""
        self._inner = inner
        self.ends = list(vocabulary.eos_token_ids)
        self.vocabulary = vocabulary
        self._size = vocabulary.vocab_size
        self._bits: Bits | None = first[0] if first is not None else None
        self._allowed: Allowed | None = first[1] if first is not None else None
        self.fault: str | None = None
        """Why the form cannot be followed any further, once that is so."""

    @property
    def complete(self) -> bool:
        """Whether the output may end here."""
        return self.fault is None and bool(self._inner.is_accepting())

    def bits(self) -> Bits:
        """Which tokens may come next; end-of-text tokens exactly where the form is complete, and after a fault.

        Not to be written to.
        """
        if self._bits is None:
            self._bits = self._mask()
        return self._bits

    def allowed(self) -> Allowed:
        """`bits` as one truth value a token."""
        if self._allowed is None:
            bits = self.bits().view(np.uint8)
            self._allowed = np.unpackbits(bits, count=self._size, bitorder="little").astype(np.bool_)
        return self._allowed

    def accept(self, token: int) -> None:
        """The output goes on with a token."""
        self._allowed = self._bits = None
        if token in self.ends or self.fault is not None:
            return
        if not self._inner.consume_token(token):
            self._fail(f"token {token} is not allowed here")

    def _mask(self) -> Bits:
        bits = np.zeros(bit_words(self._size), np.int32)
        of_library = np.frombuffer(self._inner.compute_bitmask(), np.uint8)[: bits.nbytes]
        bits.view(np.uint8)[: len(of_library)] = of_library
        beyond = len(bits) * 32 - self._size
        if beyond:
            bits.view(np.uint32)[-1] &= np.uint32(0xFFFFFFFF >> beyond)
        _forbid(bits, self.ends)
        if self._inner.is_error() or not (bits.any() or self._inner.is_accepting()):
            self._fail(_NO_TOKEN)
        if self.fault is not None:
            bits[:] = 0
        if self.fault is not None or self._inner.is_accepting():
            _allow(bits, self.ends)
        return bits

    def _fail(self, otherwise: str) -> None:
        if self.fault is None:
            self.fault = _reason(self._inner, otherwise)


class Form:
    """A compiled form. `first`: which tokens may begin an output, both ways."""

    def __init__(
        self, inner: llguidance.LLMatcher, vocabulary: Vocabulary, first: tuple[Bits, Allowed]
    ) -> None:
        self._inner, self._vocabulary, self._first = inner, vocabulary, first
        self._lock = threading.Lock()

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an output; some microseconds."""
        with self._lock:
            return Matcher(self._inner.deep_copy(), self._vocabulary, self._first)


def compile_form(vocabulary: Vocabulary, structured: Structured) -> Form:
    """Compile a form and see that something can begin it. Raises FormError, its message without the field."""
    grammar = _grammar(structured)
    limits = llguidance.LLParserLimits(verbose_errors=False, **LIMITS)
    inner = llguidance.LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=limits)
    if inner.is_error():
        raise FormError(_reason(inner, "cannot be compiled"))
    first = Matcher(inner.deep_copy(), vocabulary)
    bits, allowed = first.bits(), first.allowed()
    if first.fault is not None:
        raise FormError(f"is impossible: {first.fault}")
    bits.flags.writeable = allowed.flags.writeable = False  # every output begins with them
    return Form(inner, vocabulary, (bits, allowed))


def bit_words(vocab_size: int) -> int:
    """Words of bits for a vocabulary."""
    return -(-vocab_size // 32)


def _forbid(bits: Bits, tokens: Sequence[int]) -> None:
    """Take tokens out."""
    words = bits.view(np.uint32)
    for token in tokens:
        words[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))


def _allow(bits: Bits, tokens: Sequence[int]) -> None:
    words = bits.view(np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)


# ------------------------------------------------------------------------------------------ the pool


@dataclass(slots=True, eq=False)
class Job:
    """A form being compiled, or compiled. `started`: when its turn came, on `time.monotonic()`."""

    future: Future[Form] = field(default_factory=Future)
    started: float | None = None


class Compiler:
    """Compiles forms off its callers' threads, each form once; remembers the latest ones, also those that are none.

    Threads may share it. `kept`: compiled forms remembered. `waiting`: forms that may wait or be under way at once.
    """

    def __init__(self, threads: int = THREADS, waiting: int = WAITING, kept: int = COMPILED_KEPT) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="drift-forms")
        self._waiting, self._kept = waiting, kept
        self._lock = threading.Lock()
        self._open = 0
        self._jobs: OrderedDict[tuple[Vocabulary, Structured], Job] = OrderedDict()

    def start(self, vocabulary: Vocabulary, structured: Structured) -> Job:
        """The form's job; its future fails with FormError. Raises CompilerBusyError."""
        key = (vocabulary, structured)
        with self._lock:
            job = self._jobs.get(key)
            if job is not None:
                self._jobs.move_to_end(key)
                return job
            if self._open >= self._waiting:
                raise CompilerBusyError(f"{self._open} forms wait for being compiled already")
            job = self._jobs[key] = Job()
            self._open += 1
            self._shrink()
        self._pool.submit(self._run, job, vocabulary, structured)
        return job

    def close(self) -> None:
        """Take no more; what runs ends on its own."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Job, vocabulary: Vocabulary, structured: Structured) -> None:
        job.started = time.monotonic()
        form: Form | None = None
        failure: Exception | None = None
        try:
            form = compile_form(vocabulary, structured)
        except Exception as error:  # whoever waits is told, whatever it is
            failure = error
        with self._lock:
            self._open -= 1
        if failure is not None:
            job.future.set_exception(failure)
        elif form is not None:
            job.future.set_result(form)

    def _shrink(self) -> None:
        """Forget the forms not used for longest; those under way stay, and are at most `waiting`."""
        for key, job in list(self._jobs.items()):
            if len(self._jobs) <= self._kept:
                break
            if job.future.done():
                del self._jobs[key]


# --------------------------------------------------------------------------------------------- grammars


def _grammar(structured: Structured) -> str:
    match structured.kind:
        case "json_schema":
            body = f"%json {json.dumps(_schema(str(structured.value)))}"
        case "regex":
            body = _regex(str(structured.value))
        case "choice":
            body = _regex("|".join(map(_quoted, structured.value)))
    return llguidance.LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\nstart: {body}')


def _schema(text: str) -> dict[str, Any]:
    """The schema as the library takes it; its own directives in schemas are not ours to offer. Raises FormError."""
    try:
        schema = json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise FormError(f"is not JSON: {_line(str(error))}") from error
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise FormError(f"is a JSON {type(schema).__name__}, not the object that a schema is")
    return schema | {
        "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False}
    }


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _regex(pattern: str) -> str:
    return f"/{llguidance.regex_to_lark(pattern, '')}/"


def _quoted(text: str) -> str:
    """The regular expression that matches `text` alone."""
    return "".join(f"\\{character}" if character in _REGEX_SPECIAL else character for character in text)


def _reason(inner: llguidance.LLMatcher, otherwise: str) -> str:
    """The library's complaint without its drawing of where; `otherwise` where it has none of use."""
    told = inner.get_error() if inner.is_error() else ""
    told = _POSITION.sub("", _DRAWING.split(told, maxsplit=1)[0])
    if not told or told.startswith("NoExtension"):
        return otherwise
    return _line(told)


def _line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= _MESSAGE_CHARACTERS else f"{line[: _MESSAGE_CHARACTERS - 1]}…"
