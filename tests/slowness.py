"""How much longer things take while others use the machine too: for limits of seconds in tests.

A limit says what a quiet machine keeps. On one that is shared, as many runs of tests are, whatever
needs a processor waits for it in turn.
"""

from __future__ import annotations

import time

SAMPLE = 0.1  # seconds of a processor
MOST = 10.0  # so that what hangs is found whatever else runs


def slowdown() -> float:
    """Seconds that pass while a busy thread gets one of a processor; 1.0 where nobody else works,
    and `MOST` at most.

    Of this moment: who holds a span of time to a limit asks before and after it.
    """
    begun, spent = time.monotonic(), time.thread_time()
    while time.thread_time() - spent < SAMPLE and time.monotonic() - begun < MOST * SAMPLE:
        pass
    return min(MOST, max(1.0, (time.monotonic() - begun) / (time.thread_time() - spent)))
