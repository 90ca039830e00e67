"""An entry of a data set as the set spells it, and which of its columns is which. Pure.

All forms of data sets make `DatasetRow`s; `dataset.py` checks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.errors import UsageError

# Conventions of train.jsonl, of `datasets`' imagefolder, and of diffusers' scripts.
CAPTIONS = ("prompt", "text", "caption")
IMAGES = ("image", "file_name", "image_file_name")


@dataclass(frozen=True)
class DatasetRow:
    """An entry, unchecked."""

    where: str  # as a message names it
    image: Path | bytes | None
    caption: Any
    repeats: int = 1  # how often it is shown in an epoch, beside the others


@dataclass(frozen=True)
class Columns:
    """Which keys of an entry hold picture and caption; "" is whichever of the usual is there."""

    image: str = ""
    caption: str = ""

    def image_key(self, entry: Mapping[str, Any]) -> str:
        """Raises `UsageError` without a period, as the two below."""
        return _key(entry, self.image, IMAGES, "image_column")

    def caption_key(self, entry: Mapping[str, Any]) -> str:
        return _key(entry, self.caption, CAPTIONS, "caption_column")

    @property
    def chosen(self) -> set[str]:
        """The settings that the user has given."""
        given = {"image_column": self.image, "caption_column": self.caption}
        return {name for name, value in given.items() if value}


def _key(entry: Mapping[str, Any], chosen: str, usual: tuple[str, ...], setting: str) -> str:
    if chosen:
        if chosen not in entry:
            there = ", ".join(map(str, entry)) or "nothing"
            raise UsageError(f"the key {chosen!r} is missing (it has {there})")
        return chosen
    present = [key for key in usual if key in entry]
    if not present:
        raise UsageError(f"the key {usual[0]!r} is missing")
    filled = [key for key in present if entry[key] not in (None, "")]
    if len({str(entry[key]) for key in filled}) > 1:
        raise UsageError(f"{' and '.join(map(repr, filled))} differ; say which with `{setting}`")
    return (filled or present)[0]


def path_in(folder: Path, image: Any) -> Path | None:
    """The file that an entry names, seen from the folder of its list; None where it names none."""
    return folder / image if isinstance(image, str) and image else None
