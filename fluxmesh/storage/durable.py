"""What is on the disk for good: a file's bytes and a folder's names outlive a power cut.

On macOS `fsync` hands the bytes to the drive, which may keep them in its own memory for as long as
it likes; only `F_FULLFSYNC` has it write them. Who makes files appear whole (`atomic.py`) asks
here, and so does whoever fills a file little by little.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import nullcontext, suppress
from pathlib import Path

# Where the system has none, `fsync` is all that there is.
_FULL: int | None = getattr(fcntl, "F_FULLFSYNC", None)


def sync(descriptor: int) -> None:
    """Waits until what was written to an open file is on the disk. Raises `OSError`."""
    if _FULL is not None:
        try:
            fcntl.fcntl(descriptor, _FULL)
            return
        except OSError:
            pass  # network shares and some external disks know no such thing
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """The same for a file that is closed, or the names in a folder. Raises `OSError`.

    Not where the file system can't promise that for a folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            sync(descriptor)
    finally:
        os.close(descriptor)
