"""Where each token stands, on FLUX.2's four axes: picture, row, column, place in the text.

NumPy only. Source: black-forest-labs/flux2 `src/flux2/sampling.py` (`prc_txt`, `prc_img`,
`listed_prc_img`); diffusers' `Flux2Pipeline` has the same numbers.
"""

from __future__ import annotations

import numpy as np

REFERENCE_STEP = 10  # on the first axis, from the picture that is painted to the first reference


def text_positions(length: int) -> np.ndarray:
    """Position ids of text tokens, int32 [length, 4]: (0, 0, 0, k), padding counted."""
    ids = np.zeros((length, 4), dtype=np.int32)
    ids[:, 3] = np.arange(length)
    return ids


def image_positions(rows: int, columns: int, picture: int = 0) -> np.ndarray:
    """Position ids of a picture's tokens, int32 [rows * columns, 4].

    `picture` 0 is the one that is painted, (0, row, column, 0); 1 is the first reference,
    (10, row, column, 0). Rows and columns begin anew in each.
    """
    ids = np.zeros((rows, columns, 4), dtype=np.int32)
    ids[..., 0] = REFERENCE_STEP * picture
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None, :]
    return ids.reshape(rows * columns, 4)
