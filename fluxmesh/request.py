"""What a user asks for, checked once, before any weight is touched. Pure: imports no mlx.

The command line and the Python API build the same `GenerateRequest`, in which a user may leave open
what the model knows best. `planning.workload.ModelSizes.fill` is where that is filled in: all that
plans, runs and records a request reads a `FilledRequest`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fluxmesh.errors import UsageError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES = tuple(DTYPE_BYTES)
BITS = (3, 4, 5, 6, 8)
MAX_SEED = 2**63 - 1
MAX_IMAGES = 4096
MAX_SIDE = 8192
MAX_CACHE = 1.0


@dataclass(frozen=True)
class AdapterRef:
    """A LoRA file and the strength that it is applied with (1.0 = as trained)."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True)
class SourceImage:
    """The picture that image-to-image, inpainting and outpainting begin from.

    `pixels` is uint8 (height, width, 3) at the request's size. `mask` is uint8 (height, width),
    255 where the model paints and 0 where the picture stays; None paints everywhere.
    `strength` in (0, 1]: the share of the steps that run; 1 keeps nothing of the painted part.
    """

    pixels: np.ndarray = field(repr=False)
    strength: float = 0.6
    mask: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class GenerateRequest:
    """One job: `n_images` pictures of `prompt`; image k is what seed `seed + k` gives alone."""

    prompt: str
    seed: int
    model: str = "tiny"
    n_images: int = 1
    height: int | None = None  # pixels; None is the model's own default
    width: int | None = None  # pixels
    steps: int | None = None  # None is the model's own default
    guidance: float | None = None  # None is the model's own; read by guided ones (dev) only
    dtype: str = "bfloat16"
    bits: int | None = None  # quantize transformer and text encoders to 3|4|5|6|8 bits
    adapters: tuple[AdapterRef, ...] = ()
    fuse_adapters: bool = False
    t5_padding: bool = True
    decoding_batch_size: int = 1
    preload: bool = False  # load every component before the first starts
    low_memory: bool = False  # release modulation once it is computed; nothing stays warm
    stepwise: bool = False  # decode a preview after each step
    # Approximate: steps in which less than this share changes reuse earlier ones. 0 computes all.
    cache: float = 0.0
    source: SourceImage | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` naming the field and what is allowed."""
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                "The prompt is not valid UTF-8; check the terminal's encoding."
            ) from error
        if not 1 <= self.n_images <= MAX_IMAGES:
            raise UsageError.about(
                "n_images", f"is {self.n_images}", f"it must be 1 to {MAX_IMAGES}"
            )
        if not 0 <= self.seed <= self.seed_of(self.n_images - 1) <= MAX_SEED:
            raise UsageError(
                f"`seed` is {self.seed}; it must be 0 or more, and the last image's 2^63 - 1 at "
                "most."
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and not (16 <= side <= MAX_SIDE and side % 16 == 0):
                raise UsageError(
                    f"`image_size` has {name} {side}; each side must be a multiple of 16 "
                    f"from 16 to {MAX_SIDE}."
                )
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise UsageError.about("steps", f"is {self.steps}", "it must be 1 to 1000")
        guidance = self.guidance
        if guidance is not None and not (math.isfinite(guidance) and 0 <= guidance <= 100):
            raise UsageError.about("guidance", f"is {guidance}", "it must be 0 to 100")
        if self.dtype not in DTYPES:
            raise UsageError.about("dtype", f"is {self.dtype!r}", f"choose {', '.join(DTYPES)}")
        if self.bits is not None and self.bits not in BITS:
            raise UsageError.about("bits", f"is {self.bits}", "choose 3, 4, 5, 6 or 8")
        if self.decoding_batch_size < 1:
            raise UsageError("`decoding_batch_size` must be at least 1.")
        if not 0 <= self.cache <= MAX_CACHE:
            raise UsageError.about(
                "cache", f"is {self.cache}; it must be 0 (off) to {MAX_CACHE}", "try 0.1"
            )
        if self.preload and self.low_memory:
            raise UsageError("`preload` and `low_memory` exclude each other; choose one.")
        for adapter in self.adapters:
            if not math.isfinite(adapter.scale):
                raise UsageError(f"`adapter` {adapter.path} has scale {adapter.scale}.")
        if self.source is not None and not 0 < self.source.strength <= 1:
            raise UsageError.about(
                "strength", f"is {self.source.strength}", "it must be above 0 and at most 1"
            )

    def seed_of(self, image: int) -> int:
        """The seed that gives image `image` (counted from 0) alone."""
        return self.seed + image


@dataclass(frozen=True, kw_only=True)
class FilledRequest(GenerateRequest):
    """A request with nothing left open: what is planned, what travels, what a recipe tells.

    `bits` None says that weights are as the checkpoint stores them, `source` None that there is no
    picture to begin from.
    """

    height: int
    width: int
    steps: int
    guidance: float

    def __post_init__(self) -> None:
        """Raises `UsageError` as a `GenerateRequest` does, and for a source of another size."""
        super().__post_init__()
        if self.source is not None:
            height, width = self.source.pixels.shape[:2]
            if (height, width) != (self.height, self.width):
                raise UsageError(
                    f"the source picture is {height}x{width} and the image "
                    f"{self.height}x{self.width}; scale the source to the image's size."
                )
