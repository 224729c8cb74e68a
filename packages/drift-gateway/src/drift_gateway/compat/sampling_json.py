"""vLLM's sampling parameters, as JSON or as a dictionary, into the messages of drift.v1.

The names are vLLM's; what drift.v1 has no word for is refused by name, never ignored. Bounds are admission's to check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from drift_gateway.refusal import Refusal, invalid
from drift_gateway.v1 import generation_pb2 as pb

MAX_JSON_CHARACTERS: Final = 1 << 20
DEFAULT_MAX_TOKENS: Final = 16
"""vLLM's, for those who speak its language."""

_SAMPLING: Final[Mapping[str, type]] = {
    "n": int, "temperature": float, "top_p": float, "top_k": int, "min_p": float, "presence_penalty": float,
    "frequency_penalty": float, "repetition_penalty": float, "seed": int, "logprobs": int,
}  # fmt: skip
_STOPPING: Final[Mapping[str, tuple[str, type]]] = {
    "max_tokens": ("max_tokens", int),
    "min_tokens": ("min_tokens", int),
    "ignore_eos": ("ignore_eos", bool),
    "include_stop_str_in_output": ("include_stop_in_text", bool),
}
_TRUE_ONLY: Final = ("skip_special_tokens", "spaces_between_special_tokens", "detokenize")
_FORMS: Final = {"json": "json_schema", "regex": "regex", "choice": "choice", "json_object": "json_schema"}


def parameters_of(text: str, field: str) -> dict[str, Any]:
    """The object that `text` is in JSON. Raises Refusal (INVALID_FIELD, naming `field`)."""
    if len(text) > MAX_JSON_CHARACTERS:
        raise invalid(field, f"has {len(text)} characters, more than {MAX_JSON_CHARACTERS}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(field, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise invalid(field, f"is a JSON {type(value).__name__}, not an object")
    return value


def apply_parameters(parameters: Mapping[str, Any], request: pb.GenerateRequest, field: str) -> None:
    """Put vLLM's `parameters` into the request; `null` means absent. Raises Refusal, naming `field.NAME`."""
    request.stopping.max_tokens = DEFAULT_MAX_TOKENS
    for name, value in parameters.items():
        if value is None:
            if name == "max_tokens":
                request.stopping.ClearField("max_tokens")
            continue
        path = f"{field}.{name}"
        setter = _SETTERS.get(name)
        if setter is None:
            raise invalid(path, f"is not known here; there are: {', '.join(sorted(_SETTERS))}")
        try:
            setter(request, name, value)
        except Refusal:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise invalid(path, f"{str(value)[:80]!r} does not fit: {error}") from error


Setter = Callable[[pb.GenerateRequest, str, Any], None]


def _set_sampling(request: pb.GenerateRequest, name: str, value: Any) -> None:
    number = _as(_SAMPLING[name], value)
    setattr(request.sampling, name, 0 if name == "top_k" and number == -1 else number)


def _set_stopping(request: pb.GenerateRequest, name: str, value: Any) -> None:
    ours, kind = _STOPPING[name]
    setattr(request.stopping, ours, _as(kind, value))


def _set_stop(request: pb.GenerateRequest, name: str, value: Any) -> None:
    request.stopping.stop.extend([value] if isinstance(value, str) else _texts(value))


def _set_stop_token_ids(request: pb.GenerateRequest, name: str, value: Any) -> None:
    request.stopping.stop_token_ids.extend(_as(int, token_id) for token_id in _list(value))


def _set_logit_bias(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError("an object of token ids and numbers is wanted")
    for token_id, bias in value.items():
        request.sampling.logit_bias[_as(int, token_id)] = _as(float, bias)


def _set_structured(request: pb.GenerateRequest, name: str, value: Any) -> None:
    forms = json.loads(value) if isinstance(value, str) else value
    if not isinstance(forms, Mapping):
        raise TypeError("an object with one form is wanted")
    for form, content in forms.items():
        if content is None:
            continue
        if form not in _FORMS:
            raise ValueError(f"no form '{form}'; there are: {', '.join(_FORMS)}")
        if request.HasField("structured"):
            raise ValueError("more than one form")
        set_form(request.structured, form, content)


def _must_be_true(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if value is not True:
        raise ValueError("only true is served")


def _must_be_one(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if _as(int, value) != 1:
        raise ValueError("only 1 is served; ask for n outputs instead")


def set_form(structured: pb.StructuredOutput, form: str, content: Any) -> None:
    """One of vLLM's forms of output: `json` (a schema, or its text), `regex`, `choice` or `json_object`."""
    match form:
        case "json":
            structured.json_schema = content if isinstance(content, str) else json.dumps(content)
        case "json_object":
            structured.json_schema = '{"type": "object"}' if content else "{}"
        case "regex":
            structured.regex = _text(content)
        case _:
            structured.choice.choices.extend(_texts(content))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is wanted")
    return value


def _list(value: Any) -> list[Any]:
    """A text is none, though its characters could be gone through."""
    if not isinstance(value, list):
        raise TypeError("a list is wanted")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError("a list of texts is wanted")
    return value


def _as(kind: type, value: Any) -> Any:
    """A number or truth value; numbers may come as text, as Triton's clients send them."""
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError("true or false is wanted")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("a number is wanted")
    number = kind(value)
    if kind is int and isinstance(value, float) and number != value:
        raise ValueError("a whole number is wanted")
    return number


_SETTERS: Final[Mapping[str, Setter]] = {
    **dict.fromkeys(_SAMPLING, _set_sampling),
    **dict.fromkeys(_STOPPING, _set_stopping),
    **dict.fromkeys(_TRUE_ONLY, _must_be_true),
    "best_of": _must_be_one,
    "stop": _set_stop,
    "stop_token_ids": _set_stop_token_ids,
    "logit_bias": _set_logit_bias,
    "structured_outputs": _set_structured,
    "guided_decoding": _set_structured,
}
