"""Conversations to prompts by the chat template that came with a model.

Templates are Jinja, as Hugging Face renders them. They come from the model directory alone, never from a request,
and are still not trusted: they run in Jinja's immutable sandbox over plain copies of the messages, with bounds on
template, messages, output, ranges, products and the number of operations (CVE-2026-5760 was a template that ran
code). Knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from drift_scheduler.errors import DriftError

MAX_TEMPLATE_CHARACTERS: Final = 1 << 18
MAX_MESSAGES: Final = 4096
MAX_INPUT_CHARACTERS: Final = 1 << 23
MAX_INPUT_DEPTH: Final = 16
MAX_OUTPUT_CHARACTERS: Final = 1 << 24
MAX_RANGE: Final = 10_000
MAX_OPERATIONS: Final = 1_000_000
"""Subscripts, attributes, calls, arithmetic and pieces of output of one rendering; a long conversation takes
some ten thousand."""

_WIDTH_METHODS: Final = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_PRINTF_WIDTH: Final = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")
_FORMAT_WIDTH: Final = re.compile(r":[^}]*(\{|\d{5})")


class ChatTemplateError(DriftError):
    """A template that does not parse or goes too far, or messages that it refuses."""


class ChatTemplate:
    """A parsed template. `special_tokens`: variables such as `bos_token`. `now`: the clock of `strftime_now`.

    Raises ChatTemplateError when the template does not parse. Several threads may render at once.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, more than the {MAX_TEMPLATE_CHARACTERS} allowed"
            )
        self._special_tokens = dict(special_tokens or {})
        self._environment = _Sandbox(now)
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template does not parse: {_line(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`, each a mapping with a `role` and its `content`.

        `variables`: further ones the template knows (`tools`, `enable_thinking`). Raises ChatTemplateError.
        """
        values = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **_Copier().mapping(variables or {}, "variables"),
            "messages": _checked(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        self._environment.start()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                self._environment.count()
                pieces.append(piece)
                size += len(piece)
                if size > MAX_OUTPUT_CHARACTERS:
                    raise ChatTemplateError(
                        f"the chat template wrote more than the {MAX_OUTPUT_CHARACTERS} characters allowed"
                    )
        except DriftError:
            raise
        except (MemoryError, RecursionError) as error:
            raise ChatTemplateError("the chat template took too much memory or depth") from error
        except Exception as error:  # whatever an expression of the template may raise
            raise ChatTemplateError(f"the chat template failed on these messages: {_line(error)}") from error
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox as Hugging Face sets it up, with a count of operations per rendering and bounded products."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        self._counts = threading.local()
        del self.filters["center"], self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.filters["format"] = _printf
        self.globals["range"] = _bounded_range
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: now().strftime(form)

    def start(self) -> None:
        """A rendering begins on this thread."""
        self._counts.operations = 0

    def count(self) -> None:
        """One more operation of the rendering on this thread."""
        operations = getattr(self._counts, "operations", 0) + 1
        self._counts.operations = operations
        if operations > MAX_OPERATIONS:
            raise ChatTemplateError(
                f"the chat template took more than the {MAX_OPERATIONS} operations allowed"
            )

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.count()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.count()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _WIDTH_METHODS:
            return False  # as large as the template says
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_width(_FORMAT_WIDTH, value.__self__)
        return wrapped

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.count()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.count()
        size = _size(left) + _size(right)
        if operator == "*":
            size = max(_size(left), 1) * abs(right) if isinstance(right, int) and _size(left) else 0
            if isinstance(left, int) and _size(right):
                size = _size(right) * abs(left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            size = abs(left).bit_length() * abs(right)
        elif operator == "%" and isinstance(left, str):
            _check_width(_PRINTF_WIDTH, left)
        if size > MAX_OUTPUT_CHARACTERS:
            raise ChatTemplateError(
                f"the chat template computes '{operator}' with a result that is too large"
            )
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant said, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Copier:
    """Copies JSON-like data, so that a template sees no object with behaviour, and bounds its size."""

    def __init__(self) -> None:
        self._size = 0

    def mapping(self, value: Mapping[Any, Any], where: str, depth: int = 0) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ChatTemplateError(f"{where} has a key that is not text: {key!r}"[:200])
            self._grow(len(key))
            copied[str(key)] = self.copy(item, where, depth + 1)
        return copied

    def copy(self, value: object, where: str, depth: int) -> Any:
        if depth > MAX_INPUT_DEPTH:
            raise ChatTemplateError(f"{where} is nested deeper than {MAX_INPUT_DEPTH} levels")
        if value is None or type(value) in (bool, int, float):
            self._grow(1)
            return value
        if isinstance(value, str):
            self._grow(len(value))
            return str(value)
        if isinstance(value, Mapping):
            return self.mapping(value, where, depth)
        if isinstance(value, list | tuple):
            self._grow(len(value))
            return [self.copy(item, where, depth + 1) for item in value]
        raise ChatTemplateError(
            f"{where} holds a {type(value).__name__}, not text, numbers, lists or mappings"
        )

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MAX_INPUT_CHARACTERS:
            raise ChatTemplateError(
                f"the messages have more than the {MAX_INPUT_CHARACTERS} characters allowed"
            )


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain copies of the messages; ChatTemplateError where one is not a message."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ChatTemplateError(f"messages must be a list, not a {type(messages).__name__}")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ChatTemplateError(f"a conversation has 1 to {MAX_MESSAGES} messages, not {len(messages)}")
    copier = _Copier()
    checked: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"{where} must be a mapping with role and content")
        if not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"{where} has no role; give one such as system, user or assistant")
        if "content" not in message:
            raise ChatTemplateError(f"{where} has no content")
        checked.append(copier.mapping(message, where))
    return checked


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it in templates: without HTML escapes."""
    indent = None if indent is None else max(0, min(indent, 16))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bounded_range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise ChatTemplateError(
            f"the chat template asks for a range of {len(numbers)}, more than {MAX_RANGE}"
        )
    return numbers


def _refuse(message: str) -> NoReturn:
    """What templates call `raise_exception`."""
    raise ChatTemplateError(f"the chat template refuses these messages: {_line(message)}")


def _printf(text: str, *args: Any, **kwargs: Any) -> str:
    """Jinja's filter `format`: printf-style."""
    _check_width(_PRINTF_WIDTH, text)
    return str(text) % (kwargs or args)


def _check_width(pattern: re.Pattern[str], text: str) -> None:
    if pattern.search(text):
        raise ChatTemplateError("the chat template formats to a width that is too large")


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _line(error: object) -> str:
    """One line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
