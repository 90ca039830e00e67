"""What a job has told so far, for as many as want to hear it, from any point on.

Events are numbered one after another, so that who was cut off goes on where they stopped. Where
that was in an earlier log of the same job id, of the server before or of a job that was cancelled,
they hear this one from its start: `clock_number` begins each log above all those before it. Of the
previews of an image only the newest is kept: they are large, and nobody looks at an old one. Lives
in the server's event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

LAST = ("done", "error", "cancelled")  # the kinds after which nothing comes


@dataclass(frozen=True)
class JobEvent:
    """One thing that a job told."""

    number: int
    kind: str
    data: dict[str, Any]


def clock_number() -> int:
    """Milliseconds since 1970: a log that begins with it begins above an earlier one's last number,
    for no job tells an event a millisecond."""
    return time.time_ns() // 1_000_000


class EventLog:
    """A job's events, in order."""

    def __init__(self, first: int = 0) -> None:
        """`first` is the number of its first event."""
        self._first = first
        self._events: list[JobEvent | None] = []  # None: a preview that a newer one replaces
        self._previews: dict[int, int] = {}  # by image: where its newest preview stands there
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
        if kind == "preview":
            old = self._previews.get(data["image"])
            if old is not None:
                self._events[old] = None
            self._previews[data["image"]] = len(self._events)
        if kind in LAST:
            for old in self._previews.values():
                self._events[old] = None
        self._events.append(JobEvent(self._first + len(self._events), kind, data))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, first: int = 0) -> AsyncIterator[JobEvent]:
        """Events from number `first` on, as they come, to the last."""
        place = max(0, first - self._first)
        while True:
            while place < len(self._events):
                event = self._events[place]
                place += 1
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
