"""Named features as they travel: what encoders make of a prompt or a crop, and a transformer reads.

    "t5"       [1, T, context_in_dim]   one vector a token
    "clip"     [1, vec_in_dim]          one vector a prompt
    "latents"  [1, L, 4C]               of a crop, in a training

Only an engine knows these names: whoever keeps features and sends them on takes them as they are.
Below the units of work and `training/worker.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.models.numpy_bits import from_numpy, to_numpy
from fluxmesh.sampling.conditioning import Conditioning

BITS = ("uint16", "float32")  # of an encoder's dtype; latents are float32
KINDS = {"t5": (3, BITS), "clip": (2, BITS), "latents": (3, ("float32",))}  # dimensions, dtypes


def of_text(text: Conditioning) -> dict[str, np.ndarray]:
    """A prompt's features. Evaluates."""
    return {"t5": to_wire(text.t5), "clip": to_wire(text.clip)}


def text(features: Mapping[str, np.ndarray]) -> Conditioning:
    """What `of_text` was given. Raises `UsageError` for features of something else."""
    return Conditioning(from_numpy(_named(features, "t5")), from_numpy(_named(features, "clip")))


def latents(features: Mapping[str, np.ndarray]) -> mx.array:
    """A crop's. Raises `UsageError` for features of something else."""
    return mx.array(_named(features, "latents"))


def tokens(features: Mapping[str, np.ndarray]) -> int:
    """How many a prompt has. Raises `UsageError` for features of something else."""
    return _named(features, "t5").shape[1]


def to_wire(x: mx.array) -> np.ndarray:
    """Features for a message: bfloat16 as it is, all else as float32. Evaluates."""
    return to_numpy(x if x.dtype == mx.bfloat16 else x.astype(mx.float32))


def _named(features: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    array = features.get(name)
    if array is None:
        there = ", ".join(sorted(features)) or "nothing"
        raise UsageError(f"Features {name!r} were needed, and {there} came.")
    dimensions, dtypes = KINDS[name]
    if array.ndim != dimensions or array.shape[0] != 1 or array.dtype.name not in dtypes:
        raise UsageError(
            f"Features {name!r} came as {array.dtype.name} {list(array.shape)}; they are "
            f"{' or '.join(dtypes)} of {dimensions} dimensions, of which the first is 1."
        )
    return array
