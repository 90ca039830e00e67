"""What a running training tells: one frozen dataclass an event. Imports no mlx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fluxmesh.training.data.dataset import Example


@dataclass(frozen=True)
class Note:
    """A sentence for whoever looks on: what was passed over, what was cut."""

    text: str


@dataclass(frozen=True)
class Prepared:
    """The data set is checked and the model's sizes are known."""

    images: int
    priors: int  # beside those
    sizes: dict[tuple[int, int], int]  # images by (height, width) that they are trained at
    held_out: int
    updates: int
    micro_batches: int  # of an update
    batch_size: int
    numbers: int  # that are trained
    warmup: int  # updates
    rate: float  # when it is full
    begins_at: int  # updates done, by the run that is resumed
    revision: str  # of the base model
    # Those that are trained on, for whoever shows them; no program reads them.
    examples: Sequence[Example] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """The hosts of a mesh are ready: how an update's micro-batches are dealt out at first."""

    updates: int
    micro_batches: int  # of an update
    batch_size: int
    shares: dict[int, int]  # micro-batches by the host's rank

    def __str__(self) -> str:
        counts = list(self.shares.values())
        images = self.micro_batches * self.batch_size
        hosts = f"{len(counts)} host{'' if len(counts) == 1 else 's'}"
        if len(set(counts)) == 1:
            each = f"{counts[0] * self.batch_size} a host on {hosts}"
        else:
            parts = [str(count * self.batch_size) for count in counts]
            each = f"{', '.join(parts[:-1])} and {parts[-1]} on {hosts}"
        return f"{self.updates} updates of {images} images: {each}"


@dataclass(frozen=True)
class Encoding:
    """A caption or a crop was encoded that the cache lacked."""

    what: str  # "captions" or "pictures"
    done: int
    total: int


@dataclass(frozen=True)
class Updated:
    """The weights have moved."""

    update: int  # counted from 1
    iteration: int  # micro-batches done
    loss: float  # mean over the update's images
    rate: float
    norm: float  # of the gradient, before clipping
    images: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Validated:
    """The loss on the images that were held out, at fixed time steps and noise."""

    iteration: int
    loss: float
    best: bool


@dataclass(frozen=True)
class Progress:
    """A picture of the progress prompt, always from the run's seed."""

    iteration: int
    steps: int  # of its generation
    pixels: np.ndarray = field(repr=False, compare=False)  # uint8 (height, width, 3)


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is on the disk."""

    iteration: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The adapter is on the disk."""

    path: Path


TrainEvent = (
    Note | Prepared | Dealt | Encoding | Updated | Validated | Progress | CheckpointSaved | Finished
)
