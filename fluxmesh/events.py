"""What a running job tells: one frozen dataclass an event, in the order in which they happen.

The runner (`fluxmesh.flux.runner`) yields them; the command line turns them into a progress bar,
a table or JSON lines, and writes the pictures. Nothing here imports mlx, so that a coordinator
on another machine can hold them too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Loading:
    """A component's weights are being read."""

    component: str  # "text encoders", "transformer", "autoencoder"; "download" before them
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Encoded:
    """The prompt has become text features (at once when it was seen before)."""

    prompt: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Step:
    """One denoising step of one image is done, and evaluated."""

    image: int  # counted from 0
    step: int  # steps done, from 1
    steps: int  # steps that this image takes
    seconds: float
    preview: np.ndarray | None = field(default=None, repr=False, compare=False)
    # uint8 (height, width, 3), when the request asked to see each step


@dataclass(frozen=True)
class Picture:
    """One finished image."""

    image: int  # counted from 0
    seed: int  # the seed that gives this image alone
    pixels: np.ndarray = field(repr=False, compare=False)  # uint8 (height, width, 3)
    seconds: float = 0.0  # denoising and decoding


@dataclass(frozen=True)
class Peak:
    """Peak memory of a phase, reported as the phase ends."""

    phase: str  # "text", "denoise" or "decode"
    bytes: int


Event = Loading | Encoded | Step | Picture | Peak
