"""A transport inside of one process and one event loop: a whole mesh in one test.

Messages pass through the real codec, so that what could not travel fails here too. `Network` plays
the part of the addresses.
"""

from __future__ import annotations

import asyncio
import itertools
import logging

from fluxmesh.wire.messages import Message, Refused
from fluxmesh.wire.protocol import Frame, ProtocolError, decode, encode
from fluxmesh.wire.transport.base import ConnectionClosed
from fluxmesh.wire.transport.mailbox import Mailbox

log = logging.getLogger(__name__)


class InprocConnection:
    """One end; `twin` is the other."""

    def __init__(self, user: str, label: str, accepted: bool) -> None:
        self.user = user
        self.label = label
        self._accepted = accepted
        self.box = Mailbox()
        self.twin: InprocConnection | None = None

    async def send(self, message: Message, seq: int = 0) -> None:
        await self.send_frames([bytes(frame) for frame in encode(message, seq)])

    async def send_frames(self, frames: list[Frame]) -> None:
        """What a peer might send that has no respect for the codec."""
        if self.box.ended or self.twin is None:
            raise ConnectionClosed(self.box.reason)
        self.twin.box.put(frames)
        await asyncio.sleep(0)

    async def receive(self) -> tuple[int, Message]:
        while True:
            frames = await self.box.get()
            try:
                return decode(frames)
            except ProtocolError as error:
                if not self._accepted:
                    raise
                log.warning("%s: refused a message: %s", self.label, error)
                await self.send(Refused(error.code, str(error)), error.seq)

    async def close(self) -> None:
        self.box.end(f"The connection of {self.label} is closed.")
        if self.twin is not None:
            self.twin.box.end(f"{self.twin.label} is gone.")


class InprocListener:
    """Made by `Network.listen`."""

    def __init__(self, network: Network, address: str) -> None:
        self.address = address
        self._network = network
        self._arrived: asyncio.Queue[InprocConnection | None] = asyncio.Queue()
        self._connections: list[InprocConnection] = []

    async def accept(self) -> InprocConnection:
        connection = await self._arrived.get()
        if connection is None:
            self._arrived.put_nowait(None)  # for whoever asks again
            raise ConnectionClosed(f"{self.address} is closed.")
        return connection

    async def close(self) -> None:
        self._network.listeners.pop(self.address, None)
        for connection in self._connections:
            await connection.close()
        self._arrived.put_nowait(None)

    def arrive(self, connection: InprocConnection) -> None:
        self._connections.append(connection)
        self._arrived.put_nowait(connection)


class InprocDialer:
    """Made by `Network.dialer`."""

    def __init__(self, network: Network, user: str) -> None:
        self._network = network
        self._user = user
        self._connections: list[InprocConnection] = []

    async def connect(
        self, address: str, server_key: str = "", seconds: float = 5.0
    ) -> InprocConnection:
        listener = self._network.listeners.get(address)
        if listener is None:
            raise ConnectionClosed(f"Nobody listens at {address}.")
        near = InprocConnection(server_key, address, accepted=False)
        far = InprocConnection(self._user, self._user, accepted=True)
        near.twin, far.twin = far, near
        self._connections.append(near)
        listener.arrive(far)
        return near

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()


class Network:
    """The addresses of one process."""

    def __init__(self) -> None:
        self.listeners: dict[str, InprocListener] = {}
        self._ports = itertools.count(1)

    def listen(self, address: str = "") -> InprocListener:
        """Listens at `address`, or at a free one."""
        address = address or f"inproc:{next(self._ports)}"
        assert address not in self.listeners, f"{address} is taken"
        listener = self.listeners[address] = InprocListener(self, address)
        return listener

    def dialer(self, user: str = "user") -> InprocDialer:
        """A coordinator's side, as the user of that name."""
        return InprocDialer(self, user)
