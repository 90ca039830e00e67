"""What coordinator and engine say of a training, beside all of `fluxmesh/wire/messages.py`. Pure.

Captions and crops are encoded by `Encode` and `EncodeSource` like those of a picture. Then each
engine is handed the state in pieces (`PutVector`), opens the training, and is handed the features
of the micro-batches that it will compute (`PutFeatures`) before each `Update`. All ranks of the
ring get every `Update`, each with its own numbers; in it their sums meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.wire.messages import Report, Work

STOPPED = 1 << 32  # beside the micro-batches that failed: a rank was told to stop
PIECE = 1 << 20  # numbers of a vector in a message


def in_pieces(vector: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(offset, numbers) of a vector [size], as messages carry it."""
    for offset in range(0, len(vector), PIECE):
        yield offset, vector[offset : offset + PIECE]


@dataclass(frozen=True)
class MakeRoom(Work):
    """The transformer leaves where it and the encoders don't fit together. Reports nothing."""

    weights: ModelVariant


@dataclass(frozen=True)
class PutVector(Work):
    """A piece of the state that the next `OpenTraining` goes on from. Reports nothing."""

    vector: str  # as a checkpoint names it
    offset: int
    total: int  # numbers in the whole vector
    numbers: np.ndarray = field(repr=False, compare=False)  # float32 [n]


@dataclass(frozen=True)
class OpenTraining(Work):
    """Loads the transformer and puts the LoRAs in place that are trained. Reported by `Opened`.

    `request` is a `TrainRequest` as JSON, in which a caption is its number, as everywhere here.
    """

    weights: ModelVariant
    request: str = field(repr=False)
    update: int  # updates that the state has behind it; 0 begins anew
    sizes: np.ndarray = field(repr=False, compare=False)  # int32 [examples, 2], pixels
    captions: np.ndarray = field(repr=False, compare=False)  # int32 [examples]
    priors: int = 0  # the last so many examples are those that the model is to keep as it was


@dataclass(frozen=True)
class PutFeatures(Work):
    """What a crop or a caption was encoded to, kept until it is dropped. Reports nothing."""

    name: str
    latents: np.ndarray | None = field(default=None, repr=False, compare=False)  # [1, L, 4C]
    t5: np.ndarray | None = field(default=None, repr=False, compare=False)  # as `Encoded` gave it
    clip: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class DropFeatures(Work):
    """Forgets features. Reports nothing."""

    features: tuple[str, ...]


@dataclass(frozen=True)
class Update(Work):
    """One update: this rank's micro-batches, the sum over the ring, and the move.

    Reported by a `Computed` for each micro-batch, and `UpdateDone`. One that is cancelled ends on
    all ranks without a move and without a report, or on none.
    """

    update: int  # counted from 0
    numbers: tuple[int, ...]  # micro-batches of this rank; may be none
    parts: int  # micro-batches of the whole update
    together: bool  # with the ring; else this host is alone


@dataclass(frozen=True)
class GiveVectors(Work):
    """Reported by `VectorPart`s: the state whole, or nothing of it if it is cancelled."""


@dataclass(frozen=True)
class Validate(Work):
    """Measures on what was held out. Reported by `HeldOut`."""


@dataclass(frozen=True)
class PaintProgress(Work):
    """Paints the progress prompt. Reported by `ProgressPainted`."""


@dataclass(frozen=True)
class CloseTraining(Work):
    """Leaves the transformer as it was. Reported by `Closed`."""


# Reports


@dataclass(frozen=True)
class Opened(Report):
    job: str
    ring_generation: int
    trained: int  # numbers
    content: str  # `Checkpoint.content` of the files that the transformer came from


@dataclass(frozen=True)
class Computed(Report):
    """The gradient of a micro-batch is evaluated."""

    job: str
    ring_generation: int
    number: int
    seconds: float


@dataclass(frozen=True)
class UpdateDone(Report):
    """An update is done, on all ranks alike. Loss and norm are 0 where `bad` is not."""

    job: str
    ring_generation: int
    update: int  # done, this one included
    loss: float
    norm: float
    rate: float
    images: int
    bad: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class VectorPart(Report):
    job: str
    ring_generation: int
    update: int  # that the state has behind it
    vector: str
    offset: int
    total: int
    is_last: bool  # of all vectors
    numbers: np.ndarray = field(repr=False, compare=False)  # float32 [n]


@dataclass(frozen=True)
class HeldOut(Report):
    """The mean loss on what was held out."""

    job: str
    ring_generation: int
    loss: float


@dataclass(frozen=True)
class ProgressPainted(Report):
    job: str
    ring_generation: int
    pixels: np.ndarray = field(repr=False, compare=False)  # uint8 [height, width, 3]


@dataclass(frozen=True)
class Closed(Report):
    job: str
    ring_generation: int
