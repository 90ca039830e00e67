"""Shapes of the tensors in a single file, which has no config: a family reads its sizes from them.

Imports no mlx.
"""

from __future__ import annotations

import re
from pathlib import Path

from fluxmesh.errors import WeightsError
from fluxmesh.models.tensor_map import COMFY_PREFIX
from fluxmesh.storage.numbers import affine, foreign
from fluxmesh.storage.safetensors import Header
from fluxmesh.storage.tensor_files import read_header


class FileShapes:
    """Shapes of a single file, with an error that says what the file should have been.

    Of a file with several models, those of the one whose names begin with `prefix`. A model in
    several files comes with the `header` of all, and the folder as its path.
    """

    def __init__(
        self, path: Path, what: str, prefix: str = COMFY_PREFIX, header: Header | None = None
    ) -> None:
        self.path, self.what = path, what
        header = header or read_header(path)
        foreign.refuse(header)
        self.entries = {key.removeprefix(prefix): entry for key, entry in header.entries.items()}
        self._header = Header(self.entries, header.metadata)

    def of(self, key: str, dims: int) -> tuple[int, ...]:
        """The tensor's shape; of a matrix in MLX's quantized form, that of its numbers."""
        shape = affine.shape_of(self._header, key) if key in self.entries else None
        if shape is None or len(shape) != dims or 0 in shape:
            problem = "lacks" if shape is None else f"has shape {shape} for"
            raise WeightsError(f"{self.path} {problem} {key}, so it is not {self.what}.")
        return shape

    def pair(self, key: str) -> tuple[int, int]:
        rows, columns = self.of(key, 2)
        return rows, columns

    def count(self, pattern: str) -> int:
        number = 0
        while pattern.format(number) in self.entries:
            number += 1
        if number == 0:
            raise WeightsError(f"{self.path} lacks {pattern.format(0)}, so it is not {self.what}.")
        numbered = re.compile(re.escape(pattern).replace(re.escape("{}"), r"(\d+)"))
        matches = (numbered.fullmatch(key) for key in self.entries)
        if any(int(match[1]) > number for match in matches if match):
            raise WeightsError(
                f"{self.path} lacks {pattern.format(number)} and has what comes after it, so that "
                "a part of the model is missing; download it again."
            )
        return number
