"""Writes that are whole: a file appears under its name complete or not at all.

It is written beside it under a temporary name, flushed to the disk, then linked into place, which
fails where a file exists already. What a writer that was killed has left, the next one removes.
Below `pictures.py`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from fluxmesh.errors import OutputError

# What a file system without hard links (exFAT, some network shares) answers to link().
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, then lets it through.

    Python runs signal handlers in the main thread only; elsewhere, and where Ctrl-C is ignored
    (a job in the background), there is nothing to hold back.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    previous = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:  # also where the block failed: to stop is what the user asked for
            raise KeyboardInterrupt


def write_file(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Writes a whole file or none; without `replace`, `FileExistsError` where there is one.

    Raises `OutputError` when the disk is full or the folder refuses.
    """
    with uninterrupted():
        try:
            _sweep(path.parent)
            with _temporary(path) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if replace:
                    os.replace(file.name, path)
                else:
                    _link(Path(file.name), path)
            _sync_folder(path.parent)
        except FileExistsError:
            raise
        except OSError as error:
            raise OutputError(
                f"Could not write {path}: {error.strerror or error}; "
                "make room, or name another place with --output."
            ) from error


@contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, locked while it is written; what is left of it goes at the end."""
    while True:
        name = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
        with open(name, "xb") as file:
            try:
                with suppress(OSError):  # a file system without locks: nobody sweeps there
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink:
                    yield file
                    return
                # Another process took it for an orphan, before it was locked.
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name)


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


def _sync_folder(folder: Path) -> None:
    """The name itself outlives a power cut; a file system that can't promise that may refuse."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
