"""The units of work of a training, each beside its reports. Pure; on `unit.py`.

Captions and crops are encoded by `Encode` and `EncodeSource` like those of a picture. Then each
engine is handed the state in pieces (`PutVector`), opens the training, and is handed the features
of the micro-batches that it will compute (`PutFeatures`) before each `Update`. All ranks of the
ring get every `Update`, each with its own numbers; in it their sums meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np

from fluxmesh.bounds import ArrayOf, Count, Range, Text
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.wire.messages.base import Features, Picture, Report
from fluxmesh.wire.messages.unit import Work, WorkReport

STOPPED = 1 << 32  # beside the micro-batches that failed: a rank was told to stop

Length = Annotated[int, Range(1, 1 << 40)]  # of a vector, in numbers
Piece = Annotated[np.ndarray, ArrayOf(("float32",), (None,))]  # of a vector
Sizes = Annotated[np.ndarray, ArrayOf(("int32",), (None, 2))]  # [examples, 2], pixels
Captions = Annotated[np.ndarray, ArrayOf(("int32",), (None,))]  # [examples]
Repeats = Annotated[np.ndarray, ArrayOf(("int32",), (None,))]  # [examples]

LOOKING = "looking at the training"

PIECE = 1 << 20  # numbers of a vector in a message


def in_pieces(vector: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(offset, numbers) of a vector [size], as messages carry it."""
    for offset in range(0, len(vector), PIECE):
        yield offset, vector[offset : offset + PIECE]


# What an engine is handed


@dataclass(frozen=True, kw_only=True)
class MakeRoom(Work):
    """The transformer leaves where it and the encoders don't fit together."""

    weights: ModelVariant


@dataclass(frozen=True, kw_only=True)
class PutVector(Work):
    """A piece of the state that the next `OpenTraining` goes on from."""

    vector: str  # as a checkpoint names it
    offset: int
    total: Length
    numbers: Piece = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class PutFeatures(Work):
    """What a crop or a caption was encoded to, kept until it is dropped."""

    name: str
    features: Features = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class DropFeatures(Work):
    """Forgets features."""

    features: Annotated[tuple[str, ...], Count(16_384)]


# What it does


@dataclass(frozen=True, kw_only=True)
class Opened(WorkReport):
    trained: int  # numbers
    content: str  # `Checkpoint.content` of the files that the transformer came from


@dataclass(frozen=True, kw_only=True)
class OpenTraining(Work):
    """Loads the transformer and puts the LoRAs in place that are trained.

    `request` is a `TrainRequest` as JSON, in which a caption is its number, as everywhere here.
    """

    reports: ClassVar = (Opened,)
    doing: ClassVar = "opening the training"

    weights: ModelVariant
    request: Annotated[str, Text(1 << 16)] = field(repr=False)
    update: int  # updates that the state has behind it; 0 begins anew
    sizes: Sizes = field(repr=False, compare=False)
    captions: Captions = field(repr=False, compare=False)
    repeats: Repeats = field(repr=False, compare=False)  # how often an epoch shows each
    priors: int = 0  # the last so many examples are those that the model is to keep as it was


@dataclass(frozen=True, kw_only=True)
class Computed(WorkReport):
    """The gradient of a micro-batch is evaluated."""

    number: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class UpdateDone(WorkReport):
    """An update is done, on all ranks alike. Loss and norm are 0 where `bad` is not."""

    update: int  # done, this one included
    loss: float
    norm: float
    rate: float
    images: Annotated[int, Range(0, 1 << 31)]
    bad: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Update(Work):
    """One update: this rank's micro-batches, the sum over the ring, and the move.

    One that is cancelled ends on all ranks without a move and without a report, or on none.
    """

    reports: ClassVar = (Computed, UpdateDone)
    doing: ClassVar = "training"

    update: int  # counted from 0
    numbers: Annotated[tuple[int, ...], Count(65_536)]  # micro-batches of this rank; may be none
    parts: int  # micro-batches of the whole update
    together: bool  # with the ring; else this host is alone

    @property
    def is_collective(self) -> bool:
        return self.together


@dataclass(frozen=True, kw_only=True)
class VectorPart(WorkReport):
    update: int  # that the state has behind it
    vector: str
    offset: int
    total: Length
    is_last: bool  # of all vectors
    numbers: Piece = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class GiveVectors(Work):
    """Has the state sent whole, or nothing of it if it is cancelled."""

    reports: ClassVar = (VectorPart,)
    doing: ClassVar = LOOKING

    def is_ended_by(self, report: Report) -> bool:
        return isinstance(report, VectorPart) and report.is_last


@dataclass(frozen=True, kw_only=True)
class HeldOut(WorkReport):
    """The mean loss on what was held out."""

    loss: float


@dataclass(frozen=True, kw_only=True)
class Validate(Work):
    """Measures on what was held out."""

    reports: ClassVar = (HeldOut,)
    doing: ClassVar = LOOKING


@dataclass(frozen=True, kw_only=True)
class ProgressPainted(WorkReport):
    pixels: Picture = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class PaintProgress(Work):
    """Paints the progress prompt."""

    reports: ClassVar = (ProgressPainted,)
    doing: ClassVar = LOOKING


@dataclass(frozen=True, kw_only=True)
class Closed(WorkReport):
    """The transformer is as it was."""


@dataclass(frozen=True, kw_only=True)
class CloseTraining(Work):
    """Leaves the transformer as it was."""

    reports: ClassVar = (Closed,)
    doing: ClassVar = LOOKING
