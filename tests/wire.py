"""Real listeners and dialers on loopback, and a man in the middle between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.storage.keys import Allowlist, Keys
from fluxmesh.wire.messages import Done, Heartbeat
from fluxmesh.wire.transport.base import Connection
from fluxmesh.wire.transport.dialer import CurveDialer, DialledConnection
from fluxmesh.wire.transport.listener import AcceptedConnection, CurveListener


def run(main: Coroutine[Any, Any, None], seconds: float = 200) -> None:
    """Runs a test that waits; one that hangs fails."""
    asyncio.run(asyncio.wait_for(main, seconds))


@dataclass
class Wire:
    """An agent's listener that knows one user, anna, and a dialer with her keys."""

    keys: Keys
    anna: Keys
    allowlist: Allowlist
    listener: CurveListener
    dialer: CurveDialer
    dialers: list[CurveDialer] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.address.rpartition(":")[2])

    def as_user(self, keys: Keys) -> CurveDialer:
        """A dialer with other keys."""
        self.dialers.append(CurveDialer(keys))
        return self.dialers[-1]

    async def pair(self, address: str = "") -> tuple[DialledConnection, AcceptedConnection]:
        """A conversation of anna's that works: her end, the agent's."""
        near = await self.dialer.connect(address or self.listener.address, self.keys.public)
        await near.send(Heartbeat(), 1)
        far = await self.listener.accept()
        assert await far.receive() == (1, Heartbeat())
        return near, far

    async def works(self) -> None:
        """The agent still serves whoever may talk to it."""
        near, far = await self.pair()
        await echo(near, far)
        await near.close()


async def echo(near: Connection, far: Connection) -> None:
    await near.send(Heartbeat(), 8)
    assert await far.receive() == (8, Heartbeat())
    await far.send(Done(), 8)
    assert await near.receive() == (8, Done())


@contextlib.asynccontextmanager
async def wire(folder: Path, deadlines: Deadlines = DEADLINES) -> AsyncIterator[Wire]:
    keys, anna = Keys.new(), Keys.new()
    allowlist = Allowlist(folder / "authorized")
    allowlist.add("anna", anna.public)
    listener = await CurveListener.open("127.0.0.1:0", keys, allowlist, deadlines)
    made = Wire(keys, anna, allowlist, listener, CurveDialer(anna))
    try:
        yield made
    finally:
        for dialer in (made.dialer, *made.dialers):
            await dialer.close()
        await made.listener.close()


class MiddleBox:
    """Passes bytes between a client and a port, remembers the client's, stops or adds on demand."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.heard = bytearray()  # what the client sent
        self.passing = asyncio.Event()
        self.passing.set()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.to_agent: asyncio.StreamWriter | None = None

    @classmethod
    async def before(cls, port: int) -> Self:
        middle = cls(port)
        middle._server = await asyncio.start_server(middle._serve, "127.0.0.1", 0)
        middle.address = f"127.0.0.1:{middle._server.sockets[0].getsockname()[1]}"
        return middle

    _server: asyncio.Server
    address: str

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        agent_reader, agent_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, agent_writer]
        self.to_agent = agent_writer
        self._tasks += [
            asyncio.create_task(self._pass(reader, agent_writer, self.heard)),
            asyncio.create_task(self._pass(agent_reader, writer, bytearray())),
        ]

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await self.passing.wait()
                heard += data
                writer.write(data)
                await writer.drain()
        writer.close()
