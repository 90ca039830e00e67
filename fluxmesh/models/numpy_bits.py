"""MLX arrays as NumPy's and back; bfloat16, which NumPy lacks, as uint16 of the same bits.

What travels between processes, is cached or is written goes through here.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def to_numpy(x: mx.array) -> np.ndarray:
    """The same bits, in a memory of their own. Evaluates."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def from_numpy(values: np.ndarray) -> mx.array:
    """What `to_numpy` was given, of activations: none of them is an integer."""
    x = mx.array(values)
    return x.view(mx.bfloat16) if x.dtype == mx.uint16 else x
