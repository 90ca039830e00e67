"""Which part of a picture is trained on, and at which size. Pillow and NumPy, no mlx.

Without a fixed resolution, pictures are sorted into buckets: sizes of about the same area with
different proportions, so that little is cut off. Crop j of a picture is a function of the run's
seed, the picture's content and j alone, so that a cached crop stays valid when the data set grows.
A picture that is too small is scaled up, never padded.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from fluxmesh.training.rng import CROP, generator

Size = tuple[int, int]  # (height, width) in pixels
Box = tuple[float, float, float, float]  # (left, top, right, bottom) in the picture's pixels

ZOOM = 0.8  # a crop's sides are at least this share of the largest rectangle's
COARSE = 64  # pixels between the sides of buckets, where pictures are large enough
MAX_RATIO = 2.5  # of a bucket's sides


def buckets(area: int, multiple: int) -> list[Size]:
    """The sizes that pictures are brought to: about `area` square pixels, never more.

    Sides are multiples of `multiple`, and of 64 where the area is 256x256 or more.
    """
    side = math.isqrt(area)
    step = multiple * max(1, COARSE // multiple) if side >= 4 * COARSE else multiple
    sizes = []
    for height in range(step, int(side * MAX_RATIO) + 1, step):
        width = area // height // step * step
        if width and max(height / width, width / height) <= MAX_RATIO:
            sizes.append((height, width))
    return sizes or [(max(step, side // step * step),) * 2]


def bucket_of(size: Size, sizes: list[Size]) -> Size:
    """The bucket nearest in proportions to a picture of `size`; the larger one of two alike."""
    ratio = math.log(size[0] / size[1])

    def distance(bucket: Size) -> tuple[float, int, Size]:
        away = abs(math.log(bucket[0] / bucket[1]) - ratio)
        return round(away, 9), -bucket[0] * bucket[1], bucket

    return min(sizes, key=distance)


def crop_box(size: Size, target: Size, seed: int, content: str, crop: int) -> Box:
    """Where crop `crop` of a picture lies: a rectangle with the proportions of `target`.

    Crop 0 is the largest such rectangle, from the middle; the others are zoomed and moved at
    random, but never so far in that pixels must be made up. `content` is the picture's SHA-256.
    """
    scale = min(size[0] / target[0], size[1] / target[1])  # the picture's pixels a target pixel
    zoom, down, right = 1.0, 0.5, 0.5
    if crop > 0:
        number = int(content[:8], 16) << 16 | crop
        zoom, down, right = generator(seed, CROP, number).random(3).tolist()
        zoom = max(ZOOM + (1 - ZOOM) * zoom, min(1.0, 1 / scale))
    height, width = target[0] * scale * zoom, target[1] * scale * zoom
    # never outside by a rounding
    top, left = max(0.0, down * (size[0] - height)), max(0.0, right * (size[1] - width))
    return left, top, min(left + width, size[1]), min(top + height, size[0])


def cut(pixels: np.ndarray, target: Size, box: Box) -> np.ndarray:
    """The part `box` of `pixels` (uint8 [H, W, 3]) at the size `target`, uint8."""
    picture = Image.fromarray(pixels)
    height, width = target
    return np.array(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))
