"""Folders of pictures with captions, and what is read of them: examples, notes, problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxmesh.training.data.dataset import DatasetError, Example, load_dataset
from fluxmesh.training.data.remarks import Remarks
from tests.datasets import CAPTIONS, SIZES, picture


def read(folder: Path, **options: str) -> tuple[list[Example], list[str]]:
    """Examples, and the notes beside them."""
    remarks = Remarks()
    return load_dataset(str(folder), remarks=remarks, **options), remarks.notes


def captions(folder: Path, **options: str) -> list[str]:
    return [example.caption for example in read(folder, **options)[0]]


def problems(folder: Path, **options: str) -> tuple[str, ...]:
    with pytest.raises(DatasetError) as caught:
        load_dataset(str(folder), **options)
    return caught.value.problems


def captioned(folder: Path, count: int = 3, ending: str = ".txt", first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number, SIZES[number % 3]).save(folder / f"{number}.png")
        (folder / f"{number}{ending}").write_text(f"{CAPTIONS[number % 3]}\n")
    return folder
