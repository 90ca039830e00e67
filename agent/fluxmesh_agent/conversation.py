"""One coordinator's conversation with the agent: what it was answered, and what it is sent next."""

from __future__ import annotations

import asyncio
import logging

from fluxmesh.wire.messages import Message, Refused
from fluxmesh.wire.protocol import ProtocolError
from fluxmesh.wire.tasks import end
from fluxmesh.wire.transport.base import Connection, ConnectionClosed

log = logging.getLogger(__name__)

REMEMBERED = 256  # answers, for requests that come again


class CoordinatorConversation:
    """Sends in the background: a coordinator that reads slowly holds nobody up."""

    def __init__(self, connection: Connection) -> None:
        self.name = ""  # who it is across connections, once it has said hello
        self.waits = False  # for the answer to what it asked last
        self.user, self.label = connection.user, connection.label
        self._connection = connection
        self._outbox: asyncio.Queue[tuple[Message, int]] = asyncio.Queue()
        self._answers: dict[int, Message | None] = {}  # None while it is being done
        self._task = asyncio.create_task(self._send())

    def tell(self, report: Message) -> None:
        """Sends what was not asked for."""
        self._outbox.put_nowait((report, 0))

    def answer(self, seq: int, answer: Message) -> None:
        self._answers[seq] = answer
        while len(self._answers) > REMEMBERED:
            del self._answers[next(iter(self._answers))]
        self._outbox.put_nowait((answer, seq))

    def repeats(self, seq: int) -> bool:
        """Whether this request came before; it is answered as then, and not done again."""
        if seq not in self._answers:
            self._answers[seq] = None
            return False
        known = self._answers[seq]
        if known is not None:
            self._outbox.put_nowait((known, seq))
        return True

    async def close(self) -> None:
        await end(self._task)

    async def _send(self) -> None:
        while True:
            message, seq = await self._outbox.get()
            try:
                await self._connection.send(message, seq)
            except ConnectionClosed:
                return  # whoever receives from it is told as well
            except ProtocolError as error:
                # What can't be sent must not silence all that comes after it.
                kind = type(message).__name__
                log.error("%s: %s could not be sent: %s", self.label, kind, error)
                if seq:
                    text = f"The agent's {kind} could not be sent; see `fluxmesh logs`."
                    self._outbox.put_nowait((Refused("internal", text), seq))
