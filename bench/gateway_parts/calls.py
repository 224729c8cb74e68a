"""gRPC calls with as little of a client as will do, so that what is measured is the server.

A grpc.aio client takes as long over a message as the server does; with both on two cores, and the engine beside them,
it was the client that was too slow, and what a server sent too fast for it lay in the client's memory and counted as
the server's delay. This one speaks just the HTTP/2 that is needed (RFC 9113, RFC 7541 without its tables) and takes a
tenth of that. Knows gRPC's framing and no message; statuses are not read: who ends a call without its last message has
failed it.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final, cast

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
CANCEL: Final = 8
ROOM: Final = 2**31 - 1
"""The flow-control window of connection and streams: nothing is ever held back."""

_FRAME = struct.Struct(">HBBBI")  # length in three bytes, type, flags, stream
_MESSAGE = struct.Struct(">BI")  # compressed or not, length


class Call:
    """A call in progress: `message` gets each message's bytes, `ended` is called once nothing follows."""

    def __init__(
        self, connection: Connection, number: int, message: Callable[[bytes], None], ended: Callable[[], None]
    ) -> None:
        self.message, self.ended = message, ended
        self._connection, self._number = connection, number
        self._rest = b""

    def data(self, data: bytes) -> None:
        """Some bytes of messages."""
        data = self._rest + data if self._rest else data
        start, size = 0, len(data)
        while size - start >= _MESSAGE.size:
            _, length = _MESSAGE.unpack_from(data, start)
            stop = start + _MESSAGE.size + length
            if stop > size:
                break
            self.message(data[start + _MESSAGE.size : stop])
            start = stop
        self._rest = data[start:]

    def cancel(self) -> None:
        """The server hears that nobody reads on; `ended` is called."""
        self._connection.send(RST_STREAM, 0, self._number, struct.pack(">I", CANCEL))
        self._connection.end(self._number)


class Connection(asyncio.Protocol):
    """One connection to a server; made by `connect`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._calls: dict[int, Call] = {}
        self._next = 1
        self._rest = b""
        self._received = 0
        self._transport: asyncio.Transport | None = None
        self.closed = False
        """Whether it is gone, by whichever end: it takes no more calls."""

    @classmethod
    async def connect(cls, target: str) -> Connection:
        """To HOST:PORT, in the clear."""
        host, _, port = target.rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(target), host, int(port))
        return connection

    def call(
        self, path: str, request: bytes, message: Callable[[bytes], None], ended: Callable[[], None]
    ) -> Call:
        """Call a method of one request."""
        number, self._next = self._next, self._next + 2
        call = self._calls[number] = Call(self, number, message, ended)
        self.send(HEADERS, END_HEADERS, number, _headers(path, self._target))
        self.send(DATA, END_STREAM, number, _MESSAGE.pack(0, len(request)) + request)
        return call

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def send(self, kind: int, flags: int, number: int, body: bytes) -> None:
        assert self._transport is not None
        length = len(body)
        self._transport.write(_FRAME.pack(length >> 8, length & 255, kind, flags, number) + body)

    def end(self, number: int) -> None:
        """Nothing of that call follows."""
        call = self._calls.pop(number, None)
        if call is not None:
            call.ended()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(SETTINGS, 0, 0, struct.pack(">HIHI", 2, 0, 4, ROOM))  # no push; room in streams
        self.send(WINDOW_UPDATE, 0, 0, struct.pack(">I", ROOM - 65535))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        for number in list(self._calls):
            self.end(number)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        start, size, calls = 0, len(data), self._calls
        while size - start >= _FRAME.size:
            high, low, kind, flags, number = _FRAME.unpack_from(data, start)
            stop = start + _FRAME.size + (high << 8) + low
            if stop > size:
                break
            if kind == DATA and not flags:
                if (call := calls.get(number)) is not None:
                    call.data(data[start + _FRAME.size : stop])
            else:
                self._other(kind, flags, number, data[start + _FRAME.size : stop])
            start = stop
        self._rest = data[start:]
        self._received += size
        if self._received > ROOM // 2:
            self.send(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received))
            self._received = 0

    def _other(self, kind: int, flags: int, number: int, body: bytes) -> None:
        if kind == DATA:
            assert not flags & PADDED, "nobody pads to a client like this"
            if (call := self._calls.get(number)) is not None:
                call.data(body)
        if kind in (SETTINGS, PING) and not flags & ACK:
            self.send(kind, ACK, 0, body if kind == PING else b"")
        if (kind in (HEADERS, DATA) and flags & END_STREAM) or kind == RST_STREAM:
            self.end(number)
        if kind == GOAWAY:
            self.close()


def _headers(path: str, target: str) -> bytes:
    """As literals that enter no table; method and scheme are in the one that all have."""

    def text(value: str) -> bytes:
        assert len(value) < 127
        return bytes((len(value),)) + value.encode()

    return (
        b"\x83\x86\x04"  # :method POST, :scheme http, :path
        + text(path)
        + b"\x01"  # :authority
        + text(target)
        + b"\x00"
        + text("te")
        + text("trailers")
        + b"\x0f\x10"  # content-type
        + text("application/grpc")
    )
