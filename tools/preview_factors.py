"""Fits a checkpoint's previews to its own pictures, and writes the table beside its autoencoder.

    python -m tools.preview_factors fluxmesh/tiny/checkpoint "a red apple" "two dogs" ...

For a checkpoint that is handed on with its table, such as the embedded ones: an engine fits any
other model's at its first preview, to pictures of no particular kind. Of four pictures painted one
is left out, and tells how far colours are off in the end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.preview import TABLE, encoded_samples, fit
from fluxmesh.sampling.preview import Projection, colours_of

SIZE = (16, 16)  # of each picture, in latents
SEEDS = 4  # of each prompt
LEFT_OUT = 4  # every such picture


def painted(pipeline: FluxPipeline, prompts: Sequence[str]) -> list[mx.array]:
    """Latents of pictures of these prompts, each [1, L, 4C]."""
    pictures = []
    for number, prompt in enumerate(prompts):
        *_, latents = pipeline.generate_latents(
            prompt, n_images=SEEDS, latent_size=SIZE, seed=number * SEEDS
        )
        mx.eval(latents)
        pictures.extend(latents[k : k + 1] for k in range(SEEDS))
    return pictures


def miss(pipeline: FluxPipeline, projection: Projection, pictures: Sequence[mx.array]) -> float:
    """Root of the mean square by which colours in [0, 1] of decoded pictures are missed."""
    misses = []
    for latents in pictures:
        downsampling = pipeline.checkpoint.architecture.downsampling
        wanted = colours_of(pipeline.pixels(latents, SIZE)[0], downsampling)
        shown = colours_of(projection.picture(np.array(latents), SIZE), 1)
        misses.append(np.square(wanted - shown))
    return float(np.sqrt(np.mean(misses)))


def main(folder: Path, prompts: Sequence[str]) -> None:
    pipeline = FluxPipeline(str(folder), dtype="float32")
    (autoencoder,) = pipeline.checkpoint.architecture.of_role("autoencoder")
    pictures = painted(pipeline, prompts)
    others = pictures[::LEFT_OUT]
    own = [latents for k, latents in enumerate(pictures) if k % LEFT_OUT]
    projection = fit(pipeline, own)
    path = folder / autoencoder.folder / TABLE
    projection.write(path)
    anyhow = miss(pipeline, fit(pipeline, encoded_samples(pipeline)), others)
    print(f"{path}: {path.stat().st_size} bytes; off by {miss(pipeline, projection, others):.3f}")
    print(f"Fitted to pictures of no particular kind it would be off by {anyhow:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
