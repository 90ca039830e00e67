"""How fast this machine is now, for limits in seconds that were set on another one."""

from __future__ import annotations

import time

REFERENCE = 0.0175  # seconds of `_work` on the two processors on which limits were set


def _work() -> int:
    total = 0
    seen: dict[int, int] = {}
    for number in range(200_000):
        total += number & 7
        seen[number & 255] = total
    return len(seen)


def slowness() -> float:
    """How many times as long plain Python takes here and now; 1 where it is no slower."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        _work()
        times.append(time.perf_counter() - start)
    return max(1.0, min(times) / REFERENCE)
