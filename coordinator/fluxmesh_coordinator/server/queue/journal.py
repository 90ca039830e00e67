"""Which jobs were accepted and which have ended, so that a server that starts again can tell.

A line a job in a file beside the pictures, and none of its prompt. What a server that was killed
had not finished, the next one tells as lost. The file is locked: two servers of one folder would
each take the other's jobs for lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import HomeError

NAME = ".serve.journal"
LARGEST = 1 << 20  # bytes, after which the file is begun anew with the jobs that are open


class Journal:
    """The file, open and ours until `close`."""

    def __init__(self, path: Path) -> None:
        """Reads what the server before left into `lost`, and begins anew.

        Raises `FluxmeshError` where another server holds it, `HomeError` where it can't be used.
        """
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HomeError(f"{path} can't be used: {error.strerror or error}.") from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                self._lock()
            self.lost = _unfinished(os.read(self._file, 2 * LARGEST))
            self._open: dict[str, None] = {}  # jobs
            self._is_torn = False  # whether only a part of the last line was written
            self._begin_anew()
        except BaseException:
            os.close(self._file)
            raise

    def accepted(self, id: str) -> None:
        """A client was told that its job will be done."""
        self._open[id] = None
        self._write("accepted", id)

    def ended(self, id: str) -> None:
        """It is done, has failed or was cancelled."""
        self._open.pop(id, None)
        self._write("ended", id)
        if self._written > LARGEST:
            self._begin_anew()

    def close(self) -> None:
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FluxmeshError(
                f"Another server writes its pictures to {self.path.parent}; name another folder "
                "with `pictures`."
            ) from None

    def _begin_anew(self) -> None:
        with contextlib.suppress(OSError):  # no reason to fail a job: then it goes on as it is
            os.ftruncate(self._file, 0)
        self._written = 0
        for id in self._open:
            self._write("accepted", id)

    def _write(self, what: str, id: str) -> None:
        # One call a line: what is written outlives the process, however it ends. A full disk is no
        # reason to fail a job: only after a crash would somebody miss the line.
        line = (json.dumps([what, id]) + "\n").encode()
        with contextlib.suppress(OSError):
            if self._is_torn:
                os.write(self._file, b"\n")  # else this line were as unreadable as that one
            written = os.write(self._file, line)
            self._is_torn = written < len(line)
            self._written += written


def _unfinished(data: bytes) -> tuple[str, ...]:
    open_jobs: dict[str, None] = {}
    for line in data.splitlines():
        try:
            what, id = json.loads(line)
        except (ValueError, TypeError):  # cut off in the middle
            continue
        if what == "accepted" and isinstance(id, str):
            open_jobs[id] = None
        elif isinstance(id, str):
            open_jobs.pop(id, None)
    return tuple(open_jobs)
