"""Where a training stands on its mesh: its ring's state, what is asked, how fast it goes. Pure.

Shared by `session.py` (what happens) and `dispatch.py` (what is to be done next); what all kinds of
job have stands in `jobs/state.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.training.data.encode_units import Unit
from fluxmesh.training.run import UpdateResult
from fluxmesh_coordinator.jobs.state import JobState
from fluxmesh_coordinator.jobs.training.host import Pace, TrainingHost
from fluxmesh_coordinator.jobs.training.tasks import (
    Choice,
    Names,
    TrainingJob,
    Vectors,
    Wanted,
    choose,
)


class TrainingState(JobState[TrainingHost]):
    """One run's state."""

    job: TrainingJob
    remedy = "Go on with `resume`."

    def __init__(self, job: TrainingJob) -> None:
        super().__init__(job, job.weights.model)
        self.names = Names(job)
        self.pace = Pace()  # of the ring
        self.task: Wanted | None = None  # that the run waits for
        self.saved: tuple[int, Vectors] = (0, {})  # to go on from: updates, and what they led to
        self.done: int | None = None  # updates that the ring's state has behind it, once it is open
        self.reached = 0  # updates that the run knows of
        self.latest: UpdateResult | None = None  # what the last of them did
        self.vectors: dict[str, np.ndarray] = {}  # that come
        self.units: list[Unit] = []  # to be encoded
        self.encoding: dict[int, list[Unit]] = {}  # by rank, in the order of its line

    @property
    def members(self) -> list[TrainingHost]:
        """Who is in the ring, in its order."""
        ranks = () if self.ring is None else self.ring.ranks
        return [self.hosts[rank] for rank in ranks if rank in self.hosts]

    def choose(self, hosts: Sequence[HostInfo] | None = None) -> Choice:
        """Which of these hosts, or of those at hand, would take part."""
        if hosts is None:
            hosts = [host.info for host in self.hosts.values()]
        return choose(self.job, hosts, self.links)

    # Losses

    def give_back(self, host: TrainingHost) -> None:
        host.let_go()
        self.units = self.encoding.pop(host.rank, []) + self.units

    def goes_on_without(self, rank: int) -> None:
        """Whoever is left is chosen from when the next ring forms."""

    def ring_ends(self) -> None:
        self.ring, self.done = None, None
        self.pace.ring_ends()
