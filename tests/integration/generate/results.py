"""The size of pictures that a CPU paints at once, and what a command has left behind."""

from __future__ import annotations

import os
from pathlib import Path

SIZE = ("--image-size", "32x48")


def names(folder: Path) -> list[str]:
    """Everything that lies in a folder, hidden files too."""
    return sorted(os.listdir(folder))
