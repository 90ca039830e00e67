"""Latents and text features on disk, by what they were made from. Imports no mlx.

A second run finds everything that the first one encoded. An entry's name is a hash of all that its
numbers depend on (`key`), so that nothing in the cache is ever stale; it appears under its name
only when it is whole. A damaged entry counts as missing and is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluxmesh.errors import WeightsError
from fluxmesh.storage.atomic import replaced_file
from fluxmesh.storage.safetensors import make_folder, read_header, read_tensor, write_tensors

FORMAT = 1  # raise it when what is stored, or how it is computed, changes
Arrays = dict[str, tuple[np.ndarray, str]]  # with the dtype's name; bfloat16 as uint16


def default_folder() -> Path:
    """The user's cache: `$XDG_CACHE_HOME/fluxmesh/training`, else below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fluxmesh" / "training"


def key(**made_from: Any) -> str:
    """A name for what depends on these values (JSON's types) and on nothing else."""
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class FeatureCache:
    """Arrays by key, each entry a safetensors file below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, name: str) -> Arrays | None:
        """The entry, or None where there is none that is whole."""
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            entries = read_header(path).entries
            return {kind: (read_tensor(entry), entry.dtype) for kind, entry in entries.items()}
        except WeightsError:
            return None

    def has(self, name: str) -> bool:
        """Whether `get` would find the entry; reads its header only."""
        path = self.path(name)
        if not path.is_file():
            return False
        try:
            read_header(path)
        except WeightsError:
            return False
        return True

    def put(self, name: str, arrays: Mapping[str, tuple[np.ndarray, str]]) -> None:
        """Stores an entry; raises `OutputError` where the disk refuses."""
        path = self.path(name)
        make_folder(path.parent)
        write_tensors(path, arrays, {}, replaced_file)
