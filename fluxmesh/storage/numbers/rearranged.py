"""Tensors that a file stores in another order of axes than PyTorch's, or leaves out.

Over any form of `tensor_source.py`: rows are read as there, and rearranged. Imports no mlx.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fluxmesh.storage.numbers.tensor_source import TensorSource


@dataclass(frozen=True)
class ChannelsLastSource(TensorSource):
    """A convolution as MLX holds it, [out, height, width, in]; `shape` has `in` second."""

    stored: TensorSource

    @classmethod
    def of(cls, stored: TensorSource) -> TensorSource:
        """The same numbers in PyTorch's order; what has not four axes stays as it is."""
        if len(stored.shape) != 4:
            return stored
        out, height, width, into = stored.shape
        return cls(stored.entry, (out, into, height, width), stored)

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def float32(self, start: int, stop: int) -> np.ndarray:
        _, into, height, width = self.shape
        rows = self.stored.float32(start, stop).reshape(-1, height, width, into)
        return np.ascontiguousarray(rows.transpose(0, 3, 1, 2)).reshape(stop - start, -1)


@dataclass(frozen=True)
class ZeroSource(TensorSource):
    """Zeros, for a tensor that a writer leaves out; `entry` is the one that it belongs beside."""

    @property
    def nbytes(self) -> int:
        return 0

    def float32(self, start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, math.prod(self.shape[1:])), dtype=np.float32)
