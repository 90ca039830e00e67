"""The hash by which files are known: of adapters on a mesh, pictures in recipes, downloads."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises `OSError` where it can't be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
