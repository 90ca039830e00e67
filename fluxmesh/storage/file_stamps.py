"""Whether files are still the ones that were read, told by stat alone: a few microseconds a file.

A file that is written again, replaced or removed has another size, time of change or inode. One
that is only touched counts as another, too: to read it once more costs seconds, to take a new one
for the old one costs a wrong picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Stamp = tuple[int, int, int] | None  # inode, bytes, nanoseconds of the last change; None: not there


@dataclass(frozen=True)
class FileStamps:
    """What files were at one moment."""

    stamps: tuple[tuple[Path, Stamp], ...] = ()

    @classmethod
    def of(cls, files: Iterable[Path]) -> FileStamps:
        """As they are now; of a link, what it leads to."""
        return cls(tuple((file, _stamp(file)) for file in sorted(set(files))))

    @property
    def changed(self) -> Path | None:
        """The first file that is another one by now; None: all are the same."""
        return next((file for file, stamp in self.stamps if _stamp(file) != stamp), None)


def _stamp(file: Path) -> Stamp:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
