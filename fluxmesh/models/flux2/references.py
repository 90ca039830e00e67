"""Reference pictures as FLUX.2 takes them: which it takes, how large, cropped where.

NumPy and Pillow only. Source: diffusers' `Flux2ImageProcessor` and `Flux2Pipeline`, whose numbers
are black-forest-labs/flux2's for several references (`src/flux2/sampling.py`).
"""

from __future__ import annotations

import math

import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.models.base import ModelDefaults

MIN_SIDE = 64  # pixels
MAX_ASPECT = 8  # the longer side over the shorter


def fitted(
    picture: np.ndarray, multiple: int, most: int = ModelDefaults.reference_area
) -> np.ndarray:
    """A picture, uint8 [H, W, 3], of at most `most` pixels and sides that are multiples of
    `multiple`.

    A large one is scaled; what is over at the edges is cut away, half on either side. Raises
    `UsageError` for a picture that is too small or too narrow.
    """
    height, width = picture.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise UsageError(
            f"A reference picture of {height}x{width} pixels is too small; each side must have "
            f"{MIN_SIDE} at least."
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UsageError(
            f"A reference picture of {height}x{width} pixels is too narrow; one side may be "
            f"{MAX_ASPECT} times the other at most."
        )
    if height * width > most:
        scale = math.sqrt(most / (width * height))
        size = int(width * scale), int(height * scale)
        from PIL import Image  # what plans without a picture needs none of it

        image = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
        picture = np.asarray(image)
        height, width = picture.shape[:2]
    rows, columns = height // multiple * multiple, width // multiple * multiple
    top, left = (height - rows) // 2, (width - columns) // 2
    return picture[top : top + rows, left : left + columns]
