"""Steers a picture with a loss of one's own: python examples/custom_loss.py [MODEL].

Before each step the sampler shows `guide` the picture that the model expects, as latents, and
moves it down the gradient of the loss. Here the loss asks for a colour: the decoded picture's
mean should be a warm orange. Anything that MLX can differentiate will do: a classifier, a sketch
to follow, a likeness to another picture's features.
"""

import sys

import mlx.core as mx
import numpy as np
from PIL import Image

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels

flux = FluxPipeline(sys.argv[1] if len(sys.argv) > 1 else "tiny")
prompt, latent_size = "a cup on a white background", (8, 8)
orange = mx.array([0.9, 0.5, 0.1])
STRENGTH = 0.5


def guide(clean: mx.array, step: int) -> mx.array:
    """`clean` is float32 latents [1, h, w, channels]; a larger strength pulls harder."""
    picture = flux.ae.decode(clean) * 0.5 + 0.5  # [1, H, W, 3] in [0, 1], nearly
    distance = mx.sum((picture.mean(axis=(0, 1, 2)) - orange) ** 2)
    # A mean spreads its gradient over all latents: their number makes up for it at any size.
    return STRENGTH * clean.size * distance


plain = to_pixels(flux.generate_images(prompt, latent_size=latent_size, seed=3))[0]
guided = to_pixels(flux.generate_images(prompt, latent_size=latent_size, seed=3, guide=guide))[0]

Image.fromarray(np.hstack([plain, guided])).save("custom_loss.png")
for name, pixels in (("without", plain), ("with", guided)):
    distance = np.abs(pixels.mean(axis=(0, 1)) / 255 - np.array(orange)).mean()
    print(f"{name} the loss, the mean colour is {distance:.3f} away from orange")
