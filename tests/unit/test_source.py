"""Masks in latents and in pixels, and the last few prompts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from fluxmesh.images import composite, to_model_range
from fluxmesh.request import SourceImage
from fluxmesh.sampling import latents
from fluxmesh.sampling.conditioning import PromptMemory
from fluxmesh.sampling.img2img import SourceLatents, mask_latents


def test_a_single_masked_pixel_paints_its_whole_latent_and_no_other() -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[13, 22] = 1
    painted = latents.unpack(mask_latents(mask, 8, 3), (4, 4))
    assert painted.shape == (1, 4, 4, 3)
    assert float(painted.sum()) == 3
    assert painted[0, 1, 2].tolist() == [1, 1, 1]


def test_composite_keeps_every_pixel_outside_of_the_mask() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    new = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8], mask[8] = 255, 128
    picture = composite(new, SourceImage(old, 1.0, mask))
    assert np.array_equal(picture[:4], old[:4])
    assert np.array_equal(picture[9:], old[9:])
    assert np.array_equal(picture[4:8], new[4:8])
    middle = (old[8].astype(float) + new[8]) / 2
    assert np.abs(picture[8] - middle).max() <= 1.5


def test_composite_without_a_mask_is_the_new_picture() -> None:
    new = np.full((16, 16, 3), 7, np.uint8)
    assert composite(new, SourceImage(np.zeros_like(new))) is new


def test_noising_runs_from_the_picture_to_the_noise() -> None:
    source = SourceLatents(mx.array([[[2.0]]]), None)
    noise = mx.array([[[10.0]]])
    assert [float(source.noised(noise, t)) for t in (0.0, 0.5, 1.0)] == [2.0, 6.0, 10.0]


def test_pixels_reach_the_autoencoder_in_minus_one_to_one() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    assert np.allclose(to_model_range(pixels), [[[[-1.0, 1.0, -0.6]]]], atol=1e-6)


def features(value: float) -> dict[str, mx.array]:
    return {"t5": mx.array([[[value]]]), "clip": mx.array([[value]])}


def test_the_memory_tells_prompts_and_paddings_apart() -> None:
    memory = PromptMemory()
    memory.put("a dog", True, features(1.0))
    assert memory.get("a dog", False) is None
    assert memory.get("a cat", True) is None
    remembered = memory.get("a dog", True)
    assert remembered is not None
    assert float(remembered["clip"]) == 1.0


def test_the_memory_forgets_the_least_recently_used() -> None:
    memory = PromptMemory(size=2)
    memory.put("one", True, features(1.0))
    memory.put("two", True, features(2.0))
    memory.get("one", True)
    memory.put("three", True, features(3.0))
    assert memory.get("two", True) is None
    assert memory.get("one", True) is not None
    assert memory.get("three", True) is not None
