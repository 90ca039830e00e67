"""Which files of this host's disk make up a checkpoint that is asked for, and what each is called.

Of a snapshot of the Hub the weights that fluxmesh reads, and all that describes them, so that
diffusers and mflux find the copy complete too. Of everything else one folder that needs nothing
beside it: BFL's single file with the autoencoder and the text encoders that serve it here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.bounds import Text
from fluxmesh.errors import UsageError
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.folder_files import vocabulary_in
from fluxmesh.weights.models_folder import folder_name
from fluxmesh.wire.fields import bounded
from fluxmesh.wire.messages.parcel import (
    DESCRIPTIONS,
    FilePath,
    ModelParcel,
    ParcelFile,
    ParcelName,
)

SMALL = 64 << 20  # bytes of a description: a tokenizer's vocabulary has a few million


@dataclass(frozen=True)
class Packed:
    """A checkpoint of this host, and where each of its files lies."""

    parcel: ModelParcel
    paths: dict[str, Path]  # by `ParcelFile.path`


def packed(model: str, entry: str) -> Packed:
    """The model that users call `model`, and `hub.resolve` takes `entry` for on this host.

    Raises `FluxmeshError` where it is not here, or has files that can't be sent.
    """
    checkpoint = hub.resolve_any(entry, download=False)
    snapshot = None if os.path.isabs(entry) else _snapshot(checkpoint)
    if snapshot is not None:
        paths = {_below(snapshot, file): file for file in _weights(checkpoint)}
        paths |= {_below(snapshot, file): file for file in _descriptions(snapshot)}
        name = snapshot.parents[1].name.removeprefix("models--").replace("--", "/")
    else:
        name = folder_name(model)
        paths = _as_folder(checkpoint, _root(checkpoint, entry), name)
    # The largest first: those that are sent at once then end together.
    order = sorted(paths, key=lambda path: (-paths[path].stat().st_size, path))
    files = tuple(
        ParcelFile(
            _sendable(path, FilePath),
            paths[path].stat().st_size,
            _blob(paths[path]) if snapshot else "",
        )
        for path in order
    )
    _sendable(name, ParcelName)
    parcel = ModelParcel(name, snapshot.name if snapshot else "", checkpoint.content, files)
    parcel.check()
    return Packed(parcel, paths)


def _snapshot(checkpoint: Checkpoint) -> Path | None:
    """The folder of the Hub's cache that holds all of it; None where there is none such."""
    folders = {
        next((above for above in file.parents if above.parent.name == "snapshots"), None)
        for file in (
            *_weights(checkpoint),
            *(folder / "_" for folder in checkpoint.tokenizers.values()),
        )
    }
    folder = folders.pop()
    return folder if not folders else None


def _weights(checkpoint: Checkpoint) -> Iterator[Path]:
    for component in checkpoint.components.values():
        yield from component.files


def _descriptions(folder: Path) -> Iterator[Path]:
    """The small files of a checkpoint's folder, and of those in it."""
    for file in (*folder.glob("*"), *folder.glob("*/*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix not in DESCRIPTIONS or is_hidden or not file.is_file():
            continue
        if file.stat().st_size <= SMALL:
            yield file


def _as_folder(checkpoint: Checkpoint, root: Path, name: str) -> dict[str, Path]:
    """The files by their paths in a folder `name` that is complete in itself.

    `root` is the folder that the checkpoint is, or its transformer's file: then all others come to
    lie beside that one, wherever they lie here.
    """
    paths: dict[str, Path] = {}
    if root.is_dir():
        paths = {_below(root, file): file for file in _descriptions(root)}
    for part, tokenizer in checkpoint.family.folder.tokenizers.items():
        if tokenizer.component not in checkpoint.tokenizers:
            continue  # of what reads no words
        folder = checkpoint.tokenizers[tokenizer.component]
        if not folder.is_relative_to(root):
            here = [file.name for file in _descriptions(folder)]
            names = vocabulary_in(here, tokenizer.choices)
            for each in (*(names or ()), "tokenizer_config.json"):
                if (folder / each).is_file():
                    paths[f"{part}/{each}"] = folder / each
    for role, component in checkpoint.components.items():
        for file in component.files:
            if root.is_dir() and file.is_relative_to(root):
                paths[_below(root, file)] = file
            elif file == root:  # the folder's name leads to it: `models_folder.entry_in`
                paths[f"{name.rpartition('/')[2]}{file.suffix}"] = file
            elif (file.parent / "config.json").is_file():
                paths[f"{role}/{file.name}"] = file
                paths |= {f"{role}/{each.name}": each for each in file.parent.glob("*.json")}
            elif role == "vae":
                paths[f"ae{file.suffix}"] = file
            else:
                paths[file.name] = file
    return paths


def _root(checkpoint: Checkpoint, entry: str) -> Path:
    """The folder that a checkpoint is, or the file of its transformer; `entry` leads to it."""
    file = checkpoint.components["transformer"].files[0]
    is_folder = file.parent.name == "transformer" and not os.path.isfile(entry)
    return file.parents[1] if is_folder else file


def _below(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _blob(file: Path) -> str:
    """What the Hub's cache calls a file's content; "" on a disk without links."""
    return os.path.basename(os.readlink(file)) if file.is_symlink() else ""


def _sendable(name: str, hint: Any) -> str:
    """The name, which a message's field is to hold. Raises `UsageError` where none may."""
    _, bound = bounded(hint)
    assert isinstance(bound, Text) and bound.pattern is not None
    if len(name) > bound.most or not bound.pattern.fullmatch(name):
        raise UsageError(f"{name!r} can't be sent under this name; rename it.")
    return name
