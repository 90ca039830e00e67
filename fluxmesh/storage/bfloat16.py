"""bfloat16 in NumPy, which has none: its 16 bits as uint16, and float32 made of them and back.

Below safetensors files, messages and the cache of features, which all hold it so. MLX's side of it
is `models/numpy_bits.py`.
"""

from __future__ import annotations

import numpy as np


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def of_float32(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of the nearest bfloat16 of finite values; ties go to the even one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def kind(values: np.ndarray) -> str:
    """What safetensors calls an array of activations: "BF16" for bits, else "F32"."""
    return "BF16" if values.dtype == np.uint16 else "F32"
