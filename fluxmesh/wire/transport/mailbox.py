"""Frames that have arrived and wait to be received, until the end of a connection."""

from __future__ import annotations

import asyncio
from collections import deque

from fluxmesh.wire.protocol import Frame
from fluxmesh.wire.transport.base import ConnectionClosed


class Mailbox:
    """A queue with an end. What arrived before the end can still be taken."""

    def __init__(self) -> None:
        self._items: deque[list[Frame]] = deque()
        self._changed = asyncio.Event()
        self._reason = ""

    def __len__(self) -> int:
        return len(self._items)

    @property
    def ended(self) -> bool:
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """Why it ended: a sentence."""
        return self._reason

    def put(self, frames: list[Frame]) -> None:
        """Nothing goes in after the end."""
        if not self._reason:
            self._items.append(frames)
            self._changed.set()

    def end(self, reason: str) -> None:
        """The first reason stays."""
        self._reason = self._reason or reason
        self._changed.set()

    async def get(self) -> list[Frame]:
        """The oldest. Raises `ConnectionClosed` when there is none and there will be none."""
        while not self._items:
            if self._reason:
                raise ConnectionClosed(self._reason)
            self._changed.clear()
            await self._changed.wait()
        taken = self._items.popleft()
        self._changed.set()
        return taken

    async def room(self, most: int) -> None:
        """Waits until fewer than `most` are there, or it has ended."""
        while len(self._items) >= most and not self._reason:
            self._changed.clear()
            await self._changed.wait()
