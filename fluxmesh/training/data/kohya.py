"""What the names of a folder say to kohya's scripts: `10_sks dog`. Pure.

`library/train_util.py` of kohya-ss/sd-scripts reads `NUMBER_WORDS` so: each picture is shown NUMBER
times an epoch, and one without a caption file has WORDS as its caption.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = re.compile(r"(\d+)_(.*)")
REGULARIZATION = ("reg", "regularization", "regularisation")
MAX_REPEATS = 10_000  # relative to the folder that is repeated least


@dataclass(frozen=True)
class KohyaFolder:
    """A folder whose name is in kohya's way."""

    path: Path
    repeats: int
    words: str  # "" where the name has none

    @classmethod
    def of(cls, picture: Path, root: Path) -> KohyaFolder | None:
        """The nearest one above a picture and below `root`."""
        for parent in picture.parents:
            if parent == root:
                return None
            match = FOLDER.fullmatch(parent.name)
            if match:
                return cls(parent, int(match[1]), match[2].strip())
        return None


def regularization_folder(folders: Sequence[KohyaFolder], root: Path) -> Path | None:
    """Where a whole project of kohya's is named: its folder of pictures that keep the prior."""
    for folder in folders:
        if folder.path.parent != root and folder.path.parent.name.lower() in REGULARIZATION:
            return folder.path.parent
    return None


def relative_repeats(repeats: Sequence[int]) -> list[int]:
    """The same proportions in the smallest numbers: all alike are 1."""
    common = math.gcd(*repeats) or 1
    return [number // common for number in repeats]
