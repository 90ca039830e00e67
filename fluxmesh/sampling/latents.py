"""Initial noise, and the shapes that latents take. NumPy only: imports no mlx.

An image's noise is a function of its seed and size alone, drawn here and nowhere else, so that
image k of a request is the same on every host, placement and backend.

The transformer reads latents packed into tokens (`models/autoencoder/packing.py`).
"""

from __future__ import annotations

import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.models.autoencoder.packing import PATCH, pack, unpack

__all__ = [
    "PATCH",
    "initial_noise",
    "pack",
    "token_grid",
    "unpack",
]


def initial_noise(
    seed: int, height: int, width: int, channels: int = 16, downsampling: int = 8
) -> np.ndarray:
    """Standard normal noise, packed: float32 [1, (height/2d) * (width/2d), 4 * channels].

    `height` and `width` are pixels and multiples of `2 * downsampling` (d). The generator is
    Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") keyed by `seed`:
    counter-based, so that neighbouring seeds give unrelated streams.
    """
    rows, columns = token_grid(height, width, downsampling)
    generator = np.random.Generator(np.random.Philox(key=seed))
    shape = (1, rows * columns, channels * PATCH * PATCH)
    return generator.standard_normal(shape, dtype=np.float32)


def token_grid(height: int, width: int, downsampling: int = 8) -> tuple[int, int]:
    """Rows and columns of image tokens for an image of `height` x `width` pixels.

    Raises `UsageError` where a side is not a positive multiple of `2 * downsampling`.
    """
    side = PATCH * downsampling
    if height < side or width < side or height % side or width % side:
        raise UsageError(f"The image is {height}x{width}; each side must be a multiple of {side}.")
    return height // side, width // side
