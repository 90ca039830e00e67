"""Messages over a byte stream: the socket between an agent and its engine.

    u32 number of frames | u32 length of each | the frames of `protocol.py`      (big endian)

`Channel` is the engine's end, which blocks and has threads; `AsyncChannel` the agent's, a
`transport.Connection` like any other. When either process ends, the other reads the end of the
stream: `ConnectionClosed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Self

from fluxmesh.wire import limits
from fluxmesh.wire.messages import Message
from fluxmesh.wire.protocol import Frame, ProtocolError, decode, encode
from fluxmesh.wire.transport.base import ConnectionClosed

_COUNT = struct.Struct(">I")
ROOM = 1 << 20  # bytes on their way; macOS gives 8 KiB, through which latents go in 128 pieces


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a stream, with as much room of `ROOM` as the system allows."""
    ends = socket.socketpair()
    for end in ends:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, buffer, ROOM)
    return ends


def _prefix(frames: list[Frame]) -> bytes:
    lengths = [memoryview(frame).nbytes for frame in frames]
    return struct.pack(f">{len(lengths) + 1}I", len(lengths), *lengths)


def _check_count(head: bytes) -> int:
    count: int = _COUNT.unpack(head)[0]
    if not 1 <= count <= limits.MAX_FRAMES:
        raise ProtocolError(f"A message of {count} frames; at most {limits.MAX_FRAMES}.")
    return count


def _check_lengths(head: bytes) -> tuple[int, ...]:
    lengths: tuple[int, ...] = struct.unpack(f">{len(head) // 4}I", head)
    if max(lengths) > limits.MAX_FRAME:
        raise ProtocolError(f"A frame of {max(lengths)} bytes; at most {limits.MAX_FRAME}.")
    if sum(lengths) > limits.MAX_MESSAGE:
        raise ProtocolError(f"A message of {sum(lengths)} bytes; at most {limits.MAX_MESSAGE}.")
    return lengths


class Channel:
    """The blocking end. `send` may be called from any thread; `receive` from one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()

    def send(self, message: Message, seq: int = 0) -> None:
        """Raises `ConnectionClosed` when the other end is gone."""
        frames = encode(message, seq)
        with self._lock:
            try:
                self._socket.sendall(_prefix(frames))
                for frame in frames:
                    self._socket.sendall(frame)
            except OSError as error:
                raise ConnectionClosed(f"The other end of the stream is gone: {error}.") from None

    def receive(self) -> tuple[int, Message]:
        """(seq, message). Raises `ConnectionClosed` at the end, `ProtocolError` for nonsense.

        After a `ProtocolError` the stream may be out of step and is of no more use.
        """
        count = _check_count(self._read(_COUNT.size))
        return decode([self._read(size) for size in _check_lengths(self._read(4 * count))])

    def close(self) -> None:
        """Wakes a thread that sits in `receive`, too."""
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        left = memoryview(data)
        while left:
            try:
                got = self._socket.recv_into(left)
            except OSError as error:
                raise ConnectionClosed(f"The other end of the stream is gone: {error}.") from None
            if not got:
                raise ConnectionClosed("The other end of the stream is gone.")
            left = left[got:]
        return bytes(data)


class AsyncChannel:
    """The agent's end, for asyncio; make one with `await AsyncChannel.open(sock)`."""

    user = "engine"
    label = "engine"

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._lock = asyncio.Lock()
        self._count = 0  # what is known of the message that arrives now
        self._lengths: tuple[int, ...] = ()
        self._frames: list[Frame] = []

    @classmethod
    async def open(cls, sock: socket.socket) -> Self:
        """Takes over a connected stream socket."""
        return cls(*await asyncio.open_connection(sock=sock))

    async def send(self, message: Message, seq: int = 0) -> None:
        """Waits while the other end reads too slowly. Raises `ConnectionClosed`."""
        frames = encode(message, seq)
        async with self._lock:
            try:
                self._writer.writelines([_prefix(frames), *frames])
                await self._writer.drain()
            except (OSError, RuntimeError) as error:
                raise ConnectionClosed(f"The other end of the stream is gone: {error}.") from None
            if self._writer.is_closing():
                raise ConnectionClosed("The stream was closed before all was sent.")

    async def receive(self) -> tuple[int, Message]:
        """As `Channel.receive`. It may be cancelled: the next one goes on where this one was."""
        try:
            if not self._count:
                self._count = _check_count(await self._reader.readexactly(_COUNT.size))
            if not self._lengths:
                head = await self._reader.readexactly(4 * self._count)
                self._lengths = _check_lengths(head)
            while len(self._frames) < self._count:
                size = self._lengths[len(self._frames)]
                self._frames.append(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            raise ConnectionClosed("The other end of the stream is gone.") from None
        frames, self._frames, self._lengths, self._count = self._frames, [], (), 0
        return decode(frames)

    async def close(self) -> None:
        """What an engine that hangs has not read within a second is lost."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)
        except TimeoutError:
            self._writer.transport.abort()
        except OSError:  # it ended in an error, which is an end as well
            return
