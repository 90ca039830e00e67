"""A user's adapters on a mesh: checked, named by their hash, and sent to the hosts that lack them.

Below `mesh.py` (which names them) and `job_runner.py` (which sends them once a host is leased).
What is wrong with a file is found here, before it travels: a host never sees it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluxmesh.adapters.find import find_adapter
from fluxmesh.adapters.peft import METADATA, metadata_with, settings_of
from fluxmesh.adapters.reading import AdapterFile, open_adapter
from fluxmesh.adapters.targets import AdapterTargets
from fluxmesh.errors import AdapterError, WeightsError
from fluxmesh.request import AdapterRef
from fluxmesh.storage.hashing import sha256_of
from fluxmesh.storage.safetensors import read_header
from fluxmesh.wire.messages import Done, Found, HasFile, PutFile
from fluxmesh_coordinator.agents.client import AgentClient

PIECE = 4 << 20  # bytes a message

Downloading = Callable[[str, int, int], None]  # hears the adapter, bytes done, bytes in all


@dataclass(frozen=True)
class AdapterUpload:
    """A file as hosts get it: with PEFT's settings in its header where they lie beside it."""

    name: str  # what the user called it
    path: Path
    head: bytes = b""  # in place of the file's first `skipped` bytes
    skipped: int = 0

    @classmethod
    def of(cls, name: str, path: Path) -> AdapterUpload:
        """Raises `AdapterError` for settings beside the file that can't be read."""
        try:
            header = read_header(path)
        except WeightsError:
            return cls(name, path)  # damaged: `checked` says how
        settings = settings_of(path, header)
        if settings.source in ("", str(path)):
            return cls(name, path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        own = {key: value for key, value in header.metadata.items() if key != METADATA}
        entries["__metadata__"] = metadata_with(settings, own)
        text = json.dumps(entries, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return cls(name, path, len(text).to_bytes(8, "little") + text, 8 + length)

    @property
    def size(self) -> int:
        """Bytes that are sent."""
        return len(self.head) + self.path.stat().st_size - self.skipped

    @property
    def sha256(self) -> str:
        """The hash of these bytes."""
        if not self.head:
            return sha256_of(self.path)
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    def pieces(self) -> Iterator[bytes]:
        """The bytes, in pieces."""
        for offset in range(0, len(self.head), PIECE):
            yield self.head[offset : offset + PIECE]
        with open(self.path, "rb") as file:
            file.seek(self.skipped)
            while piece := file.read(PIECE):
                yield piece


Files = Mapping[str, AdapterUpload]  # by hash


def by_hash(
    adapters: Iterable[AdapterRef], downloading: Downloading | None = None
) -> tuple[tuple[AdapterRef, ...], Files]:
    """The same adapters, named by their files' hashes; those of the Hub are fetched.

    Raises `AdapterError`, and what `find_adapter` does.
    """
    named: list[AdapterRef] = []
    files: dict[str, AdapterUpload] = {}
    for adapter in adapters:
        progress = None if downloading is None else functools.partial(downloading, adapter.path)
        try:
            upload = AdapterUpload.of(adapter.path, find_adapter(adapter.path, progress=progress))
            sha256 = upload.sha256
        except OSError as error:
            raise _unreadable(adapter.path, error) from error
        files[sha256] = upload
        named.append(AdapterRef(sha256, adapter.scale))
    return tuple(named), files


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that was read whole, and fits its model."""

    name: str  # as the user gave it
    notes: tuple[str, ...]  # sentences: what is left out
    inputs: tuple[tuple[str, int], ...]  # linears that get more inputs, and how many in all


def checked(files: Files, targets: AdapterTargets) -> list[CheckedAdapter]:
    """Reads adapters whole, for a model with these targets.

    Raises `AdapterError` for what no host could apply.
    """
    made: list[CheckedAdapter] = []
    for upload in files.values():
        stat = upload.path.stat()
        try:
            file = _checked(upload.path, stat.st_size, stat.st_mtime_ns, targets)
        except AdapterError as error:
            raise AdapterError(str(error).replace(str(upload.path), upload.name)) from error
        notes = (note.replace(str(upload.path), upload.name) for note in file.notes)
        inputs = ((name, count) for (_, name), count in file.inputs.items())
        made.append(CheckedAdapter(upload.name, tuple(notes), tuple(inputs)))
    return made


@functools.lru_cache(maxsize=64)
def _checked(path: Path, _size: int, _mtime: int, targets: AdapterTargets) -> AdapterFile:
    """Read once for as long as the file stays the same: a conversation asks at each prompt."""
    file = open_adapter(path, targets)
    file.check_values()
    return file


def with_names(text: str, files: Files) -> str:
    """A sentence of an agent, in which adapters bear the names that the user gave them."""
    for sha256, upload in files.items():
        # As a function: a name is no pattern.
        text = re.sub(rf"[^\s'\"]*{sha256}(\.safetensors)?", _constant(upload.name), text)
    return text


def _constant(text: str) -> Callable[[re.Match[str]], str]:
    return lambda _: text


async def send(
    client: AgentClient, fence: int, files: Files, tell: Callable[[int, int], None]
) -> None:
    """Makes a host have these files; `tell` hears (bytes sent, in all) of each.

    Raises `FluxmeshError`.
    """
    for sha256, upload in files.items():
        reply = await client.ask(HasFile(fence=fence, sha256=sha256), Found)
        if reply.there:
            continue
        try:
            await _send_file(client, fence, sha256, upload, tell)
        except OSError as error:
            raise _unreadable(upload.name, error) from error


async def _send_file(
    client: AgentClient,
    fence: int,
    sha256: str,
    upload: AdapterUpload,
    tell: Callable[[int, int], None],
) -> None:
    total, offset = upload.size, 0
    tell(0, total)
    for piece in upload.pieces():
        data = np.frombuffer(piece, np.uint8)
        await client.ask(
            PutFile(fence=fence, sha256=sha256, offset=offset, total=total, data=data), Done
        )
        offset += len(piece)
        tell(offset, total)
    if offset < total:
        raise AdapterError(
            f"`adapter` {upload.name} shrinks while it is read; try again.", setting="adapter"
        )


def _unreadable(name: str, error: OSError) -> AdapterError:
    return AdapterError(
        f"`adapter` {name} can't be read: {error.strerror or error}.", setting="adapter"
    )
