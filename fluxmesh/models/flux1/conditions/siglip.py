"""SigLIP's picture encoder: a picture to one vector for each of its squares.

Beside `redux.py`, which sees with it. Names are transformers' (`SiglipVisionModel`; older files put
`vision_model.` before them). The head that pools its vectors into one is not used, and not held.
Source: Zhai et al. 2023 (https://arxiv.org/abs/2303.15343); the encoder is that of Dosovitskiy et
al. 2020 (https://arxiv.org/abs/2010.11929), without a class token: CLIP's layers without a mask.

Shapes: B pictures, S tokens, D = hidden_size, H heads.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.models.flux1.clip import ClipEncoder
from fluxmesh.models.flux1.config import SiglipConfig


class SiglipEmbeddings(nn.Module):
    """Squares of pixels to vectors that know their places."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        D, side = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, side, stride=side)
        self.position_embedding = nn.Embedding(config.rows**2, D)

    def __call__(self, pixels: mx.array) -> mx.array:
        """[B, side, side, 3] to [B, S, D], row by row; pixels short of a whole square are cut."""
        x = self.patch_embedding(pixels)  # [B, rows, rows, D]
        return x.flatten(1, 2) + self.position_embedding.weight


class SiglipVision(nn.Module):
    """Pictures to vectors, in the dtype of the weights."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = ClipEncoder(config, nn.gelu_approx, None)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Numbers in [-1, 1], [B, side, side, 3], to [B, S, D]."""
        dtype = self.embeddings.patch_embedding.weight.dtype
        return self.post_layernorm(self.encoder(self.embeddings(pixels.astype(dtype))))
