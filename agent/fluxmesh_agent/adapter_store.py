"""Adapters that coordinators have sent, kept under the hash of their bytes.

They arrive in pieces; only what has the hash that it is called by becomes a file that an engine
may open. `model_paths.py` finds them again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluxmesh.errors import FluxmeshError, UsageError
from fluxmesh.storage import durable
from fluxmesh.storage.hashing import sha256_of
from fluxmesh.storage.homes import private_folder

MAX_BYTES = 8 << 30  # of one
KEPT_BYTES = 32 << 30  # of all: those that were asked for the longest ago leave first


@dataclass
class AdapterStore:
    """A folder of `<sha256>.safetensors`."""

    folder: Path

    kept_bytes: int = KEPT_BYTES

    def has(self, sha256: str) -> bool:
        """Whether it is there; from now on it counts as used."""
        path = self._path(sha256)
        if not path.is_file():
            return False
        os.utime(path)
        return True

    def put(self, sha256: str, offset: int, total: int, data: np.ndarray) -> None:
        """Takes the next piece; the last one is followed by the check of the hash.

        Raises `UsageError` for a piece out of turn or a wrong hash, after which the sender begins
        anew; `FluxmeshError` where the disk doesn't take it.
        """
        if total > MAX_BYTES or offset + data.nbytes > total:
            raise UsageError(f"An adapter of {total} bytes; at most {MAX_BYTES} can be sent.")
        if self.has(sha256):
            return
        private_folder(self.folder)
        part = self._path(sha256).with_suffix(".part")
        try:
            size = part.stat().st_size if part.exists() else 0
            if offset and offset != size:
                raise UsageError(f"A piece at {offset} came where {size} was expected; begin anew.")
            flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if offset else os.O_TRUNC)
            with os.fdopen(os.open(part, flags, 0o600), "wb") as file:
                file.write(data.tobytes())
                file.flush()
                if offset + data.nbytes == total:
                    durable.sync(file.fileno())
            if offset + data.nbytes == total:
                self._check(part, sha256)
        except OSError as error:
            raise FluxmeshError(f"The adapter can't be kept: {error.strerror}.") from None

    def _check(self, part: Path, sha256: str) -> None:
        if sha256_of(part) != sha256:
            part.unlink()
            raise UsageError("The adapter arrived with another hash than it was announced with.")
        os.replace(part, self._path(sha256))
        durable.sync_path(self.folder)
        self._make_room(self._path(sha256))

    def _make_room(self, newest: Path) -> None:
        files = [(path.stat(), path) for path in self.folder.glob("*.safetensors")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda pair: pair[0].st_mtime):
            if total <= self.kept_bytes or path == newest:
                return
            path.unlink()
            total -= stat.st_size

    def _path(self, sha256: str) -> Path:
        # The codec holds the name to 64 hexadecimal digits; a name is a path, so look again.
        if len(sha256) != 64 or not all(digit in "0123456789abcdef" for digit in sha256):
            raise UsageError("An adapter is named by its SHA-256, 64 hexadecimal digits.")
        return self.folder / f"{sha256}.safetensors"
