"""One host's part of a training: gradients of the micro-batches that it is given, and the update.

A run on one host gives it all of an update's micro-batches and the sum back. A run on several
deals the numbers out (`micro_batches.deal`), adds the vectors of `total` across the ring and gives
every host the same sum: each then makes the same update to its own copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import mlx.core as mx
import numpy as np

from fluxmesh.engine.stages import PipelineStages
from fluxmesh.models.runtime import PromptFeatures
from fluxmesh.sampling import latents
from fluxmesh.sampling.denoise import denoise
from fluxmesh.training.compute import exact_sum, gradient_memory, optimizer
from fluxmesh.training.compute.lora_layers import TrainedLoras
from fluxmesh.training.compute.loss import Batch, squared_errors, traced
from fluxmesh.training.compute.lr_schedule import learning_rate
from fluxmesh.training.compute.optimizer import State
from fluxmesh.training.plan import LEVELS, Part, TrainingPlan
from fluxmesh.training.rng import VALIDATION, generator
from fluxmesh.training.run import UpdateResult


class Features(Protocol):
    """Where a learner finds what was encoded."""

    def text(self, caption: str) -> PromptFeatures:
        """A caption's features, by the family's names."""

    def latents(self, image: int, crop: int) -> mx.array:
        """A crop's latents, packed float32 [1, L, 4C]."""


class Learner:
    """The transformer with the LoRAs that are trained, and where these stand."""

    def __init__(
        self,
        pipeline: PipelineStages,
        features: Features,
        plan: TrainingPlan,
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        """Loads the transformer where it is not in memory. All features must be encoded.

        `go_on` is called before each piece of work, and may raise to stop; the state stays whole.
        """
        self.pipeline = pipeline
        self.features = features
        self.go_on = go_on
        self.plan = plan
        self.request = plan.request
        self.runtime, self.flow = pipeline.runtime, pipeline.flow
        self.architecture = pipeline.checkpoint.architecture
        self.adapters = TrainedLoras(self.flow, self.architecture, self.request)
        self.state: State = optimizer.begin(
            self.adapters.flatten(self.adapters.weights()), self.request
        )
        mx.eval(self.state.weights)
        self.step = traced(
            self.runtime, self.adapters, self.request.guidance, self.request.grad_checkpoint
        )

    # An update

    def nothing(self) -> mx.array:
        """The sum of no gradients."""
        return mx.zeros((self.adapters.size + exact_sum.TAIL,), dtype=mx.int64)

    def total(self, numbers: Sequence[int], parts: int) -> mx.array:
        """The exact sum of the gradients of these micro-batches, int64 [size + TAIL].

        `parts` is how many micro-batches the whole update has, on all hosts. No number gives zeros.
        """
        total = self.nothing()
        for number in numbers:
            total = self.add(total, number, parts)
        return total

    def add(self, total: mx.array, number: int, parts: int) -> mx.array:
        """`total` with micro-batch `number`, being evaluated."""
        made_of = self.plan.parts(number)
        for part in made_of:
            batch = self.batch(part)
            vector = self.gradient(part, batch, parts * len(made_of))
            mx.eval(total)  # the device computed the one before while this one's graph was built
            total = total + vector
            with self._bounded(batch):
                mx.async_eval(total)
        return total

    def _bounded(self, batch: Batch) -> AbstractContextManager[None]:
        if not self.request.grad_checkpoint:
            return nullcontext()
        size, trained = self.flow.dtype.size, self.adapters.size
        shape = self.architecture.shape
        return gradient_memory.bounded(gradient_memory.needed(shape, size, batch.tokens, trained))

    def gradient(self, part: Part, batch: Batch, parts: int) -> mx.array:
        """The vector of a part, one of `parts` of an update, which is `batch`; lazily."""
        request = self.request
        dropped = request.lora_dropout > 0
        keys = part.micro.dropout_keys(len(self.adapters.names)) if dropped else None
        loss, gradient = self.step(batch, keys)
        weight = part.weight
        return exact_sum.on_grid(weight * gradient, weight * loss, part.images, parts)

    def advance(self, total: mx.array) -> UpdateResult:
        """Moves the weights by the sum of a whole update."""
        sums = exact_sum.read(total)
        rate = learning_rate(self.request, self.state.update)
        if sums.bad:
            return UpdateResult(
                loss=math.nan, norm=math.nan, rate=rate, images=sums.images, bad=sums.bad
            )
        self.state, norm = optimizer.advance(self.state, sums.gradient, rate, self.request)
        self.adapters.install(self.adapters.unflatten(self.state.weights))
        return UpdateResult(
            loss=sums.loss,
            norm=norm,
            rate=rate,
            images=sums.images,
            bad=0,
            peak_bytes=mx.get_peak_memory(),
        )

    def batch(self, part: Part) -> Batch:
        """What the transformer sees of a part of a micro-batch."""
        micro = part.micro
        clean = mx.concatenate([self.features.latents(*item) for item in part.items])
        noise = mx.array(micro.noise(*clean.shape[1:]))
        return self._batch(clean, noise, micro.times, part.captions, micro.size)

    def _batch(
        self,
        clean: mx.array,
        noise: mx.array,
        times: np.ndarray,
        captions: Sequence[str],
        size: tuple[int, int],
    ) -> Batch:
        texts = [self.features.text(caption) for caption in captions]
        return Batch(
            clean,
            noise,
            mx.array(times),
            {
                name: mx.concatenate([text[name] for text in texts])
                for name in self.runtime.prompt_features
            },
            latents.token_grid(*size, self.architecture.downsampling),
        )

    # Looking at it

    def validate(self) -> float:
        """The mean loss on the images held out, at fixed time steps and from fixed noise."""
        with self._result():
            every = [loss for image in self.plan.held_out for loss in self._losses(image)]
        return float(np.mean(every))

    def _losses(self, image: int) -> Iterator[float]:
        clean, size = self.features.latents(image, 0), self.plan.sizes[image]
        for step, time in enumerate(self._levels(size)):
            self.go_on()
            random = generator(self.request.seed, VALIDATION, 1 + image * len(LEVELS) + step)
            noise = mx.array(random.standard_normal(clean.shape, dtype=np.float32))
            caption = self.plan.examples[image].caption
            batch = self._batch(clean, noise, time.reshape(1), [caption], size)
            errors = squared_errors(self.runtime, self.flow, batch, self.request.guidance)
            yield float(np.array(errors)[0])

    @contextmanager
    def _result(self) -> Iterator[None]:
        """Computes with what would be saved, and then again with what is trained."""
        self.adapters.install(self.adapters.unflatten(self.state.result))
        try:
            yield
        finally:
            self.adapters.install(self.adapters.unflatten(self.state.weights))

    def _levels(self, size: tuple[int, int]) -> np.ndarray:
        times = self.plan.times
        own = times.own_levels(size)
        return times.shifted(np.array(LEVELS), size).astype(np.float32) if own is None else own

    def paint(self) -> np.ndarray:
        """A picture of the progress prompt from the run's seed, uint8 [H, W, 3].

        Takes no number of the training's, and leaves its weights as they were.
        """
        pipeline, request = self.pipeline, self.request
        side = self.architecture.downsampling
        size = (self.plan.picture_size[0] // side, self.plan.picture_size[1] // side)
        x = pipeline.noise(request.seed, size)
        with self._result():
            made = pipeline.plan(
                self.features.text(request.progress_prompt),
                num_steps=request.progress_steps,
                guidance=request.guidance,
                latent_size=size,
            )
            for step in denoise(self.flow, made, x):
                self.go_on()
                x = step.x
                with pipeline.bounded_steps(size):
                    mx.eval(x)
        with pipeline.bounded_pixels(*self.plan.picture_size):
            pixels = pipeline.pixels(x, size)[0]
        del pipeline.ae
        return pixels

    def close(self) -> None:
        """Leaves the transformer as it was."""
        self.adapters.remove()

    # On the disk

    def vectors(self) -> dict[str, np.ndarray]:
        """The state's vectors as a checkpoint stores them."""
        state = self.state
        arrays = {"weights": state.weights, "first": state.first, "second": state.second}
        if state.average is not None:
            arrays["average"] = state.average
        return {name: np.array(vector) for name, vector in arrays.items()}

    def restore(self, update: int, vectors: Mapping[str, np.ndarray]) -> None:
        """Goes on from a checkpoint's vectors, after `update` updates."""
        arrays = {name: mx.array(vector) for name, vector in vectors.items()}
        self.state = State(
            update, arrays["weights"], arrays["first"], arrays["second"], arrays.get("average")
        )
        self.adapters.install(self.adapters.unflatten(self.state.weights))
