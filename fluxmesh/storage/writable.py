"""Whether something can be written to a place: asked before the work whose result shall go there.

Beside `atomic.py`, which writes it. What a folder allows is found by trying, for its permissions
don't tell: macOS keeps programs out of Desktop, Documents and Downloads until their user agrees, a
disk may be mounted for reading alone, and root may write where it says nobody may.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from fluxmesh.errors import NoSuchFolderError, OutputError
from fluxmesh.storage import placeholders
from fluxmesh.storage.safetensors import cannot_write


def check_file(path: Path) -> None:
    """As `check_folder` of the folder above; raises it too for a name that its disk can't have."""
    check_folder(path.parent)
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise cannot_write(path, error) from error


def check_folder(folder: Path) -> None:
    """Raises `OutputError` where no file can be made in `folder`, which may still be to be made.

    `NoSuchFolderError` where it can't be one: a file stands there, or a link that leads nowhere.
    Leaves nothing behind, and makes no folder.
    """
    nearest = folder.absolute()
    try:
        while not os.path.lexists(nearest):
            nearest = nearest.parent
    except OSError as error:  # a name that is too long
        raise cannot_write(folder, error) from error
    instead = placeholders.instead_of(str(folder))
    if instead is not None:
        raise NoSuchFolderError(f"{folder} is {instead}.")
    if not nearest.is_dir():
        raise NoSuchFolderError(
            f"{folder} can't be a folder: {nearest} is a file; name another place."
        )
    probe = nearest / f".fluxmesh-{secrets.token_hex(4)}.tmp"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(probe)
    except OSError as error:
        raise OutputError(
            f"Nothing can be written into {nearest}: {error.strerror}; name another place, or "
            "change who may write there."
        ) from error


def check_new(path: Path) -> None:
    """Raises `OutputError` where `path` exists or can't be made, `NoSuchFolderError` where the
    folder above it is missing."""
    if os.path.lexists(path):
        raise OutputError(f"{path} exists already; name another, or remove it.")
    parent = path.absolute().parent
    if not parent.exists():
        raise NoSuchFolderError(f"The folder {parent} does not exist; make it first.")
    check_folder(parent)


def check_room(path: Path, nbytes: int) -> None:
    """Raises `OutputError` where the disk of `path` has less than `nbytes` left."""
    free = shutil.disk_usage(path.absolute().parent).free
    if free < nbytes:
        raise OutputError(
            f"{path} will take at least {nbytes / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} "
            "GB left; free some space, or name another place."
        )
