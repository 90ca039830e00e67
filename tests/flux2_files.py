"""Modules of FLUX.2 out of files, by the tables of `tensor_maps.py`. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from fluxmesh.models.flux2.tensor_maps import spellings
from fluxmesh.models.tensor_map import Tensors, same_but_for_ones
from fluxmesh.storage.safetensors import read_headers, read_tensor

M = TypeVar("M", bound=nn.Module)


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
