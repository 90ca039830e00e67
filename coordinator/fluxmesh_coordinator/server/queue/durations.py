"""How long a request will take, from how long those before it took. Pure.

The planner knows better, but asks every host; a line of sixty is reckoned again whenever somebody
joins it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NEWEST = 0.5  # how much the newest request counts


@dataclass
class Durations:
    """By model: seconds a step and pixel."""

    _rates: dict[str, float] = field(default_factory=dict)

    def learn(self, model: str, work: float, seconds: float) -> None:
        """A request of so much `work` (images x pixels x steps) took `seconds`."""
        if work <= 0 or seconds <= 0:
            return
        rate = seconds / work
        before = self._rates.get(model, rate)
        self._rates[model] = (1 - NEWEST) * before + NEWEST * rate

    def guess(self, model: str, work: float) -> float:
        """Seconds; 0: nothing is known of this model."""
        return self._rates.get(model, 0.0) * work
