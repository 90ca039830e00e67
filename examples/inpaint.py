"""Changes one part of a picture and no other: python examples/inpaint.py [MODEL].

Makes a picture, then paints something else into its middle. With pictures of your own, use
`fluxmesh.images.load_source`, which reads files, masks and margins to outpaint; without a mask
and with a strength below 1, the same call varies the whole picture (image-to-image).
"""

import sys

import numpy as np
from PIL import Image

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.request import SourceImage

flux = FluxPipeline(sys.argv[1] if len(sys.argv) > 1 else "tiny")
latent_size = (16, 16)
before = to_pixels(
    flux.generate_images("a cat on a green background", latent_size=latent_size, seed=1)
)[0]

mask = np.zeros(before.shape[:2], np.uint8)
mask[32:96, 32:96] = 255  # white is painted, black stays
source = SourceImage(pixels=before, strength=1.0, mask=mask)
after = to_pixels(
    flux.generate_images(
        "a dog on a green background", latent_size=latent_size, seed=2, source=source
    )
)[0]

Image.fromarray(np.hstack([before, after])).save("inpaint.png")
outside = mask == 0
print("wrote inpaint.png; outside of the mask nothing changed:", (before == after)[outside].all())
