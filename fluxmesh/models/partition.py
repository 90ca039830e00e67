"""A part of a model, of a linear, of a run of tokens: what one of N hosts has. Pure, no mlx.

A family says which of its linears are cut, and where (`flux1/partition.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size`; by default, the whole."""

    rank: int = 0
    size: int = 1


def token_run(tokens: int, rank: int, ranks: int) -> tuple[int, int]:
    """A rank's run of ceil(S / N) of S tokens under `sequence`; what lies beyond S is filling."""
    count = -(-tokens // ranks)
    return rank * count, (rank + 1) * count


@dataclass(frozen=True)
class Cut:
    """The part of one linear's weight [out, in] that a shard holds."""

    axis: int  # 0: outputs. 1: inputs; the outputs are then parts of a sum over the hosts
    spans: tuple[tuple[int, int], ...]  # from, to; in the order in which they are held
    length: int  # of the whole axis

    def spans_of(self, stored: int) -> tuple[tuple[int, int], ...]:
        """The spans in an axis stored as `stored` numbers: a quantized row has fewer than columns.

        Exact where the spans are whole quantization groups, which `check` sees to.
        """
        return tuple((a * stored // self.length, b * stored // self.length) for a, b in self.spans)

    @property
    def indices(self) -> np.ndarray:
        """The places along the whole axis that are held, int64."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.spans])
