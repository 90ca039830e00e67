"""Large safetensors files of random bfloat16 numbers, as fast as the disk takes them.

`writer.py` needs 34 GB of plausible weights in seconds; drawing so many normals takes
minutes. So 32 million are drawn once and every tensor is cut from them, at an offset of its own,
scaled by a power of two near 1/sqrt(inputs): in bfloat16 that is a change of the exponent alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

POOL = 2**25 + 19  # numbers; odd, so that repeats don't line up with rows


class RandomValues:
    """Normals in bfloat16 (as uint16), of any length and power-of-two scale."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.Generator(np.random.Philox(seed))
        normals = rng.standard_normal(POOL, dtype=np.float32)
        # The smallest that a scale of 2^-16 leaves normal numbers, far below what matters.
        normals[np.abs(normals) < 1e-6] = 1e-6
        self._scaled = {0: (normals.view(np.uint32) >> 16).astype(np.uint16)}
        self._offset = 0

    def blocks(self, count: int, exponent: int) -> list[memoryview]:
        """`count` numbers times 2^-exponent, as pieces to write one after another."""
        if exponent not in self._scaled:
            self._scaled[exponent] = self._scaled[0] - np.uint16(exponent << 7)
        pool = self._scaled[exponent]
        pieces = []
        while count:
            piece = pool[self._offset : self._offset + count]
            pieces.append(piece.data.cast("B"))
            count -= len(piece)
            self._offset = (self._offset + len(piece)) % POOL
        return pieces


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], values: RandomValues) -> int:
    """Writes the tensors `shapes` names (PyTorch's shapes) in bfloat16; returns the bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if len(shape) == 1 and not name.endswith("bias"):  # the scale of a norm
                file.write(np.full(shape, 0x3F80, np.uint16).tobytes())  # 1.0
                continue
            for block in values.blocks(math.prod(shape), _exponent(name, shape)):
                file.write(block)
    return end + len(text) + 8


def _exponent(name: str, shape: tuple[int, ...]) -> int:
    """Minus the binary logarithm of a weight's scale: 1/sqrt(inputs), or a bias's 1/16."""
    if len(shape) == 1:
        return 4
    if "embedding" in name or name == "shared.weight":
        return 0
    return round(math.log2(math.prod(shape[1:])) / 2)
