"""The time in which this process ran: a machine that slept, or somebody's Ctrl-Z, cost nobody any.

Most clocks go on meanwhile, and ZeroMQ's does on every system: whoever wakes finds each silence
too long and each deadline missed. Agents count their coordinators' silence by this clock, and the
coordinator its hosts'.
"""

from __future__ import annotations

import time

from fluxmesh.deadlines import DEADLINES


class RunningClock:
    """Seconds that pass while `tick` is called several times a second."""

    def __init__(self) -> None:
        self._lost = 0.0  # seconds in which it stood still
        self.begin()

    def begin(self) -> None:
        """From now on there are ticks again."""
        self._last = (time.monotonic(), time.time())

    def tick(self) -> float:
        """The time now. Notices that this process stood still."""
        before, self._last = self._last, (time.monotonic(), time.time())
        spent, seen = (now - then for now, then in zip(self._last, before, strict=True))
        if spent > DEADLINES.standstill:
            self._lost += spent
        if max(spent, seen) > DEADLINES.standstill:  # some machines' clocks sleep with them
            self.woke(self._last[0], max(spent, seen))
        return self._last[0] - self._lost

    def woke(self, now: float, seconds: float) -> None:
        """It stood still for `seconds`, and goes on at `now` of `time.monotonic`."""

    @property
    def now(self) -> float:
        return time.monotonic() - self._lost
