"""What a user asks for, checked once, before any weight is touched. Pure: imports no mlx.

The command line and the Python API build the same `GenerateRequest`, in which a user may leave open
what the model knows best. `planning.workload.ModelSizes.fill` is where that is filled in: all that
plans, runs and records a request reads a `FilledRequest`.
"""

from __future__ import annotations

import bisect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from fluxmesh.errors import UsageError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES = tuple(DTYPE_BYTES)
BITS = (3, 4, 5, 6, 8)
MAX_SEED = 2**63 - 1
MAX_IMAGES = 4096
MAX_SIDE = 8192
MAX_CACHE = 1.0
MAX_CFG = 100.0
MAX_REFERENCES = 10
MAX_STRENGTH = 10.0  # of a reference
LONG = 24  # letters of a "word" that is cut inside, as Chinese, which has no spaces
SHOWN = 48  # letters of what is left out, in a sentence


@dataclass(frozen=True)
class AdapterRef:
    """A LoRA file and the strength that it is applied with (1.0 = as trained)."""

    path: str
    scale: float = 1.0

    @classmethod
    def all_of(cls, adapters: Any) -> tuple[Self, ...]:
        """Adapters as a program may give them: each a path, (path, strength), or one of these.

        Raises `UsageError` for anything else.
        """
        if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Iterable):
            raise UsageError.about("adapters", f"is {adapters!r}", "give a list of adapters")
        return tuple(cls._of(adapter) for adapter in adapters)

    @classmethod
    def _of(cls, adapter: Any) -> Self:
        if isinstance(adapter, cls):
            return adapter
        path, scale = adapter, 1.0
        if isinstance(adapter, tuple | list) and len(adapter) == 2:
            path, scale = adapter
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not isinstance(path, str | os.PathLike) or not is_number:
            raise UsageError.about(
                "adapters", f"has {adapter!r}", 'give "a.safetensors", or ("a.safetensors", 0.5)'
            )
        return cls(os.fspath(path), float(scale))


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


Condition = Literal[
    "references", "reference_strengths", "control", "control_from", "negative", "cfg"
]
"""What some models take beside a prompt, by the request's field: `Architecture.takes`.

"control_from" is a map that fluxmesh makes of a picture, as users ask for it; "control" any other.
"""
MapKind = Literal["edges", "depth"]
"""What a map shows that a picture follows. fluxmesh makes those of edges (`images/edges.py`)."""


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
    text_bits: int | None = None  # the text encoders to so many; None is as `bits` says
    adapters: tuple[AdapterRef, ...] = ()
    fuse_adapters: bool = False
    t5_padding: bool = True
    decoding_batch_size: int = 1
    preload: bool = False  # load every component before the first starts
    low_memory: bool = False  # release modulation once it is computed; nothing stays warm
    stepwise: bool = False  # decode a preview after each step
    preview_every: int = 0  # show what comes, small and undecoded, each so many steps; 0: never
    # Approximate: steps in which less than this share changes reuse earlier ones. 0 computes all.
    cache: float = 0.0
    source: SourceImage | None = None
    # Pictures that the prompt speaks of, uint8 [H, W, 3] each.
    references: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)
    # How much each of them counts, for models that take that; () is 1 for all.
    reference_strengths: tuple[float, ...] = ()
    # The models that read references, of one that reads none by itself: FLUX.1 Redux, by an alias,
    # a Hub id or a path; "" is the family's own.
    redux: str = ""
    # A map of edges or depth that the picture follows, uint8 [H, W, 3].
    control: np.ndarray | None = field(default=None, repr=False, compare=False)
    control_is_found: bool = False  # it is the edges that fluxmesh found in a picture
    negative: str | None = None  # what to move away from; None is the model's own
    cfg: float | None = None  # strength of classifier-free guidance; None is the model's own

    def __post_init__(self) -> None:
        """Raises `UsageError` naming the field and what is allowed."""
        object.__setattr__(self, "adapters", AdapterRef.all_of(self.adapters))
        object.__setattr__(self, "references", tuple(self.references))
        object.__setattr__(self, "reference_strengths", tuple(self.reference_strengths))
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative or "")):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"The {name} is not valid UTF-8; check the terminal's encoding."
                ) from error
        if not 1 <= self.n_images <= MAX_IMAGES:
            raise UsageError.about(
                "n_images", f"is {self.n_images}", f"it must be 1 to {MAX_IMAGES}"
            )
        if not 0 <= self.seed <= self.seed_of(self.n_images - 1) <= MAX_SEED:
            raise UsageError(
                f"`seed` is {self.seed}; it must be 0 or more, and the last image's 2^63 - 1 at "
                "most.",
                setting="seed",
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and not (16 <= side <= MAX_SIDE and side % 16 == 0):
                raise UsageError(
                    f"`image_size` has {name} {side}; each side must be a multiple of 16 "
                    f"from 16 to {MAX_SIDE}.",
                    setting="image_size",
                )
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise UsageError.about("steps", f"is {self.steps}", "it must be 1 to 1000")
        guidance = self.guidance
        if guidance is not None and not (math.isfinite(guidance) and 0 <= guidance <= 100):
            raise UsageError.about("guidance", f"is {guidance}", "it must be 0 to 100")
        if not 0 <= self.preview_every <= 1000:
            raise UsageError.about(
                "preview_every", f"is {self.preview_every}", "it must be 0 (never) to 1000"
            )
        if self.dtype not in DTYPES:
            raise UsageError.about("dtype", f"is {self.dtype!r}", f"choose {', '.join(DTYPES)}")
        if self.bits is not None and self.bits not in BITS:
            raise UsageError.about("bits", f"is {self.bits}", "choose 3, 4, 5, 6 or 8")
        if self.text_bits is not None and self.text_bits not in BITS:
            raise UsageError.about("text_bits", f"is {self.text_bits}", "choose 3, 4, 5, 6 or 8")
        if self.decoding_batch_size < 1:
            raise UsageError(
                "`decoding_batch_size` must be at least 1.", setting="decoding_batch_size"
            )
        if not 0 <= self.cache <= MAX_CACHE:
            raise UsageError.about(
                "cache", f"is {self.cache}; it must be 0 (off) to {MAX_CACHE}", "try 0.1"
            )
        if self.preload and self.low_memory:
            raise UsageError("`preload` and `low_memory` exclude each other; choose one.")
        for adapter in self.adapters:
            if not math.isfinite(adapter.scale):
                raise UsageError(
                    f"`adapter` {adapter.path} has scale {adapter.scale}.", setting="adapter"
                )
        if self.source is not None and not 0 < self.source.strength <= 1:
            raise UsageError.about(
                "strength", f"is {self.source.strength}", "it must be above 0 and at most 1"
            )
        cfg = self.cfg
        if cfg is not None and not (math.isfinite(cfg) and 0 <= cfg <= MAX_CFG):
            raise UsageError.about("cfg", f"is {cfg}", f"it must be 0 to {MAX_CFG:.0f}")
        if len(self.references) > MAX_REFERENCES:
            raise UsageError.about(
                "references", f"are {len(self.references)}", f"give {MAX_REFERENCES} at most"
            )
        check_strengths(self.reference_strengths, len(self.references))
        for picture in self.references:
            _check_picture("references", picture)
        if self.control is not None:
            _check_picture("control", self.control)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those that are given."""
        given: dict[Condition, bool] = {
            "references": bool(self.references),
            "reference_strengths": any(strength != 1 for strength in self.reference_strengths),
            "control": self.control is not None and not self.control_is_found,
            "control_from": self.control is not None and self.control_is_found,
            "negative": self.negative is not None,
            "cfg": self.cfg is not None and self.cfg != 1,  # which every model takes
        }
        return tuple(name for name, is_given in given.items() if is_given)

    def seed_of(self, image: int) -> int:
        """The seed that gives image `image` (counted from 0) alone."""
        return self.seed + image


def check_strengths(strengths: Sequence[float], references: int) -> None:
    """Raises `UsageError` for anything but none, or one for each reference."""
    if strengths and len(strengths) != references:
        raise UsageError.about(
            "reference_strengths",
            f"are {len(strengths)} for {references} references",
            "give one for each, or none",
        )
    for strength in strengths:
        if not (math.isfinite(strength) and 0 <= strength <= MAX_STRENGTH):
            raise UsageError.about(
                "reference_strengths",
                f"has {strength}",
                f"each must be 0 to {MAX_STRENGTH:g}, and 1 counts as it is",
            )


def _check_picture(field: str, picture: Any) -> None:
    """Raises `UsageError` for anything but pixels."""
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        raise UsageError.about(field, "must be arrays of uint8", "`fluxmesh.images` reads files")
    if picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UsageError.about(
            field, f"has the shape {list(picture.shape)}", "a picture has [height, width, 3]"
        )


@dataclass(frozen=True, kw_only=True)
class FilledRequest(GenerateRequest):
    """A request with nothing left open: what is planned, what travels, what a recipe tells.

    `bits` None says that weights are as the checkpoint stores them, `source` None that there is no
    picture to begin from, `negative` None that the model's own words are moved away from, if any.
    `references` are of the sizes at which the model reads them.
    """

    height: int
    width: int
    steps: int
    guidance: float
    cfg: float = 1.0  # above it, the model is asked twice a step

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


@dataclass(frozen=True)
class PromptCut:
    """A prompt that is longer than a text encoder reads.

    FLUX.1's T5 reads 256 tokens (schnell) or 512 (dev), `tiny` 32; what comes after is left out,
    and changes nothing in the picture. CLIP reads 77, but for a summary beside T5's account of
    every word: a prompt that only CLIP can't hold is not cut.
    """

    tokens: int  # of the whole prompt, its markers included
    kept: int  # that are read
    start: int  # where what is left out begins, in letters: a word that is not read whole

    def counts(self, what: str = "the prompt") -> str:
        """How much is read, without a word of it; `what` is how to call it."""
        return f"The model reads {self.kept} of the {self.tokens} tokens of {what}"

    def sentence(self, prompt: str, what: str = "the prompt") -> str:
        """For whoever wrote it; `what` is how to call it."""
        words = " ".join(prompt[self.start :].split())
        shown = words if len(words) <= SHOWN else f"{words[:SHOWN].rsplit(' ', 1)[0]} …"
        return f"{self.counts(what)}; left out is all from “{shown}” on."


def cut_of(prompt: str, count: Callable[[str], int], limit: int) -> PromptCut | None:
    """What is left out of a prompt; None where it is read whole.

    `count` gives the tokens of a text with its markers, `limit` is how many are read.
    """
    tokens = count(prompt)
    if tokens <= limit:
        return None
    words = [match.span() for match in re.finditer(r"\S+", prompt)]
    whole = _longest(len(words), lambda number: count(prompt[: words[number - 1][1]]) <= limit)
    if whole == len(words):  # what is too much is no word: the markers of an odd tokenizer
        return PromptCut(tokens, limit, len(prompt))
    start, end = words[whole]
    if end - start > LONG:
        start += _longest(end - start, lambda letters: count(prompt[: start + letters]) <= limit)
    return PromptCut(tokens, limit, start)


def _longest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, or 0: beyond one that does not, none does."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda number: not fits(number))
