"""What a fake engine remembers of a training, and what it says: the part of `fakes.FakeEngine`.

The state is one number: how many updates it has behind it. Whoever loses one, or makes one twice,
gets another.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fluxmesh.wire import messages
from fluxmesh.wire.messages import training

SIZE = 100  # numbers that are trained


class FakeTraining:
    """Does units of a training at once."""

    def __init__(self) -> None:
        self.features: set[str] = set()
        self.vectors: dict[str, np.ndarray] = {}
        self.update: int | None = None

    def work(self, unit: messages.Message, content: str) -> Iterator[messages.Report]:
        """Its reports, one a `next`; `content` is of the files that the engine reads."""
        job, ring_generation = getattr(unit, "job", ""), getattr(unit, "ring_generation", 0)
        match unit:
            case training.PutVector():
                assert unit.total == SIZE
                vector = self.vectors.setdefault(unit.vector, np.zeros(SIZE, np.float32))
                vector[unit.offset : unit.offset + len(unit.numbers)] = unit.numbers
            case training.OpenTraining():
                assert (unit.update > 0) == bool(self.vectors)
                if unit.update:  # the state says how old it is: see `GiveVectors`
                    assert self.vectors["weights"][0] == unit.update
                self.update = unit.update
                yield training.Opened(
                    job=job, ring_generation=ring_generation, trained=SIZE, content=content
                )
            case training.PutFeatures():
                self.features.add(unit.name)
            case training.DropFeatures():
                self.features -= set(unit.features)
            case training.Update():
                assert unit.update == self.update
                for number in unit.numbers:
                    yield training.Computed(
                        job=job, ring_generation=ring_generation, number=number, seconds=0.5
                    )
                self.update += 1
                yield training.UpdateDone(
                    job=job,
                    ring_generation=ring_generation,
                    update=self.update,
                    loss=1 / self.update,
                    norm=1.0,
                    rate=0.1,
                    images=8,
                    bad=0,
                    seconds=1.0,
                    peak_bytes=100,
                )
            case training.GiveVectors():
                assert self.update is not None
                for name, is_last in (("weights", False), ("first", True)):
                    yield training.VectorPart(
                        job=job,
                        ring_generation=ring_generation,
                        update=self.update,
                        vector=name,
                        offset=0,
                        total=SIZE,
                        is_last=is_last,
                        numbers=np.full(SIZE, self.update, np.float32),
                    )
            case training.Validate():
                yield training.HeldOut(job=job, ring_generation=ring_generation, loss=0.5)
            case training.PaintProgress():
                yield training.ProgressPainted(
                    job=job, ring_generation=ring_generation, pixels=np.zeros((8, 8, 3), np.uint8)
                )
            case training.CloseTraining():
                yield training.Closed(job=job, ring_generation=ring_generation)
