"""Small transformers of FLUX.2 with no zero in them, and modules out of files. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.tensor_maps import spellings
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.tensor_map import Tensors, same_but_for_ones
from fluxmesh.storage.safetensors import read_headers, read_tensor

M = TypeVar("M", bound=nn.Module)

SMALL = Flux2Config(
    in_channels=16,
    out_channels=16,
    context_in_dim=20,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 4, 4, 4),
    guidance_embed=True,
)


def random_flux2(config: Flux2Config = SMALL, seed: int = 5) -> Flux2:
    """Every parameter is random, norms too; the same each time."""
    flux = Flux2(config)
    randomize(flux, seed)
    return flux


def randomize(module: nn.Module, seed: int) -> None:
    """Matrices that keep activations near 1, what has one axis around 1."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> mx.array:
        values = rng.standard_normal(shape)
        width = np.prod(shape[1:]) ** -0.5
        return mx.array(1 + 0.2 * values if len(shape) == 1 else width * values, dtype=mx.float32)

    module.load_weights([(name, draw(p.shape)) for name, p in tree_flatten(module.parameters())])


def load(module: M, tensors: Tensors, files: Sequence[Path]) -> M:
    """Fills every parameter of `module`; each must be in the table and in the files, float32."""
    entries = read_headers(files).entries
    weights = []
    for name, target in tensors.items():
        parts = []
        for rows in target.pieces:
            key = next(key for key in spellings(rows.key) if key in entries)
            parts.append(read_tensor(entries[key])[rows.start : rows.stop])
        value = np.concatenate(parts)
        assert same_but_for_ones(value.shape, target.shape), name
        value = value.reshape(target.shape)
        if value.ndim == 4:
            value = value.transpose(0, 2, 3, 1)  # MLX's convolutions: out, height, width, in
        weights.append((name, mx.array(value)))
    assert {name for name, _ in tree_flatten(module.parameters())} == set(tensors)
    module.load_weights(weights, strict=True)
    return module
