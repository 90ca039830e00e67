"""Jobs on a simulated mesh: a generation and a training, each with what must come of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from fluxmesh import events
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.models.base import ModelDefaults
from fluxmesh.models.flux1.architecture import Flux1Architecture
from fluxmesh.models.flux1.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    ScheduleConfig,
    T5Config,
)
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.training.data.dataset import Example
from fluxmesh.training.data.encode_units import Caption, Crop, Unit
from fluxmesh.training.plan import prepare
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import UpdateResult
from fluxmesh.wire import messages
from fluxmesh.wire.messages import training
from fluxmesh_coordinator.jobs.generation.session import GenerationSession
from fluxmesh_coordinator.jobs.generation.state import GenerationJob
from fluxmesh_coordinator.jobs.training import tasks
from fluxmesh_coordinator.jobs.training.session import TrainingSession
from fluxmesh_coordinator.jobs.training.tasks import TrainingJob, Wanted
from fluxmesh_coordinator.jobs.types import Links
from tests.fake_training import SIZE
from tests.fakes import FEATURES, expected
from tests.unit.meshes import GB, ask, full, mac, small
from tests.unit.simulation import SimulatedMachine, Simulation

SIZES = small()
PLACEMENTS = ["data", "sequence", "tensor"]
UNITS = (Caption("a cat"), Caption("two dogs"), Crop(0, 0), Crop(1, 0), Crop(2, 1))


class GenerationSimulation(Simulation[GenerationSession]):
    """A request for pictures."""

    def __init__(
        self, hosts: int = 1, *, faults: Callable[[Any], None] | None = None, **keys: Any
    ) -> None:
        placement, force_shard = keys.pop("placement", None), keys.pop("force_shard", False)
        self.sizes: ModelSizes = keys.pop("sizes", SIZES)
        self.request = ask(**{"height": 32, "width": 32, "steps": 3, **keys})
        # Links so fast that more hosts are always faster.
        view = full(*[mac(rank, holds=None) for rank in range(hosts)], rate=1e18)
        links = Links(tuple(replace(link, latency=0.0) for link in view.links))
        job = GenerationJob(
            id="job",
            secret=b"secret",
            request=self.request,
            sizes=self.sizes,
            placement=placement,
            force_shard=force_shard,
        )
        super().__init__(GenerationSession(job), hosts, links)
        self.faults = faults or self.faults
        self.acknowledged: dict[int, int] = {}
        self.repeated: list[tuple[int, int]] = []  # steps made after they were acknowledged

    def stepped(self, machine: SimulatedMachine, image: int, step: int) -> None:
        if step <= self.acknowledged.get(image, 0) and machine.engine.rank == 0:
            self.repeated.append((image, step))

    def reports_now(self, machine: SimulatedMachine, report: messages.Report) -> None:
        if isinstance(report, messages.Stepped) and report.latents is not None:
            known = self.acknowledged.get(report.image, 0)
            self.acknowledged[report.image] = max(known, report.step)

    def run(self, limit: int = 5000) -> Self:
        """Until the end, or until nothing is left that could happen."""
        return self.begin().go_on(limit)

    def go_on(self, limit: int = 5000) -> Self:
        for _ in range(limit):
            if self.end is not None or not self.turn():
                break
        return self

    def check(self) -> None:
        """Every picture once, right, and no acknowledged step made again."""
        assert self.end is not None, self.stuck
        assert self.end.error is None, self.end.error
        pictures = {event.image: event for event in self.of(events.Picture)}
        assert len(self.of(events.Picture)) == len(pictures) == self.request.n_images
        for image, event in pictures.items():
            assert np.array_equal(event.pixels, expected(self.request, self.sizes, image)), image
            assert event.seed == self.request.seed + image
        assert self.repeated == []


@dataclass
class SimulatedJob:
    """As much of a checkpoint as a plan reads."""

    transformer: FluxConfig = field(default_factory=FluxConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    defaults: ModelDefaults = field(default_factory=lambda: ModelDefaults(4, 4.0, 64, 64, 16))

    family = FLUX1

    @property
    def architecture(self) -> Flux1Architecture:
        return Flux1Architecture(
            self.transformer, T5Config(), ClipConfig(), self.autoencoder, self.defaults
        )


@functools.cache
def training_job(**changed: Any) -> TrainingJob:
    fields: dict[str, Any] = {
        "dataset": "data",
        "seed": 1,
        "iterations": 24,
        "grad_accumulate": 8,
        "num_augmentations": 2,
        "validation": 1,
        "caption_dropout": 0.3,
        "progress_prompt": "a cat",
    }
    request = TrainRequest(**fields | changed)
    examples = [Example("", f"caption {i % 3}", f"{i:064x}", (64, 64), b"") for i in range(5)]
    plan = prepare(request, examples, SimulatedJob())  # type: ignore[arg-type]

    def features(unit: Unit) -> dict[str, np.ndarray]:
        if isinstance(unit, Crop):
            return {"latents": np.zeros((1, 16, 64), np.float32)}
        return {name: np.zeros(shape, np.uint16) for name, shape in FEATURES.items()}

    def pixels(crop: Crop) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)

    return TrainingJob(
        id="job",
        secret=b"secret",
        plan=plan,
        weights=ModelVariant("m"),
        base_bytes=24 * GB,
        size=SIZE,
        features=features,
        pixels=pixels,
    )


class TrainingSimulation(Simulation[TrainingSession]):
    """A training, and what its run hears."""

    def __init__(self, hosts: int, *, checkpoint: int = 1, **changed: Any) -> None:
        """`checkpoint`: updates, after each so many of which the run asks for the state."""
        super().__init__(TrainingSession(training_job(**changed)), hosts, Links())
        self.checkpoint = checkpoint
        self.number = 0  # of the task
        self.begin()

    def can_begin(self, machine: SimulatedMachine) -> bool:
        """A ring's update begins when all have it, here: as its sum would wait for all."""
        update = machine.at
        if not isinstance(update, training.Update):
            return True
        together = [
            other
            for other in self.machines.values()
            if other.at is not None and other.at.ring_generation == update.ring_generation
        ]
        ready = [
            other
            for other in together
            if isinstance(other.at, training.Update) and not other.is_stopped
        ]
        ring = self.session.state.ring
        if ring is None or not (
            any(other.running for other in together) or len(ready) == len(ring.ranks)
        ):
            return False
        needed = self.session.state.names.of_micro_batches(update.numbers)
        assert set(needed) <= machine.engine.training.features
        return True

    def reports_now(self, machine: SimulatedMachine, report: messages.Report) -> None:
        if isinstance(report, training.Computed):
            machine.computed.append(report.number)

    # The run

    def want(self, task: tasks.Task) -> int:
        """Asks for something; the number of the task."""
        self.number += 1
        self.feed(Wanted(self.number, task))
        return self.number

    def ask(self, task: tasks.Task) -> Any:
        """What the task gives."""
        number = self.want(task)
        for _ in range(10_000):
            if self.answers(number) or self.end is not None or self.stuck:
                break
            self.turn()
        assert self.answers(number), (self.end, self.stuck)
        return self.answers(number)[0].value

    def answers(self, number: int) -> list[tasks.Answer]:
        return [answer for answer in self.of(tasks.Answer) if answer.number == number]

    def opened(self) -> Self:
        self.ask(tasks.OpenTask(0, {}))
        return self

    def train(self, updates: int = 3, checkpoint: int = 1) -> list[float]:
        """A run's loop; the losses that it hears."""
        losses = []
        for update in range(updates):
            losses.append(self.ask(tasks.AdvanceTask(update)).loss)
            if (update + 1) % checkpoint == 0:
                vectors = self.ask(tasks.GiveTask())
                assert vectors["weights"][0] == update + 1
        return losses

    def drive(self) -> None:
        """As a run does."""
        if self.number and not self.answers(self.number):
            return
        if not self.number:
            self.todo: list[tasks.Task] = [tasks.EncodeTask(UNITS), tasks.OpenTask(0, {})]
            for update in range(self.session.state.job.plan.request.updates):
                self.todo.append(tasks.AdvanceTask(update))
                if (update + 1) % self.checkpoint == 0:
                    self.todo.append(tasks.GiveTask())
            self.todo.append(tasks.FinishTask())
        self.want(self.todo.pop(0))

    def check(self) -> None:
        """Every unit was encoded once, and every update made once, as far as the run knows."""
        assert self.end is not None, self.stuck
        assert self.end.error is None, self.end.error
        assert sorted(repr(encoded.unit) for encoded in self.of(tasks.UnitEncoded)) == sorted(
            map(repr, UNITS)
        )
        for encoded in self.of(tasks.UnitEncoded):
            if isinstance(encoded.unit, Caption):
                assert {name: array.shape for name, array in encoded.arrays.items()} == FEATURES
                assert {array.flat[0] for array in encoded.arrays.values()} == {
                    len(encoded.unit.text)
                }
        values = [answer.value for answer in self.of(tasks.Answer)]
        moves = [value for value in values if isinstance(value, UpdateResult)]
        updates = self.session.state.job.plan.request.updates
        assert [moved.loss for moved in moves] == [1 / (k + 1) for k in range(updates)]
        given = [value["weights"][0] for value in values if isinstance(value, dict)]
        assert given == list(range(self.checkpoint, updates + 1, self.checkpoint))
