"""Text and conversations to token ids and back: bounded in size, and off the event loop when they are long.

Knows the served model's tokenizer; nothing of requests' other fields or of engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

from drift_core.frames import Ready
from drift_core.tokenizer import Tokenizer
from drift_gateway.refusal import Reason, Refusal, invalid
from drift_gateway.supervisor import Served
from drift_gateway.v1 import generation_pb2 as pb
from drift_scheduler.errors import DriftError

MAX_CHARACTERS: Final = 4 * 1024 * 1024
MAX_MESSAGES: Final = 4096
MAX_DETOKENIZED: Final = 1024 * 1024
INLINE_CHARACTERS: Final = 2000
"""Texts up to this long are tokenised on the event loop (well under a millisecond), longer ones in a thread."""

MAX_PENDING_CHARACTERS: Final = 8 * MAX_CHARACTERS
"""Of all texts that wait for a thread; what comes beyond is refused at once."""

T = TypeVar("T")


class HasInput(Protocol):
    """GenerateRequest and TokenizeRequest: both have `text` and `chat`."""

    text: str
    chat: pb.Chat


class Pool:
    """Two threads for long texts, with a bounded queue."""

    def __init__(self, most: int = MAX_PENDING_CHARACTERS) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="drift-tokenize")
        self._most = most
        self._pending = 0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on so many characters. Raises Refusal (QUEUE_FULL) when too much waits already."""
        if size <= INLINE_CHARACTERS:
            return work()
        if self._pending + size > self._most:
            raise Refusal(
                Reason.QUEUE_FULL, f"{self._pending} characters wait to be tokenized already; try again later"
            )
        self._pending += size
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._pending -= size


POOL: Final = Pool()


def tokenizer_of(served: Served, field: str, cure: str = "; give token_ids") -> Tokenizer:
    """The model's tokenizer. Raises Refusal when it has none; `cure` says what to do then."""
    if served.tokenizer is None:
        raise Refusal(Reason.NO_TOKENIZER, f"{field}: model '{served.ready.model}' has no tokenizer{cure}")
    return served.tokenizer


def not_served(model: str, ready: Ready, field: str = "model") -> Refusal:
    """MODEL_NOT_FOUND, naming the model that is served."""
    return Refusal(
        Reason.MODEL_NOT_FOUND, f"model '{model}' is not served here; '{ready.model}' is", field=field
    )


async def text_ids(served: Served, request: HasInput, special: bool | None = None) -> list[int]:
    """Token ids of `request.text`; `special` as in `Tokenizer.encode`."""
    text = request.text
    if not text:
        raise invalid("text", "is empty")
    _check_characters("text", len(text))
    tokenizer = tokenizer_of(served, "text")
    return await _tokenized("text", len(text), lambda: tokenizer.encode(text, special))


async def chat_ids(served: Served, request: HasInput) -> list[int]:
    """Token ids of `request.chat` in the model's own template."""
    chat = request.chat
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        raise invalid("chat.messages", f"{len(chat.messages)} messages are not 1 to {MAX_MESSAGES}")
    for position, message in enumerate(chat.messages):
        if not message.role:
            raise invalid(f"chat.messages[{position}].role", "is empty")
    characters = sum(len(message.role) + len(message.content) for message in chat.messages)
    _check_characters("chat", characters)
    tokenizer = tokenizer_of(served, "chat")
    if not tokenizer.has_chat_template:
        raise Refusal(
            Reason.NO_CHAT_TEMPLATE,
            f"chat: model '{served.ready.model}' has no chat template; give text or token_ids",
        )
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    return await _tokenized("chat", characters, lambda: tokenizer.encode_chat(messages))


def given_ids(field: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids as a client gave them, checked."""
    ids = list(ids)
    if not ids:
        raise invalid(field, "is empty")
    if (highest := max(ids)) >= vocab_size:
        raise invalid(field, f"token id {highest} is not below the vocabulary size {vocab_size}")
    return ids


async def tokenize(request: pb.TokenizeRequest, served: Served) -> pb.TokenizeResponse:
    """GenerationService.Tokenize. Raises Refusal."""
    if request.HasField("model") and request.model != served.ready.model:
        raise not_served(request.model, served.ready)
    match request.WhichOneof("input"):
        case "text":
            ids = await text_ids(served, request, False if request.without_special_tokens else None)
        case "chat":
            ids = await chat_ids(served, request)
        case _:
            raise invalid("input", "is missing; give one of text, chat")
    return pb.TokenizeResponse(token_ids=ids, max_context_tokens=served.ready.max_context)


async def detokenize(request: pb.DetokenizeRequest, served: Served) -> pb.DetokenizeResponse:
    """GenerationService.Detokenize. Raises Refusal."""
    if request.HasField("model") and request.model != served.ready.model:
        raise not_served(request.model, served.ready)
    if len(request.token_ids) > MAX_DETOKENIZED:
        raise invalid("token_ids", f"{len(request.token_ids)} token ids are more than {MAX_DETOKENIZED}")
    tokenizer = tokenizer_of(served, "token_ids", cure="")
    if not request.token_ids:
        return pb.DetokenizeResponse()
    ids = given_ids("token_ids", request.token_ids, served.ready.vocab_size)
    skip = not request.with_special_tokens
    text = await POOL.run(4 * len(ids), lambda: tokenizer.decode(ids, skip_special_tokens=skip))
    return pb.DetokenizeResponse(text=text)


def _check_characters(field: str, characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise invalid(field, f"has {characters} characters, more than {MAX_CHARACTERS}")


async def _tokenized(field: str, characters: int, encode: Callable[[], list[int]]) -> list[int]:
    try:
        ids = await POOL.run(characters, encode)
    except Refusal:
        raise
    except DriftError as error:
        raise invalid(field, str(error)) from error
    if not ids:
        raise invalid(field, "has no tokens")
    return ids
