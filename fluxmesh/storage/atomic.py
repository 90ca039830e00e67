"""Writes that are whole: a file or folder appears under its name complete or not at all.

It is made beside it under a temporary name, flushed to the disk, then put in its place. What a
writer of files that was killed has left, the next one in that folder removes. Everything that
fluxmesh writes for good goes this way: pictures, keys and records, adapters, checkpoints.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fluxmesh.errors import OutputError
from fluxmesh.storage import durable
from fluxmesh.storage.interrupts import uninterrupted

# What a file system without hard links (exFAT, some network shares) answers to link().
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
# `new_file` or `replaced_file`, for those who write what either may be wanted for.
Opens = Callable[..., AbstractContextManager[BinaryIO]]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)


@contextmanager
def new_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file that takes the name `path` when the block ends well. Raises `OSError`.

    `FileExistsError` where there is one of that name then. `mode` is narrowed by the umask.
    """
    with _placed(path, mode, _link) as file:
        yield file


@contextmanager
def replaced_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """As `new_file`, but one that is there gives way, in one piece."""
    with _placed(path, mode, os.replace) as file:
        yield file


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes the name `folder` when the block ends well. Raises `OSError`.

    A failure leaves nothing.
    """
    temporary = folder.with_name(_temporary_name(folder))
    try:
        temporary.mkdir()
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            durable.sync_path(path)
        os.rename(temporary, folder)
        durable.sync_path(folder.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well


def write_file(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Writes a whole file or none; without `replace`, `FileExistsError` where there is one.

    Ctrl-C waits for it. Raises `OutputError` when the disk is full or the folder refuses.
    """
    opened = replaced_file if replace else new_file
    with uninterrupted():
        try:
            with opened(path) as file:
                file.write(data)
        except FileExistsError:
            raise
        except OSError as error:
            raise OutputError(
                f"Could not write {path}: {error.strerror or error}; "
                "make room, or name another place."
            ) from error


# Within


@contextmanager
def _placed(path: Path, mode: int, place: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
    _sweep(path.parent)
    with _temporary(path, mode) as (temporary, file):
        yield file
        file.flush()
        durable.sync(file.fileno())
        place(temporary, path)
    durable.sync_path(path.parent)


@contextmanager
def _temporary(path: Path, mode: int) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `path`, locked while it is written; what is left of it goes at the end."""
    while True:
        name = path.with_name(_temporary_name(path))
        with os.fdopen(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            try:
                with suppress(OSError):  # a file system without locks: nobody sweeps there
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink:
                    yield name, file
                    return
                # Another process took it for an orphan, before it was locked.
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name)


def _temporary_name(path: Path) -> str:
    # Forty characters are at most 160 bytes, of the 255 that a name may have.
    return f".{path.name[:40]}.{secrets.token_hex(4)}.tmp"


def _sweep(folder: Path) -> None:
    """Removes what writers that were killed have left: their files are locked no more."""
    for name in os.listdir(folder):
        if not _TEMPORARY.fullmatch(name):
            continue
        with suppress(OSError):
            handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(folder / name)
            finally:
                os.close(handle)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here: claim the name first, then put the whole file in its place.
        with open(path, "xb"):
            try:
                os.replace(temporary, path)
            except OSError:
                os.unlink(path)
                raise
