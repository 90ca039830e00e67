"""Which jobs were accepted and which are done, so that a server that starts again can tell.

A line a change in a file beside the pictures, and nothing of a prompt but a hash of the request.
What a server that was killed had not finished, the next one tells as lost, and goes on with where a
client sends it again; what is done, it answers again. A file beside it is locked: two servers of a
folder would each take the other's jobs for lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fluxmesh.errors import FluxmeshError
from fluxmesh.storage.homes import HomeError

NAME = ".serve.journal"
LARGEST = 1 << 20  # bytes, after which the file is begun anew with the jobs that count
KEPT = 256  # jobs that are done and can still be asked for; of those that are lost as many


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What is kept of a job that was accepted."""

    id: str
    fingerprint: str  # of the request
    model: str
    seed: int
    n_images: int
    height: int  # pixels
    width: int  # pixels
    steps: int
    accepted: float  # seconds since 1970: its pictures are named by it


class Journal:
    """The file, open and ours until `close`."""

    def __init__(self, path: Path) -> None:
        """Reads what servers before left into `lost` and `done`, and begins anew.

        Raises `FluxmeshError` where another server holds it, `HomeError` where it can't be used.
        """
        self.path = path
        # Not the journal itself, which another file takes the place of.
        self._guard = _opened(path.with_name(f"{path.name}.lock"), os.O_RDWR)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                self._lock()
            self._file = _opened(path, os.O_RDWR | os.O_APPEND)
        except BaseException:
            os.close(self._guard)
            raise
        try:
            self._open: dict[str, JobRecord] = {}
            data = os.read(self._file, 2 * LARGEST)
            unfinished, self._lost, self._done = _read(data)
            self.new_lost = tuple(unfinished)  # ids: of the server before this one
            self._lost |= unfinished
            _shorten(self._lost)
            self.lost, self.done = tuple(self._lost.values()), tuple(self._done.values())
            # Whether only a part of the last line was written.
            self._is_torn = bool(data) and not data.endswith(b"\n")
            self._begin_anew()
        except BaseException:
            self.close()
            raise

    def accepted(self, record: JobRecord) -> None:
        """A client was told that its job will be done."""
        self._open[record.id] = record
        self._done.pop(record.id, None)
        self._lost.pop(record.id, None)
        self._write([["accepted", asdict(record)]])

    def ended(self, id: str, *, is_done: bool = False) -> None:
        """It has all its pictures, or it has failed or was cancelled."""
        record = self._open.pop(id, None)
        if is_done and record is not None:
            self._done[id] = record
            _shorten(self._done)
        self._write([["done" if is_done else "ended", id]])
        if self._written > LARGEST:
            self._begin_anew()

    def close(self) -> None:
        os.close(self._file)
        os.close(self._guard)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FluxmeshError(
                f"Another server writes its pictures to {self.path.parent}; name another folder "
                "with `pictures`."
            ) from None

    def _begin_anew(self) -> None:
        """With what counts, in one piece: whenever this process ends, one of the two is whole."""
        self._written = 0
        changes: list[list[Any]] = []
        for end, records in (("", self._open), ("lost", self._lost), ("done", self._done)):
            for id, record in records.items():
                changes += [["accepted", asdict(record)], *([[end, id]] if end else [])]
        lines, fresh = _lines(changes), self.path.with_name(f"{self.path.name}.new")
        try:
            file = _opened(fresh, os.O_WRONLY | os.O_APPEND | os.O_TRUNC)
        except HomeError:  # no reason to fail a job: then it goes on as it is
            return
        try:
            if os.write(file, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.replace(fresh, self.path)
        except OSError:
            os.close(file)
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            return
        os.close(self._file)
        self._file, self._is_torn, self._written = file, False, len(lines)

    def _write(self, changes: Iterable[list[Any]]) -> None:
        # One call: what is written outlives the process, however it ends. A full disk is no
        # reason to fail a job: only after a crash would somebody miss the line.
        lines = _lines(changes)
        with contextlib.suppress(OSError):
            if self._is_torn:
                os.write(self._file, b"\n")  # else this line were as unreadable as that one
            written = os.write(self._file, lines)
            self._is_torn = written < len(lines)
            self._written += written


def _opened(path: Path, flags: int) -> int:
    """The file, made if it is not there. Raises `HomeError`."""
    try:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HomeError(f"{path} can't be used: {error.strerror or error}.") from error


def _lines(changes: Iterable[list[Any]]) -> bytes:
    return "".join(json.dumps(change) + "\n" for change in changes).encode()


def _shorten(records: dict[str, JobRecord]) -> None:
    for old in list(records)[:-KEPT]:
        del records[old]


def _read(data: bytes) -> tuple[dict[str, JobRecord], ...]:
    """By id: jobs that are open, those that an earlier server lost, and those that are done."""
    kinds: dict[str, dict[str, JobRecord]] = {"open": {}, "lost": {}, "done": {}}
    for line in data.splitlines():
        try:
            what, about = json.loads(line)
            record = _record(about) if what == "accepted" else None
        except (ValueError, TypeError):  # cut off in the middle, or of another version
            continue
        id = about if record is None else record.id
        if not isinstance(id, str):
            continue
        known = [jobs.pop(id) for jobs in kinds.values() if id in jobs]
        if record is not None:
            kinds["open"][id] = record
        elif what in kinds and known:
            kinds[what][id] = known[0]
    return tuple(kinds.values())


def _record(values: Any) -> JobRecord:
    """Raises `TypeError` for what is no record."""
    record = JobRecord(**values)
    types: dict[str, Any] = {"str": str, "int": int, "float": float}
    for field in fields(record):
        if type(getattr(record, field.name)) is not types[str(field.type)]:
            raise TypeError(field.name)
    return record
