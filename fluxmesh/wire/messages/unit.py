"""What all units of an engine's work have in common, and all that an engine reports. Pure.

An engine does what it is given one after another, in the order in which it came. Agent, engine and
coordinator each have to know a little of every unit: whether the ranks of a ring do it together,
which report ends it, how long it may take. All of that stands on the unit's class, so that a new
unit is written in one place; `work.py` and `training.py` hold them, each beside its reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fluxmesh.bounds import Range
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.deadlines import Deadlines
from fluxmesh.wire.messages.base import Changing, JobName, Report

PEER_LATE = "PeerLate"  # a `Failed` of a ring: a GPU's watchdog ended what waited for too long
ENGINE_KILLED = "Killed"  # a `Failed`: another program, or the system, ended the engine
WARM_STEP = "step"  # what a `Beat` calls the first step of an image whose kernels are compiled


# Reports


@dataclass(frozen=True, kw_only=True)
class EngineReport(Report, is_base=True):
    """Base of what an engine tells: of an older generation of its ring, it counts no more."""

    ring_generation: int


@dataclass(frozen=True, kw_only=True)
class WorkReport(EngineReport, is_base=True):
    """Base of what an engine tells of a job."""

    job: JobName


@dataclass(frozen=True, kw_only=True)
class Failed(WorkReport):
    """The engine ended, or could not do its work. `fatal`: it is gone, and all that it held."""

    # A class of fluxmesh.errors; "Raised": the engine ended itself over an exception, as those do
    # whose neighbour in a ring is gone; PEER_LATE; ENGINE_KILLED; "Died": something else ended it.
    kind: str
    text: str
    fatal: bool
    setting: str = ""  # of the error: which is at fault


@dataclass(frozen=True, kw_only=True)
class Cancelled(WorkReport):
    """The engine has let go of a job's work, and is ready for more."""


@dataclass(frozen=True, kw_only=True)
class LoadProgress(WorkReport):
    """Bytes of a component read so far."""

    component: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Beat(WorkReport):
    """The engine works at something that gives no other sign: loading, encoding, the first step of
    an image, decoding."""

    doing: str


# Units


@dataclass(frozen=True, kw_only=True)
class EngineUnit(Changing, is_base=True):
    """Base of what an engine is given. Answered by `Done` when it is in line; reports follow."""

    ring_generation: int

    reports: ClassVar[tuple[type[EngineReport], ...]] = ()
    """Those of this unit alone; the last one is of the class that ends it. With none it is done at
    once, and is no part of the line."""
    doing: ClassVar[str] = "at work"  # as in "it gave no sign while ..."
    ticks: ClassVar[bool] = True  # whether its engine gives a sign each second
    budget: ClassVar[float] = math.inf
    """Seconds that it may take from when its weights are read, for a picture of common size; of an
    image, that its first step may take."""

    @property
    def is_collective(self) -> bool:
        """Whether the ranks of a ring do it together: it begins on all of them or on none."""
        return False

    @property
    def pictures(self) -> float:
        """About how many pictures of common size it is about, at least 1."""
        return 1.0

    def gave(self, report: Report) -> bool:
        """Whether a report is of this unit, as far as it says so."""
        return type(report) in self.reports

    def is_ended_by(self, report: Report) -> bool:
        """Whether the unit is over with this report."""
        return self.gave(report) and type(report) is self.reports[-1]

    def limit(self, deadlines: Deadlines) -> float:
        """Seconds that it may take from when its weights are read; `deadlines` are a job's."""
        return self.budget * self.pictures

    def late(self, seconds: float) -> str:
        """What is said of an engine that took longer than `seconds`."""
        return f"{self.doing} took more than {seconds:.0f} s"


@dataclass(frozen=True, kw_only=True)
class Work(EngineUnit, is_base=True):
    """Base of what an engine does for a job."""

    job: JobName


@dataclass(frozen=True, kw_only=True)
class ModelWork(Work, is_base=True):
    """Base of work with a model as it is: what pictures are made of."""

    weights: ModelVariant  # adapters by hash: AdapterRef(sha256, scale)
    # That its job takes on this host, by the plan: within what the engine may use, other models
    # stay in memory beside it. 0: nobody knows, and none stays.
    memory_bytes: Annotated[int, Range(0, 1 << 50)] = 0
