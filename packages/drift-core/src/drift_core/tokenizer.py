"""Text to token ids and back, by the `tokenizer.json` of a Hugging Face model directory.

Knows the tokenizer's files and nothing of models, requests or streams; `IncrementalDetokenizer` (here for its
users' convenience) turns ids into text as they come. Nothing in a model directory is run: the vocabulary is data, and
the chat template is rendered in a sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from drift_core.chat_template import ChatTemplate, ChatTemplateError
from drift_core.detokenizer import IncrementalDetokenizer
from drift_scheduler.errors import DriftError

__all__ = ["IncrementalDetokenizer", "Tokenizer", "TokenizerError"]

MAX_TOKENIZER_BYTES: Final = 256 * 1024 * 1024
MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024
MANY_TOKENS: Final = 1000
"""From so many on it pays to decode them so that other threads go on meanwhile."""

_SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


class TokenizerError(DriftError):
    """Tokenizer files that are missing or unreadable, or text that cannot be encoded."""


class Tokenizer:
    """A model's vocabulary and chat template. Threads may share it.

    `special_tokens`: their texts by role (`bos_token`, …). `source`: what errors call it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
        source: str = "the tokenizer",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._source = source
        self._special = dict(special_tokens or {})
        self._chat_template = chat_template
        self.eos_token_ids = tuple(eos_token_ids)
        self.byte_level = _is_byte_level(json.loads(backend.to_str()).get("decoder"))
        self._special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        self._bytes_shown: list[bytes | None] = [None] * self.vocab_size

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and, where they are, `tokenizer_config.json`, `generation_config.json` and
        `chat_template.jinja`.

        Raises TokenizerError for files missing or corrupt, ChatTemplateError for a template that does not parse.
        """
        directory = Path(directory)
        backend = _backend(directory)
        config = _json(directory / "tokenizer_config.json")
        special = {
            name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name))) is not None
        }
        return cls(
            backend,
            special,
            _eos_token_ids(backend, special, _json(directory / "generation_config.json")),
            _chat_template(directory, config, special),
            str(directory),
        )

    @property
    def vocab_size(self) -> int:
        """Token ids, added ones included; the model's vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def definition(self) -> str:
        """Its vocabulary and rules as the text of a `tokenizer.json`."""
        return str(self._backend.to_str())

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a text, if the model has one."""
        return self._special.get("bos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens`: put the model's first (and last) tokens around it; by default unless the text
        begins with the first token already, as one made by a chat template does. Raises TokenizerError.
        """
        if add_special_tokens is None:
            add_special_tokens = not (self.bos_token and text.startswith(self.bos_token))
        try:  # as a batch of one: all other threads stand still while the library's `encode` runs, a second for 1 MB
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError(f"the text cannot be encoded: {error}") from error
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids beyond the vocabulary have none."""
        if len(token_ids) < MANY_TOKENS:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes of one token of a byte-level vocabulary; none for skipped and unknown ones."""
        table = self.known_bytes(skip_special_tokens)
        if not 0 <= token_id < len(table):
            return b""
        known = table[token_id]
        if known is None:
            skipped = skip_special_tokens and token_id in self._special_ids
            token = None if skipped else self._backend.id_to_token(token_id)
            known = table[token_id] = b"" if token is None else _byte_level_bytes(token)
        return known

    def known_bytes(self, skip_special_tokens: bool = True) -> list[bytes | None]:
        """By id, what `token_bytes` gave for each token so far; `None` for those it was not asked for."""
        return self._bytes_shown if skip_special_tokens else self._bytes

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation. Raises ChatTemplateError, also when the model has no template."""
        if self._chat_template is None:
            raise ChatTemplateError(f"{self._source} has no chat template; send text or token ids instead")
        return self._chat_template.render(messages, add_generation_prompt, variables)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation: the template writes all special tokens itself."""
        return self.encode(
            self.apply_chat_template(messages, add_generation_prompt), add_special_tokens=False
        )


def _backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not directory.is_dir():
        raise TokenizerError(f"no model directory '{directory}'")
    if not path.is_file():
        others = [
            p.name for p in directory.iterdir() if p.name in ("tokenizer.model", "vocab.json", "vocab.txt")
        ]
        hint = f" (it has {', '.join(sorted(others))}; convert it to a fast tokenizer)" if others else ""
        raise TokenizerError(f"no tokenizer.json in '{directory}'{hint}")
    text = _read(path, MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"'{path}' is not a tokenizer: {reason}") from error


def _read(path: Path, limit: int) -> str:
    try:
        size = path.stat().st_size
        if size > limit:
            raise TokenizerError(f"'{path}' has {size} bytes, more than the {limit} allowed")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise TokenizerError(f"cannot read '{path}': {error.strerror}") from error


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one when there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path, MAX_CONFIG_BYTES))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"'{path}' holds a {type(value).__name__}, not an object")
    return value


def _token_text(value: object) -> str | None:
    """A special token is its text, or an object that has it as `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _eos_token_ids(
    backend: tokenizers.Tokenizer, special: Mapping[str, str], generation: Mapping[str, Any]
) -> tuple[int, ...]:
    """End-of-text ids: those of the generation config first, and the tokenizer's own."""
    listed = generation.get("eos_token_id")
    ids = [listed] if isinstance(listed, int) else listed if isinstance(listed, list) else []
    if "eos_token" in special:
        ids = [*ids, backend.token_to_id(special["eos_token"])]
    return tuple(dict.fromkeys(token for token in ids if type(token) is int))


def _chat_template(
    directory: Path, config: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    """The template in its own file, or else in the config: one text, or several by name of which `default` counts."""
    path = directory / "chat_template.jinja"
    source: Any = config.get("chat_template")
    if path.is_file():
        source = _read(path, MAX_CONFIG_BYTES)
    elif isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return ChatTemplate(source, special) if isinstance(source, str) else None


def _is_byte_level(decoder: object) -> bool:
    """Whether a decoder, as `tokenizer.json` describes it, joins bytes and does nothing else."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders")
        return isinstance(parts, list) and len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: each byte as a printable character. Printable bytes stand for themselves, the rest follow
    from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """A token's bytes; a token outside the alphabet (an added one) stands for its own text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8")
