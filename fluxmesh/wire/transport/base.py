"""The interface of every transport: a `Listener` accepts, a `Dialer` connects, conversations begin.

A `Connection` is one conversation. It ends once and for all: what was sent and not received may be
lost, and who wants to go on dials again (and says `Hello` again). Messages arrive in the order in
which they were sent, or not at all.
"""

from __future__ import annotations

from typing import Protocol

from fluxmesh.errors import FluxmeshError
from fluxmesh.wire.messages import Message


class ConnectionClosed(FluxmeshError):
    """The other side is gone, or this side closed; nothing more comes or goes."""


class NotAllowed(ConnectionClosed):
    """The agent does not know our key, or is not the one whose key we know."""


class Connection(Protocol):
    """One conversation with one peer."""

    @property
    def user(self) -> str:
        """The peer's public key, as it was proved; on a dialled connection the agent's."""
        ...

    @property
    def label(self) -> str:
        """Who that is, for log lines."""
        ...

    async def send(self, message: Message, seq: int = 0) -> None:
        """Hands over a message. Raises `ConnectionClosed`."""
        ...

    async def receive(self) -> tuple[int, Message]:
        """The next (seq, message). Raises `ConnectionClosed`.

        What is no message raises `ProtocolError` on a dialled connection. On an accepted one the
        transport itself answers it with `Refused` and logs it, and goes on.
        """
        ...

    async def close(self) -> None:
        """Ends it; a `receive` that waits raises `ConnectionClosed`. Twice is harmless."""
        ...


class Listener(Protocol):
    """An agent's side."""

    @property
    def address(self) -> str:
        """Where it listens: "host:port"."""
        ...

    async def accept(self) -> Connection:
        """The next peer that has proved its key and sent something. Raises `ConnectionClosed`."""
        ...

    async def close(self) -> None:
        """Ends all connections too, and frees the port."""
        ...


class Dialer(Protocol):
    """A coordinator's side."""

    async def connect(self, address: str, server_key: str, seconds: float = 5.0) -> Connection:
        """A conversation with the agent at "host:port" that proves `server_key`.

        Raises `ConnectionClosed` where none answers within `seconds`, proves another key, or does
        not know ours.
        """
        ...

    async def close(self) -> None:
        """Ends all connections too."""
        ...
