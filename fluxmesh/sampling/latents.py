"""Initial noise, and the shapes that latents take. NumPy only: imports no mlx.

An image's noise is a function of its seed and size alone, drawn here and nowhere else, so that
image k of a request is the same on every host, placement and backend.

The transformer reads latents "packed": each token is a square of 2x2 latents. `pack` and `unpack`
take NumPy and MLX arrays alike. Channel order inside a token (channel, row, column) is that of
black-forest-labs/flux `src/flux/sampling.py`: "b c (h ph) (w pw) -> b (h w) (c ph pw)".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxmesh.errors import UsageError

PATCH = 2  # latents along one side of a token


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


def pack(latents: Any) -> Any:
    """Latents [B, h, w, C] to tokens [B, (h/2) * (w/2), 4C]."""
    B, h, w, C = latents.shape
    x = latents.reshape(B, h // PATCH, PATCH, w // PATCH, PATCH, C)
    x = x.transpose(0, 1, 3, 5, 2, 4)  # [B, h/2, w/2, C, 2, 2]
    return x.reshape(B, (h // PATCH) * (w // PATCH), C * PATCH * PATCH)


def unpack(tokens: Any, latent_size: tuple[int, int]) -> Any:
    """Tokens [B, (h/2) * (w/2), 4C] to latents [B, h, w, C]; `latent_size` is (h, w)."""
    h, w = latent_size
    B, _, channels = tokens.shape
    C = channels // (PATCH * PATCH)
    x = tokens.reshape(B, h // PATCH, w // PATCH, C, PATCH, PATCH)
    x = x.transpose(0, 1, 4, 2, 5, 3)  # [B, h/2, 2, w/2, 2, C]
    return x.reshape(B, h, w, C)


def image_positions(rows: int, columns: int) -> np.ndarray:
    """Position ids of image tokens, int32 [rows * columns, 3]: (0, row, column)."""
    ids = np.zeros((rows, columns, 3), dtype=np.int32)
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3)


def text_positions(length: int) -> np.ndarray:
    """Position ids of text tokens, int32 [length, 3]: all zero."""
    return np.zeros((length, 3), dtype=np.int32)
