"""From a prompt to a picture, one step at a time: python examples/text_to_image.py [MODEL]."""

import sys

import mlx.core as mx
from PIL import Image

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels

flux = FluxPipeline(sys.argv[1] if len(sys.argv) > 1 else "tiny")

# The image's size in latents, of 8 pixels each: 128x192 pixels.
latent_size = (16, 24)
steps = flux.generate_latents(
    "a red apple to the left of a dog on a yellow background",
    latent_size=latent_size,
    seed=7,
)

# First comes what the prompt and the seed were turned into. Once it is evaluated the text
# encoders may leave, before the transformer loads.
conditioning = next(steps)
mx.eval(conditioning)
del flux.t5, flux.clip

# Then come the latents after each step: nothing is computed until they are evaluated.
for i, x in enumerate(steps, start=1):
    mx.eval(x)
    print(f"step {i} done")

image = flux.decode(x, latent_size)
Image.fromarray(to_pixels(image)[0]).save("text_to_image.png")
print("wrote text_to_image.png")
