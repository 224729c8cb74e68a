"""What gateway and engine say to each other: typed frames, msgpack, each behind its length.

Data only, and the codec. A frame is four bytes of big-endian length and then that many bytes of msgpack; what
does not decode to one of the types below, or is longer than its cap, is refused, and nothing in it can name code
to run. This module knows nothing of sockets, threads or models.

Times are seconds on `time.monotonic()`, which both processes share. New fields go last and have defaults.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from drift_core.sampling_params import SamplingParams
from drift_scheduler.errors import DriftError

MAX_FRAME_BYTES: Final = 32 * 1024 * 1024
"""A prompt of a million tokens takes 5 MB."""

HEADER_BYTES: Final = 4
_HEADER: Final = struct.Struct(">I")

if TYPE_CHECKING:
    TokenIds = array[int]
else:
    TokenIds = array  # has no parameters before Python 3.12


class FrameError(DriftError):
    """Bytes that are not a frame of ours, or a frame that is too long."""


# ---------------------------------------------------------------------------------- gateway to engine


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Generate one output for `prompt`.

    `id` is unique among requests in flight. `sampling.n` is 1 and `sampling.stop` is empty: the gateway fans out
    and looks for stop strings. `arrival`: when the gateway received the request. `priority`: lower is earlier.
    Targets are seconds, `inf` for none. Requests share cached prefixes only with those of the same `salt`;
    `reuse_tokens`: leading tokens of the prompt worth keeping in the cache, `None` when nobody said.
    """

    id: str
    prompt: list[int]
    sampling: SamplingParams
    slo_ttft: float
    slo_tbt: float
    slo_e2e: float | None
    slo_class: str
    priority: int
    salt: str
    arrival: float
    reuse_tokens: int | None = None


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """Stop working on a request; one that has ended already is no error.

    `stop`: it has said enough (a stop string came), so it ends as STOP and not as CANCELLED.
    """

    id: str
    stop: bool = False


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """End the engine process in order."""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """Is the engine's loop alive? Answered by a `Pong` of the same number, from that loop."""

    number: int


class SetPolicy(msgspec.Struct, frozen=True, array_like=True, tag="set_policy"):
    """Decide by other policies ("name:option=value") from the next step on; `None` keeps what is there.

    This and the three below are answered by an `Answer` to the same `call`, and done between two steps.
    """

    call: int
    dispatch: str | None = None
    partition: str | None = None


class FlushPrefixes(msgspec.Struct, frozen=True, array_like=True, tag="flush_prefixes"):
    """Forget all cached prefixes that no request uses."""

    call: int


class StartTrace(msgspec.Struct, frozen=True, array_like=True, tag="start_trace"):
    """Begin a decision log at `path`, which must not exist."""

    call: int
    path: str


class StopTrace(msgspec.Struct, frozen=True, array_like=True, tag="stop_trace"):
    """End the decision log."""

    call: int


class Join(msgspec.Struct, frozen=True, array_like=True, tag="join"):
    """Serve another gateway as well, which listens at `path`: Ready first, then its own requests' steps.

    Answered by an `Answer` to the same `call`. Only the gateway that started the engine asks for this.
    """

    call: int
    path: str


# ---------------------------------------------------------------------------------- engine to gateway


class Starting(msgspec.Struct, frozen=True, array_like=True, tag="starting"):
    """Start-up is in `phase` ("load weights"), `fraction` of it done, 0 to 1; the first frame of a phase begins it."""

    phase: str
    fraction: float = 0.0


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine takes requests from now on. `directory`: where model and tokenizer were read from.

    `menu`: the partitions (prefill units, decode units). `kv_tokens`: positions the KV pool holds in all.
    `prefill_seconds`: what its cost model expects of prompts of some numbers of tokens, alone on the whole device;
    `decode_seconds`: of decode steps over some numbers of short requests, likewise.
    """

    model: str
    directory: str
    pid: int
    vocab_size: int
    max_context: int
    num_layers: int
    dtype: str
    device: str
    units: int
    menu: list[tuple[int, int]]
    dispatch: str
    partition: str
    page_tokens: int
    kv_pages: int
    kv_tokens: int
    max_running: int
    slo_ttft: float
    slo_tbt: float
    eos_token_ids: list[int] = []
    prefill_seconds: list[tuple[int, float]] = []
    decode_seconds: list[tuple[int, float]] = []


class AcceptedItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The scheduler has queued a request behind `queue_position` others."""

    id: str
    queue_position: int = 0
    cached_tokens: int | None = None


def pack_ids(ids: Iterable[int]) -> TokenIds:
    """Token ids as they are sent: 32 bits each, in one piece that both ends copy as it is.

    A number in msgpack takes as many bytes, and hundreds of them took each end tens of microseconds at every step.
    """
    return array("i", ids)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of a sampled token, and the likeliest tokens beside it (id, log probability)."""

    logprob: float
    top: list[tuple[int, float]] = []


class TokensItem(msgspec.Struct, frozen=True, array_like=True):
    """One new token for each listed request; `first`: they are first tokens (all or none).

    `token_ids`: made by `pack_ids`. `logprobs`: by request id, for those that asked. On the wire no ids stand for
    those of the latest item that was not of first tokens.
    """

    ids: list[str]
    token_ids: TokenIds
    first: bool = False
    logprobs: dict[str, TokenLogprob] | None = None


class FinishedItem(msgspec.Struct, frozen=True, array_like=True):
    """The end of a request; nothing about it follows. A token that ends it comes in the same frame.

    `reason` is a `drift_scheduler.domain.FinishReason` value; times are on the engine's clock, `None` where the
    request never got that far. `id_in_use`: rejected because another gateway has a request of that id in flight.
    """

    id: str
    reason: str
    message: str = ""
    arrival: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    finished: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    tbt_max: float = 0.0
    late_tokens: int = 0
    id_in_use: bool = False


class LoadItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How full the engine is, and how far its cost model's predictions were off lately (0.1 is 10%).

    `overload_s`: once TTFT targets are lost for certain, the seconds that the prompts before a newcomer take at best;
    0 as long as none is (`drift_scheduler.overload`).
    """

    waiting: int
    running: int
    free_pages: int
    preemptions: int = 0
    prefill_error: float | None = None
    decode_error: float | None = None
    overload_s: float = 0.0


class OtherItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request of another gateway that the scheduler has queued: as much of it as forecasts need.

    `id` is the engine's own, which no gateway's requests have. `slo_tbt`: seconds. `min_tokens`: it does not end
    sooner, unless at one of its stop strings, which only its gateway knows.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    priority: int
    slo_tbt: float
    slo_class: str
    cached_tokens: int | None = None
    min_tokens: int = 0


class Others(msgspec.Struct, frozen=True, array_like=True):
    """What a step has to tell of other gateways' requests: who was queued, who got a first token, how many tokens
    there were in all (the first ones included), and how requests ended."""

    accepted: list[OtherItem] = []
    first: list[str] = []
    tokens: int = 0
    finished: list[FinishedItem] = []


class StepFrame(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Everything one engine step has to tell, for all requests of a gateway. `time`: of the step, and of its tokens.

    `partition` (prefill units, decode units) and `sharing` are in force from `time` on, until the next frame;
    `None` with both lanes idle. `prefill_requests` and `decode_requests`: in the lanes now, 0 for an idle lane.
    Lanes and `load` are the whole engine's. `others`: where several gateways share it, and those had something.
    """

    time: float
    accepted: list[AcceptedItem] = []
    tokens: list[TokensItem] = []
    finished: list[FinishedItem] = []
    partition: tuple[int, int] | None = None
    sharing: str | None = None
    prefill_requests: int = 0
    decode_requests: int = 0
    load: LoadItem | None = None
    others: Others | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine cannot start or go on; it exits after this frame. `message` is one line for a person.

    `usage`: the fault is in what it was asked to do (a missing checkpoint, an unknown policy), so starting it
    again with the same configuration is no use.
    """

    message: str
    usage: bool = True


class Pong(msgspec.Struct, frozen=True, array_like=True, tag="pong", gc=False):
    """The engine's loop is alive. `busy`: seconds for which the work that a lane does has been under way, the longest;
    `predicted`: seconds that were predicted for that work. Both 0 when nothing runs.
    """

    number: int
    busy: float = 0.0
    predicted: float = 0.0


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """What became of a `call`. `error`: why it was not done, in one line; empty when it was.

    `dispatch`, `partition`: the policies now in force. `pages`: how many were forgotten. `path`, `steps`: of the
    decision log.
    """

    call: int
    error: str = ""
    dispatch: str = ""
    partition: str = ""
    pages: int = 0
    path: str = ""
    steps: int = 0


Call = SetPolicy | FlushPrefixes | StartTrace | StopTrace
ToEngine = Submit | Cancel | Shutdown | Ping | Call | Join
ToGateway = Starting | Ready | StepFrame | Failed | Pong | Answer


def _bytes_of(value: Any) -> bytes:
    """What msgpack has no word for. Both ends run on one machine, so the order of bytes is theirs."""
    if isinstance(value, array):
        return value.tobytes()
    raise TypeError(f"a frame cannot hold a {type(value).__name__}")


def _of_bytes(kind: type, data: Any) -> TokenIds:
    if kind is not array or not isinstance(data, bytes):
        raise TypeError(f"{kind.__name__} does not come as {type(data).__name__}")
    found = array("i")
    found.frombytes(data)  # ValueError unless whole numbers of them
    return found


_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_bytes_of)
_TO_ENGINE: Final[msgspec.msgpack.Decoder[ToEngine]] = msgspec.msgpack.Decoder(ToEngine)


def encode_frame(frame: ToEngine | ToGateway) -> bytes:
    """The frame's bytes, its length in front. Raises FrameError when it is longer than MAX_FRAME_BYTES."""
    body = _ENCODER.encode(frame)
    _check_length(len(body))
    return _HEADER.pack(len(body)) + body


def decode_to_engine(body: bytes) -> ToEngine:
    """The frame in `body` (without its length). Raises FrameError when it is none of the gateway's."""
    try:
        return _TO_ENGINE.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError(f"not a frame from a gateway: {error}") from error


class FramesForGateway:
    """Encodes what an engine tells one gateway, in the order in which it is sent.

    From step to step mostly the same requests get a token. With hundreds of them their ids are nearly all of a frame,
    so that they are sent once: to leave them out saves both ends most of their work on it.
    """

    def __init__(self) -> None:
        self._ids: list[str] | None = None

    def encode(self, frame: ToGateway) -> bytes:
        """The frame's bytes, its length in front. Raises FrameError when it is longer than MAX_FRAME_BYTES."""
        if not isinstance(frame, StepFrame) or not frame.tokens:
            return encode_frame(frame)
        ids, items = self._ids, []
        for item in frame.tokens:
            if item.first or not item.ids:
                items.append(item)
            elif item.ids == ids:
                items.append(TokensItem([], item.token_ids, False, item.logprobs))
            else:
                items.append(item)
                ids = item.ids
        data = encode_frame(msgspec.structs.replace(frame, tokens=items))
        self._ids = ids
        return data


class FramesOfEngine:
    """Decodes the frames of one engine; ids that are the same again are the same list."""

    def __init__(self) -> None:
        self._decoder: msgspec.msgpack.Decoder[ToGateway] = msgspec.msgpack.Decoder(
            ToGateway, dec_hook=_of_bytes
        )
        self._ids: list[str] = []

    def decode(self, body: bytes) -> ToGateway:
        """The frame in `body` (without its length). Raises FrameError when it is none of the engine's."""
        try:
            frame = self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise FrameError(f"not a frame from an engine: {error}") from error
        if isinstance(frame, StepFrame):
            for place, item in enumerate(frame.tokens):
                if item.first or not item.token_ids:
                    continue
                if item.ids:
                    self._ids = item.ids
                else:
                    frame.tokens[place] = TokensItem(self._ids, item.token_ids, False, item.logprobs)
        return frame


class FrameSplitter:
    """Cuts a byte stream into frame bodies, however the bytes arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes, in order. Raises FrameError on a length above the cap."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            (length,) = _HEADER.unpack_from(buffer, start)
            _check_length(length)
            stop = start + HEADER_BYTES + length
            if len(buffer) < stop:
                break
            bodies.append(bytes(buffer[start + HEADER_BYTES : stop]))
            start = stop
        del buffer[:start]
        return bodies


def _check_length(length: int) -> None:
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes is longer than the {MAX_FRAME_BYTES} allowed")
