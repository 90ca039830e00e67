"""The run: data set to adapter, a generator of events, whoever computes. No mlx.

An `Executor` does the work: the learner of this process (`local_executor.py`), or the engines of a
mesh. Here is what does not depend on that: the loop, what is due when, the files. Ctrl-C, and
closing the generator, leave a checkpoint of the last whole update; a loss that is no number, or
that explodes, ends the run with the last good checkpoint untouched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from fluxmesh.adapters.formats import write_low_ranks
from fluxmesh.errors import CancelledError, FluxmeshError, UsageError
from fluxmesh.storage.atomic import replaced_file
from fluxmesh.storage.safetensors import make_folder
from fluxmesh.storage.writable import check_folder
from fluxmesh.training import checkpoint
from fluxmesh.training.checkpoint import RunCounters
from fluxmesh.training.compute.lr_schedule import warmup_updates
from fluxmesh.training.compute.parameter_vector import VectorLayout
from fluxmesh.training.data.dataset import DatasetError, Example, load_dataset
from fluxmesh.training.data.remarks import Remarks
from fluxmesh.training.events import (
    CheckpointSaved,
    Finished,
    Note,
    Prepared,
    Progress,
    TrainEvent,
    Updated,
    Validated,
)
from fluxmesh.training.notes import notes_of
from fluxmesh.training.plan import TrainingPlan
from fluxmesh.training.request import TrainRequest
from fluxmesh.weights.checkpoint import Checkpoint

SMOOTH = 0.9  # of the running mean of the loss
EXPLODES = 10.0  # times the lowest running mean, where the run ends
NO_LOSS = 1e30  # on a mesh stands for one that is no number, which no message may hold
SETTLED = 10  # updates before an explosion is looked for


class DivergedError(FluxmeshError):
    """The loss is no number, or explodes."""


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What an update did."""

    loss: float  # mean over its images
    norm: float  # of the gradient, before clipping
    rate: float
    images: int
    bad: int  # micro-batches without a usable gradient; the weights moved only if there are none
    peak_bytes: int = 0  # on the host that needed most


class Executor(Protocol):
    """Who computes a run."""

    def encode(self) -> Iterator[TrainEvent]:
        """Makes every feature that the run needs."""

    def open(self, update: int, vectors: Mapping[str, np.ndarray]) -> None:
        """Begins (`update` 0), or goes on from a checkpoint's vectors."""

    def advance(self, update: int) -> UpdateResult:
        """Does update `update`, counted from 0: they come one after another."""

    def halt(self) -> UpdateResult | None:
        """After a call was interrupted: lets go. What the last update that came to its end did,
        also where nobody was told; None if that isn't known."""

    @property
    def update(self) -> int | None:
        """How many updates the state has behind it; None where there is no state."""

    def validate(self) -> float:
        """The mean loss on what was held out."""

    def paint(self) -> np.ndarray:
        """The progress picture, uint8 [H, W, 3]."""

    def vectors(self) -> Mapping[str, np.ndarray]:
        """The state as a checkpoint stores it."""


def read_examples(request: TrainRequest) -> tuple[list[Example], list[Note]]:
    """A request's data set, and after it the pictures of `prior_folder`; and what is noted of them.

    Raises `DatasetError`, `OutputError` where a run has been, or nothing can be written, and
    `UsageError` where none has been that could be resumed, or for a setting that neither data set
    has a use for.
    """
    for place in (request.output_dir, request.cache_dir):
        if place:
            check_folder(Path(place))
    if request.resume:
        checkpoint.check_begun(Path(request.output_dir))
    else:
        checkpoint.check_new(Path(request.output_dir))
    columns = {"image_column": request.image_column, "caption_column": request.caption_column}
    sets = [(request.dataset, request.trigger, False)]
    if request.prior_folder:
        sets.append((request.prior_folder, "", True))
    examples: list[Example] = []
    notes: list[Note] = []
    applied: set[str] = set()
    failed: list[DatasetError] = []
    for name, trigger, is_prior in sets:
        remarks = Remarks()
        try:
            read = load_dataset(
                name, split=request.split, trigger=trigger, remarks=remarks, **columns
            )
        except DatasetError as error:
            failed.append(error)
            continue
        examples += [replace(example, prior=is_prior) for example in read]
        notes += [Note(f"{name}: {note}.") for note in remarks.notes]
        applied |= remarks.applied
    if failed:
        raise DatasetError.of(failed)
    given = {**columns, "split": "" if request.split == TrainRequest.split else request.split}
    for setting, value in given.items():
        if value and setting not in applied:
            raise UsageError.about(
                setting, f"is {value!r}, for which {request.dataset} has no use", "leave it out"
            )
    return examples, notes


class Run:
    """A training, from what it began with or was left at, to its end."""

    def __init__(self, plan: TrainingPlan, base: Checkpoint, executor: Executor) -> None:
        """Checks that a resume finds what the run began with. Computes nothing."""
        self.request: TrainRequest = plan.request
        self.plan, self.base, self.executor = plan, base, executor
        self.layout = VectorLayout(base.architecture, plan.request)
        self.folder = Path(self.request.output_dir)
        self.counters = RunCounters(0, 0)
        self.saved_at: int | None = None
        self.begin = checkpoint.latest(self.folder) if self.request.resume else None
        if self.begin is not None:
            checkpoint.check_same(self.begin, self.request.identity(), plan.data, base.revision)
            self.counters = self.begin.counters
            self.saved_at = self.begin.counters.iteration

    def events(self) -> Iterator[TrainEvent]:
        """Runs it. Raises `DivergedError`, `CancelledError` on Ctrl-C, and what the executor
        raises.
        """
        yield from notes_of(self.plan, self.base)
        yield from self.executor.encode()
        vectors = {} if self.begin is None else self.begin.vectors
        self.executor.open(self.counters.update, vectors)
        yield self._prepared()
        try:
            yield from self._loop()
        except (KeyboardInterrupt, GeneratorExit) as stop:
            self._leave()
            if isinstance(stop, GeneratorExit):
                raise
            if self.saved_at is None:
                raise CancelledError("Stopped before a checkpoint was saved.") from None
            raise CancelledError(
                f"Stopped after iteration {self.saved_at}; go on with `resume`."
            ) from None
        yield self._finish()

    def _prepared(self) -> Prepared:
        plan, request = self.plan, self.request
        return Prepared(
            images=len(set(plan.trained)),
            priors=len(set(plan.priors)),
            sizes=plan.sizes_count(),
            held_out=len(plan.held_out),
            updates=request.updates,
            micro_batches=request.grad_accumulate,
            batch_size=request.batch_size,
            numbers=self.layout.size,
            warmup=warmup_updates(request),
            rate=request.learning_rate or 0.0,
            begins_at=self.counters.update,
            revision=self.base.revision,
            examples=[plan.examples[image] for image in dict.fromkeys(plan.trained)],
        )

    def _loop(self) -> Iterator[TrainEvent]:
        request = self.request
        if request.progress_prompt and self.counters.update == 0:
            yield self._paint()
        for update in range(self.counters.update, request.updates):
            start = time.perf_counter()
            moved = self.executor.advance(update)
            before, now = self.counters.iteration, request.micro_batches(update).stop
            self._count(moved)
            yield Updated(
                update=update + 1,
                iteration=now,
                loss=moved.loss,
                rate=moved.rate,
                norm=moved.norm,
                images=moved.images,
                seconds=time.perf_counter() - start,
                peak_bytes=moved.peak_bytes,
            )
            if self._due(request.checkpoint_every, before):
                yield from self._look()
                yield self._save()
            if request.progress_prompt and self._due(request.progress_every, before):
                yield self._paint()

    def _paint(self) -> Progress:
        steps = self.request.progress_steps or self.base.defaults.steps
        return Progress(self.counters.iteration, steps, self.executor.paint())

    def _due(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` iterations, or the end, was reached since `before`."""
        now = self.counters.iteration
        return now // every > before // every or now == self.request.iterations

    def _count(self, moved: UpdateResult) -> None:
        """Raises `DivergedError` where the update's loss says that nothing good will follow."""
        counters = self.counters
        iteration = self.request.micro_batches(counters.update).stop
        if moved.bad or not (math.isfinite(moved.loss) and math.isfinite(moved.norm)):
            update = counters.update + 1
            raise self._diverged(
                iteration, f"or its gradient was not finite (NaN or infinity) in update {update},"
            )
        smooth = lowest = moved.loss
        if counters.smooth_loss is not None and counters.lowest_loss is not None:
            smooth = SMOOTH * counters.smooth_loss + (1 - SMOOTH) * moved.loss
            lowest = min(smooth, counters.lowest_loss)
        if counters.update >= SETTLED and smooth > EXPLODES * lowest:
            raise self._diverged(iteration, f"rose from {lowest:.3g} to {smooth:.3g}")
        self.counters = replace(
            counters,
            update=counters.update + 1,
            iteration=iteration,
            smooth_loss=smooth,
            lowest_loss=lowest,
        )

    def _diverged(self, iteration: int, how: str) -> DivergedError:
        kept = (
            "no checkpoint was saved yet"
            if self.saved_at is None
            else f"the last good one is {checkpoint.adapters_path(self.folder, self.saved_at)}"
        )
        return DivergedError(
            f"The loss {how} by iteration {iteration}, so the training has stopped; {kept}: try a "
            "lower `learning_rate` or a longer `warmup_steps`."
        )

    def _look(self) -> Iterator[TrainEvent]:
        """Measures on what was held out, and remembers the best."""
        if not self.plan.held_out:
            return
        loss = self.executor.validate()
        if not loss < NO_LOSS:
            update = self.counters.update
            raise self._diverged(
                self.counters.iteration,
                f"on what was held out was not finite (NaN or infinity) after update {update},",
            )
        best = self.counters.best_loss is None or loss < self.counters.best_loss
        if best:
            self.counters = replace(
                self.counters, best_loss=loss, best_iteration=self.counters.iteration
            )
        yield Validated(self.counters.iteration, loss, best)

    # Files

    def _leave(self) -> None:
        """Saves the last whole update, as far as it was counted."""
        last = self.executor.halt()
        if last is not None and self.executor.update == self.counters.update + 1:
            self._count(last)  # it was stopped before it heard of it
        if self.executor.update == self.counters.update:  # else the state is lost, or not known
            self._save()

    def _save(self) -> CheckpointSaved:
        """The adapter, then the state that makes it a checkpoint; then the old ones go."""
        iteration = self.counters.iteration
        path = checkpoint.adapters_path(self.folder, iteration)
        vectors = self.executor.vectors()
        self._write(vectors, path)
        checkpoint.save(
            self.folder,
            checkpoint.Saved(
                self.counters,
                self.request.identity(),
                self.plan.data,
                self.base.revision,
                vectors,
            ),
        )
        self.saved_at = iteration
        best = self.counters.best_iteration
        checkpoint.prune(self.folder, self.request.keep_checkpoints, best)
        return CheckpointSaved(iteration, path)

    def _finish(self) -> Finished:
        path = self.folder / checkpoint.FINAL
        self._write(self.executor.vectors(), path)
        return Finished(path)

    def _write(self, vectors: Mapping[str, np.ndarray], path: Path) -> None:
        adapter = self.layout.adapter(vectors.get("average", vectors["weights"]))
        metadata = {
            "lora_rank": str(self.request.lora_rank),
            "lora_blocks": str(self.request.lora_blocks),
        }
        names = self.base.architecture.adapter_names
        made = {names[0].component: adapter}
        make_folder(self.folder)
        write_low_ranks(path, made, names, metadata=metadata, opened=replaced_file)
