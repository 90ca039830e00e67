"""The reference picture as Kontext takes it: one of the sizes that the model was trained with.

NumPy and Pillow only. Source: black-forest-labs/flux `src/flux/util.py`
(`PREFERED_KONTEXT_RESOLUTIONS`) and `sampling.py` (`prepare_kontext`); diffusers'
`FluxKontextPipeline` has the same numbers.
"""

from __future__ import annotations

import numpy as np

# (width, height) in pixels, from tall to wide
SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184)),
    *((944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752)),
    *((1456, 720), (1504, 688), (1568, 672)),
)


def fitted(picture: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H, W, 3], scaled to the size of `SIZES` whose proportions are nearest.

    Nothing is cut away: it is stretched by what the proportions differ.
    """
    from PIL import Image  # what plans without a picture needs none of it

    height, width = picture.shape[:2]
    aspect = width / height
    _, *size = min((abs(aspect - w / h), w, h) for w, h in SIZES)
    if size == [width, height]:
        return picture
    image = Image.fromarray(picture).resize((size[0], size[1]), Image.Resampling.LANCZOS)
    return np.asarray(image)
