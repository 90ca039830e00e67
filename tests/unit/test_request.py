"""A request is checked when it is made: the bounds of what may be asked for, in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fluxmesh.errors import UsageError
from fluxmesh.request import MAX_IMAGES, MAX_SEED, AdapterRef, GenerateRequest, SourceImage

PIXELS = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "a \udcff dog"}, "not valid UTF-8"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": MAX_SEED + 1}, "`seed`"),
        ({"seed": MAX_SEED, "n_images": 2}, "the last image's"),
        ({"n_images": 0}, "`n_images` is 0"),
        ({"n_images": MAX_IMAGES + 1}, "`n_images`"),
        ({"n_images": 10**30}, "`n_images`"),
        ({"height": 24}, "height 24"),
        ({"width": 0}, "width 0"),
        ({"width": 16384}, "width 16384"),
        ({"steps": 0}, "`steps` is 0"),
        ({"guidance": float("nan")}, "`guidance` is nan"),
        ({"guidance": -1.0}, "`guidance`"),
        ({"dtype": "float8"}, "'float8'; choose bfloat16, float16, float32"),
        ({"bits": 7}, "`bits` is 7"),
        ({"decoding_batch_size": 0}, "`decoding_batch_size`"),
        ({"cache": -0.1}, "`cache` is -0.1"),
        ({"cache": 1.5}, "`cache` is 1.5"),
        ({"cache": float("nan")}, "`cache` is nan"),
        ({"preload": True, "low_memory": True}, "exclude each other"),
        ({"adapters": (AdapterRef("a", float("inf")),)}, "`adapter` a"),
        ({"source": SourceImage(PIXELS, strength=0.0)}, "`strength` is 0"),
        ({"source": SourceImage(PIXELS, strength=1.5)}, "`strength` is 1.5"),
    ],
)
def test_what_is_out_of_range_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        GenerateRequest(**{"prompt": "dog", "seed": 1, **changes})


def test_the_largest_seed_is_a_seed() -> None:
    request = GenerateRequest("dog", MAX_SEED - 2, n_images=3)
    assert request.seed_of(2) == MAX_SEED
    assert GenerateRequest("dog", MAX_SEED).seed_of(0) == MAX_SEED
