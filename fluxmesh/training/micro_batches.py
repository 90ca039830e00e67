"""What micro-batch n is: images, crops, time steps, noise, dropout. NumPy only, no mlx.

Everything here is a function of (seed, n) and of the data set's sizes, never of what ran before
or where: so the micro-batches of an update may be dealt to any hosts, and a resume begins at n.

An epoch is every crop of every image once, shuffled; images of different sizes never share a
micro-batch, so that the last one of each size may be short. Time steps: uniform or logit-normal
(Esser et al. 2024, https://arxiv.org/abs/2403.03206), both shifted as in generation at the
image's length, or the levels of a few steps alone, for a model that was distilled to those.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fluxmesh.models.base import Architecture, Shifting
from fluxmesh.sampling.latents import token_grid
from fluxmesh.training.data.bucketing import Size
from fluxmesh.training.rng import CAPTION, DROPOUT, NOISE, ORDER, TIME, generator

SCHNELL_STEPS = 4


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch: B images of one size."""

    number: int
    items: tuple[tuple[int, int], ...]  # (image, crop), both counted from 0
    size: Size  # of the crops, in pixels
    times: np.ndarray  # float32 [B], noise levels in (0, 1]
    without_caption: tuple[bool, ...]  # per image: trained on the empty caption
    seed: int

    def noise(self, tokens: int, channels: int) -> np.ndarray:
        """Standard normal float32 [B, tokens, channels]."""
        shape = (len(self.items), tokens, channels)
        return generator(self.seed, NOISE, self.number).standard_normal(shape, dtype=np.float32)

    def dropout_keys(self, count: int) -> np.ndarray:
        """A random key for each of `count` layers with dropout, uint32 [count, 2]."""
        drawn = generator(self.seed, DROPOUT, self.number)
        return drawn.integers(0, 1 << 32, (count, 2), dtype=np.uint32)


@dataclass(frozen=True)
class TimeSteps:
    """How noise levels are drawn."""

    kind: str  # "uniform", "logit-normal", "schnell", or "distilled": the model's own few steps
    schedule: Shifting
    downsampling: int = 8  # pixels a latent covers along one side
    steps: int = SCHNELL_STEPS  # of a generation, on whose number some schedules depend

    @classmethod
    def of(cls, asked: str, model: Architecture) -> TimeSteps:
        """`asked` is the request's; "auto" is what `model` was trained for."""
        own = model.distilled_steps
        if asked == "auto":
            asked = "uniform" if own is None else "distilled"
        steps = own or model.defaults.steps
        return cls(asked, model.shifting, model.downsampling, steps)

    def shifted(self, levels: np.ndarray, size: Size) -> np.ndarray:
        """Levels in (0, 1], moved towards 1 as generation does at `size`; float64."""
        rows, columns = token_grid(*size, self.downsampling)
        factor = math.exp(self.schedule.mu(rows * columns, self.steps))
        return factor * levels / (1 + (factor - 1) * levels)

    def own_levels(self, size: Size) -> np.ndarray | None:
        """All levels that are drawn, ascending float32, where these are few; else None."""
        if self.kind == "schnell":
            return (np.arange(1, SCHNELL_STEPS + 1) / SCHNELL_STEPS).astype(np.float32)
        if self.kind == "distilled":
            levels = np.arange(1, self.steps + 1) / self.steps
            return self.shifted(levels, size).astype(np.float32)
        return None

    def draw(self, random: np.random.Generator, count: int, size: Size) -> np.ndarray:
        """`count` noise levels in (0, 1], float32."""
        own = self.own_levels(size)
        if own is not None:
            levels = own[random.integers(0, len(own), count)]
        elif self.kind == "logit-normal":
            levels = self.shifted(1 / (1 + np.exp(-random.standard_normal(count))), size)
        else:
            levels = self.shifted(1 - random.random(count), size)
        return levels.astype(np.float32)


class Sampler:
    """The run's micro-batches by number."""

    def __init__(
        self,
        seed: int,
        sizes: Sequence[Size],
        crops: int,
        batch_size: int,
        times: TimeSteps,
        caption_dropout: float = 0.0,
    ) -> None:
        """`sizes` is the size that each image is trained at; `crops` how many an image has."""
        self.seed = seed
        self.sizes = tuple(sizes)
        self.crops = crops
        self.batch_size = batch_size
        self.times = times
        self.caption_dropout = caption_dropout
        counts = [self.sizes.count(size) * crops for size in set(self.sizes)]
        self.epoch_length = sum(-(-count // batch_size) for count in counts)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number`, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.epoch_length)
        items = self._order(epoch)[place]
        size = self.sizes[items[0][0]]
        drops = generator(self.seed, CAPTION, number).random(len(items)) < self.caption_dropout
        return MicroBatch(
            number=number,
            items=items,
            size=size,
            times=self.times.draw(generator(self.seed, TIME, number), len(items), size),
            without_caption=tuple(drops.tolist()),
            seed=self.seed,
        )

    def _shuffled(self, epoch: int) -> list[tuple[tuple[int, int], ...]]:
        """The items of each micro-batch of an epoch."""
        random = generator(self.seed, ORDER, epoch)
        alike: dict[Size, list[tuple[int, int]]] = {}
        for item in random.permutation(len(self.sizes) * self.crops).tolist():
            image, crop = divmod(item, self.crops)
            alike.setdefault(self.sizes[image], []).append((image, crop))
        step = self.batch_size
        batches = [
            tuple(items[first : first + step])
            for items in alike.values()
            for first in range(0, len(items), step)
        ]
        return [batches[i] for i in random.permutation(len(batches)).tolist()]


def deal(numbers: Sequence[int], shares: Sequence[float]) -> list[list[int]]:
    """Micro-batches to hosts in proportion to their `shares` (speed), each number to one host.

    Largest remainders first, then lower ranks: a function of its arguments, the same everywhere.
    """
    whole = sum(shares)
    exact = [len(numbers) * share / whole for share in shares]
    counts = [int(count) for count in exact]
    left = len(numbers) - sum(counts)
    by_rest = sorted(range(len(shares)), key=lambda rank: (counts[rank] - exact[rank], rank))
    for rank in by_rest[:left]:
        counts[rank] += 1
    ends = np.cumsum(counts).tolist()
    return [list(numbers[end - count : end]) for count, end in zip(counts, ends, strict=True)]
