"""A tensor of an adapter's file as float32, whatever its dtype; what is not finite is named.

Below `reading.py`. Trainers leave factors in any float format, fp8 among them, and alphas as
integers of 64 bits or float64. Imports no mlx.
"""

from __future__ import annotations

import numpy as np

from fluxmesh.errors import AdapterError, WeightsError
from fluxmesh.storage import bfloat16
from fluxmesh.storage.numbers import float8
from fluxmesh.storage.safetensors import NUMPY, Entry, read_rows_into

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # that a factor may be stored in


def floats(entry: Entry, scale: Entry | None = None) -> np.ndarray:
    """A factor's numbers, float32; `scale` multiplies those of an fp8 file.

    Raises `AdapterError` naming file and tensor where one is NaN or infinite, or where the dtype
    is none of a factor.
    """
    if entry.dtype not in FLOATS:
        raise AdapterError(
            f"{entry.path}: {entry.key} has dtype {entry.dtype}, which no factor of an adapter "
            "has; download the file again."
        )
    values = _read(entry)
    if scale is not None:
        factor = _read(scale)
        values = values * (factor.reshape(-1, 1) if factor.size > 1 else factor.reshape(()))
    return _finite(entry, values)


def number(entry: Entry) -> float:
    """A single number, of any dtype. Raises `AdapterError` as `floats`, or for several numbers."""
    values = _finite(entry, _read(entry))
    if values.size != 1:
        raise AdapterError(f"{entry.path}: {entry.key} is no single number; the file is damaged.")
    return float(values.reshape(()))


def is_zero(entry: Entry) -> bool:
    """Whether all numbers are zero. Raises as `floats`."""
    return not floats(entry).any()


def _read(entry: Entry) -> np.ndarray:
    if entry.dtype not in NUMPY:
        raise AdapterError(
            f"{entry.path}: {entry.key} has dtype {entry.dtype}, which fluxmesh doesn't read."
        )
    out = np.empty(entry.shape, dtype=NUMPY[entry.dtype])
    try:
        read_rows_into(out, entry)
    except WeightsError as error:
        raise AdapterError(str(error)) from error
    if entry.dtype == "BF16":
        return bfloat16.to_float32(out)
    if entry.dtype.startswith("F8"):
        return float8.table(entry.dtype)[out]
    with np.errstate(over="ignore"):  # a float64 that float32 can't hold becomes infinite
        return out.astype(np.float32)


def _finite(entry: Entry, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise AdapterError(
            f"{entry.path}: {entry.key} holds NaN or infinity; the adapter's training broke, or "
            "the file is damaged: use another one."
        )
    return values
