"""A unit of work that fluxmesh does not know: all of it stands here, and it travels as any does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.engine.state import Reports
from fluxmesh.training.worker import TrainingWorker
from fluxmesh.wire.messages import Features, ModelWork, WorkReport
from fluxmesh_agent import engine


@dataclass(frozen=True, kw_only=True)
class Rubbed(WorkReport):
    """A side is done."""

    side: int


@dataclass(frozen=True, kw_only=True)
class Polished(WorkReport):
    features: Features = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Polish(ModelWork):
    """Polishes so many sides, each for so long."""

    reports: ClassVar = (Rubbed, Polished)
    doing: ClassVar = "polishing"
    budget: ClassVar = 40.0

    sides: int
    together: bool = False
    waits: bool = False  # until it is told to stop
    features: Features = field(repr=False, compare=False)

    @property
    def is_collective(self) -> bool:
        return self.together

    @property
    def pictures(self) -> float:
        return self.sides


def polish(features: Any, **more: Any) -> Polish:
    fields: dict[str, Any] = {
        "fence": 1,
        "job": "job",
        "ring_generation": 0,
        "weights": ModelVariant("tiny"),
        "sides": 2,
    }
    return Polish(**fields | more, features=features)


class PolishingWorker(TrainingWorker):
    """Does what a worker does, and polishes."""

    def units(self) -> dict[type, Callable[[Any], Reports]]:
        return super().units() | {Polish: self._polish}

    def _polish(self, work: Polish) -> Reports:
        end = time.monotonic() + 20
        while work.waits and not self.options.stopping() and time.monotonic() < end:
            time.sleep(0.01)
        for side in range(work.sides):
            yield Rubbed(job=work.job, ring_generation=work.ring_generation, side=side)
        yield Polished(job=work.job, ring_generation=work.ring_generation, features=work.features)


def main() -> None:
    """An engine that polishes too; its command line is that of any engine."""
    engine.TrainingWorker = PolishingWorker  # type: ignore[misc]
    engine.main()
