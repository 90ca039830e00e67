"""Four images of one prompt, and one of them again: python examples/seeds.py [MODEL].

Image k of a request with seed s is the image that seed s + k gives alone, to the byte, however
many images are asked for and wherever they are made.
"""

import sys

import numpy as np
from PIL import Image

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels

flux = FluxPipeline(sys.argv[1] if len(sys.argv) > 1 else "tiny")
prompt, latent_size = "a blue fish on a white background", (8, 8)

images = to_pixels(flux.generate_images(prompt, n_images=4, latent_size=latent_size, seed=5))
top, bottom = np.hstack(images[:2]), np.hstack(images[2:])
Image.fromarray(np.vstack([top, bottom])).save("seeds.png")
print("wrote seeds.png: seeds 5 and 6 above, 7 and 8 below")

# The prompt is remembered, so that the text encoders do not run a second time.
alone = to_pixels(flux.generate_images(prompt, latent_size=latent_size, seed=7))
print("seed 7 alone is the third image:", np.array_equal(alone[0], images[2]))
