"""Named features as they travel: what encoders make of a prompt or a crop, and a transformer reads.

A prompt's have the names that its family gives them (`models/runtime.py`); "latents" [1, L, 4C]
are of a crop, in a training. Only an engine knows these names: whoever keeps features and sends
them on takes them as they are.
Below the units of work and `training/worker.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import mlx.core as mx
import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.models.numpy_bits import from_numpy, to_numpy
from fluxmesh.models.runtime import Conditions, PromptFeatures

BITS = ("uint16", "float32")  # of an encoder's dtype


def to_arrays(features: PromptFeatures) -> dict[str, np.ndarray]:
    """A prompt's features as they travel. Evaluates."""
    return {name: to_wire(array) for name, array in features.items()}


def from_arrays(
    arrays: Mapping[str, np.ndarray],
    axes: Mapping[str, int] | None = None,
    optional: Collection[str] = (),
) -> PromptFeatures:
    """What `to_arrays` was given; `axes` as `Runtime.feature_axes`, None of what is known anyway.

    Those that are `optional` need not have come. Raises `UsageError` for features of something
    else.
    """
    axes = axes or {name: array.ndim for name, array in arrays.items()}
    return {
        name: from_numpy(_named(arrays, name, count, BITS))
        for name, count in axes.items()
        if name in arrays or name not in optional
    }


def conditions(arrays: Mapping[str, np.ndarray] | None) -> Conditions:
    """What a model made of pictures. Its runtime says which it knows, and of what shapes.

    Raises `UsageError` for what no model makes.
    """
    arrays = arrays or {}
    return {
        name: from_numpy(_named(arrays, name, array.ndim, BITS)) for name, array in arrays.items()
    }


def latents(arrays: Mapping[str, np.ndarray]) -> mx.array:
    """A crop's. Raises `UsageError` for features of something else."""
    return mx.array(_named(arrays, "latents", 3, ("float32",)))


def tokens(arrays: Mapping[str, np.ndarray]) -> int:
    """How many tokens a prompt has: 0 for features of something else."""
    return next((array.shape[1] for array in arrays.values() if array.ndim == 3), 0)


def to_wire(x: mx.array) -> np.ndarray:
    """PromptFeatures for a message: bfloat16 as it is, all else as float32. Evaluates."""
    return to_numpy(x if x.dtype == mx.bfloat16 else x.astype(mx.float32))


def _named(
    features: Mapping[str, np.ndarray], name: str, dimensions: int, dtypes: tuple[str, ...]
) -> np.ndarray:
    array = features.get(name)
    if array is None:
        there = ", ".join(sorted(features)) or "nothing"
        raise UsageError(f"PromptFeatures {name!r} were needed, and {there} came.")
    if array.ndim != dimensions or array.shape[0] != 1 or array.dtype.name not in dtypes:
        raise UsageError(
            f"PromptFeatures {name!r} came as {array.dtype.name} {list(array.shape)}; they are "
            f"{' or '.join(dtypes)} of {dimensions} dimensions, of which the first is 1."
        )
    return array
