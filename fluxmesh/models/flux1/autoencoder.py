"""The autoencoder of FLUX.1: pictures to latents and back, 8 pixels a latent along each side.

Last in `stages.py`, and first for image-to-image and for training. Its halves and its tiles are
those of all families (`models/autoencoder/convolutional.py`); here stands what lies between them.

Shapes are MLX's, channels last: pictures [B, H, W, 3] in [-1, 1], latents [B, h, w, z_channels].
"""

from __future__ import annotations

import mlx.core as mx

from fluxmesh.models.autoencoder.convolutional import ConvAutoencoder
from fluxmesh.models.flux1.config import AutoencoderConfig


class AutoEncoder(ConvAutoencoder):
    """Pictures to latents and back. Latents are those that FLUX was trained on: shifted, scaled."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.config = config

    def encode(self, x: mx.array) -> mx.array:
        """Pictures [B, H, W, 3] in [-1, 1] to the posterior's mean, latents [B, h, w, z_channels].

        H and W are multiples of `config.downsampling`. The result has the dtype of the weights.
        """
        moments = self.encoder(x.astype(self.dtype))  # [B, h, w, 2 * z_channels]
        mean, _ = mx.split(moments, 2, axis=-1)
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def restored(self, z: mx.array) -> mx.array:
        """As `ConvAutoencoder.restored`."""
        return (z / self.config.scale_factor + self.config.shift_factor).astype(self.dtype)
