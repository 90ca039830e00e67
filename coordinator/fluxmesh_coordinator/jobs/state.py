"""Where a job stands, as far as all kinds of job have it: hosts, ring, whether it ends. Pure.

Between `types.py` and `session.py`. What kinds differ in stands in `generation/state.py` and
`training/state.py`; `recovery.py` asks the methods here what a loss means for the job.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from fluxmesh.wire.messages import Changing
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.model_check import ModelCheck
from fluxmesh_coordinator.jobs.ring import Ring
from fluxmesh_coordinator.jobs.types import Job, Links

H = TypeVar("H", bound=HostState)
Sender = Callable[[HostState, Changing], None]  # sends a message, and puts work in the host's line


class JobState(ABC, Generic[H]):
    """One job's state."""

    remedy = ""  # what a user may do when the hosts can't go on, in a sentence

    def __init__(self, job: Job, model: str) -> None:
        self.job = job
        self.model_check = ModelCheck(model)
        self.hosts: dict[int, H] = {}  # by rank; those that can be used
        self.links = Links()
        self.ring: Ring | None = None
        self.losses = 0  # of engines and hosts
        self.shuns_rings = False  # once one was lost for a host that came late
        self.is_ending = False

    @property
    def is_killing(self) -> bool:
        """Whether an engine is being ended."""
        return any(host.killed is not None for host in self.hosts.values())

    def has_ring_with(self, rank: int) -> bool:
        """Whether a host's death is the death of the ring that works now, or forms."""
        return self.ring is not None and rank in self.ring.ranks

    def shares_ring(self, rank: int) -> bool:
        """Whether others wait for a host in a ring, and fail when it does."""
        return self.ring is not None and len(self.ring.ranks) > 1 and self.has_ring_with(rank)

    @abstractmethod
    def give_back(self, host: H) -> None:
        """What its engine had in line is for others, and what it held is gone."""

    @abstractmethod
    def goes_on_without(self, rank: int) -> None:
        """A host has left `hosts`."""

    @abstractmethod
    def ring_ends(self) -> None:
        """The ring is no more, nor what its engines had in common."""
