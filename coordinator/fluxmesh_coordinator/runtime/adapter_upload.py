"""A user's adapters on a mesh: named by their hash, and sent to the hosts that lack them.

Below `mesh.py` (which names them) and `job_runner.py` (which sends them once a host is leased).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from fluxmesh.adapters.formats import find_adapter
from fluxmesh.errors import AdapterError
from fluxmesh.request import AdapterRef
from fluxmesh.storage.hashing import sha256_of
from fluxmesh.wire.messages import Done, Found, HasFile, PutFile
from fluxmesh_coordinator.agents.client import AgentClient

PIECE = 4 << 20  # bytes a message

Files = Mapping[str, tuple[str, Path]]  # hash -> (what the user called it, the file)


def by_hash(adapters: Iterable[AdapterRef]) -> tuple[tuple[AdapterRef, ...], Files]:
    """The same adapters, named by their files' hashes. Raises `AdapterError`."""
    named: list[AdapterRef] = []
    files: dict[str, tuple[str, Path]] = {}
    for adapter in adapters:
        try:
            path = Path(find_adapter(adapter.path))
            sha256 = sha256_of(path)
        except OSError as error:
            raise AdapterError(
                f"`adapter` {adapter.path} can't be read: {error.strerror or error}."
            ) from error
        files[sha256] = (adapter.path, path)
        named.append(AdapterRef(sha256, adapter.scale))
    return tuple(named), files


def with_names(text: str, files: Files) -> str:
    """A sentence of an agent, in which adapters bear the names that the user gave them."""
    for sha256, (name, _) in files.items():
        # As a function: a name is no pattern.
        text = re.sub(rf"[^\s'\"]*{sha256}(\.safetensors)?", _constant(name), text)
    return text


def _constant(text: str) -> Callable[[re.Match[str]], str]:
    return lambda _: text


async def send(
    client: AgentClient, fence: int, files: Files, tell: Callable[[int, int], None]
) -> None:
    """Makes a host have these files; `tell` hears (bytes sent, in all) of each.

    Raises `FluxmeshError`.
    """
    for sha256, (name, path) in files.items():
        reply = await client.ask(HasFile(fence=fence, sha256=sha256), Found)
        if reply.there:
            continue
        total = path.stat().st_size
        tell(0, total)
        with open(path, "rb") as file:
            for offset in range(0, total, PIECE):
                piece = file.read(PIECE)
                if not piece:
                    raise AdapterError(f"`adapter` {name} shrinks while it is read; try again.")
                data = np.frombuffer(piece, np.uint8)
                await client.ask(
                    PutFile(fence=fence, sha256=sha256, offset=offset, total=total, data=data), Done
                )
                tell(offset + len(piece), total)
