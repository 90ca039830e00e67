"""Fits what previews are made with to the autoencoder in memory, and makes them of latents.

Between `sampling/preview.py`, which knows arrays alone, and `painting.py`, which sends what comes
out. The embedded checkpoints bring a table (`tools/preview_factors.py` wrote it); for any other
model, four small pictures go through its autoencoder once: less arithmetic than a picture of
256x256 takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import mlx.core as mx
import numpy as np

from fluxmesh.engine.stages import PipelineStages
from fluxmesh.engine.state import EngineState
from fluxmesh.errors import WeightsError
from fluxmesh.models.autoencoder.packing import PATCH, unpack
from fluxmesh.request import SourceImage
from fluxmesh.sampling.img2img import SourceLatents
from fluxmesh.sampling.preview import Projection, colours_of, expected, sample_pictures
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.wire.messages import Paint

TABLE = "preview.npy"  # beside the autoencoder's weights
PICTURES = 4
SIDE = 8  # of each, in latents


def shipped(checkpoint: Checkpoint) -> Projection | None:
    """The table that a checkpoint brings; None: it brings none that can be read."""
    (autoencoder,) = checkpoint.architecture.of_role("autoencoder")
    path = checkpoint.components[autoencoder.folder].files[0].with_name(TABLE)
    if not path.is_file():
        return None
    try:
        table = Projection.read(path)
    except WeightsError:  # no picture fails for want of a preview
        return None
    return table if len(table.factors) == checkpoint.architecture.latent_channels else None


def encoded_samples(pipeline: PipelineStages) -> Iterator[mx.array]:
    """Latents [1, L, 4C] of pictures of any kind, `SIDE` a side."""
    side = SIDE * pipeline.checkpoint.architecture.downsampling
    for picture in sample_pictures(PICTURES, side):
        yield pipeline.encode_source(SourceImage(picture)).clean


def fit(pipeline: PipelineStages, pictures: Iterable[mx.array]) -> Projection:
    """That of the pipeline's autoencoder, which decodes `pictures`: latents [1, L, 4C],
    each a square."""
    downsampling = pipeline.checkpoint.architecture.downsampling
    latents, colours = [], []
    for packed in pictures:
        size = square_of(packed)
        channels = packed.shape[-1] // PATCH**2
        latents.append(unpack(np.array(packed), size).reshape(-1, channels))
        colours.append(colours_of(pipeline.pixels(packed, size)[0], downsampling))
    return Projection.fit(np.concatenate(latents), np.concatenate(colours))


def square_of(packed: mx.array) -> tuple[int, int]:
    """Height and width in latents of a square picture's, packed [1, L, 4C]."""
    side = PATCH * math.isqrt(packed.shape[1])
    return side, side


def known(engine: EngineState) -> Projection | None:
    """That of the model that is open, if it needs no fitting."""
    if engine.content not in engine.projections:
        brought = shipped(engine.model.checkpoint)
        if brought is None:
            return None
        engine.projections[engine.content] = brought
    return engine.projections[engine.content]


class Previews:
    """Of one image, as its steps are made."""

    def __init__(
        self,
        projection: Projection,
        start: np.ndarray,
        times: list[float],
        latent_size: tuple[int, int],
        every: int,
    ) -> None:
        """`start`: the latents that the first step begins from, float32 [1, L, 4C]; `times` of all
        steps, counted from that of noise; `every`: so many steps a preview."""
        self.projection, self.latest = projection, start
        self.times, self.latent_size, self.every = times, latent_size, every

    def after(self, step: int, latents: np.ndarray) -> np.ndarray | None:
        """What step `step`, counted from 1, leads to, uint8 [h, w, 3]; None where none is due.

        To be called for each step in turn, with the latents that it left, float32 [1, L, 4C].
        """
        before, self.latest = self.latest, latents
        if step % self.every:
            return None
        t, t_next = self.times[step - 1], self.times[step]
        clean = expected(before, latents, t, t_next)
        return self.projection.picture(clean, self.latent_size)


def of_image(
    engine: EngineState, work: Paint, times: list[float], source: SourceLatents | None
) -> Previews | None:
    """Those of the image that is about to be painted, where they are asked for.

    `source` is the picture that it begins from. Fits what is not known, with the autoencoder that
    is in memory.
    """
    if not work.preview_every:
        return None
    projection = known(engine)
    if projection is None:
        engine.begin("decoding")
        projection = engine.projections[engine.content] = fit(
            engine.model, encoded_samples(engine.model)
        )
    start = work.latents if work.first else work.noise
    if not work.first and source is not None:
        start = np.array(source.noised(mx.array(work.noise), times[0]))
    assert start is not None, "to go on, the latents after the last step are needed"
    return Previews(projection, start, times, engine.latent_size(work), work.preview_every)
