"""How long a request will take, from how long those before it took. Pure.

The planner knows better, but asks every host; a line of sixty is reckoned again whenever somebody
joins it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fluxmesh.planning.learning import RECENT, typical


@dataclass
class Durations:
    """By model: seconds a step and pixel."""

    _rates: dict[str, tuple[float, ...]] = field(default_factory=dict)  # the latest last

    def learn(self, model: str, work: float, seconds: float) -> None:
        """A request of so much `work` (images x pixels x steps) took `seconds`."""
        if work <= 0 or seconds <= 0:
            return
        self._rates[model] = (*self._rates.get(model, ()), seconds / work)[-RECENT:]

    def guess(self, model: str, work: float) -> float:
        """Seconds; 0: nothing is known of this model."""
        rates = self._rates.get(model)
        return typical(rates) * work if rates else 0.0
