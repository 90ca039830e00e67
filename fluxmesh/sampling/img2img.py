"""Image-to-image, in- and outpainting: a request's `SourceImage` as latents and as pixels.

The base model knows nothing of masks. Where a picture is kept, its own latents, noised to the
level of the step, are put back after every step, as diffusers' `FluxInpaintPipeline` does; where
it is painted, the model's go on. `composite` then lays the user's own pixels over the decoded
picture, because no autoencoder gives back exactly what went in.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from fluxmesh.sampling import latents


@dataclass(frozen=True)
class SourceLatents:
    """A picture in the model's own space, packed float32 [1, L, 4C], and what of it stays."""

    clean: mx.array
    painted: mx.array | None  # same shape: 1 where the model paints, 0 where the picture stays

    def noised(self, noise: mx.array, t: float) -> mx.array:
        """The picture at noise level `t` in [0, 1]."""
        return t * noise + (1.0 - t) * self.clean

    def keep(self, x: mx.array, noise: mx.array, t: float) -> mx.array:
        """`x` where the model paints, the picture at noise level `t` everywhere else."""
        if self.painted is None:
            return x
        return (1 - self.painted) * self.noised(noise, t) + self.painted * x


def mask_latents(mask: np.ndarray, downsampling: int, channels: int) -> mx.array:
    """A pixel mask, uint8 [H, W], as packed latents float32 [1, L, 4 * channels] of 0 and 1.

    A latent is painted when any of its `downsampling` x `downsampling` pixels is (diffusers looks
    at one of them, so that thin strokes fall through): the pixels that stay are composited anyway.
    """
    height, width = mask.shape
    cells = mask.reshape(height // downsampling, downsampling, width // downsampling, downsampling)
    painted = (cells.max(axis=(1, 3)) > 0).astype(np.float32)
    every = np.repeat(painted[None, :, :, None], channels, axis=-1)
    return mx.array(latents.pack(every))
