"""The units of work that make pictures, each beside its reports. Pure; on `unit.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from fluxmesh.bounds import (
    MAX_PREVIEW,
    Count,
    Pixels,
    Range,
    ShardIndex,
    Shards,
    Text,
    check_shard,
)
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import CollectiveTime, Holding, Placement, StepTiming
from fluxmesh.deadlines import Deadlines
from fluxmesh.errors import UsageError
from fluxmesh.request import MAX_REFERENCES, PromptCut, check_strengths
from fluxmesh.wire.messages.base import (
    Components,
    Conditions,
    Features,
    Image,
    Latents,
    Mask,
    OneLatents,
    Picture,
    Pictures,
    Report,
)
from fluxmesh.wire.messages.unit import ModelWork, Work, WorkReport

MAX_STEPS = 100_000
AREA = 1 << 20  # pixels, up to which a picture is not large

Steps = Annotated[int, Range(1, MAX_STEPS)]
StepsDone = Annotated[int, Range(0, MAX_STEPS)]


def _large(pixels: int) -> float:
    """How many pictures of common size one of so many pixels is about, at least 1."""
    return max(1.0, pixels / AREA)


@dataclass(frozen=True, kw_only=True)
class Loaded(WorkReport):
    holding: Holding
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Load(ModelWork):
    """Makes the engine hold a transformer, whole or a shard of it, and `components` beside it.

    What it holds of other weights leaves first, where there is no room for both
    (`ModelWork.memory_bytes`). `LoadProgress` tells how far it is.
    """

    reports: ClassVar = (Loaded,)
    doing: ClassVar = "loading"

    shards: Shards = 1
    shard: ShardIndex = 0
    components: Components = ()
    low_memory: bool = False
    text_stays: bool = True  # else text encoders that are there leave first
    shares: Shares = EVEN  # of which `shard` is one

    def __post_init__(self) -> None:
        check_shard(self.shard, self.shards)
        self.shares.check(self.shards)

    def limit(self, deadlines: Deadlines) -> float:
        return deadlines.load_moves  # each byte that is read begins it anew

    def late(self, seconds: float) -> str:
        return f"not one byte was loaded for {seconds:.0f} s"


@dataclass(frozen=True, kw_only=True)
class TextEncoded(WorkReport):
    seconds: float
    cached: bool
    peak_bytes: int
    content: str  # `Checkpoint.content` of the files that the encoders came from
    revision: Annotated[str, Text(64)]  # `Checkpoint.revision` of them
    # Of texts that have more tokens than are read; the texts themselves do not travel.
    cut: PromptCut | None = None
    negative_cut: PromptCut | None = None
    features: Features = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Encode(ModelWork):
    """Runs the text encoders."""

    reports: ClassVar = (TextEncoded,)
    doing: ClassVar = "reading the prompt"
    budget: ClassVar = 120.0

    # A log that names a message names no prompt.
    prompt: Annotated[str, Text(1 << 17)] = field(repr=False)
    # What to move away from; None is the model's own, of one that is guided so.
    negative: Annotated[str, Text(1 << 17)] | None = field(default=None, repr=False)
    t5_padding: bool = True
    stay: bool = True  # whether the encoders may stay in memory afterwards
    # Where encoders have to run, the transformer leaves first, and they leave afterwards.
    makes_room: bool = False
    by_layers: bool = False  # their layers are read and run one at a time, where they can be


@dataclass(frozen=True, kw_only=True)
class SourceEncoded(WorkReport):
    content: str  # `Checkpoint.content` of the files that the autoencoder came from
    latents: Latents = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class PictureWork(ModelWork, is_base=True):
    """Base of what encodes pictures: with the autoencoder, or with models of its own."""

    makes_room: bool = False  # the transformer leaves first
    text_stays: bool = True  # else text encoders that are there leave first


@dataclass(frozen=True, kw_only=True)
class EncodeSource(PictureWork):
    """Encodes the picture to begin from."""

    reports: ClassVar = (SourceEncoded,)
    doing: ClassVar = "encoding the picture"
    budget: ClassVar = 120.0

    pixels: Picture = field(repr=False, compare=False)

    @property
    def pictures(self) -> float:
        return _large(self.pixels.size // 3)


@dataclass(frozen=True, kw_only=True)
class PicturesEncoded(WorkReport):
    content: str  # `Checkpoint.content` of the model
    reader: Annotated[str, Text(64)] = ""  # of what read references, where that is another one
    conditions: Conditions = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class EncodePictures(PictureWork):
    """Encodes the pictures that the model reads beside the prompt: references, a control map."""

    reports: ClassVar = (PicturesEncoded,)
    doing: ClassVar = "encoding the pictures"
    budget: ClassVar = 120.0

    # uint8 [height, width, 3] each, or 1 of a mask, as `Architecture.pictures` has them
    named: Pictures = field(repr=False, compare=False)
    # Of models that read references with others: those, by a name as of `weights.model`, how much
    # each reference counts, and whether they may stay in memory.
    reader: Annotated[str, Text(4096)] = ""
    strengths: Annotated[tuple[float, ...], Count(MAX_REFERENCES)] = ()
    stay: bool = True

    def __post_init__(self) -> None:
        check_strengths(self.strengths, len(self.named))
        for name, picture in self.named.items():
            if picture.ndim != 3 or picture.shape[2] not in (1, 3):
                raise UsageError(
                    f"The picture {name!r} came as {list(picture.shape)}, and that is no picture; "
                    "send [height, width, 3], or 1 for a mask."
                )

    @property
    def pictures(self) -> float:
        return sum(_large(math.prod(picture.shape[:2])) for picture in self.named.values())


@dataclass(frozen=True, kw_only=True)
class Stepped(WorkReport):
    """A step is done and evaluated; `latents` from rank 0 of a ring alone, and from `data`."""

    image: Image
    step: Steps  # steps done, from 1
    is_last: bool  # of the image
    seconds: float
    peak_bytes: int
    latents: Latents | None = field(default=None, repr=False, compare=False)
    preview: Picture | None = field(default=None, repr=False, compare=False)
    # What the step leads to, undecoded, a pixel a latent or fewer: no side above `MAX_PREVIEW`.
    projected: Picture | None = field(default=None, repr=False, compare=False)
    reused: bool = False  # most of its blocks were not run: an approximation that was asked for

    def __post_init__(self) -> None:
        if self.projected is not None and max(self.projected.shape[:2]) > MAX_PREVIEW:
            height, width, _ = self.projected.shape
            raise UsageError(f"projected is {height}x{width}; {MAX_PREVIEW} a side is the most.")


@dataclass(frozen=True, kw_only=True)
class Paint(ModelWork):
    """Denoises one image from step `first`, alone or with the ring.

    All ranks of a ring get the same; each reports its steps, and rank 0 the latents.
    """

    reports: ClassVar = (Stepped,)
    doing: ClassVar = "making a first step"
    budget: ClassVar = 300.0

    placement: Placement
    image: Image
    height: Pixels
    width: Pixels
    steps: Steps
    first: StepsDone  # steps already done; 0 begins from noise
    guidance: float
    low_memory: bool
    preview: bool  # decode the expected picture after each step
    strength: float  # of `source`; 1.0 without one
    # [1, L, 4C] after `first` steps; None where that is none: it begins from the noise
    latents: Latents | None = field(repr=False, compare=False)
    noise: OneLatents = field(repr=False, compare=False)
    features: Features = field(repr=False, compare=False)  # as `TextEncoded` gave them
    source: OneLatents | None = field(default=None, repr=False, compare=False)
    mask: Mask | None = field(default=None, repr=False, compare=False)
    # As `PicturesEncoded` gave them.
    conditions: Conditions | None = field(default=None, repr=False, compare=False)
    cfg: float = 1.0  # above it, the model is asked twice a step
    cache: float = 0.0  # threshold of step caching; 0 computes every step
    # With a cache and `first`: the latest step that was computed, counted from 0, and the latents
    # that it began from; None where these are the very first.
    basis: StepsDone = 0
    basis_latents: OneLatents | None = field(default=None, repr=False, compare=False)
    preview_every: StepsDone = 0  # project what each so many steps lead to; 0: none
    shares: Shares = EVEN  # of the ring's hosts, the same in all of the job's steps by it

    def __post_init__(self) -> None:
        for name in ("latents", "source", "basis_latents"):
            array = getattr(self, name)
            if array is not None and array.shape != self.noise.shape:
                raise UsageError(
                    f"`{name}` came as {list(array.shape)} and the noise as "
                    f"{list(self.noise.shape)}; all are of one image, and of one shape.",
                    setting=name,
                )
        if self.mask is not None and self.mask.shape != (self.height, self.width):
            raise UsageError(
                f"The mask came as {list(self.mask.shape)} for an image of "
                f"{self.height}x{self.width}; both must have one size."
            )

    @property
    def is_collective(self) -> bool:
        return self.placement != "data"

    @property
    def added_tokens(self) -> int:
        """Tokens that conditions add to a step's: those that are grids [1, rows, columns, C]."""
        shapes = [array.shape for array in (self.conditions or {}).values()]
        return sum(shape[1] * shape[2] for shape in shapes if len(shape) == 4)

    @property
    def pictures(self) -> float:
        """With references, which a step reads as it does the picture."""
        tokens = self.noise.shape[1]
        return _large(self.height * self.width) * (tokens + self.added_tokens) / tokens

    def gave(self, report: Report) -> bool:
        return isinstance(report, Stepped) and report.image == self.image

    def is_ended_by(self, report: Report) -> bool:
        return self.gave(report) and isinstance(report, Stepped) and report.is_last


@dataclass(frozen=True, kw_only=True)
class Pictured(WorkReport):
    image: Image
    seconds: float
    peak_bytes: int
    pixels: Picture = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Decode(ModelWork):
    """Latents to pictures, all in one batch; a report for each."""

    reports: ClassVar = (Pictured,)
    doing: ClassVar = "decoding"
    budget: ClassVar = 120.0

    images: tuple[Image, ...]
    height: Pixels
    width: Pixels
    latents: Latents = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.images):
            raise UsageError(
                f"The latents of {len(self.latents)} images came for {len(self.images)}; send one "
                "each."
            )

    @property
    def pictures(self) -> float:
        return max(1, len(self.images)) * _large(self.height * self.width)

    def gave(self, report: Report) -> bool:
        return isinstance(report, Pictured) and report.image in self.images

    def is_ended_by(self, report: Report) -> bool:
        return isinstance(report, Pictured) and report.image in self.images[-1:]


@dataclass(frozen=True, kw_only=True)
class Timed(WorkReport):
    measured: StepTiming


@dataclass(frozen=True, kw_only=True)
class Measure(ModelWork):
    """Times a step and a decode, alone or with the ring, after a trial picture (`Warm`)."""

    reports: ClassVar = (Timed,)
    doing: ClassVar = "timing a step"

    height: Pixels
    width: Pixels
    placement: Placement = "data"
    shares: Shares = EVEN  # of the ring's hosts

    @property
    def is_collective(self) -> bool:
        return self.placement != "data"


@dataclass(frozen=True, kw_only=True)
class Warmed(WorkReport):
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Warm(ModelWork):
    """Makes a step of one picture of noise, alone or with the ring, and a decode; keeps neither.

    What is compiled or allocated at the first picture of a size then is.
    """

    reports: ClassVar = (Warmed,)
    doing: ClassVar = "making a first step"

    height: Pixels
    width: Pixels
    placement: Placement = "data"
    shares: Shares = EVEN  # of the ring's hosts

    @property
    def is_collective(self) -> bool:
        return self.placement != "data"


@dataclass(frozen=True, kw_only=True)
class RingTimed(WorkReport):
    """What the collectives of a ring take, the same on all ranks: times of the slowest one."""

    gathers: tuple[CollectiveTime, ...]
    sums: tuple[CollectiveTime, ...]
    hidden: float  # part of a gather that passes while products run beside it, 0 to 1


@dataclass(frozen=True, kw_only=True)
class MeasureRing(Work):
    """Times the collectives of the engine's ring by size, within `seconds` or so.

    All ranks of a ring are given it, and begin also where the job was cancelled: they agree to
    stop. Needs no weights.
    """

    reports: ClassVar = (RingTimed,)
    doing: ClassVar = "measuring its ring"
    budget: ClassVar = 60.0

    seconds: float = 2.0

    @property
    def is_collective(self) -> bool:
        return True
