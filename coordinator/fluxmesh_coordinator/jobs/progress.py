"""How long a job still takes, for those who look at its hosts or wait for them. Pure.

A session asks it beside what it counts itself: the plan's prediction at first, and the job's own
pace once some of its steps are done.
"""

from __future__ import annotations


class RemainingTime:
    """Seconds that are left of one job, whose work is counted in steps of like length."""

    def __init__(self) -> None:
        self._ends: float | None = None  # as it was predicted
        self._since: tuple[float, int] | None = None  # a moment, and the steps done by then

    def predicted(self, seconds: float, now: float) -> None:
        """What is left will take so long; what was seen before was of another plan."""
        self._ends, self._since = now + seconds, None

    def stepped(self, done: int, now: float) -> None:
        """`done` steps are done. The first one is no measure: weights load, kernels compile."""
        if self._since is None or done < self._since[1]:
            self._since = (now, done)

    def left(self, done: int, total: int, now: float) -> float:
        """Seconds until all `total` steps are done; 0 where nothing is known."""
        if self._since is not None and done > self._since[1]:
            begun, first = self._since
            return (now - begun) / (done - first) * max(0, total - done)
        return 0.0 if self._ends is None else max(0.0, self._ends - now)
