"""What any trusted coordinator may ask an agent, and what it is answered. Pure.

What only the holder of the lease may ask for stands in `lease.py` and `work.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fluxmesh.bounds import Count, Pixels, Range, ShardIndex, Shards, check_shard
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.wire.messages import base
from fluxmesh.wire.messages.base import BootName, ClientName, Components, Message, Port, Version
from fluxmesh.wire.messages.status import Status

LINES = 10_000  # of a log, at most


@dataclass(frozen=True)
class Done(Message):
    """What was asked for is done, or in line."""


@dataclass(frozen=True)
class Refused(Message):
    """What was asked for can't be done; `text` is the sentence that the user reads."""

    code: Literal["version", "malformed", "fence", "usage", "network", "internal"]
    text: str


@dataclass(frozen=True)
class Hello(Message):
    """Opens a connection; answered by `Welcome`. `client` is random, new for each coordinator."""

    client: ClientName
    version: Version  # of fluxmesh


@dataclass(frozen=True)
class Welcome(Message):
    """Who answers: `boot` is random, new for each start of the agent."""

    boot: BootName
    version: Version  # of fluxmesh
    status: Status


@dataclass(frozen=True)
class Heartbeat(Message):
    """Sent by both sides each second; a coordinator's renews its lease and its place in line."""


@dataclass(frozen=True)
class AskStatus(Message):
    """Answered by `Status`."""


@dataclass(frozen=True)
class AskLogs(Message):
    """Answered by `Logs`: the last `lines` lines."""

    lines: Annotated[int, Range(0, LINES)] = 100


@dataclass(frozen=True)
class Logs(Message):
    lines: Annotated[tuple[str, ...], Count(LINES)]


@dataclass(frozen=True)
class ShutDown(Message):
    """`fluxmesh down`: kills the engine and ends the agent; answered by `Done` first."""


# Links between hosts


@dataclass(frozen=True)
class Ports(Message):
    """Ports that are free, or where somebody listens."""

    ports: base.Ports


@dataclass(frozen=True)
class ListenForLink(Message):
    """Opens a port at `ip` for one `ProbeLink` that says `token`. Answered by `Ports`."""

    ip: str
    token: bytes


@dataclass(frozen=True, kw_only=True)
class ProbeLink(Message):
    """Sends `nbytes` to another agent's `ListenForLink`. Answered by `LinkRate`."""

    ip: str
    port: Port
    token: bytes
    nbytes: Annotated[int, Range(1, 4 << 30)] = 64 << 20


@dataclass(frozen=True)
class LinkRate(Message):
    rate: float  # bytes/s
    latency: float  # seconds


# What a host does when nobody asks for it


@dataclass(frozen=True, kw_only=True)
class Keep(Message):
    """What a host is to hold whenever nobody has a use for its engine. Answered by `Done`.

    The agent remembers it, and loads what is missing of it by itself: after the engine was ended
    with a broken ring, or died. None: nothing.
    """

    weights: ModelVariant | None
    shards: Shards = 1
    shard: ShardIndex = 0
    components: Components = ()  # as in `Load`
    shares: Shares = EVEN  # of which `shard` is one

    def __post_init__(self) -> None:
        check_shard(self.shard, self.shards)
        self.shares.check(self.shards)


@dataclass(frozen=True)
class NoteSize(Message):
    """Pictures of this size were asked for in the mesh, and this host could make them too.

    One that holds the weights gets ready for them once it has nothing to do. Answered by `Done`.
    """

    weights: ModelVariant
    height: Pixels
    width: Pixels
    memory_bytes: Annotated[int, Range(0, 1 << 50)] = 0  # that they take, as of `ModelWork`


@dataclass(frozen=True)
class LeaveRing(Message):
    """The ring that the engine is in was made of what a loss had left of another.

    The next job will want the whole one, whose engines are in no ring or in that one: so this one
    makes place for a new one that loads again, once the host is idle. Answered by `Done`.
    """
