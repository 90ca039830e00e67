"""The training loop: data set to adapter, a generator of events.

One host drives its own `Learner` here. Ctrl-C, and closing the generator, leave a checkpoint of
the last whole update; a loss that is no number, or that explodes, ends the run with the last good
checkpoint untouched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh.events import Loading
from fluxmesh.flux.lora import write_adapter
from fluxmesh.flux.pipeline import FluxPipeline
from fluxmesh.training import checkpoint
from fluxmesh.training.cache import FeatureCache, default_folder
from fluxmesh.training.checkpoint import Counters
from fluxmesh.training.dataset import Example, load_dataset
from fluxmesh.training.encoding import Caption, Crop, Encoder
from fluxmesh.training.events import (
    CheckpointSaved,
    Encoding,
    Finished,
    Prepared,
    Progress,
    TrainEvent,
    Updated,
    Validated,
)
from fluxmesh.training.learner import Learner, Moved
from fluxmesh.training.plan import Plan, prepare
from fluxmesh.training.rates import warmup_updates
from fluxmesh.training.request import TrainRequest

SMOOTH = 0.9  # of the running mean of the loss
EXPLODES = 10.0  # times the lowest running mean, where the run ends
SETTLED = 10  # updates before an explosion is looked for


class DivergedError(FluxmeshError):
    """The loss is no number, or explodes."""


def train(
    request: TrainRequest, on_loading: Callable[[Loading], None] | None = None
) -> Generator[TrainEvent, None, None]:
    """Runs a training, or goes on with one, to the adapter in `output_dir`.

    Raises `DatasetError`, `UsageError`, `OutputError`, `ModelNotFoundError`, `WeightsError`,
    `DivergedError`, and `CancelledError` on Ctrl-C.
    """
    if not request.resume:
        checkpoint.check_new(Path(request.output_dir))
    examples = load_dataset(
        request.dataset,
        split=request.split,
        image_column=request.image_column,
        caption_column=request.caption_column,
        trigger=request.trigger,
    )
    pipeline = FluxPipeline(
        request.model, dtype=request.dtype, bits=request.bits, on_loading=on_loading
    )
    yield from Trainer(request, examples, pipeline).run()


class Trainer:
    """A run on this host."""

    def __init__(
        self, request: TrainRequest, examples: list[Example], pipeline: FluxPipeline
    ) -> None:
        """Checks that a resume finds what the run began with. Loads nothing."""
        self.request = request
        self.pipeline = pipeline
        self.folder = Path(request.output_dir)
        self.plan: Plan = prepare(request, examples, pipeline.checkpoint)
        self.counters = Counters(0, 0)
        self.saved_at: int | None = None
        self.begin = checkpoint.latest(self.folder) if request.resume else None
        if self.begin is not None:
            checkpoint.check_same(
                self.begin, request.identity(), self.plan.data, pipeline.checkpoint.revision
            )
            self.counters = self.begin.counters
            self.saved_at = self.begin.counters.iteration

    def run(self) -> Iterator[TrainEvent]:
        """See `train`."""
        folder = Path(self.request.cache_dir) if self.request.cache_dir else default_folder()
        encoder = Encoder(
            self.pipeline,
            FeatureCache(folder),
            self.plan.examples,
            self.plan.sizes,
            self.request.seed,
        )
        yield from self._encode(encoder)
        learner = Learner(self.pipeline, encoder, self.plan)
        if self.begin is not None:
            learner.restore(self.begin.counters.update, self.begin.vectors)
        yield self._prepared(learner)
        try:
            yield from self._loop(learner)
        except (KeyboardInterrupt, GeneratorExit) as stop:
            self._save(learner)
            if isinstance(stop, GeneratorExit):
                raise
            if self.saved_at is None:
                raise CancelledError("Stopped before the first update.") from None
            raise CancelledError(
                f"Stopped after iteration {self.saved_at}; go on with --resume."
            ) from None
        yield self._finish(learner)

    def _encode(self, encoder: Encoder) -> Iterator[TrainEvent]:
        captions = [Caption(text) for text in self.plan.captions]
        crops = [Crop(image, crop) for image, crop in self.plan.crops]
        for what, units in (("captions", captions), ("pictures", crops)):
            todo = encoder.pending(units)
            for done, unit in enumerate(todo, start=1):
                encoder.store(unit)
                yield Encoding(what, done, len(todo))
            encoder.release()

    def _prepared(self, learner: Learner) -> Prepared:
        plan, request = self.plan, self.request
        return Prepared(
            images=len(plan.trained),
            sizes=plan.sizes_count(),
            held_out=len(plan.held_out),
            updates=request.updates,
            micro_batches=request.grad_accumulate,
            batch_size=request.batch_size,
            numbers=learner.adapters.size,
            warmup=warmup_updates(request),
            begins_at=self.counters.update,
            revision=self.pipeline.checkpoint.revision,
        )

    def _loop(self, learner: Learner) -> Iterator[TrainEvent]:
        request = self.request
        if request.progress_prompt and self.counters.update == 0:
            yield self._paint(learner)
        for update in range(self.counters.update, request.updates):
            start = time.perf_counter()
            mx.reset_peak_memory()
            numbers = request.micro_batches(update)
            moved = learner.advance(learner.total(numbers, len(numbers)))
            before = self.counters.iteration
            self._count(moved, numbers.stop)
            yield Updated(
                update=update + 1,
                iteration=numbers.stop,
                loss=moved.loss,
                rate=moved.rate,
                norm=moved.norm,
                images=moved.images,
                seconds=time.perf_counter() - start,
                peak_bytes=mx.get_peak_memory(),
            )
            if self._due(request.checkpoint_every, before):
                yield from self._look(learner)
                yield self._save(learner)
            if request.progress_prompt and self._due(request.progress_every, before):
                yield self._paint(learner)

    def _paint(self, learner: Learner) -> Progress:
        steps = self.request.progress_steps or self.pipeline.checkpoint.defaults.steps
        return Progress(self.counters.iteration, steps, learner.paint())

    def _due(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` iterations, or the end, was reached since `before`."""
        now = self.counters.iteration
        return now // every > before // every or now == self.request.iterations

    def _count(self, moved: Moved, iteration: int) -> None:
        """Raises `DivergedError` where the update's loss says that nothing good will follow."""
        counters = self.counters
        if moved.bad or not (math.isfinite(moved.loss) and math.isfinite(moved.norm)):
            raise self._diverged(iteration, "is not a number, or out of range")
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
            "lower --learning-rate or a longer --warmup-steps."
        )

    def _look(self, learner: Learner) -> Iterator[TrainEvent]:
        """Measures on what was held out, and remembers the best."""
        if not self.plan.held_out:
            return
        loss = learner.validate()
        best = self.counters.best_loss is None or loss < self.counters.best_loss
        if best:
            self.counters = replace(
                self.counters, best_loss=loss, best_iteration=self.counters.iteration
            )
        yield Validated(self.counters.iteration, loss, best)

    # Files

    def _save(self, learner: Learner) -> CheckpointSaved:
        """The adapter, then the state that makes it a checkpoint; then the old ones go."""
        iteration = self.counters.iteration
        path = checkpoint.adapters_path(self.folder, iteration)
        if learner.state.update != self.counters.update:  # stopped between the two
            return CheckpointSaved(iteration, path)
        self._write(learner, path)
        checkpoint.save(
            self.folder,
            checkpoint.Saved(
                self.counters,
                self.request.identity(),
                self.plan.data,
                self.pipeline.checkpoint.revision,
                learner.vectors(),
            ),
        )
        self.saved_at = iteration
        best = self.counters.best_iteration
        checkpoint.prune(self.folder, self.request.keep_checkpoints, best)
        return CheckpointSaved(iteration, path)

    def _finish(self, learner: Learner) -> Finished:
        path = self.folder / checkpoint.FINAL
        self._write(learner, path)
        return Finished(path)

    def _write(self, learner: Learner, path: Path) -> None:
        adapter = learner.adapters.adapter(learner.state.result)
        metadata = {
            "lora_rank": str(self.request.lora_rank),
            "lora_blocks": str(self.request.lora_blocks),
        }
        config = learner.adapters.config
        checkpoint.written(
            path, lambda partial: write_adapter(partial, adapter, config, metadata=metadata)
        )
