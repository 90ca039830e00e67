"""The learning rate of every stage, and the clock of a sitting.

A stage may be cut into sittings of a few minutes on a machine that is lent: each ends by the clock,
and the next one goes on.
"""

from __future__ import annotations

import math
import time

SAVE_EVERY = 200.0  # seconds between two states on the disk
WARM_UP = 200  # steps


def cosine(step: int, steps: int, peak: float, share: float = 0.0, *, since: int) -> float:
    """A cosine from `peak` to zero at `steps`, or at the end of the stage's time.

    `share` is what is spent of that time; whichever is further counts. `since` are the steps of
    this sitting, which begins with a linear warm-up: the optimizer's moments are not kept.
    """
    spent = min(1.0, max(step / max(1, steps), share))
    warmth = min(1.0, (since + 1) / WARM_UP)
    return peak * warmth * 0.5 * (1 + math.cos(math.pi * spent))


class Sitting:
    """The clock of one call of a stage."""

    def __init__(self, seconds: float, budget: float, spent: float = 0.0) -> None:
        self.seconds = seconds  # that this call has
        self.budget = budget  # seconds of the stage, over every sitting
        self.spent = spent  # seconds, in sittings before
        self.began = self.saved = time.monotonic()
        self.first: tuple[float, int] | None = None  # time and steps of the first line

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        return self.elapsed >= self.seconds or self.share >= 1

    @property
    def share(self) -> float:
        """What is spent of the budget."""
        return (self.spent + self.elapsed) / self.budget

    @property
    def is_time_to_save(self) -> bool:
        """Whether the last state is old; the one who asks then saves."""
        due = time.monotonic() - self.saved >= SAVE_EVERY
        if due:
            self.saved = time.monotonic()
        return due

    def progress(self, text: str, steps: int) -> None:
        """Prints a line; from the second on with the steps a second since the first."""
        now = time.monotonic()
        speed = ""
        if self.first is None:
            self.first = now, steps
        else:
            began, before = self.first
            speed = f" {(steps - before) / (now - began):.2f} steps/s"
        print(f"{text}{speed} after {self.elapsed:.0f} s", flush=True)
