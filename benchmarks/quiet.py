"""Is the machine ours while something is measured on it? What others take of its processors.

Beside `plans.py`, whose requests run in many processes: those are named, and all that the machine's
processors do beside them is somebody else's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable

import psutil


class OtherWork:
    """Processors that other processes keep busy, between `begin` and `end`."""

    def __init__(
        self,
        ours: Iterable[int],
        busy: Callable[[], float] | None = None,
        used: Callable[[int], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`ours` are processes beside this one; the rest is for tests."""
        self._pids = {os.getpid(), *ours}
        self._busy, self._used, self._clock = busy or busy_seconds, used or used_seconds, clock
        self._before: tuple[float, float, dict[int, float]] | None = None

    def begin(self) -> None:
        """From here on it counts."""
        self._before = self._look()

    def end(self) -> float:
        """How many processors others kept busy since `begin`; one of ours that ended is theirs."""
        assert self._before is not None, "begin comes first"
        (then, busy, used), (now, busy_now, used_now) = self._before, self._look()
        ours = sum(seconds - used[pid] for pid, seconds in used_now.items() if pid in used)
        return max(0.0, busy_now - busy - ours) / max(now - then, 1e-9)

    def _look(self) -> tuple[float, float, dict[int, float]]:
        used: dict[int, float] = {}
        for pid in self._pids:
            with contextlib.suppress(psutil.Error):
                used[pid] = self._used(pid)
        return self._clock(), self._busy(), used


def busy_seconds() -> float:
    """Processor time of all processes since the machine started, without interrupts."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))


def used_seconds(pid: int) -> float:
    """Processor time of a process. Raises `psutil.Error` where there is none."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
