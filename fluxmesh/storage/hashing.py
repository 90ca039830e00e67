"""The hash by which files are known: of adapters on a mesh, pictures in recipes, downloads."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(path: str | Path | bytes) -> str:
    """Hexadecimal SHA-256 of a file, or of a file's bytes. Raises `OSError`."""
    if isinstance(path, bytes):
        return hashlib.sha256(path).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
