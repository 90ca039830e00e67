"""Latents as tokens: the transformer reads them "packed", each token a square of 2x2 latents.

`pack` and `unpack` take NumPy and MLX arrays alike; imports no mlx. Channel order inside a token
(channel, row, column) is that of black-forest-labs/flux `src/flux/sampling.py`:
"b c (h ph) (w pw) -> b (h w) (c ph pw)".
"""

from __future__ import annotations

from typing import Any

PATCH = 2  # latents along one side of a token


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
