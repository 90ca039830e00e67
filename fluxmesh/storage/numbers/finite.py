"""Whether numbers are numbers: no NaN, no infinity. Cheap enough to ask while weights are read."""

from __future__ import annotations

import numpy as np

from fluxmesh.errors import WeightsError
from fluxmesh.storage.safetensors import PIECE, Entry

# The bits of a positive infinity; NaN's are above it, and a sign bit is above both.
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00}
# Of a tensor of more than PIECE bytes, `glance` looks at one run of so many numbers in four.
RUN, ONE_IN = 1 << 15, 4


def is_finite(values: np.ndarray, dtype: str) -> bool:
    """Of an array of a safetensors dtype; whole numbers always are.

    The 16-bit floats are compared as whole numbers: as signed ones, infinity and NaN are the
    largest, and with a sign the largest unsigned ones.
    """
    if not values.size:
        return True
    if dtype in _INFINITY:
        bits, top = values.view(np.uint16), _INFINITY[dtype]
        return bool(bits.view(np.int16).max() < top and bits.max() < top + 0x8000)
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def check(entry: Entry, values: np.ndarray) -> None:
    """Of some of a tensor's numbers as they are stored. Raises `WeightsError` naming it."""
    if not is_finite(values, entry.dtype):
        raise not_finite(entry)


def glance(entry: Entry, values: np.ndarray) -> None:
    """As `check`, for what is read at a disk's full speed: of a large tensor, a quarter of it.

    Looking at every number would cost 8% of a load from the page cache, and this about 3%. What a
    broken training or merge leaves, whole matrices, rows or columns, is seen; for a single number,
    who gets NaN from a step asks `check` of every tensor (`first_not_finite` of
    `weights/reader.py`).
    """
    stride = RUN * ONE_IN
    whole = values.size // stride * stride
    if entry.nbytes <= PIECE or not whole:
        check(entry, values)
        return
    check(entry, values[:whole].reshape(-1, stride)[:, :RUN])
    check(entry, values[whole:])


def not_finite(entry: Entry) -> WeightsError:
    """The sentence for a tensor that holds NaN or infinity."""
    return WeightsError(
        f"{entry.path}: {entry.key} holds numbers that are NaN or infinite, so no picture could "
        "come of it; download the file again, or make it anew."
    )
