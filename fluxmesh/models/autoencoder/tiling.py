"""How a long side is cut into overlapping tiles, and how they are blended. NumPy only.

`autoencoder.py` decodes large pictures with it. The cut is a function of the side's length alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fluxmesh.errors import UsageError

# A picture of more latents than this is decoded in tiles (192 x 192 latents are 1536 x 1536 pixels
# of FLUX). A constant, never free memory: a tile is not the same picture, since the norms and the
# middle attention see all of it.
UNTILED_LATENTS = 192 * 192


@dataclass(frozen=True)
class Tile:
    """Latents `start` to `stop` of a side; `before` and `after` it shares with its neighbours."""

    start: int
    stop: int
    before: int  # latents shared with the tile before; 0 at the side's beginning
    after: int  # latents shared with the tile after; 0 at the side's end

    def share(self, scale: int) -> np.ndarray:
        """The tile's weight in each pixel, float32 [(stop - start) * scale].

        A latent is `scale` pixels. Linear ramps where neighbours overlap; their weights sum to 1.
        """
        weights = np.ones((self.stop - self.start) * scale, dtype=np.float32)
        if self.before:
            weights[: self.before * scale] *= _ramp(self.before * scale)
        if self.after:
            weights[-self.after * scale :] *= 1 - _ramp(self.after * scale)
        return weights


def tiles(length: int, tile: int, overlap: int) -> list[Tile]:
    """Covers `length` latents with tiles of `tile`, of one size and evenly placed.

    Neighbours share at least `overlap` latents, and no latent lies in three tiles. Raises
    `UsageError` where `overlap` is not from 1 to a third of `tile`.
    """
    if not 1 <= overlap <= tile // 3:
        raise UsageError(f"The tiles' overlap is {overlap}; it must be 1 to {tile // 3}.")
    if length <= tile:
        return [Tile(0, length, 0, 0)]
    count = math.ceil((length - overlap) / (tile - overlap))
    tile = min(tile, math.ceil((length + (count - 1) * overlap) / count))  # no larger than needed
    starts = [i * (length - tile) // (count - 1) for i in range(count)]
    shared = [a + tile - b for a, b in zip(starts, starts[1:], strict=False)]
    return [
        Tile(start, start + tile, before, after)
        for start, before, after in zip(starts, [0, *shared], [*shared, 0], strict=True)
    ]


def _ramp(length: int) -> np.ndarray:
    """From just above 0 to just below 1, symmetric: ramp + reversed ramp = 1."""
    return ((np.arange(length) + 0.5) / length).astype(np.float32)
