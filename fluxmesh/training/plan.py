"""A run before it begins: which images are trained on and held out, at which sizes. No mlx.

`prepare` is a function of the request, the data set and the checkpoint's sizes; every host of a
mesh that is handed the same three has the same plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fluxmesh.errors import UsageError
from fluxmesh.sampling.latents import PATCH
from fluxmesh.training.data.bucketing import Size, bucket_of, buckets
from fluxmesh.training.data.dataset import Example, fingerprint
from fluxmesh.training.data.encode_units import Caption, Crop, Unit
from fluxmesh.training.defaults import fill
from fluxmesh.training.micro_batches import MicroBatch, Sampler, TimeSteps
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.rng import VALIDATION, generator
from fluxmesh.weights.checkpoint import Checkpoint

DEFAULT_AREA = 512 * 512  # pixels of a training picture, or fewer where the model's own is smaller
LEVELS = (0.125, 0.375, 0.625, 0.875)  # where validation measures, before the shift
NO_CAPTION = ""
FIRST_PRIOR = 1 << 55  # the prior's micro-batches are numbered from here, apart from all others


@dataclass(frozen=True)
class Part:
    """One of the two things that a micro-batch may be made of: B images of one size."""

    micro: MicroBatch
    items: tuple[tuple[int, int], ...]  # (example, crop)
    captions: tuple[str, ...]
    weight: float  # of the sum of the images' losses
    images: int  # that the part counts for: the mean of an update is taken over them


@dataclass(frozen=True)
class TrainingPlan:
    """What a run trains on."""

    request: TrainRequest
    examples: Sequence[Example]
    sizes: tuple[Size, ...]  # of each example, in pixels
    trained: tuple[int, ...]  # indices into `examples`, each as often as it is shown in an epoch
    held_out: tuple[int, ...]
    priors: tuple[int, ...]  # what the model is to keep as it was
    sampler: Sampler  # its image i is example `trained[i]`
    prior_sampler: Sampler | None  # its image i is example `priors[i]`
    times: TimeSteps
    picture_size: Size  # of progress pictures
    data: str  # fingerprint

    @property
    def captions(self) -> list[str]:
        """Every text that the run needs, each once."""
        texts = [example.caption for example in self.examples]
        if self.request.caption_dropout:
            texts.append(NO_CAPTION)
        if self.request.progress_prompt:
            texts.append(self.request.progress_prompt)
        return list(dict.fromkeys(texts))

    @property
    def crops(self) -> list[tuple[int, int]]:
        """Every (example, crop) that the run needs, each once."""
        count = self.request.num_augmentations
        every = dict.fromkeys((*self.trained, *self.priors))
        trained = [(image, crop) for image in every for crop in range(count)]
        return trained + [(image, 0) for image in self.held_out]

    def units(self) -> Iterator[tuple[str, list[Unit]]]:
        """What is encoded, in two heaps: captions, then crops; each with its name in the plural."""
        yield "captions", [Caption(text) for text in self.captions]
        yield "pictures", [Crop(image, crop) for image, crop in self.crops]

    def parts(self, number: int) -> list[Part]:
        """What micro-batch `number` is made of: images of the data set, then as many of the prior.

        The loss of the latter keeps the model from taking every dog for the one that it is shown
        (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242).
        """
        micro = self.sampler.micro_batch(number)
        parts = [self._part(micro, self.trained, 1.0, len(micro.items))]
        if self.prior_sampler is not None:
            prior = self.prior_sampler.micro_batch(FIRST_PRIOR + number)
            weight = self.request.prior_weight * len(micro.items) / len(prior.items)
            parts.append(self._part(prior, self.priors, weight, 0))
        return parts

    def _part(self, micro: MicroBatch, examples: Sequence[int], weight: float, images: int) -> Part:
        items = tuple((examples[place], crop) for place, crop in micro.items)
        captions = tuple(
            NO_CAPTION if left_out else self.examples[image].caption
            for (image, _), left_out in zip(items, micro.without_caption, strict=True)
        )
        return Part(micro, items, captions, weight, images)

    def sizes_count(self) -> dict[Size, int]:
        """How many images are trained at each size."""
        return dict(sorted(Counter(self.sizes[image] for image in set(self.trained)).items()))


def prepare(
    request: TrainRequest, examples: Sequence[Example], checkpoint: Checkpoint
) -> TrainingPlan:
    """The plan, whose request has nothing left open.

    Raises `UsageError` where nothing would be left to train on, a size does not divide, or the
    model can't paint from a prompt alone.
    """
    model = checkpoint.architecture
    if model.is_tool:
        raise UsageError(
            f"{checkpoint.name} reads a picture beside the latents, for which fluxmesh trains no "
            "adapters; name the model that it was made from, such as dev."
        )
    request = fill(request, model.shape.hidden_size)
    downsampling = model.downsampling
    multiple = PATCH * downsampling
    own = checkpoint.defaults.height * checkpoint.defaults.width
    area = min(DEFAULT_AREA, own)
    if request.resolution is None:
        choices = buckets(area, multiple)
        sizes = tuple(bucket_of(example.size, choices) for example in examples)
    else:
        if any(side % multiple for side in request.resolution):
            raise UsageError(
                f"`resolution` is {'x'.join(map(str, request.resolution))}; this model needs "
                f"multiples of {multiple}.",
                setting="resolution",
            )
        sizes = (request.resolution,) * len(examples)
    shown = [i for i, example in enumerate(examples) if not example.prior]
    priors = tuple(i for i, x in enumerate(examples) if x.prior for _ in range(x.repeats))
    if request.validation >= len(shown):
        raise UsageError(
            f"`validation` holds out {request.validation} of {len(shown)} images, which leaves "
            "none to train on; give fewer.",
            setting="validation",
        )
    order = generator(request.seed, VALIDATION, 0).permutation(len(shown)).tolist()
    held_out = tuple(sorted(shown[i] for i in order[: request.validation]))
    # One that is shown more often stands there as often: an epoch has every crop of each.
    trained = tuple(i for i in shown if i not in set(held_out) for _ in range(examples[i].repeats))
    times = TimeSteps.of(request.timesteps, model)

    def sampler(images: Sequence[int], caption_dropout: float) -> Sampler:
        return Sampler(
            request.seed,
            [sizes[i] for i in images],
            request.num_augmentations,
            request.batch_size,
            times,
            caption_dropout,
        )

    picture_size = request.resolution or bucket_of((1, 1), buckets(area, multiple))
    return TrainingPlan(
        request=request,
        examples=examples,
        sizes=sizes,
        trained=trained,
        held_out=held_out,
        priors=priors,
        sampler=sampler(trained, request.caption_dropout),
        prior_sampler=sampler(priors, 0.0) if priors else None,
        times=times,
        picture_size=picture_size,
        data=fingerprint(list(examples)),
    )
