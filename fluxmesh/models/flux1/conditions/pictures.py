"""What FLUX.1's tools are given of a request's pictures, by name, before an engine encodes it.

A control map is brought to the output's size; what Fill paints into has it already, and what Redux
sees is a square. NumPy and Pillow only; `channels.py` and `redux.py` make of it what the
transformer reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fluxmesh.request import SourceImage

CONTROL = "control"  # uint8 [H, W, 3]
FILLED = "picture"  # to paint into, uint8 [H, W, 3]
MASK = "mask"  # of what is painted, uint8 [H, W, 1]


def of_control(picture: np.ndarray, height: int, width: int) -> Mapping[str, np.ndarray]:
    """A map of edges or depth, uint8 [h, w, 3], stretched to the output's size.

    Source: diffusers' `FluxControlPipeline`, which scales by LANCZOS and cuts nothing away.
    """
    if picture.shape[:2] != (height, width):
        from PIL import Image  # what plans without a picture needs none of it

        resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
        picture = np.asarray(resized)
    return {CONTROL: picture}


def of_source(source: SourceImage) -> Mapping[str, np.ndarray]:
    """A picture at the output's size; all of it is painted where it has no mask."""
    mask = source.mask
    if mask is None:
        mask = np.full(source.pixels.shape[:2], 255, np.uint8)
    return {FILLED: source.pixels, MASK: mask[:, :, None]}


def as_siglip_sees(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture, uint8 [H, W, 3], stretched to a square: nothing is cut away.

    Source: transformers' `SiglipImageProcessor`, which scales bicubically.
    """
    if picture.shape[:2] == (side, side):
        return picture
    from PIL import Image  # what plans without a picture needs none of it

    resized = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized)
