"""A training in this process: `run.py`'s loop with one learner, and no mesh.

Why a training alone has a road of its own, where a painting alone is a mesh of one: the loop, the
files and the numbers are those of `run.py` and `compute/learner.py` on both roads, to the same
bytes; only who is asked differs, behind the same `Executor`. A picture wants an engine that
outlives its command, and another that takes over within seconds. A run of hours wants neither: here
it starts no process, opens no port, holds the features once, and comes back from its own
checkpoints. What it gives up: where the device fails, the command ends, and a resume goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from fluxmesh.engine.gpu_errors import RELAX, explain, gpu_end
from fluxmesh.engine.stages import PipelineStages
from fluxmesh.engine.worker import is_out_of_memory
from fluxmesh.errors import DoesNotFitError, FluxmeshError
from fluxmesh.events import Loading
from fluxmesh.machine.awake import kept_awake
from fluxmesh.training.compute.learner import Learner
from fluxmesh.training.data.encoding import DatasetEncoder
from fluxmesh.training.data.feature_cache import FeatureCache, default_folder
from fluxmesh.training.events import Encoding, TrainEvent
from fluxmesh.training.plan import TrainingPlan, prepare
from fluxmesh.training.request import LESS_MEMORY, TrainRequest
from fluxmesh.training.run import DivergedError, Run, UpdateResult, read_examples

__all__ = ["DivergedError", "train"]


def train(
    request: TrainRequest, on_loading: Callable[[Loading], None] | None = None
) -> Generator[TrainEvent, None, None]:
    """Runs a training, or goes on with one, to the adapter in `output_dir`.

    Raises `DatasetError`, `UsageError`, `OutputError`, `ModelNotFoundError`, `WeightsError`,
    `DivergedError`, `DoesNotFitError` where memory runs out, and `CancelledError` on Ctrl-C.
    """
    with kept_awake(), _in_words(request.model):
        examples, notes = read_examples(request)
        yield from notes
        pipeline = PipelineStages(
            request.model, dtype=request.dtype, bits=request.bits, on_loading=on_loading
        )
        plan = prepare(request, examples, pipeline.checkpoint)
        yield from Run(plan, pipeline.checkpoint, LocalExecutor(pipeline, plan)).events()


@contextmanager
def _in_words(model: str) -> Iterator[None]:
    """What the device fails of inside becomes a sentence that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            text = f"Memory ran out while training {model}; try {LESS_MEMORY}."
            raise DoesNotFitError(text) from error
        end = gpu_end(error)
        if end is None:
            raise
        relaxed = os.environ.get(RELAX) == "1"
        raise FluxmeshError(explain(end, "training", in_ring=False, relaxed=relaxed)) from error


class LocalExecutor:
    """This process as the whole executor of a run."""

    def __init__(self, pipeline: PipelineStages, plan: TrainingPlan) -> None:
        request = plan.request
        folder = Path(request.cache_dir) if request.cache_dir else default_folder()
        self.plan, self.pipeline = plan, pipeline
        self.encoder = DatasetEncoder(
            pipeline, FeatureCache(folder), plan.examples, plan.sizes, request.seed
        )
        self._learner: Learner | None = None
        self._last: tuple[int, UpdateResult] | None = None  # update, and what it did

    @property
    def learner(self) -> Learner:
        assert self._learner is not None, "open it first"
        return self._learner

    def encode(self) -> Iterator[TrainEvent]:
        for what, units in self.plan.units():
            todo = self.encoder.pending(units)
            for done, unit in enumerate(todo, start=1):
                self.encoder.store(unit)
                yield Encoding(what, done, len(todo))
            self.encoder.release()

    def open(self, update: int, vectors: Mapping[str, np.ndarray]) -> None:
        self._learner = Learner(self.pipeline, self.encoder, self.plan)
        if update:
            self._learner.restore(update, vectors)

    def advance(self, update: int) -> UpdateResult:
        mx.reset_peak_memory()
        numbers = self.plan.request.micro_batches(update)
        moved = self.learner.advance(self.learner.total(numbers, len(numbers)))
        self._last = (update, moved)
        return moved

    def halt(self) -> UpdateResult | None:
        if self._last is None or self._last[0] + 1 != self.update:
            return None
        return self._last[1]

    @property
    def update(self) -> int | None:
        return self.learner.state.update

    def validate(self) -> float:
        return self.learner.validate()

    def paint(self) -> np.ndarray:
        return self.learner.paint()

    def vectors(self) -> Mapping[str, np.ndarray]:
        return self.learner.vectors()
