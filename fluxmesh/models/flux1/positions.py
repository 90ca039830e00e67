"""Where each token stands, on FLUX.1's three axes: picture, row, column. NumPy only.

Source: black-forest-labs/flux `src/flux/sampling.py` (`prepare`).
"""

from __future__ import annotations

import numpy as np


def image_positions(rows: int, columns: int, picture: int = 0) -> np.ndarray:
    """Position ids of image tokens, int32 [rows * columns, 3]: (picture, row, column).

    `picture` 0 is the one that is painted, 1 Kontext's reference.
    """
    ids = np.zeros((rows, columns, 3), dtype=np.int32)
    ids[..., 0] = picture
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3)


def text_positions(length: int) -> np.ndarray:
    """Position ids of text tokens, int32 [length, 3]: all zero."""
    return np.zeros((length, 3), dtype=np.int32)
