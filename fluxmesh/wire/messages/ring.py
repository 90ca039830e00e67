"""How engines become one ring. Pure.

A ring cannot be rebuilt inside a process: each change of its members ends all engines and begins a
new generation, with fresh ports and a fresh nonce.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fluxmesh.bounds import Count, Range, Text
from fluxmesh.deadlines import Deadlines
from fluxmesh.wire.messages.base import Changing, Rank, RingSize
from fluxmesh.wire.messages.unit import EngineReport, EngineUnit

# A table of RDMA devices grows with the square of the hosts.
RingFile = Annotated[str, Text(1 << 16)]


def ring_name(nonce: bytes) -> str:
    """What `Status` calls a ring: who knows the name does not know the nonce."""
    return hashlib.sha256(nonce).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class AskPorts(Changing):
    """`count` ports that are free at `ip`. Answered by `Ports`."""

    ip: str
    count: Annotated[int, Range(1, 64)] = 1


@dataclass(frozen=True, kw_only=True)
class Joined(EngineReport):
    rank: Rank


@dataclass(frozen=True, kw_only=True)
class Join(EngineUnit):
    """Joins a ring (`rendezvous.Joining`); an engine that is in another one is killed first.

    Answered by `Done` at once, and reported by `Joined` or `Failed`. `size` 1 means no ring.
    """

    reports: ClassVar = (Joined,)
    doing: ClassVar = "joining its ring"
    ticks: ClassVar = False

    rank: Rank  # in the ring
    size: RingSize
    backend: str = "ring"
    envs: Annotated[tuple[tuple[str, str], ...], Count(64)] = ()
    files: Annotated[tuple[tuple[RingFile, RingFile], ...], Count(8)] = ()
    nonce: bytes = b""

    def limit(self, deadlines: Deadlines) -> float:
        return deadlines.first_sign
