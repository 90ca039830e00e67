"""Rows of one tensor's plain numbers or bytes, as float32. Imports no mlx."""

from __future__ import annotations

import math

import numpy as np

from fluxmesh.storage import bfloat16
from fluxmesh.storage.numbers import float8
from fluxmesh.storage.safetensors import Entry, numpy_dtype, read_rows_into


def rows_of(entry: Entry, start: int, stop: int) -> np.ndarray:
    """Rows of plain floats or of bytes, as float32 [rows, numbers of a row]."""
    raw = np.empty((stop - start, math.prod(entry.shape[1:])), dtype=numpy_dtype(entry))
    read_rows_into(raw, entry, start)
    if entry.dtype in float8.DTYPES:
        return float8.table(entry.dtype)[raw.view(np.uint8)]
    return bfloat16.to_float32(raw) if entry.dtype == "BF16" else raw.astype(np.float32, copy=False)
