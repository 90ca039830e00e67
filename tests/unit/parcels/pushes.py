"""A push of a model over loopback: what lies on the two disks, who sends, who receives."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError
from fluxmesh.wire.messages import ModelParcel, ParcelFile
from fluxmesh_agent.parcels.landing import Landing, landing
from fluxmesh_agent.parcels.receiving import ParcelReceiver
from fluxmesh_agent.parcels.sending import DiskSource, FileSource, ParcelSender, Put

COMMIT = "c" * 40
CONTENT = "0123456789abcdef"
FILES = {
    "transformer/model.safetensors": random.Random(1).randbytes(9_000_001),
    "vae/model.safetensors": random.Random(2).randbytes(5_000_000),
    "vae/config.json": b"{}",
    "model_index.json": b'{"a": 1}',
    "empty.txt": b"",
}
QUICK = replace(DEADLINES, link_open=2.0, handshake=0.5)  # where nobody comes, or says a word


class ModelDisk:
    """A host's models: files that lie there, and where more would land."""

    def __init__(self, folder: Path, files: Mapping[str, bytes] = FILES) -> None:
        self.files, self.folder = files, folder
        self.cache, self.models = folder / "cache", folder / "models"
        self.paths = {path: folder / "made" / path for path in files}
        for path, data in files.items():
            self.paths[path].parent.mkdir(parents=True, exist_ok=True)
            self.paths[path].write_bytes(data)

    def parcel(self, *, hub: bool = True) -> ModelParcel:
        files = [
            ParcelFile(path, len(data), _blob(path, data) if hub else "")
            for path, data in self.files.items()
        ]
        name = "somebody/flux" if hub else "flux-4bit"
        return ModelParcel(name, COMMIT if hub else "", CONTENT, tuple(files))

    def landing(self, parcel: ModelParcel) -> Landing:
        return landing(parcel, self.cache, self.models)

    def has(self, parcel: ModelParcel) -> bool:
        """Whether all of a parcel lies where it belongs, with the right bytes."""
        folder = self.models / parcel.name
        if parcel.commit:
            folder = self.cache / "models--somebody--flux" / "snapshots" / parcel.commit
        return all(
            (folder / path).is_file() and (folder / path).read_bytes() == data
            for path, data in FILES.items()
        )

    @property
    def everything(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}


def _blob(path: str, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    return digest if path.endswith(".safetensors") else hashlib.sha1(data).hexdigest()


class SlowSource:
    """A disk's files in small pieces, with something done before each of them."""

    def __init__(self, source: FileSource, before: Callable[[int], None], piece: int) -> None:
        self.source, self.before, self.piece = source, before, piece
        self.sent = 0
        self.offsets: dict[str, list[int]] = {}

    def read(self, file: ParcelFile, offset: int, put: Put) -> bytes:
        self.offsets.setdefault(file.path, []).append(offset)

        def slowly(block: memoryview) -> None:
            for begin in range(0, len(block), self.piece):
                self.before(self.sent)
                piece = block[begin : begin + self.piece]
                put(piece)
                self.sent += len(piece)

        return self.source.read(file, offset, slowly)


class Comes:
    """A receiver at work in a thread, and where it listens."""

    def __init__(self, receiver: ParcelReceiver, pool: ThreadPoolExecutor) -> None:
        self.receiver = receiver
        self._listening: Future[Sequence[str]] = Future()
        self.end = pool.submit(receiver.run, self._listening.set_result)

    @property
    def addresses(self) -> Sequence[str]:
        while not self._listening.done():
            if self.end.done():
                self.end.result()
            time.sleep(0.005)
        return self._listening.result()


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def comes(
    pool: ThreadPoolExecutor,
    place: Landing,
    token: bytes = b"t" * 32,
    deadlines: Deadlines = DEADLINES,
) -> Comes:
    return Comes(ParcelReceiver(place, token, ["127.0.0.1"], deadlines), pool)


def goes(
    parcel: ModelParcel, source: FileSource, addresses: Sequence[str], token: bytes = b"t" * 32
) -> ParcelSender:
    return ParcelSender(parcel, source, token, addresses, DEADLINES)


def sent(
    source: ModelDisk, target: ModelDisk, parcel: ModelParcel, via: FileSource | None = None
) -> None:
    """Sends it; raises what the receiver does."""
    with threads() as pool:
        receiver = comes(pool, target.landing(parcel))
        via = via or DiskSource(parcel, source.paths)
        with contextlib.suppress(FluxmeshError):
            goes(parcel, via, receiver.addresses).run()
        receiver.end.result(60)
