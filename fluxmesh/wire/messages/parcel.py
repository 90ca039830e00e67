"""How a checkpoint travels from a host that has it to one that lacks it. Pure.

    coordinator ── AskModel ──► every agent             who has it (`ModelHere`), as which files
    coordinator ── ReceiveModel ──► one that lacks it   listens (`ModelAwaited`), tells its progress
    coordinator ── SendModel ──► one that has it        dials, and sends what it is asked for

The files themselves travel between the two agents (`fluxmesh_agent/parcels/`), not in messages. No
message names a path of a host: a `ModelParcel` says what its files are called below a folder that
the receiving host chooses by itself, in the Hub's cache or in its folder of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fluxmesh.bounds import Bytes, Count, Range, Text
from fluxmesh.errors import UsageError
from fluxmesh.wire.messages.base import Message, Report

MAX_FILES = 2000  # of a checkpoint
MAX_FILE_BYTES = 1 << 40
MAX_PARCEL_BYTES = 2 << 40
TOKEN_BYTES = 32
# What a checkpoint is made of. Nothing that runs.
WEIGHTS = (".safetensors", ".sft", ".gguf")
DESCRIPTIONS = (".json", ".model", ".txt", ".jinja")

# Neither "." nor ".." is a part, none is hidden, and no separator or drive of any system is in one.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+ -]{0,127}"
FilePath = Annotated[str, Text(300, re.compile(rf"{_PART}(/{_PART}){{0,3}}"))]
ParcelName = Annotated[str, Text(200, re.compile(rf"{_PART}(/{_PART})?"))]
Commit = Annotated[str, Text(64, re.compile(r"[0-9a-f]{7,64}|"))]
BlobName = Annotated[str, Text(128, re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}|"))]
Fingerprint = Annotated[str, Text(64, re.compile(r"[0-9a-f]{8,64}"))]
Token = Annotated[bytes, Bytes(TOKEN_BYTES)]
Address = Annotated[str, Text(64)]  # "ip:port"
Addresses = Annotated[tuple[Address, ...], Count(32)]

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ParcelFile:
    """One file: where it belongs below the checkpoint's folder, and what the Hub calls it."""

    path: FilePath
    nbytes: Annotated[int, Range(0, MAX_FILE_BYTES)]
    blob: BlobName = ""  # its name among the blobs of the Hub's cache

    @property
    def sha256(self) -> str:
        """What its bytes must hash to, where its name says it; else ""."""
        return self.blob if _SHA256.fullmatch(self.blob) else ""


@dataclass(frozen=True)
class ModelParcel:
    """A whole checkpoint as files: a snapshot of a Hub repository, or a folder."""

    name: ParcelName  # of the repository, or of the folder
    commit: Commit  # of the snapshot; "" for a folder
    content: Fingerprint  # `Checkpoint.content`, by which the receiver looks whether it is whole
    files: Annotated[tuple[ParcelFile, ...], Count(MAX_FILES)]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def check(self) -> None:
        """Raises `UsageError` where these can't be the files of one checkpoint.

        Also for names that are one name on a disk that takes A for a, as those of most Macs do.
        """
        if not self.files or self.nbytes > MAX_PARCEL_BYTES:
            raise UsageError(
                f"A checkpoint of {len(self.files)} files and {self.nbytes} bytes can't be sent."
            )
        if self.commit and (self.name.count("/") != 1 or re.search(r"\.\.|--| ", self.name)):
            raise UsageError(f"{self.name!r} is no repository of the Hub.")
        files, folders, sizes = set[str](), set[str](), dict[str, int]()
        for file in self.files:
            if not file.path.endswith((*WEIGHTS, *DESCRIPTIONS)):
                raise UsageError(
                    f"{file.path} is no part of a checkpoint; only weights and their "
                    "descriptions are sent."
                )
            path = file.path.casefold()
            if path in files:
                raise UsageError(f"The checkpoint has two files {file.path}.")
            if file.blob and sizes.setdefault(file.blob.casefold(), file.nbytes) != file.nbytes:
                raise UsageError(f"{file.path} has the content of another file, and its own size.")
            files.add(path)
            folders.update(_above(path.split("/")))
        if both := files & folders:
            raise UsageError(f"{min(both)} is a file and a folder.")


def _above(parts: Sequence[str]) -> list[str]:
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


@dataclass(frozen=True)
class AskModel(Message):
    """Whether this host has a model. Answered by `ModelHere`."""

    model: str


@dataclass(frozen=True)
class ModelHere(Message):
    """What a host has of the name that it was asked for."""

    parcel: ModelParcel | None  # None: nothing that it could use, and `problem` says why
    place: Fingerprint  # the same for hosts that keep their models in one folder of one machine
    problem: str = ""


@dataclass(frozen=True)
class ReceiveModel(Message):
    """Keeps the checkpoint that another host sends it. Answered by `Done` once it is whole.

    `ModelAwaited` says first where it listens, for whoever knows `token`.
    """

    model: str  # as it is asked for once it is here
    parcel: ModelParcel
    token: Token
    ips: Annotated[tuple[Annotated[str, Text(64)], ...], Count(16)]  # of this host


@dataclass(frozen=True)
class ModelAwaited(Report):
    """Where this host listens for whoever knows `token`; `done_bytes` are here already."""

    token: Token
    addresses: Addresses
    done_bytes: int = 0


@dataclass(frozen=True)
class ModelProgress(Report):
    """How much of the checkpoint is on the receiver's disk, as `done_bytes` of `total_bytes`."""

    token: Token
    done_bytes: int
    total_bytes: int
    address: Annotated[str, Text(64)] = ""  # of this host, at which it comes in


@dataclass(frozen=True)
class SendModel(Message):
    """Sends a checkpoint, whole or as it comes in, to whoever listens at the first of `addresses`
    that can be reached. Answered by `Done` when the receiver has all of it.
    """

    model: str
    parcel: ModelParcel
    token: Token
    addresses: Addresses


@dataclass(frozen=True)
class StopModel(Message):
    """Ends what goes on under `token`; what has arrived stays. Answered by `Done`."""

    token: Token
