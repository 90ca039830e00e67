"""A mesh as the executor of a training: what the run asks for becomes tasks of a `TrainingSession`.

The run (`fluxmesh/training/run.py`) reads the data set, keeps the cache and writes the files, here;
hosts need no disk of ours. Every call blocks until the mesh has done it, whoever died meanwhile.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from fluxmesh.cluster.snapshot import MeshView, ModelVariant
from fluxmesh.errors import FluxmeshError
from fluxmesh.events import Loading
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import GenerateRequest
from fluxmesh.storage import bfloat16
from fluxmesh.training.compute.parameter_vector import VectorLayout
from fluxmesh.training.data.encode_units import Crop, EncoderIdentity, Unit, Units
from fluxmesh.training.data.feature_cache import FeatureCache, default_folder
from fluxmesh.training.events import Encoding, TrainEvent
from fluxmesh.training.needs import transformer_bytes, ways
from fluxmesh.training.plan import TrainingPlan, prepare
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import Run, UpdateResult, read_examples
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh_coordinator.jobs.training import tasks
from fluxmesh_coordinator.jobs.training.session import TrainingSession
from fluxmesh_coordinator.jobs.training.tasks import TrainingJob, UnitEncoded, Wanted
from fluxmesh_coordinator.jobs.types import Heard, Told
from fluxmesh_coordinator.runtime.adapter_upload import Files
from fluxmesh_coordinator.runtime.resolved import own_paths
from fluxmesh_coordinator.runtime.running import Running

Tell = Callable[[Heard], None]
A = TypeVar("A")


class Hosts(Protocol):
    """What a training asks of a `Mesh`."""

    @property
    def view(self) -> MeshView: ...

    def start(
        self, session: TrainingSession, files: Files, *, paths: Mapping[str, str]
    ) -> Running: ...


def train_on(mesh: Hosts, request: TrainRequest, tell: Tell) -> Generator[TrainEvent, None, None]:
    """See `Mesh.train`."""
    examples, notes = read_examples(request)
    yield from notes

    def downloading(done: int, total: int) -> None:
        tell(Loading("download", done, total))

    base = hub.resolve(request.model, progress=downloading)
    plan = prepare(request, examples, base)
    with MeshExecutor(mesh, plan, base, tell) as executor:
        yield from Run(plan, base, executor).events()
        executor.finish()


class MeshExecutor:
    """The hosts of a mesh. A context manager, which lets them go."""

    def __init__(self, mesh: Hosts, plan: TrainingPlan, base: Checkpoint, tell: Tell) -> None:
        request = plan.request
        self.plan, self.tell = plan, tell
        self._units = Units(plan.examples, plan.sizes, request.seed)
        self._cache = FeatureCache(
            Path(request.cache_dir) if request.cache_dir else default_folder()
        )
        bits = base.text_bits or base.bits or request.bits
        self._reader = EncoderIdentity(base.revision, request.dtype, bits, _device(mesh))
        self._number = 0  # of the task
        self._update: int | None = None
        self._given: tuple[int, Mapping[str, np.ndarray]] | None = None  # by the hosts, last
        job = job_of(plan, base, self._features, self._units.pixels)
        paths = own_paths(request.model, hub.full_name(request.model))
        self._running = mesh.start(TrainingSession(job), {}, paths=paths)

    def __enter__(self) -> MeshExecutor:
        return self

    def __exit__(self, *_error: object) -> None:
        self._running.stop()

    def finish(self) -> None:
        """Hosts let go of the training. Raises how the job failed."""
        self._want(tasks.FinishTask())
        self._running.wait()

    # What a run asks for

    def encode(self) -> Iterator[TrainEvent]:
        for what, units in self.plan.units():
            every = dict.fromkeys(units)
            todo = [unit for unit in every if not self._cache.has(self._key(unit))]
            if not todo:
                continue
            done = 0
            for event in self._events(tasks.EncodeTask(tuple(todo))):
                if not isinstance(event, UnitEncoded):
                    self._tell(event)
                else:
                    kinds = {name: (a, bfloat16.kind(a)) for name, a in event.arrays.items()}
                    self._cache.put(self._key(event.unit), kinds)
                    done += 1
                    yield Encoding(what, done, len(todo))

    def open(self, update: int, vectors: Mapping[str, np.ndarray]) -> None:
        self._ask(tasks.OpenTask(update, vectors))
        self._update = update

    def advance(self, update: int) -> UpdateResult:
        self._update = None  # until it is known
        moved = self._ask(tasks.AdvanceTask(update))
        self._update = update + 1
        return moved

    def halt(self) -> UpdateResult | None:
        halted = self._ask(tasks.HaltTask())
        self._update = halted.update
        return halted.moved

    @property
    def update(self) -> int | None:
        return self._update

    def validate(self) -> float:
        return self._ask(tasks.ValidateTask())

    def paint(self) -> np.ndarray:
        return self._ask(tasks.PaintTask())

    def vectors(self) -> Mapping[str, np.ndarray]:
        if self._given is None or self._given[0] != self._update:
            assert self._update is not None, "no host has a state"
            self._given = (self._update, self._ask(tasks.GiveTask()))
        return self._given[1]

    # Within

    def _want(self, task: tasks.Task[Any]) -> int:
        self._number += 1
        self._running.feed(Wanted(self._number, task))
        return self._number

    def _events(self, task: tasks.Task[A]) -> Generator[Told, None, A]:
        """What is told until the task is done; returns what it gave."""
        number = self._want(task)
        for event in self._running.events():
            if isinstance(event, tasks.Answer):
                if event.number == number:  # else of one that was broken off
                    return cast(A, event.value)  # the session answers as the task says
            else:
                yield event
        raise FluxmeshError("The training ended on its hosts before it was done.")

    def _ask(self, task: tasks.Task[A]) -> A:
        events = self._events(task)
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                answer: A = end.value
                return answer
            self._tell(event)

    def _tell(self, event: Told) -> None:
        assert isinstance(event, Heard), event
        self.tell(event)

    def _key(self, unit: Unit) -> str:
        return self._units.key(unit, self._reader)

    def _features(self, unit: Unit) -> dict[str, np.ndarray]:
        """As the cache holds them."""
        features = self._cache.get(self._key(unit))
        if features is None:
            path = self._cache.path(self._key(unit))
            raise FluxmeshError(
                f"{path} is missing or damaged, although it was written; start again with `resume`."
            )
        return {name: array for name, (array, _) in features.items()}


def job_of(
    plan: TrainingPlan,
    base: Checkpoint,
    features: Callable[[Unit], Mapping[str, np.ndarray]],
    pixels: Callable[[Crop], np.ndarray],
) -> TrainingJob:
    """The run as it travels. Raises `WeightsError` where the files of `base` are others by now."""
    request, content = plan.request, base.content
    base.check_files()  # what is encoded has `base.revision` in its name, and no other content
    name = hub.full_name(request.model)
    sizes = ModelSizes.of(base)
    asked = sizes.fill(
        GenerateRequest("", seed=0, model=name, dtype=request.dtype, bits=request.bits)
    )
    return TrainingJob(
        id=secrets.token_hex(8),
        secret=secrets.token_bytes(32),
        plan=plan,
        weights=ModelVariant.of(asked, base.bits, base.text_bits),
        base_bytes=transformer_bytes(request, sizes),
        size=VectorLayout(sizes.architecture, request).size,
        content=content,
        features=features,
        pixels=pixels,
        ways=ways(request, sizes, max(plan.sizes, key=math.prod)),
    )


def _device(mesh: Hosts) -> str:
    """What the hosts compute on; where they differ, what most of them have."""
    kinds = ["gpu" if "gpu" in host.device else "cpu" for host in mesh.view.hosts]
    return max(kinds, key=kinds.count, default="cpu")
