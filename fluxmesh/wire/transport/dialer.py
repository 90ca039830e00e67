"""The coordinator's side of the real transport: a DEALER for each agent, never connected twice.

ZeroMQ would connect again by itself and lose what was on the way without a word. Here a connection
that breaks is over; who dials again has a new identity and says `Hello` again.
"""

from __future__ import annotations

import asyncio
import secrets

import zmq
import zmq.asyncio

from fluxmesh.storage.keys import Keys
from fluxmesh.wire.messages import Message
from fluxmesh.wire.protocol import decode, encode
from fluxmesh.wire.tasks import end
from fluxmesh.wire.transport import local_network, sockets
from fluxmesh.wire.transport.base import ConnectionClosed, NotAllowed
from fluxmesh.wire.transport.mailbox import Mailbox

# Until ZeroMQ connects again by itself: a day. Its own "never", -1, ends the connection's line at
# once, with what has arrived and was not read yet; so does the option IMMEDIATE.
_NEVER_MS = 86_400_000
_WAITING = 64  # messages taken off the socket and not received: more wait in ZeroMQ, then in TCP


class DialledConnection:
    """One agent, as the coordinator sees it. Made by `CurveDialer.connect`."""

    def __init__(
        self, sock: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket, user: str, label: str
    ) -> None:
        self.user = user
        self.label = label
        self._socket = sock
        self._monitor = monitor
        self._box = Mailbox()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    @property
    def closed(self) -> bool:
        return self._socket.closed

    async def send(self, message: Message, seq: int = 0) -> None:
        """Waits while the line is full. Raises `ConnectionClosed`."""
        frames = encode(message, seq)
        while not self._box.ended:
            try:
                await self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
                await asyncio.sleep(0)  # who sends in a loop lets others run, the end be noticed
                return
            except zmq.Again:  # full, or gone, which the monitor tells
                await asyncio.sleep(0.02)
            except zmq.ZMQError as error:
                self._box.end(f"The agent at {self.label} is gone: {error.strerror}.")
        raise ConnectionClosed(self._box.reason)

    async def receive(self) -> tuple[int, Message]:
        """Raises `ConnectionClosed`, and `ProtocolError` for what is no message."""
        return decode(await self._box.get())

    async def close(self) -> None:
        self._box.end(f"The connection to {self.label} is closed.")
        await end(*self._tasks)
        sockets.close_watched(self._socket, self._monitor)

    async def _read(self) -> None:
        while not self._box.ended:
            await self._box.room(_WAITING)
            frames = await self._socket.recv_multipart(copy=False)
            if len(frames) == 1 and frames[0].bytes == sockets.GOODBYE:
                self._box.end(f"The agent at {self.label} has closed the connection.")
            else:
                self._box.put([frame.buffer for frame in frames])

    def _has_more(self) -> bool:
        """Whether `_read` has not yet taken all that arrived."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    async def _watch(self) -> None:
        while (await sockets.next_event(self._monitor)).kind != zmq.EVENT_DISCONNECTED:
            continue
        await asyncio.sleep(0.02)  # what arrived last is still on its way through ZeroMQ
        while not self._box.ended and (self._has_more() or len(self._box) >= _WAITING):
            await asyncio.sleep(0.02)
        self._box.end(f"The agent at {self.label} is gone, or silent for too long.")


class CurveDialer:
    """Connects to agents with the keys of a user."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._context = zmq.asyncio.Context()
        self._connections: list[DialledConnection] = []

    async def connect(
        self, address: str, server_key: str, seconds: float = 5.0
    ) -> DialledConnection:
        """As `base.Dialer.connect`; one attempt, which ends at once where nobody listens."""
        host, port = sockets.split(address)
        sock = self._context.socket(zmq.DEALER)
        monitor = sockets.watch(sock)
        try:  # whatever fails, a key that is none too: `close` waits for a socket that is left open
            sockets.guard(sock, host)
            sock.setsockopt(zmq.ROUTING_ID, secrets.token_hex(16).encode())
            sock.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
            sock.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())
            sock.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
            sock.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
            sock.connect(f"tcp://{sockets.join(host, port)}")
            async with asyncio.timeout(seconds):
                await _handshake(monitor, address)
        except BaseException as error:
            sockets.close_watched(sock, monitor)
            reached = isinstance(error, NotAllowed) or not isinstance(error, Exception)
            if not reached and await asyncio.to_thread(local_network.keeps_out, host, port):
                sentence = f"Can't connect to {address}: {local_network.SENTENCE}."
                raise ConnectionClosed(sentence) from None
            if isinstance(error, TimeoutError):
                raise ConnectionClosed(
                    f"No agent answers at {address} within {seconds:.0f} s: it hangs, or a "
                    "firewall drops what comes; see `fluxmesh doctor`."
                ) from None
            if isinstance(error, zmq.ZMQError):
                raise ConnectionClosed(f"Can't connect to {address}: {error.strerror}.") from None
            raise
        connection = DialledConnection(sock, monitor, server_key, address)
        self._connections = [each for each in self._connections if not each.closed]
        self._connections.append(connection)
        return connection

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()
        await asyncio.to_thread(self._context.term)  # waits for what was sent last


async def _handshake(monitor: zmq.asyncio.Socket, address: str) -> None:
    """Waits until the agent has proved its key and knows ours."""
    while True:
        event = await sockets.next_event(monitor)
        if event.kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return
        if event.kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise NotAllowed(
                f"The agent at {address} does not know this user's key; "
                "run `fluxmesh up` to add it."
            )
        if event.kind in (
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
            zmq.EVENT_DISCONNECTED,
        ):
            raise NotAllowed(
                f"What listens at {address} is not the agent whose key is known; "
                "run `fluxmesh up` to learn its key."
            )
        if event.kind in (zmq.EVENT_CLOSED, zmq.EVENT_CONNECT_RETRIED):
            raise ConnectionClosed(f"Nobody listens at {address}; is the agent up?")
