"""Shapes of the tensors in a single file, which has no config: a family reads its sizes from them.

Imports no mlx.
"""

from __future__ import annotations

from pathlib import Path

from fluxmesh.errors import WeightsError
from fluxmesh.models.tensor_map import COMFY_PREFIX
from fluxmesh.storage.safetensors import read_header


class FileShapes:
    """Shapes of a single file, with an error that says what the file should have been."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        entries = read_header(path).entries
        self.entries = {key.removeprefix(COMFY_PREFIX): entry for key, entry in entries.items()}

    def of(self, key: str, dims: int) -> tuple[int, ...]:
        entry = self.entries.get(key)
        if entry is None or len(entry.shape) != dims or 0 in entry.shape:
            problem = "lacks" if entry is None else f"has shape {entry.shape} for"
            raise WeightsError(f"{self.path} {problem} {key}, so it is not {self.what}.")
        return entry.shape

    def pair(self, key: str) -> tuple[int, int]:
        rows, columns = self.of(key, 2)
        return rows, columns

    def count(self, pattern: str) -> int:
        number = 0
        while pattern.format(number) in self.entries:
            number += 1
        if number == 0:
            raise WeightsError(f"{self.path} lacks {pattern.format(0)}, so it is not {self.what}.")
        return number
