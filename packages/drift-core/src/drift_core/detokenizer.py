"""Text from tokens as they come: never half a character, never half a stop string.

Knows a tokenizer only by what it asks of it, and nothing of requests or streams. One detokenizer per output.

Byte-level vocabularies (Llama 3, Qwen, the demo model) are decoded byte by byte, so what is pushed and finished
is exactly what decoding all tokens at once gives, invalid bytes included. Other vocabularies are decoded in a short
window behind the last tokens (vLLM's and TGI's method, since a decoder may treat the start of a text specially);
there an invalid byte after valid ones of the same run may read differently. Both take constant time per token.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from operator import itemgetter
from typing import Final, Protocol

MAX_PENDING_TOKENS: Final = 64
"""Tokens that may wait for the rest of a character before they are decoded as they are."""

TOKENS_BEFORE: Final = (8, 16, 32)
"""Of the prompt, looked at to tell how the output goes on; more where so few begin amid a character that is its end."""

_REPLACEMENT: Final = "\ufffd"


class TokenText(Protocol):
    """What a detokenizer asks of a tokenizer."""

    @property
    def byte_level(self) -> bool:
        """Whether a text is the bytes of its tokens, one after another."""

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes of a token of a byte-level vocabulary; none for what is skipped."""

    def known_bytes(self, skip_special_tokens: bool = True) -> list[bytes | None]:
        """By id, those that were asked for so far, and `None`."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all tokens."""


class IncrementalDetokenizer:
    """Decodes one output piece by piece and ends it at the first stop string to be complete.

    `stop`: strings that end the text; where two end at the same character the longer one is taken. The text ends
    before the stop string, or behind it with `include_stop`. `skip_special_tokens`: leave them out of the text.
    `prompt`: what the output goes on from. Its text is not shown, but a first token may read otherwise after another
    one: some vocabularies leave out the space that a text begins with.
    """

    def __init__(
        self,
        tokenizer: TokenText,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        prompt: Sequence[int] = (),
    ) -> None:
        self._decoder = (
            _ByteDecoder(tokenizer, skip_special_tokens)
            if tokenizer.byte_level
            else _WindowDecoder(tokenizer, skip_special_tokens, prompt)
        )
        self._stops = _StopSearch(stop, include_stop) if stop else None
        if not stop:  # one call less for each message of a stream
            self.push = self._decoder.push  # type: ignore[method-assign]

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, once one has."""
        return None if self._stops is None else self._stops.found

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain after these tokens; nothing once it has stopped."""
        if self.stopped is not None:
            return ""
        text = self._decoder.push(token_ids)
        return text if self._stops is None else self._stops.push(text)

    def finish(self) -> str:
        """No more tokens come: what was held back, an unfinished character as U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._decoder.finish()
        if self._stops is None:
            return text
        return self._stops.push(text) + self._stops.finish()


class _ByteDecoder:
    """Joins the tokens' bytes; an unfinished character waits for the rest.

    Tokens that were seen before are looked up in a list, all of them in one call: with tens of tokens in a message
    their text is most of the work.
    """

    def __init__(self, tokenizer: TokenText, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._known = tokenizer.known_bytes(skip_special_tokens)
        self._rest = b""

    def push(self, token_ids: Sequence[int]) -> str:
        try:
            found = itemgetter(*token_ids)(self._known)
            data = found if type(found) is bytes else b"".join(found)  # of one there is no tuple
        except (TypeError, IndexError):  # new and so None, unknown, or none at all
            token_bytes, skip = self._tokenizer.token_bytes, self._skip
            data = b"".join([token_bytes(token, skip) for token in token_ids])
        if self._rest:
            return self._whole_characters(self._rest + data)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return self._whole_characters(data)

    def _whole_characters(self, data: bytes) -> str:
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def finish(self) -> str:
        rest, self._rest = self._rest, b""
        return rest.decode(errors="replace")


class _WindowDecoder:
    """Decodes from a token that has been shown already, and shows what was added to its text."""

    def __init__(self, tokenizer: TokenText, skip_special_tokens: bool, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._shown = 0  # leading tokens of the window whose text is out
        self._shown_text = ""
        for count in TOKENS_BEFORE:
            text = tokenizer.decode(prompt[-count:], skip_special_tokens)
            if not text.endswith(_REPLACEMENT):
                self._window, self._shown_text = list(prompt[-count:]), text
                self._shown = len(self._window)
                break

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._step(token) for token in token_ids])

    def finish(self) -> str:
        text = self._tokenizer.decode(self._window, self._skip)
        return text[len(self._shown_text) :]

    def _step(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window, self._skip)
        overdue = len(self._window) - self._shown > MAX_PENDING_TOKENS
        if len(text) <= len(self._shown_text) or (text.endswith(_REPLACEMENT) and not overdue):
            if overdue:  # nothing but skipped tokens
                del self._window[self._shown :]
            return ""
        fresh = text[len(self._shown_text) :]
        del self._window[: self._shown]
        self._shown = len(self._window)
        self._shown_text = self._tokenizer.decode(self._window, self._skip)
        return fresh


class _StopSearch:
    """Searches a text that comes in pieces for several strings at once (Knuth, Morris, Pratt for each).

    What is found does not depend on the pieces: the string whose last character comes first.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self.found: str | None = None
        self._include = include
        self._stops = list(stops)
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(self._stops)  # characters of each stop at the end of the text
        self._held = ""  # the longest of those

    def push(self, text: str) -> str:
        """What is certain not to belong to a stop string."""
        matched = self._matched
        for position, character in enumerate(text):
            for index, stop in enumerate(self._stops):
                length, borders = matched[index], self._borders[index]
                while length and stop[length] != character:
                    length = borders[length - 1]
                if stop[length] == character:
                    length += 1
                matched[index] = length
            complete = [
                stop for stop, length in zip(self._stops, matched, strict=True) if length == len(stop)
            ]
            if complete:
                self.found = max(complete, key=len)
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(self.found)]
        whole = self._held + text
        safe = len(whole) - max(matched)
        self._held = whole[safe:]
        return whole[:safe]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop` the length of the longest shorter prefix that is also its end."""
    borders = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = borders[length - 1]
        if stop[index] == stop[length]:
            length += 1
        borders[index] = length
    return borders
