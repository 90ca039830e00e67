"""A transport that loses, repeats, delays and cuts, for tests: it wraps another one's ends.

What happens to which message follows from `Faults.seed` and the order of the connections and of
their messages alone, so a test that fails fails again.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from fluxmesh.wire.messages import Message
from fluxmesh.wire.transport.base import Connection, ConnectionClosed, Dialer, Listener


@dataclass(frozen=True)
class Faults:
    """How likely each fault is for a message that is sent or received, from 0 to 1."""

    seed: int = 0
    drop: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    seconds: float = 0.05  # of a delay; what comes behind it waits as well
    cut: float = 0.0  # the connection ends, and the message with it
    only: tuple[type[Message], ...] = ()  # kinds that faults happen to; none named means all


class BrokenConnection:
    """One end of a connection, with faults on both ways."""

    def __init__(self, inner: Connection, faults: Faults, number: int) -> None:
        self.user = inner.user
        self.label = inner.label
        self._inner = inner
        self._faults = faults
        self._out = random.Random(f"{faults.seed} {number} out")
        self._in = random.Random(f"{faults.seed} {number} in")
        self._again: list[tuple[int, Message]] = []

    async def send(self, message: Message, seq: int = 0) -> None:
        for _ in range(await self._times(message, self._out)):
            await self._inner.send(message, seq)

    async def receive(self) -> tuple[int, Message]:
        while not self._again:
            seq, message = await self._inner.receive()
            self._again = [(seq, message)] * await self._times(message, self._in)
        return self._again.pop()

    async def close(self) -> None:
        await self._inner.close()

    async def _times(self, message: Message, draw: random.Random) -> int:
        """How often a message arrives, after its delay. Raises `ConnectionClosed` for a cut."""
        faults = self._faults
        if faults.only and not isinstance(message, faults.only):
            return 1  # nor do others change what happens to those: heartbeats come by the clock
        chances = [draw.random() for _ in range(4)]  # always as many, whatever is switched on
        if chances[0] < faults.cut:
            await self._inner.close()
            raise ConnectionClosed(f"{self.label}: cut.")
        if chances[1] < faults.delay:
            await asyncio.sleep(faults.seconds)
        if chances[2] < faults.drop:
            return 0
        return 2 if chances[3] < faults.repeat else 1


class BrokenDialer:
    """Connections that begin well and then suffer `faults`."""

    def __init__(self, inner: Dialer, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._number = 0

    async def connect(
        self, address: str, server_key: str = "", seconds: float = 5.0
    ) -> BrokenConnection:
        connection = await self._inner.connect(address, server_key, seconds)
        self._number += 1
        return BrokenConnection(connection, self._faults, self._number)

    async def close(self) -> None:
        await self._inner.close()


class BrokenListener:
    """The same, on the agent's side."""

    def __init__(self, inner: Listener, faults: Faults) -> None:
        self.address = inner.address
        self._inner = inner
        self._faults = faults
        self._number = 0

    async def accept(self) -> BrokenConnection:
        connection = await self._inner.accept()
        self._number += 1
        return BrokenConnection(connection, self._faults, self._number)

    async def close(self) -> None:
        await self._inner.close()
