"""One job as its session sees it: which hosts it holds, what happens, what is to be done.

The vocabulary of `session.py` and all below it: an `Input` goes in, an `Instruction` comes out.
Pure, as the whole folder: no socket, no clock, no chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np

from fluxmesh import events
from fluxmesh.cluster import hostfile
from fluxmesh.cluster.backends import BackendFault, Fallback
from fluxmesh.cluster.snapshot import HostInfo, LinkInfo, MeshView, Timings
from fluxmesh.errors import FluxmeshError
from fluxmesh.planning.remedies import Remedy
from fluxmesh.training.events import Dealt, TrainEvent
from fluxmesh.wire.messages import Changing, Message, Report


@dataclass(frozen=True, kw_only=True)
class Job:
    """Base of what a mesh is asked to do."""

    id: str
    secret: bytes = field(repr=False)  # random; what rings prove themselves with comes from it

    def nonce(self, ring_generation: int) -> bytes:
        """What the ring of that generation gathers: nobody else can know it."""
        return hashlib.sha256(self.secret + ring_generation.to_bytes(8, "big")).digest()


@dataclass(frozen=True, kw_only=True)
class LeasedHost:
    """A host whose lease the job holds, as it stood when the lease was granted."""

    info: HostInfo
    host: hostfile.Host
    fence: int
    ring_generation: int
    is_up: bool = True  # whether its engine runs already
    ring: str = ""  # `messages.ring_name` of the ring that its engine is in
    ring_rank: int = 0
    ring_size: int = 1
    ring_backend: str = "ring"

    @property
    def rank(self) -> int:
        return self.info.rank


@dataclass(frozen=True)
class Links:
    """How the hosts reach one another."""

    links: tuple[LinkInfo, ...] = ()
    backend: str = "ring"  # the hostfile's
    timings: Timings = Timings()
    fallback: Fallback = Fallback()
    size: int = 0  # hosts that the mesh has; 0 is not known

    def view(self, hosts: Iterable[HostInfo]) -> MeshView:
        """These hosts as the planner sees them."""
        ordered = tuple(sorted(hosts, key=lambda host: host.rank))
        return MeshView(ordered, self.links, self.backend, self.timings, self.fallback, self.size)

    def backend_of(self, ranks: Sequence[int]) -> str:
        """What a ring of these hosts forms over."""
        return self.fallback.backend(self.backend, ranks)


class WayToDo(Protocol):
    """Hosts that a job would lease."""

    @property
    def ranks(self) -> tuple[int, ...]: ...

    @property
    def text_rank(self) -> int | None:
        """Who reads the prompt, if it is one of these or another."""

    @property
    def seconds(self) -> float:
        """Until the job is done, as far as anybody can say."""


class Proposal(Protocol):
    """How a job would be done. `winner` is None where the hosts can't, for `reason`."""

    @property
    def winner(self) -> WayToDo | None: ...

    @property
    def reason(self) -> str: ...

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """What would make it fit."""


class Result:
    """Base of what a session tells the program that stands above it."""


# What happens


@dataclass(frozen=True)
class Leased:
    """The job begins, or goes on, with these hosts and no others."""

    hosts: tuple[LeasedHost, ...]
    links: Links


@dataclass(frozen=True)
class Answered:
    """An agent answered a request of this session."""

    rank: int
    request: Message
    answer: Message


@dataclass(frozen=True)
class Reported:
    """An agent tells something by itself."""

    rank: int
    report: Report


@dataclass(frozen=True)
class Gone:
    """An agent, or the connection to it, or the lease of it, is lost."""

    rank: int
    reason: str
    counts: bool = True  # as a failure of the host; not where this side was away


@dataclass(frozen=True)
class Back:
    """A host that was gone can be used again."""

    host: LeasedHost


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Stop:
    """The user cancels, or nobody wants the result any more."""


class Asked:
    """Base of what the program above the session asks for while the job runs."""

    def with_arrays(self, change: Callable[[np.ndarray], np.ndarray]) -> Self:
        """The same, in which `change` has been made to all arrays."""
        return self


Input = Leased | Answered | Reported | Gone | Back | Tick | Stop | Asked


# What is to be done


@dataclass(frozen=True)
class SendToAgent:
    """A request for an agent."""

    rank: int
    message: Changing


Told = events.Event | TrainEvent | Result  # what a job tells the program that began it
# What of it a training's user hears beside the events of the run itself.
Heard = (
    events.Loading
    | events.Queued
    | events.HostLost
    | events.HostUnfit
    | events.BackendChanged
    | Dealt
)


@dataclass(frozen=True)
class TellUser:
    """An event for the user."""

    event: Told


@dataclass(frozen=True)
class Learn:
    """What the job measured on its mesh, not dated yet."""

    news: Timings


@dataclass(frozen=True)
class LetGo:
    """The job has no more use for a host: others may have it."""

    rank: int


@dataclass(frozen=True)
class Remember:
    """A backend that failed, for this job's next leases and for later jobs; not dated yet."""

    fault: BackendFault


@dataclass(frozen=True)
class JobStuck:
    """The hosts that are left can't do what is left: `JobSession.begin` goes on with others."""

    reason: str


@dataclass(frozen=True)
class JobFinished:
    """The job is over: hosts are idle, or load for the next one. With an error where it failed."""

    error: FluxmeshError | None = None


Instruction = SendToAgent | TellUser | Learn | LetGo | Remember | JobStuck | JobFinished
