"""What a picture will look like, seen from the middle of its steps, without a decode. NumPy only.

The flow is straight: from the latents before and after a step follows where it leads at t = 0
(`expected`). A `Projection` makes colours of these, one small matrix for every latent, for what an
autoencoder keeps of a few pixels is nearly linear in their colour. It is fitted to the autoencoder
at hand (`engine/preview.py`), so that no table of numbers from elsewhere has to be trusted, and
none to be kept for a family that is yet to come.

The host computes it from latents that leave the device anyway: no step has one operation more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluxmesh.bounds import MAX_PREVIEW
from fluxmesh.errors import WeightsError
from fluxmesh.models.autoencoder.packing import unpack
from fluxmesh.storage import atomic

COLOURS = 3
# A weak pull to zero: channels that say nothing of colours stay out, however few pictures there are
RIDGE = 1e-3


def expected(before: np.ndarray, after: np.ndarray, t: float, t_next: float) -> np.ndarray:
    """The finished latents, as far as the step from noise level `t` to `t_next` tells.

    `before` and `after` are float32 [1, L, 4C], and so is what comes back.
    """
    velocity = (after - before) / np.float32(t_next - t)
    return after - np.float32(t_next) * velocity


@dataclass(frozen=True)
class Projection:
    """The colour of a latent as a linear function of it."""

    factors: np.ndarray  # float32 [C, COLOURS]
    offset: np.ndarray  # float32 [COLOURS]: grey, nearly

    @classmethod
    def fit(cls, latents: np.ndarray, colours: np.ndarray) -> Projection:
        """The one that comes nearest, by least squares.

        `latents` is float32 [N, C]; `colours` [N, COLOURS] in [0, 1], as `colours_of` gives them.
        """
        centre, grey = latents.mean(axis=0), colours.mean(axis=0)
        x, y = (latents - centre).astype(np.float64), (colours - grey).astype(np.float64)
        square = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
        factors = np.linalg.solve(square, x.T @ y)
        return cls(factors.astype(np.float32), (grey - centre @ factors).astype(np.float32))

    @classmethod
    def read(cls, path: Path) -> Projection:
        """A table that `write` wrote. Raises `WeightsError` for anything else."""
        try:
            table = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise WeightsError(f"{path} is no table of a preview: {error}.") from None
        is_table = isinstance(table, np.ndarray) and table.dtype.kind == "f" and table.ndim == 2
        if not (is_table and table.shape[1] == COLOURS and np.isfinite(table).all()):
            raise WeightsError(f"{path} is no table of a preview; fit it again, or remove it.")
        return cls(table[:-1].astype(np.float32), table[-1].astype(np.float32))

    def write(self, path: Path) -> None:
        """As a NumPy file [C + 1, COLOURS], the offset last. Raises `OSError`."""
        with atomic.replaced_file(path, 0o644) as file:
            np.save(file, np.vstack([self.factors, self.offset]), allow_pickle=False)

    def picture(self, latents: np.ndarray, latent_size: tuple[int, int]) -> np.ndarray:
        """Finished latents [1, L, 4C] as a small picture, uint8 [h, w, 3], no NaN in it.

        A pixel a latent; of large pictures every second one, or fewer, so that no side exceeds
        `MAX_PREVIEW`.
        """
        every = -(-max(latent_size) // MAX_PREVIEW)
        shown = unpack(latents, latent_size)[0, ::every, ::every]
        colours = np.nan_to_num(shown @ self.factors + self.offset)
        return np.round(np.clip(colours, 0.0, 1.0) * 255.0).astype(np.uint8)


def colours_of(pixels: np.ndarray, downsampling: int) -> np.ndarray:
    """What the latents of a picture, uint8 [H, W, 3], should show: means, float32 [h * w, 3]."""
    height, width, _ = pixels.shape
    cells = (height // downsampling, downsampling, width // downsampling, downsampling, 3)
    means = pixels.reshape(cells).mean(axis=(1, 3), dtype=np.float32)
    return means.reshape(-1, COLOURS) / np.float32(255.0)


def sample_pictures(count: int, side: int, seed: int = 0) -> list[np.ndarray]:
    """Pictures to fit to, uint8 [side, side, 3]: flat colours, washes, edges, and some texture."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) / side
    pictures = []
    for number in range(count):
        first, last = generator.uniform(0, 1, (2, 3))
        is_plain = number % 2 == 0
        last = first if is_plain else last
        slope = generator.normal(size=2)
        along = (slope[0] * rows + slope[1] * columns)[..., None]
        along = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
        picture = first + (last - first) * along
        for _ in range(6):
            middle, (tall, wide) = generator.uniform(0, 1, 2), generator.uniform(0.05, 0.35, 2)
            down, right = (rows - middle[0]) / tall, (columns - middle[1]) / wide
            is_round = generator.uniform() < 0.5
            reach = down**2 + right**2 if is_round else np.maximum(abs(down), abs(right))
            picture = np.where((reach < 1)[..., None], generator.uniform(0, 1, 3), picture)
        if not is_plain:
            picture = picture + generator.normal(scale=0.02, size=picture.shape)
        pictures.append(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return pictures
