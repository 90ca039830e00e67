"""What the units of work of one engine share: its models, its signs of life, when to stop.

Stands on `residency.py` (the models in memory, the place in a ring). The units (`units.py`,
`painting.py`, `measuring.py`) are functions of it, and `worker.py` does one after another.

In a ring all ranks are given the same `Paint`s, and before each step they agree on whether anyone
was told to stop (`lookahead.py`): a rank that stopped alone would leave the others in a collective.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from fluxmesh.engine.lookahead import walked
from fluxmesh.engine.residency import ModelStore, WorkerOptions
from fluxmesh.errors import UsageError
from fluxmesh.models.autoencoder.packing import PATCH
from fluxmesh.models.runtime import DenoisePlan
from fluxmesh.sampling.denoise import StepState
from fluxmesh.sampling.preview import Projection
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Measure, Paint, Report, Warm

# What a rank does next; in a ring, all do the greatest. `PLANS`: it makes what images share.
GOES_ON, PLANS, LOADS, STOPS = range(4)

Reports = Generator[Report, None, None]


class EngineState(ModelStore):
    """The models of an engine, and what one unit leaves for the next."""

    def __init__(self, options: WorkerOptions | None = None) -> None:
        super().__init__(options)
        self.quiet = ""  # what it does, while it gives no other sign of life
        self.plan: tuple[bytes, DenoisePlan] | None = None  # the latest, and what it is for
        self.projections: dict[str, Projection] = {}  # for previews, by a checkpoint's content
        self.warm: set[Any] = set()  # what steps were run at since something was read

    def end_job(self) -> None:
        """Lets go of what only the images of one job share."""
        self.plan = None

    def _leave(self) -> None:
        super()._leave()
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
        self,
        work: Paint | Measure,
        walk: Iterator[StepState],
        steps: int,
        *,
        ahead: bool = True,
        first: int = 0,
    ) -> Iterator[tuple[StepState, float]]:
        """Steps, evaluated, with their seconds; `first` were done before.

        A cache waits for the device: nothing is ahead. Raises `NotFiniteError`.
        """
        added = work.added_tokens if isinstance(work, Paint) else 0
        with self.model.bounded_steps(self.latent_size(work), added):
            yield from walked(
                walk,
                steps,
                None if work.placement == "data" else self.ring(),
                self.options.stopping,
                pause=lambda: self.options.pause("step"),
                ahead=ahead,
                no_number=lambda k: self.model.not_finite(f"step {first + k} of {first + steps}"),
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

    def latent_size(self, work: Paint | Decode | Measure | Warm) -> tuple[int, int]:
        """Height and width of this work's latents. Raises `UsageError` for a size that has none."""
        downsampling = self.model.checkpoint.architecture.downsampling
        size = (work.height // downsampling, work.width // downsampling)
        self.model.check_size(size)
        return size

    def check_latents(self, latents: np.ndarray, work: Paint | Decode) -> None:
        """Raises `UsageError` for latents [images, L, 4C] that are not those of the work's size."""
        rows, columns = (side // PATCH for side in self.latent_size(work))
        channels = PATCH**2 * self.model.architecture.latent_channels
        if latents.shape[1:] != (rows * columns, channels):
            raise UsageError(
                f"The latents of {work.height}x{work.width} pixels came as "
                f"{list(latents.shape[1:])}; this model's are {[rows * columns, channels]}."
            )

    def begin_step(self, shape: Any) -> None:
        """As `begin`, of a step: it may take long where none was run at this `shape`."""
        self.begin(messages.WARM_STEP if shape in self.warm else "first step")

    def begin(self, quiet: str, phase: str = "") -> None:
        """From here on the unit gives no sign until it is done."""
        self.quiet = quiet
        if phase:
            self.options.pause(phase)
