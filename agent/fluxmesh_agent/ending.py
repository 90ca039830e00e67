"""What asks an agent to end: SIGTERM and SIGINT, from the first line that it runs to its last.

Python's own answers are none here: SIGTERM would kill the agent in the middle of what it does, and
asyncio's handlers stand neither before its loop runs nor after.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType


class Ending:
    """Of this process, which hears of signals through it alone from now on.

    Until `becomes` says otherwise a signal ends it at once, with exit code 0: nothing is to be put
    in order before an engine runs.
    """

    def __init__(self) -> None:
        self._end: Callable[[], None] = lambda: os._exit(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it outlives the session that started it
        # Whoever started it may have kept a terminal's Ctrl-C from it; from here on it is its own.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGHUP))

    def becomes(self, end: Callable[[], None]) -> None:
        """From now on a signal calls `end`, between any two lines of the main thread."""
        self._end = end

    def is_under_way(self) -> None:
        """The agent ends: signals change nothing any more."""
        self._end = lambda: None

    def _asked(self, _number: int, _frame: FrameType | None) -> None:
        self._end()
