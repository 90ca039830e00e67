"""Where a training stands on its mesh: hosts, ring, state, and what is asked. Pure.

Shared by `train_session.py` (what happens), `train_dispatch.py` (what is to be done next) and
`train_losses.py` (what is lost).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.training.data.encode_units import Unit
from fluxmesh.training.run import Moved
from fluxmesh_coordinator.jobs.host import Worker
from fluxmesh_coordinator.jobs.model_check import Contents
from fluxmesh_coordinator.jobs.ring import Ring
from fluxmesh_coordinator.jobs.training import tasks as train_jobs
from fluxmesh_coordinator.jobs.training.host import Hand
from fluxmesh_coordinator.jobs.training.tasks import Choice, Names, TrainJob, Vectors, Wanted
from fluxmesh_coordinator.jobs.types import Links


class TrainCourse:
    """One run's state."""

    def __init__(self, job: TrainJob) -> None:
        self.job, self.names = job, Names(job)
        self.contents = Contents(job.weights.model)
        self.hands: dict[int, Hand] = {}  # by rank; those that can be used
        self.links = Links()
        self.ring: Ring | None = None
        self.task: Wanted | None = None  # that the run waits for
        self.state: tuple[int, Vectors] = (0, {})  # to go on from: updates, and what they led to
        self.done: int | None = None  # updates that the ring's state has behind it, once it is open
        self.reached = 0  # updates that the run knows of
        self.latest: Moved | None = None  # what the last of them did
        self.vectors: dict[str, np.ndarray] = {}  # that come
        self.units: list[Unit] = []  # to be encoded
        self.encoding: dict[int, list[Unit]] = {}  # by rank, in the order of its line
        self.is_ending = False

    @property
    def members(self) -> list[Hand]:
        """Who is in the ring, in its order."""
        ranks = () if self.ring is None else self.ring.ranks
        return [self.hands[rank] for rank in ranks if rank in self.hands]

    @property
    def workers(self) -> dict[int, Worker]:
        return {rank: hand.worker for rank, hand in self.hands.items()}

    def choose(self, hosts: Sequence[HostInfo] | None = None) -> Choice:
        """Which of these hosts, or of those at hand, would take part."""
        if hosts is None:
            hosts = [hand.worker.info for hand in self.hands.values()]
        return train_jobs.choose(self.job, hosts, self.links)

    def parted(self) -> None:
        """The ring is no more, nor the state that its hosts held."""
        self.ring, self.done = None, None

    def give_back(self, rank: int) -> None:
        """What a host was encoding is for others."""
        self.units = self.encoding.pop(rank, []) + self.units
