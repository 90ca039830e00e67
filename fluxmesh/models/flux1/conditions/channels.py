"""What FLUX.1's tools read beside the latents: pictures as channels of the input's tokens.

Fill paints into a picture: it takes the picture without what is painted over, and the mask. Canny
and Depth follow a control picture. `img_in` of these models is wider than what they give back
(`config.input_kind`); their condition stands behind the latents' channels at every call, neither
noised nor moved by a step. Below `runtime.py`.

Source: black-forest-labs/flux `src/flux/sampling.py` (`prepare_fill`, `prepare_control`), diffusers
`FluxFillPipeline`, `FluxControlPipeline`. Both of these draw a sample of what the autoencoder
encodes; here it is the posterior's mean, so that a seed has one picture.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.images import to_model_range
from fluxmesh.models.autoencoder.packing import pack

OPAQUE = 128  # of a mask's 255: from here on a pixel is painted, as diffusers rounds


def control_channels(autoencoder: Any, pixels: np.ndarray) -> mx.array:
    """A control picture, uint8 [H, W, 3] at the output's size, as channels [1, S, 4C], lazy."""
    return _encoded(autoencoder, to_model_range(pixels))


def fill_channels(autoencoder: Any, pixels: np.ndarray, mask: np.ndarray) -> mx.array:
    """A picture, uint8 [H, W, 3], and the mask of what is painted, uint8 [H, W], as channels.

    The result, float32 [1, S, 4C + (2d)^2] with d pixels a latent, is lazy: first the picture, its
    hole a mid grey, then the mask, a number a pixel.
    """
    painted = mask >= OPAQUE
    picture = to_model_range(pixels) * ~painted[None, :, :, None]
    side = autoencoder.downsampling
    return mx.concatenate(
        [_encoded(autoencoder, picture), mx.array(mask_channels(painted, side))], axis=-1
    )


def mask_channels(painted: np.ndarray, downsampling: int) -> np.ndarray:
    """A mask, bool [H, W], as float32 [1, S, (2d)^2]: 1 where the model paints.

    The d x d pixels of a latent become its channels, row by row, and these are packed as latents
    are: channel ((y*d + x)*2 + ph)*2 + pw of token (i, j) is pixel (2di + d*ph + y, 2dj + d*pw +
    x).
    """
    height, width = painted.shape
    d = downsampling
    cells = painted.reshape(height // d, d, width // d, d).transpose(0, 2, 1, 3)
    latents = cells.reshape(1, height // d, width // d, d * d).astype(np.float32)
    return np.ascontiguousarray(pack(latents))


def _encoded(autoencoder: Any, picture: np.ndarray) -> mx.array:
    """A picture, float32 [1, H, W, 3] in [-1, 1], as packed latents float32 [1, S, 4C]."""
    return pack(autoencoder.encode(mx.array(picture.astype(np.float32))).astype(mx.float32))
