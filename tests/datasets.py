"""Small data sets of random pictures, in every form that training reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((40, 40), (48, 32), (32, 64))
CAPTIONS = ("a red dog", "two cats", "the fox on a table")


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Random pixels of `size` (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_pictures(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> list[str]:
    """Writes `0.png`, `1.png`, ... and returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i}.png" for i in range(len(sizes))]
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        picture(i, size).save(folder / name)
    return names


def write_lines(folder: Path, rows: Sequence[object]) -> None:
    """`train.jsonl`; a row that is a string is written as it stands."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_dataset(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> Path:
    """A folder with pictures of these sizes and their `train.jsonl`."""
    names = write_pictures(folder, sizes)
    rows = [{"image": name, "prompt": CAPTIONS[i % len(CAPTIONS)]} for i, name in enumerate(names)]
    write_lines(folder, rows)
    return folder
