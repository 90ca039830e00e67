"""What is encoded before a training, one unit at a time, and under which name it is kept. No mlx.

A unit is a caption or a crop. Its name in the cache is a hash of all that its numbers depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fluxmesh.training.data.bucketing import Size, crop_box, cut
from fluxmesh.training.data.dataset import Example
from fluxmesh.training.data.feature_cache import key


@dataclass(frozen=True)
class Caption:
    """A text to be encoded."""

    text: str


@dataclass(frozen=True)
class Crop:
    """Crop `crop` of image `image`, both counted from 0."""

    image: int
    crop: int


Unit = Caption | Crop


def caption_name(caption: str) -> str:
    """What a mesh calls the features of a caption, which is a number there ("" is none)."""
    return f"caption {caption}"


def crop_name(image: int, crop: int) -> str:
    """What a mesh calls the features of a crop."""
    return f"crop {image} {crop}"


@dataclass(frozen=True)
class EncoderIdentity:
    """The model that encodes, as far as numbers depend on it."""

    revision: str
    dtype: str  # "bfloat16" or "float32"
    bits: int | None  # of the text encoders
    device: str  # "cpu" or "gpu": float32 on a GPU rounds otherwise
    t5_padding: bool = True


@dataclass(frozen=True)
class Units:
    """The captions and crops of one data set."""

    examples: Sequence[Example]
    sizes: Sequence[Size]  # that each example is trained at, in pixels
    seed: int

    def key(self, unit: Unit, reader: EncoderIdentity) -> str:
        """The name of a unit's features in the cache."""
        model = {
            "revision": reader.revision,
            "dtype": f"mlx.core.{reader.dtype}",
            "device": f"DeviceType.{reader.device}",
        }
        if isinstance(unit, Caption):
            bits, padded = reader.bits, reader.t5_padding
            return key(kind="text", text=unit.text, bits=bits, padded=padded, **model)
        example, size = self.examples[unit.image], self.sizes[unit.image]
        box = crop_box(example.size, size, self.seed, example.content, unit.crop)
        return key(kind="image", content=example.content, box=box, size=size, **model)

    def pixels(self, crop: Crop) -> np.ndarray:
        """uint8 [height, width, 3] of a crop at its size."""
        example, size = self.examples[crop.image], self.sizes[crop.image]
        box = crop_box(example.size, size, self.seed, example.content, crop.crop)
        return cut(example.pixels(), size, box)
