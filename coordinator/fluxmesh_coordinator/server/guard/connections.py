"""HTTP connections whose clients must get on: uvicorn's, with deadlines.

uvicorn ends connections that are idle between two requests, and waits for ever for the first one,
and for the rest of one that has begun: a few hundred clients that send a byte a minute would hold
all connections (known as Slowloris). So would those that ask for pictures and take none of them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
SEND_SECONDS = 60.0  # in which a client must have taken what waits to be sent


class ImpatientProtocol(H11Protocol):
    """Cuts off a client whose request's headers have not all come in time."""

    header_seconds = HEADER_SECONDS
    send_seconds = SEND_SECONDS
    _deadline: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None  # ends who takes nothing

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_serving():
            self._disarm()
        else:
            self._arm()

    def pause_writing(self) -> None:
        """More waits to be sent than the transport wants to hold.

        Closing would wait for all of it to be taken, so who takes nothing is cut off.
        """
        super().pause_writing()
        if self._sending is None:
            self._sending = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _is_serving(self) -> bool:
        """Whether a request's headers are all there, and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self._cut)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self) -> None:
        self._deadline = None
        if not self._is_serving() and not self.transport.is_closing():
            self.transport.abort()
