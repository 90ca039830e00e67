"""The checkpoints that come with fluxmesh: where each lies in the package, and which are there.

Small models of the families' shapes, which `tools/tiny/` trains. Imports no mlx.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from fluxmesh.models.registry import FAMILIES
from fluxmesh.weights.checkpoint import MANIFEST, Checkpoint, from_folder, with_defaults
from fluxmesh.weights.folder_files import INDEX

# By the name that `--model` takes; the first is the one that is always there.
FOLDERS: Mapping[str, str] = {
    name: folder for family in FAMILIES for name, folder in family.embedded.items()
}
# The largest pictures that either was trained on are the largest that one reads: a photo would take
# it minutes, and it would see nothing in it.
TRAINED_AT: Mapping[str, int] = {
    "steps": 4,
    "height": 128,
    "width": 128,
    "reference_area": 192 * 192,
}


def folder_of(name: str) -> Path:
    """Where an embedded checkpoint lies, or would, in the installed package."""
    return Path(__file__).resolve().parents[2] / "tiny" / FOLDERS[name]


def embedded_names() -> tuple[str, ...]:
    """Those that this package has."""
    return tuple(name for name in FOLDERS if (folder_of(name) / INDEX).is_file())


def embedded_folders() -> tuple[Path, ...]:
    return tuple(folder_of(name) for name in embedded_names())


def embedded_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of that name; its own fluxmesh.json may say what it paints by default."""
    checkpoint = from_folder(folder_of(name), name)
    if (folder_of(name) / MANIFEST).is_file():
        return checkpoint
    model = with_defaults(checkpoint.architecture, TRAINED_AT)
    return dataclasses.replace(checkpoint, architecture=model)
