"""What a job has told so far, for as many as want to hear it, from any point on.

Events are numbered from 0, so that who was cut off goes on where they stopped. Of the previews of
an image only the newest is kept: they are large, and nobody looks at an old one. Lives in the
server's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

LAST = ("done", "error", "cancelled")  # the kinds after which nothing comes


@dataclass(frozen=True)
class JobEvent:
    """One thing that a job told."""

    number: int  # from 0
    kind: str
    data: dict[str, Any]


class EventLog:
    """A job's events, in order."""

    def __init__(self) -> None:
        self._events: list[JobEvent | None] = []  # None: a preview that a newer one replaces
        self._previews: dict[int, int] = {}  # by image: where its newest preview stands
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        last = self._events[-1] if self._events else None
        return last is not None and last.kind in LAST

    @property
    def last(self) -> JobEvent | None:
        """What was told last."""
        return self._events[-1] if self._events else None

    def latest(self, kind: str) -> JobEvent | None:
        """The newest event of a kind."""
        return next((e for e in reversed(self._events) if e is not None and e.kind == kind), None)

    def append(self, kind: str, data: dict[str, Any]) -> None:
        """Tells everybody who follows. What comes after the end is dropped."""
        if self.is_over:
            return
        number = len(self._events)
        if kind == "preview":
            old = self._previews.get(data["image"])
            if old is not None:
                self._events[old] = None
            self._previews[data["image"]] = number
        if kind in LAST:
            for old in self._previews.values():
                self._events[old] = None
        self._events.append(JobEvent(number, kind, data))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, first: int = 0) -> AsyncIterator[JobEvent]:
        """Events from number `first` on, as they come, to the last."""
        number = max(0, first)
        while True:
            while number < len(self._events):
                event = self._events[number]
                number += 1
                if event is not None:
                    yield event
            if self.is_over:
                return
            await self._changed.wait()

    async def over(self) -> JobEvent:
        """The last event, once it is there."""
        while not self.is_over:
            await self._changed.wait()
        assert self.last is not None
        return self.last
