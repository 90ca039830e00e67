"""The autoencoder of FLUX.2: pictures to the transformer's tokens' latents and back.

Its halves and its tiles are those of all families (`models/autoencoder/`). Between them and the
latents stand a 1x1 convolution on either side, and the statistics of a batch norm in the place of
FLUX.1's shift and scale: of each of the numbers of a token (2x2 latents), their mean and variance
in training. The small decoder (black-forest-labs/FLUX.2-small-decoder) has narrower levels.

Shapes are MLX's, channels last: pictures [B, H, W, 3] in [-1, 1], latents [B, h, w, z_channels].
Source: black-forest-labs/flux2 `src/flux2/autoencoder.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.models.autoencoder.convolutional import ConvAutoencoder, conv1x1
from fluxmesh.models.autoencoder.packing import pack, unpack
from fluxmesh.models.flux2.config import Flux2AutoencoderConfig


class TokenStatistics(nn.Module):
    """Mean and variance of each number of a token; names are PyTorch's batch norm's."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.running_mean = mx.zeros((channels,))
        self.running_var = mx.ones((channels,))

    @property
    def deviation(self) -> mx.array:
        """Float32 [channels]."""
        return mx.sqrt(self.running_var.astype(mx.float32) + self.eps)

    def normalized(self, tokens: mx.array) -> mx.array:
        """Tokens [B, L, channels] as the transformer has them, float32."""
        return (tokens.astype(mx.float32) - self.running_mean) / self.deviation

    def restored(self, tokens: mx.array) -> mx.array:
        """What `normalized` was given, float32."""
        return tokens.astype(mx.float32) * self.deviation + self.running_mean


class Flux2AutoEncoder(ConvAutoencoder):
    """Pictures to latents and back. Latents are those that FLUX.2 was trained on: normalized."""

    def __init__(self, config: Flux2AutoencoderConfig) -> None:
        super().__init__(config, config.decoder)
        self.config = config
        self.encoder.quant_conv = conv1x1(2 * config.z_channels, 2 * config.z_channels)
        self.decoder.post_quant_conv = conv1x1(config.z_channels, config.z_channels)
        self.bn = TokenStatistics(config.token_channels, config.batch_norm_eps)

    def encode(self, x: mx.array) -> mx.array:
        """Pictures [B, H, W, 3] in [-1, 1] to the posterior's mean, latents [B, h, w, z_channels].

        H and W are multiples of twice `config.downsampling`. The result has the dtype of the
        weights.
        """
        moments = self.encoder.quant_conv(self.encoder(x.astype(self.dtype)))
        mean, _ = mx.split(moments, 2, axis=-1)
        _, h, w, _ = mean.shape
        return unpack(self.bn.normalized(pack(mean)), (h, w)).astype(self.dtype)

    def restored(self, z: mx.array) -> mx.array:
        """As `ConvAutoencoder.restored`; h and w are even."""
        _, h, w, _ = z.shape
        z = unpack(self.bn.restored(pack(z)), (h, w))
        return self.decoder.post_quant_conv(z.astype(self.dtype))
