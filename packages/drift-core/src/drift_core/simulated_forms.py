"""Outputs in a form, without a model: tokens drawn from those that the form allows, so that it comes to an end soon.

Uniform draws would keep to a form as well, but seldom end it: of a hundred thousand tokens that may go on in a string a
handful close it. So ends are preferred, now and then at first and always after a number of tokens, or a part of those
that the output may have. Knows nothing of executors; the random numbers are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from drift_core.sampling_params import FormKind
    from drift_core.structured import Matcher

Tokens = npt.NDArray[np.int64]

LEISURE_TOKENS: Final = 48
"""Tokens after which ends are preferred at every draw; at most a quarter of what the output may have."""

_TEXT: Final = "q"
"""Stands in none of JSON's own words and numbers: where it may come, the draw is within a text."""
_VISIBLE: Final = "".join(map(chr, range(33, 127)))
_MARKS: Final = " " + "".join(character for character in _VISIBLE if not character.isalnum())
_CLOSING: Final = ("}]", ",", '"')
"""What brings a JSON value nearer to its end, the better first; within a text, the last alone."""
_DEEPENING: Final = "{["


class FormedTokens(Iterator[int]):
    """The tokens of one output in a form. `ended`: the last one was an end-of-text token, after which there are only
    more of them. `matcher`: this output's own; once it has a fault the tokens mean nothing.

    `numbers`: random ones of at least 31 bits, two per token. Before `least` tokens there is no end unless the form
    leaves nothing else.
    """

    def __init__(
        self, matcher: Matcher, kind: FormKind, numbers: Iterator[int], least: int, most: int | None
    ) -> None:
        self.matcher = matcher
        self.ended = False
        self._json = kind == "json_schema"
        self._numbers = numbers
        self._least = least
        self._leisure = min(LEISURE_TOKENS, LEISURE_TOKENS if most is None else most // 4)
        self._made = 0

    def __next__(self) -> int:
        matcher = self.matcher
        if self.ended:
            return matcher.ends[0]
        token = self._draw()
        self._made += 1
        complete = matcher.complete
        matcher.accept(token)
        self.ended = matcher.fault is None and complete and token in matcher.ends
        return token

    def _draw(self) -> int:
        whim, number = next(self._numbers), next(self._numbers)
        hurry = self._made >= self._leisure or not whim % 4
        matcher = self.matcher
        may_end = matcher.complete
        if may_end and self._made >= max(self._least, 1) and (hurry or whim % 2):
            return matcher.ends[0]
        candidates = self._hurried(number) if hurry else self._any()
        if may_end:
            going_on = candidates[~np.isin(candidates, matcher.ends)]
            candidates = going_on if len(going_on) else candidates
        return int(candidates[number % len(candidates)]) if len(candidates) else matcher.ends[0]

    def _any(self) -> Tokens:
        """All that is allowed; between the texts of a JSON value only single characters, where some are: few blanks."""
        if self._json and not self._may(_TEXT) and len(singles := self._singles()):
            return singles
        return np.flatnonzero(self.matcher.allowed())

    def _hurried(self, number: int) -> Tokens:
        """What may bring the form nearer to its end."""
        in_text = self._may(_TEXT)
        if self._json:
            for characters in _CLOSING[-1:] if in_text else _CLOSING:
                if len(found := self._singles(characters)):
                    return found
        if in_text or not self._json:
            return self._of_another_part(number)
        candidates = self._any()
        flat = candidates[~np.isin(candidates, self.matcher.vocabulary.tokens_of(_DEEPENING))]
        return flat if len(flat) else candidates

    def _of_another_part(self, number: int) -> Tokens:
        """A pattern's next part may begin with any character, and does so most often with a mark."""
        for bit, characters in ((1 << 20, _MARKS), (1 << 21, _VISIBLE)):
            if number & bit and len(found := self._singles(characters)):
                return found
        return self._any()

    def _may(self, character: str) -> bool:
        return len(self._singles(character)) > 0

    def _singles(self, characters: str = _VISIBLE) -> Tokens:
        """Allowed tokens of one character each."""
        matcher = self.matcher
        tokens = matcher.vocabulary.tokens_of(characters)
        words = matcher.bits().view(np.uint32)[tokens >> 5]
        allowed: npt.NDArray[np.bool_] = (words >> (tokens & 31).astype(np.uint32)) & 1 == 1
        return tokens[allowed]
