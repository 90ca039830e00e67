"""What the units of work of one engine share: its models, its signs of life, when to stop.

Stands on `residency.py` (the models in memory, the place in a ring). The units (`units.py`,
`painting.py`, `measuring.py`) are functions of it, and `worker.py` does one after another.

In a ring all ranks are given the same `Paint`s, and before each step they agree on whether anyone
was told to stop (`Ranks.most`): a rank that stopped alone would leave the others in a collective.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

from fluxmesh.engine.lookahead import walked
from fluxmesh.engine.residency import ModelStore, WorkerOptions
from fluxmesh.sampling.denoise import DenoisePlan, StepState
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Measure, Paint, Report

GOES_ON, LOADS, STOPS = range(3)  # what a rank does next; in a ring, all do the greatest

Reports = Generator[Report, None, None]


class EngineState(ModelStore):
    """The models of an engine, and what one unit leaves for the next."""

    def __init__(self, options: WorkerOptions | None = None) -> None:
        super().__init__(options)
        self.quiet = ""  # what it does, while it gives no other sign of life
        self.plans: dict[str, tuple[bytes, DenoisePlan]] = {}  # the latest of each placement
        self.warm: set[Any] = set()  # what steps were run at since something was read

    def end_job(self) -> None:
        """Lets go of what only the images of one job share."""
        self.plans.clear()

    def release(self) -> None:
        super().release()
        self.end_job()

    def loading(self, work: messages.Work, component: str) -> Reports:
        """Loads what is missing of a component. Raises `Stopped`, as `load`."""
        for event in self.load(component):
            self.begin("loading")
            self.warm.clear()  # whatever runs next reads new weights, and may take long
            yield messages.LoadProgress(
                job=work.job,
                ring_generation=work.ring_generation,
                component=event.component,
                done_bytes=event.done_bytes,
                total_bytes=event.total_bytes,
            )
        self.quiet = ""

    def walked(
        self, work: Paint | Measure, walk: Iterator[StepState], steps: int, ahead: bool = True
    ) -> Iterator[tuple[StepState, float]]:
        """Steps, evaluated, with their seconds. A cache waits for the device: nothing is ahead."""
        with self.model.bounded_steps(self.latent_size(work)):
            yield from walked(
                walk,
                steps,
                None if work.placement == "data" else self.ring(),
                self.options.stopping,
                pause=lambda: self.options.pause("step"),
                ahead=ahead,
            )

    def agree(self, work: Paint | Measure, own: int) -> int:
        """What all ranks do, if this one would do `own`: `STOPS` goes before all else."""
        if self.options.stopping():
            own = STOPS
        if work.placement == "data":
            return own
        start = time.perf_counter()
        most = self.ring().most(own)
        self.count(agree_seconds=time.perf_counter() - start)
        return most

    def stops(self, work: Paint | Measure) -> bool:
        """Whether to stop: in a ring, on all ranks or on none."""
        return self.agree(work, GOES_ON) == STOPS

    def latent_size(self, work: Paint | Decode | Measure) -> tuple[int, int]:
        """Height and width of this work's latents. Raises `UsageError` for a size that has none."""
        downsampling = self.model.checkpoint.autoencoder.downsampling
        size = (work.height // downsampling, work.width // downsampling)
        self.model.check_size(size, None)
        return size

    def begin_step(self, shape: Any) -> None:
        """As `begin`, of a step: it may take long where none was run at this `shape`."""
        self.begin(messages.WARM_STEP if shape in self.warm else "first step")

    def begin(self, quiet: str, phase: str = "") -> None:
        """From here on the unit gives no sign until it is done."""
        self.quiet = quiet
        if phase:
            self.options.pause(phase)
