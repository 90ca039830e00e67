"""Where a checkpoint that is sent to this host lands, and what of it has landed already.

    the Hub's cache     blobs/BLOB.pushed ──► blobs/BLOB; snapshots/COMMIT and refs/main at the end
    a folder of models  .NAME.CONTENT.incoming/… ──► NAME, at the end, in one piece

So nobody sees a part of a checkpoint under its name, and what an interrupted push left goes on.
Nothing else of the disk is touched: every folder on the way is looked at, none may be a link. The
Hub's library calls its own partial files otherwise, so the two never write into one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxmesh.errors import FluxmeshError, OutputError, UsageError
from fluxmesh.storage import atomic, durable
from fluxmesh.wire.messages.parcel import ModelParcel, ParcelFile

SMALL = 64 << 20  # bytes of what may be on the disk twice
LEFT_FREE = 1 << 30  # bytes of the disk that no push takes: a full one hurts whatever runs there


class Landing(ABC):
    """One checkpoint's files on this host's disk."""

    def __init__(self, parcel: ModelParcel, root: Path) -> None:
        """Below `root`, which is made if need be. Raises `UsageError` for what is no checkpoint."""
        parcel.check()
        self.parcel = parcel
        root.mkdir(parents=True, exist_ok=True)
        self.root = Path(os.path.realpath(root))

    @property
    @abstractmethod
    def folder(self) -> Path:
        """What is locked meanwhile."""

    @abstractmethod
    def whole(self, file: ParcelFile) -> Path:
        """Where a file lies when its hash was right."""

    @abstractmethod
    def _make_folders(self) -> None:
        """All that the files need. Raises `UsageError` where a link stands there, or the name is
        another checkpoint's."""

    @abstractmethod
    def place(self) -> None:
        """Shows the checkpoint, of which every file is whole, under its name. Raises `OSError`."""

    @abstractmethod
    def _drop_old(self) -> None:
        """Removes what pushes of other versions have left, that nobody went on with."""

    def partial(self, file: ParcelFile) -> Path:
        """Where a file lies until then."""
        whole = self.whole(file)
        return whole.with_name(f"{whole.name}.pushed")

    def places(self, file: ParcelFile) -> tuple[Path, ...]:
        """Where a file may lie by now, in the order in which it gets there."""
        return self.partial(file), self.whole(file)

    def has(self, file: ParcelFile) -> bool:
        """Whether a file is whole."""
        return _size(self.whole(file)) == file.nbytes

    @property
    def missing(self) -> int:
        """Bytes that have not arrived."""
        return sum(file.nbytes - self.arrived(file) for file in self.parcel.files)

    def arrived(self, file: ParcelFile) -> int:
        """Bytes of a file that are here, whole or not."""
        if self.has(file):
            return file.nbytes
        size = _size(self.partial(file))
        return size if 0 < size <= file.nbytes else 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Ready to be written to, by nobody else. Raises `FluxmeshError`: where another push
        is about it, or (`OutputError`) the disk has no room."""
        self._make_folders()
        handle = os.open(self.folder, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FluxmeshError(
                    f"{self.parcel.name} is on its way to this host already."
                ) from None
            except OSError:
                pass  # a file system without locks
            self._drop_old()
            self._check_space()
            yield
        finally:
            os.close(handle)

    def _check_space(self) -> None:
        free, missing = shutil.disk_usage(self.folder).free, self.missing
        if missing + LEFT_FREE > free:
            raise OutputError(
                f"{self.parcel.name} needs {missing / 1e9:.1f} GB more, with {LEFT_FREE / 1e9:.0f} "
                f"GB to spare, and {self.root} has {free / 1e9:.1f} GB free; make room there."
            )


class FolderLanding(Landing):
    """In a folder of models."""

    @property
    def target(self) -> Path:
        return self.root / self.parcel.name

    @property
    def folder(self) -> Path:
        target = self.target
        return target.with_name(f".{target.name}.{self.parcel.content}.incoming")

    def whole(self, file: ParcelFile) -> Path:
        return self.folder / file.path

    def places(self, file: ParcelFile) -> tuple[Path, ...]:
        return *super().places(file), self.target / file.path

    def _make_folders(self) -> None:
        _own_folder(self.root, self.target.parent)
        if os.path.lexists(self.target):
            raise UsageError(
                f"There is another checkpoint at {self.target}; remove it, or rename one of them."
            )
        for file in self.parcel.files:
            _own_folder(self.root, self.whole(file).parent)

    def _drop_old(self) -> None:
        for old in self.target.parent.glob(f".{glob.escape(self.target.name)}.*.incoming"):
            if old != self.folder and _is_nobodys(old):
                shutil.rmtree(old, ignore_errors=True)

    def place(self) -> None:
        for path in (self.folder, *self.folder.rglob("*")):
            if path.is_dir():
                durable.sync_path(path)
        os.rename(self.folder, self.target)
        durable.sync_path(self.target.parent)


class HubLanding(Landing):
    """In the Hub's cache, as the Hub's own library lays it out."""

    @property
    def folder(self) -> Path:
        return self.root / f"models--{self.parcel.name.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.parcel.commit

    def whole(self, file: ParcelFile) -> Path:
        name = file.blob
        if not name:  # the sender's disk has no links, and so nothing is known of the Hub's name
            name = hashlib.sha1(f"{self.parcel.commit}/{file.path}".encode()).hexdigest()
        return self.folder / "blobs" / name

    def _make_folders(self) -> None:
        for folder in ("blobs", "refs", "snapshots"):
            _own_folder(self.root, self.folder / folder)
        for file in self.parcel.files:
            _own_folder(self.root, (self.snapshot / file.path).parent)

    def _drop_old(self) -> None:
        own = {self.partial(file) for file in self.parcel.files}
        for old in (self.folder / "blobs").glob("*.pushed"):
            if old not in own:
                old.unlink(missing_ok=True)

    def place(self) -> None:
        for file in self.parcel.files:
            self._link(self.snapshot / file.path, self.whole(file))
        for folder in {(self.snapshot / file.path).parent for file in self.parcel.files}:
            durable.sync_path(folder)
        # What `hub.cached_snapshot` goes by: written last, when every file is here.
        atomic.write_file(self.folder / "refs" / "main", self.parcel.commit.encode(), replace=True)

    def _link(self, name: Path, blob: Path) -> None:
        """Puts a file into the snapshot, as a link to its content."""
        content = os.path.relpath(blob, name.parent)
        if name.is_symlink() and os.readlink(name) == content:
            return
        temporary = name.with_name(f".{name.name}.pushed")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            os.symlink(content, temporary)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A disk without links. Two small files may have one content, and so one blob.
            move = shutil.copyfile if blob.stat().st_size <= SMALL else os.replace
            move(blob, temporary)
        os.replace(temporary, name)


def landing(parcel: ModelParcel, cache: Path, models: Path) -> Landing:
    """Where a checkpoint belongs on this host. Raises `UsageError` for what is none."""
    return HubLanding(parcel, cache) if parcel.commit else FolderLanding(parcel, models)


def _own_folder(root: Path, folder: Path) -> None:
    """Makes a folder below `root`. Raises `UsageError` where a link or a file is in the way."""
    path = root
    for part in folder.relative_to(root).parts:
        path /= part
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        if path.is_symlink() or not path.is_dir():
            raise UsageError(f"{path} is a link or a file, where a folder is needed; move it away.")


def _is_nobodys(folder: Path) -> bool:
    """Whether no other push writes into what an older one left."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _size(path: Path) -> int:
    """Of a file that is no link; -1 where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
