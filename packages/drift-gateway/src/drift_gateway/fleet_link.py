"""What a fleet and its gateway processes say to each other, and the socket between them.

A socket pair, made before the process is started; frames as between gateway and engine (`drift_core.frames`): typed,
msgpack, each behind its length. Either end learns from the socket's end that the other is gone.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final, Generic, TypeVar, cast

import msgspec

from drift_core.frames import FrameError, FrameSplitter, Ping, Pong
from drift_gateway.sharing import News

_LENGTH: Final = struct.Struct(">I")
_ENCODER: Final = msgspec.msgpack.Encoder()

# ---------------------------------------------------------------------------------- member to fleet


class Attach(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    """An engine may connect at `path`."""

    path: str


class Serving(msgspec.Struct, frozen=True, array_like=True, tag="serving"):
    """Whether it has an engine, and its port is open."""

    ready: bool


class Trouble(msgspec.Struct, frozen=True, array_like=True, tag="trouble"):
    """Why it cannot serve, in one line."""

    message: str


class Counted(msgspec.Struct, frozen=True, array_like=True, tag="counted"):
    """Its own outputs in flight."""

    call: int
    in_flight: int


class Aborted(msgspec.Struct, frozen=True, array_like=True, tag="aborted"):
    """Requests that it ended."""

    call: int
    request_ids: list[str]


# ---------------------------------------------------------------------------------- fleet to member


class EngineIs(msgspec.Struct, frozen=True, array_like=True, tag="engine"):
    """What became of the engine: the phase that its start-up is in, `None` otherwise, and how often it was started
    again."""

    restarts: int
    phase: str | None = None
    fraction: float = 0.0


class PoliciesAre(msgspec.Struct, frozen=True, array_like=True, tag="policies"):
    """The engine decides by these now."""

    dispatch: str
    partition: str


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="drain"):
    """Refuse new requests, or take them again."""

    draining: bool


class Count(msgspec.Struct, frozen=True, array_like=True, tag="count"):
    """How many outputs are in flight?"""

    call: int


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End these requests; `None` means all."""

    call: int
    request_ids: list[str] | None


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """End in order: seconds to serve on while health says no, and seconds for what runs then."""

    grace: float
    lame_duck: float


class Hurry(msgspec.Struct, frozen=True, array_like=True, tag="hurry"):
    """Wait no longer."""


class Reload(msgspec.Struct, frozen=True, array_like=True, tag="reload"):
    """Take up changed files."""


ToFleet = Attach | Serving | Trouble | Counted | Aborted | News | Pong
ToMember = EngineIs | PoliciesAre | Drain | Count | Abort | Stop | Hurry | Reload | News | Ping
TO_FLEET: Final[msgspec.msgpack.Decoder[ToFleet]] = msgspec.msgpack.Decoder(ToFleet)
TO_MEMBER: Final[msgspec.msgpack.Decoder[ToMember]] = msgspec.msgpack.Decoder(ToMember)

Received = TypeVar("Received")


class FleetLink(asyncio.Protocol, Generic[Received]):
    """One end. `receive` gets every frame of the other end, `lost` is called once when that is gone."""

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[Received],
        receive: Callable[[Received], None],
        lost: Callable[[], None],
    ) -> None:
        self.pong: Pong | None = None
        """The latest answer to a `ping`."""
        self._decoder = decoder
        self._receive = receive
        self._lost = lost
        self._splitter = FrameSplitter()
        self._transport: asyncio.Transport | None = None

    async def open(self, end: socket.socket) -> None:
        """Speak over this end of a socket pair, which is the link's from now on."""
        end.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=end)

    def send(self, frame: ToFleet | ToMember) -> None:
        """Never waits; dropped when the other end is gone."""
        if self._transport is None or self._transport.is_closing():
            return
        body = _ENCODER.encode(frame)
        self._transport.write(_LENGTH.pack(len(body)) + body)

    def ping(self, number: int) -> None:
        """Ask for a sign of life; `pong` gets the answer."""
        self.send(Ping(number))

    def close(self) -> None:
        """What was sent is sent; then the socket is closed."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Implements asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        """Implements asyncio.Protocol; nonsense ends the connection."""
        try:
            frames = [self._decoder.decode(body) for body in self._splitter.feed(data)]
        except (FrameError, msgspec.MsgspecError):
            if self._transport is not None:
                self._transport.abort()
            return
        for frame in frames:
            if isinstance(frame, Pong):
                self.pong = frame
            else:
                self._receive(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        """Implements asyncio.Protocol."""
        self._lost()
