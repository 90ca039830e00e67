"""The time in which this process ran: what did not happen while it stood still is no host's fault.

A laptop sleeps, or somebody presses Ctrl-Z: to whoever wakes, every host is late, and most have
given the connection up. Used by `conduct.py`.
"""

from __future__ import annotations

import math
import time

STANDSTILL = 2.0  # seconds without a tick, in which this process did not run
WAKING = 10.0  # seconds after that, in which hosts may turn out to have given us up


class OwnClock:
    """Seconds that pass while `tick` is called several times a second."""

    def __init__(self) -> None:
        self._lost = 0.0  # seconds in which it stood still
        self._woke = -math.inf
        self.begin()

    def begin(self) -> None:
        """From now on there are ticks again."""
        self._last = (time.monotonic(), time.time())

    def tick(self) -> None:
        """Notices that this process stood still."""
        before, self._last = self._last, (time.monotonic(), time.time())
        spent, seen = (now - then for now, then in zip(self._last, before, strict=True))
        if spent > STANDSTILL:
            self._lost += spent
        if max(spent, seen) > STANDSTILL:  # some machines' clocks sleep with them
            self._woke = self._last[0]

    @property
    def now(self) -> float:
        return time.monotonic() - self._lost

    @property
    def has_just_woken(self) -> bool:
        return time.monotonic() - self._woke < WAKING
