"""Reference pictures as a transformer reads them: encoded, packed, one grid of tokens each.

What families whose references are tokens have in common, below them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.images import to_model_range
from fluxmesh.models.autoencoder.packing import PATCH, pack
from fluxmesh.models.base import REFERENCE


def encoded(autoencoder: Any, pixels: np.ndarray) -> mx.array:
    """A fitted picture, uint8 [H, W, 3], as a grid of tokens, float32 [1, rows, columns, 4C]; lazy.

    The posterior's mean.
    """
    latents = autoencoder.encode(mx.array(to_model_range(pixels))).astype(mx.float32)
    return pack(latents).reshape(1, latents.shape[1] // PATCH, latents.shape[2] // PATCH, -1)


def reference_grids(conditions: Mapping[str, mx.array], channels: int) -> list[mx.array]:
    """The grids of reference pictures, in their order: "reference_1", "reference_2" and so on.

    Raises `UsageError` for what is no such grid, or has not so many `channels` a token.
    """
    for name, grid in conditions.items():
        number = name.removeprefix(REFERENCE)
        is_grid = grid.ndim == 4 and grid.shape[0] == 1 and grid.shape[-1] == channels
        if not (name.startswith(REFERENCE) and number.isdecimal() and is_grid):
            raise UsageError(
                f"The condition {name!r} came as {list(grid.shape)}; this model reads references "
                f"of [1, rows, columns, {channels}]."
            )
    return [conditions[name] for name in in_order(conditions)]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of references by their numbers."""
    return sorted(names, key=_number)


def _number(name: str) -> int:
    return int(name.removeprefix(REFERENCE))
