"""The agent's side of the real transport: one ROUTER for all coordinators, behind the gate.

A coordinator's connection is known by the identity that it chose, and belongs to the key that its
first message proved: messages of another key under that identity are dropped. It ends when its TCP
connection does, which the socket's monitor tells by the file descriptor, the same that ZeroMQ notes
on each message.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from typing import Self

import zmq
import zmq.asyncio

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.storage.keys import Allowlist, Keys
from fluxmesh.wire.messages import Message, Refused
from fluxmesh.wire.protocol import Frame, ProtocolError, decode, encode
from fluxmesh.wire.tasks import end
from fluxmesh.wire.transport import sockets
from fluxmesh.wire.transport.base import ConnectionClosed
from fluxmesh.wire.transport.gate import DOMAIN, Gate
from fluxmesh.wire.transport.mailbox import Mailbox

log = logging.getLogger(__name__)

_FULL = 1024  # messages that a peer sent and nobody received: it floods, and is put out
_TOLD = sockets.REFUSALS[zmq.EVENT_HANDSHAKE_FAILED_AUTH]  # by the gate, with the key


class AcceptedConnection:
    """One coordinator, as the agent sees it."""

    def __init__(self, listener: CurveListener, identity: bytes, user: str, label: str) -> None:
        self.user = user
        self.label = label
        self.box = Mailbox()
        self._listener = listener
        self._identity = identity

    async def send(self, message: Message, seq: int = 0) -> None:
        """Waits while the peer's line is full. Raises `ConnectionClosed`."""
        frames = [self._identity, *encode(message, seq)]
        waited = 0.0
        while not self.box.ended:
            if await self._listener.push(frames):
                await asyncio.sleep(0)  # who sends in a loop lets others run, the end be noticed
                return
            if waited >= self._listener.deadlines.full_line:
                await self._end(f"{self.label} does not read what it is sent.")
                break
            await asyncio.sleep(0.05)
            waited += 0.05
        raise ConnectionClosed(self.box.reason)

    async def receive(self) -> tuple[int, Message]:
        """Answers what is no message with `Refused`. Raises `ConnectionClosed`."""
        while True:
            frames = await self.box.get()
            try:
                return decode(frames)
            except ProtocolError as error:
                log.warning("%s: refused a message: %s", self.label, error)
                await self.send(Refused(error.code, str(error)), error.seq)

    async def close(self) -> None:
        await self._end(f"The connection of {self.label} is closed.")

    async def _end(self, reason: str) -> None:
        if not self.box.ended:
            with contextlib.suppress(ConnectionClosed):  # it is gone by itself
                await self._listener.push([self._identity, sockets.GOODBYE])
            self.box.end(reason)


class CurveListener:
    """Listens with CURVE for those in an allowlist; make one with `await CurveListener.open`."""

    def __init__(
        self, router: zmq.asyncio.Socket, gate: Gate, address: str, deadlines: Deadlines
    ) -> None:
        self.address, self.deadlines = address, deadlines
        self._router = router
        self._gate = gate
        self._monitor = sockets.watch(router)
        self._arrived: asyncio.Queue[AcceptedConnection | None] = asyncio.Queue()
        self._by_identity: dict[bytes, AcceptedConnection] = {}
        self._by_descriptor: dict[int, bytes] = {}  # identities of those that have said something
        self._strangers: dict[int, str] = {}  # descriptors of those that have not
        self._why = ""  # of the last handshake that failed
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(
        cls, address: str, keys: Keys, allowlist: Allowlist, deadlines: Deadlines = DEADLINES
    ) -> Self:
        """Listens at "host:port", no other address; port 0 takes a free one.

        Raises `ConnectionClosed` where the address is taken, or not this machine's.
        """
        host, port = sockets.split(address)
        context = zmq.asyncio.Context()
        gate = Gate(context, allowlist)
        router = context.socket(zmq.ROUTER)
        listener = cls(router, gate, address, deadlines)
        try:
            sockets.guard(router, host)
            router.setsockopt(zmq.CURVE_SERVER, 1)
            router.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
            router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
            router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            router.setsockopt(zmq.ROUTER_HANDOVER, 0)
            router.bind(f"tcp://{sockets.join(host, port)}")
        except zmq.ZMQError as error:
            await listener.close()
            raise ConnectionClosed(f"Can't listen at {address}: {error.strerror}.") from None
        bound = router.getsockopt_string(zmq.LAST_ENDPOINT)
        listener.address = sockets.join(host, sockets.split(bound)[1])
        listener._tasks = [
            asyncio.create_task(listener._read()),
            asyncio.create_task(listener._watch()),
        ]
        return listener

    async def accept(self) -> AcceptedConnection:
        """The next coordinator. Raises `ConnectionClosed` after `close`."""
        connection = await self._arrived.get()
        if connection is None:
            self._arrived.put_nowait(None)  # for whoever asks again
            raise ConnectionClosed(f"{self.address} is closed.")
        return connection

    async def close(self) -> None:
        for connection in list(self._by_identity.values()):
            await connection.close()
        await end(*self._tasks)
        self._tasks = []
        self._arrived.put_nowait(None)
        if not self._router.closed:
            sockets.close_watched(self._router, self._monitor)
            await self._gate.close()
            # Waits until what was sent last has left, `Deadlines.linger` at most.
            await asyncio.to_thread(self._router.context.term)

    async def push(self, frames: list[Frame]) -> bool:
        """Hands frames, the identity first, to ZeroMQ; False where the peer's line is full.

        Raises `ConnectionClosed` where the peer is gone.
        """
        try:
            await self._router.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            self._drop(bytes(frames[0]))
            detail = "" if error.errno == errno.EHOSTUNREACH else f": {error.strerror}"
            raise ConnectionClosed(f"The coordinator is gone{detail}.") from None
        return True

    async def _read(self) -> None:
        while True:
            frames = await self._router.recv_multipart(copy=False)
            # A descriptor may be a new peer's already: hear first that the old one left.
            for event in await sockets.events_now(self._monitor):
                self._note(event)
            try:
                await self._sort(frames)
            except Exception:  # one message that can't be sorted must not end all conversations
                log.exception("a message could not be sorted, and is dropped")

    async def _sort(self, frames: list[zmq.Frame]) -> None:
        """Puts a message into its connection's box; opens a connection for a new identity."""
        identity = frames[0].bytes
        user = str(frames[-1].get("User-Id"))
        name = self._gate.name(user)
        connection = self._by_identity.get(identity)
        if name is None or (connection is not None and connection.user != user):
            self._gate.tell(f"dropped a message of the key {user}, which may not send it")
            if connection is not None and connection.user == user:
                connection.box.end(f"{connection.label} is no longer in the allowlist.")
                await self._goodbye(identity)
            return
        if connection is None:
            origin = str(frames[-1].get("Peer-Address"))
            connection = AcceptedConnection(self, identity, user, f"{name} at {origin}")
            self._by_identity[identity] = connection
            descriptor = int(frames[-1].get(zmq.SRCFD))
            self._by_descriptor[descriptor] = identity
            self._strangers.pop(descriptor, None)
            self._arrived.put_nowait(connection)
        if len(connection.box) >= _FULL:
            log.warning("%s floods and is put out", connection.label)
            connection.box.end(f"{connection.label} sent more than was received.")
            await self._goodbye(identity)
        connection.box.put([frame.buffer for frame in frames[1:]])

    async def _watch(self) -> None:
        while True:
            self._note(await sockets.next_event(self._monitor))

    def _note(self, event: sockets.SocketEvent) -> None:
        if event.kind == zmq.EVENT_ACCEPTED:
            self._strangers[event.value] = sockets.peer_of(event.value)
        elif event.kind in sockets.REFUSALS:
            self._why = sockets.REFUSALS[zmq.Event(event.kind)]
        elif event.kind == zmq.EVENT_DISCONNECTED:
            identity = self._by_descriptor.pop(event.value, None)
            if identity is not None:
                self._drop(identity)
            elif (origin := self._strangers.pop(event.value, None)) and self._why != _TOLD:
                why = self._why or "it said nothing, or sent a frame over the limit"
                self._gate.tell(f"refused {origin}: {why}")
            self._why = ""

    def _drop(self, identity: bytes) -> None:
        connection = self._by_identity.pop(identity, None)
        if connection is not None and not connection.box.ended:
            connection.box.end(f"{connection.label} is gone, or silent for too long.")
            log.info(
                "%s is gone: it left, fell silent or sent a frame over the limit", connection.label
            )

    async def _goodbye(self, identity: bytes) -> None:
        with contextlib.suppress(ConnectionClosed):  # it is gone by itself
            await self.push([identity, sockets.GOODBYE])
