"""The coordinator's clock: what did not happen while it stood still is no host's fault.

A laptop sleeps, or somebody presses Ctrl-Z: to whoever wakes, every host is late, and most have
given the connection up. Used by `job_runner.py` and `agent_pool.py`.
"""

from __future__ import annotations

import math
import time

from fluxmesh.machine.clock import RunningClock

WAKING = 10.0  # seconds after a standstill, in which hosts may turn out to have given us up


class OwnClock(RunningClock):
    """Knows for a while that it has just woken."""

    def __init__(self) -> None:
        self._woke = -math.inf
        super().__init__()

    def woke(self, now: float, seconds: float) -> None:
        self._woke = now

    @property
    def has_just_woken(self) -> bool:
        return time.monotonic() - self._woke < WAKING
