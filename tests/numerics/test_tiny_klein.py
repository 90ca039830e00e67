"""tiny-klein edits as it is told, at the size that it was trained at.

How often it is right of 200 edits is what `tools/tiny/evaluate.py` measures; this is one of each
kind of request, by what a few pixels tell.
"""

from __future__ import annotations

import numpy as np
import pytest

from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.stages import to_pixels

FAR = 60  # by how much a thing's colours differ from the ground's


@pytest.fixture(scope="module")
def klein() -> FluxPipeline:
    return FluxPipeline("tiny-klein")


def painted(klein: FluxPipeline, prompt: str, *references: np.ndarray) -> np.ndarray:
    """A picture, uint8 [128, 128, 3]."""
    images = klein.generate_images(
        prompt, num_steps=4, latent_size=(16, 16), seed=2, references=references
    )
    return to_pixels(images)[0]


def things(pixels: np.ndarray) -> np.ndarray:
    """Where something is, bool [height, width]: what has not the colour of the top left corner."""
    return (np.abs(pixels.astype(int) - pixels[4, 4]) > FAR).any(axis=-1)


def test_two_pictures_become_one(klein: FluxPipeline) -> None:
    apple = painted(klein, "a red apple on the left on a blue background")
    dog = painted(klein, "a dog in the center on a white background")
    assert things(apple)[:, :64].mean() > 4 * things(apple)[:, 64:].mean()
    told = "put the dog from the second picture to the right of the red apple"
    both = painted(klein, told, apple, dog)
    assert (np.abs(both[4, 4].astype(int) - apple[4, 4]) < FAR).all(), "the first one's background"
    assert things(both)[:, :64].mean() > 0.08 and things(both)[:, 64:].mean() > 0.08
    alone = painted(klein, "remove the dog", both)
    assert things(alone)[:, 72:].mean() < 0.02 and things(alone)[:, :64].mean() > 0.08
