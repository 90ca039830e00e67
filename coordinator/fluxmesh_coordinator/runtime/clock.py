"""The coordinator's clock: what did not happen while it stood still is no host's fault.

A laptop sleeps, or somebody presses Ctrl-Z: to whoever wakes, every host is late, and most have
given the connection up. Used by `job_runner.py` and `agent_pool.py`.
"""

from __future__ import annotations

import math
import time

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.machine.clock import RunningClock


class OwnClock(RunningClock):
    """Knows for a while that it has just woken."""

    def __init__(self, deadlines: Deadlines = DEADLINES) -> None:
        self._waking = deadlines.waking
        self._woke = -math.inf
        super().__init__()

    def woke(self, now: float, seconds: float) -> None:
        self._woke = now

    @property
    def has_just_woken(self) -> bool:
        return time.monotonic() - self._woke < self._waking
