"""A mask from the user's file: what is painted, and what stays.

Masks come in two ways. Where its alpha channel varies, a file's **transparent part is painted** and
its colours say nothing: so OpenAI's clients send it, and so it is left by an eraser. Any other
file is read by its colours: **white is painted**, black stays, greys blend. Masks of a programmer,
whose values are 0 and 1, are as those of 0 and 255. Beside `files.py`; no mlx.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from fluxmesh.errors import UsageError
from fluxmesh.images.files import PictureFile, is_deep, named, open_picture, over

NEARLY_BLACK = 16  # labels of 2 or 3, and 12 bits in 16: what they blend in, nobody would see
MAX_SKEW = 0.02  # how far the mask's proportions may be from the picture's


def read_mask(
    file: PictureFile,
    like: np.ndarray | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> np.ndarray:
    """A mask as uint8 (height, width): 255 is painted, 0 stays, what lies between blends.

    With `like`, the mask is brought to that picture's size; proportions that differ raise
    `UsageError`, since the mask was then drawn over something else, and so does a mask that paints
    nothing. Both are turned as their EXIF data say. `tell` hears which way a mask with an alpha
    channel was read.
    """
    opened, name = named(file, "mask")
    picture = open_picture(opened, name)
    mask = _by_alpha(picture)
    if mask is not None:
        tell(f"{name} is transparent in parts: these are painted, whatever its colours are.")
    else:
        mask = _by_colour(picture)
    if mask.max() <= NEARLY_BLACK:
        nearly = f", or nearly so ({mask.max()} of 255 at most)" if mask.any() else ""
        raise UsageError(
            f"{name} paints nothing, for it is black all over{nearly}; make white, or transparent, "
            "what is to be painted."
        )
    if like is None or mask.shape == like.shape[:2]:
        return mask
    height, width = like.shape[:2]
    if abs(_skew(mask, height, width) - 1) > MAX_SKEW:
        is_turned = abs(_skew(mask, width, height) - 1) <= MAX_SKEW
        remedy = "draw the mask at the picture's size"
        if is_turned:
            remedy = "turn the mask by a quarter, as a viewer shows the picture"
        raise UsageError(
            f"{name} is {mask.shape[0]}x{mask.shape[1]} pixels and the picture is "
            f"{height}x{width}; {remedy}."
        )
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))


def _by_alpha(picture: Image.Image) -> np.ndarray | None:
    """What is transparent, uint8; None where the alpha channel says nothing.

    Nothing is said by one that is the same all over, unless all of it is transparent.
    """
    if is_deep(picture) or not picture.has_transparency_data:
        return None
    alpha = _spread(np.asarray(picture.convert("RGBA").getchannel("A")))
    if alpha.min() == alpha.max() > 0:
        return None
    return 255 - alpha


def _by_colour(picture: Image.Image) -> np.ndarray:
    """What is light, uint8."""
    colours = over(picture, background=0)
    if colours.max() <= 1:
        return _spread(colours.max(axis=2))
    return np.asarray(Image.fromarray(colours).convert("L"))


def _spread(values: np.ndarray) -> np.ndarray:
    """Values of 0 and 1 as 0 and 255; all others as they are."""
    return values * np.uint8(255) if values.max() == 1 else values


def _skew(mask: np.ndarray, height: int, width: int) -> float:
    return (mask.shape[1] * height) / (mask.shape[0] * width)
