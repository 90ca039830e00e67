"""A folder into which nobody can write, whoever runs the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unwritable_folder(folder: Path) -> Iterator[Path]:
    """`folder`, made read-only; where root runs the tests, who may write there, a folder of the
    kernel's that takes no file of anybody, on Linux and on macOS."""
    if os.geteuid() == 0:
        yield Path("/dev/fd")
        return
    folder.mkdir()
    folder.chmod(0o555)
    try:
        yield folder
    finally:
        folder.chmod(0o755)
