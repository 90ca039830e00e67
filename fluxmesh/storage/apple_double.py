"""The files `._NAME` that macOS lays beside NAME on disks without extended attributes.

exFAT sticks and SMB shares are full of them. They have the name's ending and none of its content,
so whoever looks for files by an ending leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path


def without(paths: Iterable[Path]) -> Iterator[Path]:
    """The paths that are not such companions."""
    return (path for path in paths if not path.name.startswith("._"))
