"""Who may change a host, and what the holder of its lease may send beside work. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from fluxmesh.bounds import ArrayOf, Range
from fluxmesh.wire.messages.base import Changing, JobName, JobTitle, Message, Report, Sha256
from fluxmesh.wire.messages.status import JobProgress, Status

MAX_FILE = 16 << 30  # bytes of an adapter


@dataclass(frozen=True)
class AskLease(Message):
    """Answered by `Done`; then `LeaseQueued` reports until `Granted`.

    `seconds` is how long the job may take, for those who wait behind it; `title` tells them what it
    is, and holds nothing of a prompt.
    """

    job: JobName
    seconds: float = 0.0
    title: JobTitle = ""


@dataclass(frozen=True)
class LeaveQueue(Message):
    """Gives up a lease, or the place in line for one. Answered by `Done`."""


@dataclass(frozen=True)
class LeaseQueued(Report):
    """Who waits: `place` 1 is next; `seconds` until the lease is free, as far as is known."""

    place: int
    seconds: float


@dataclass(frozen=True)
class Granted(Report):
    """The lease is the receiver's; `ring_generation` is the agent's latest, `status` how it
    stands now."""

    fence: int
    ring_generation: int
    status: Status


@dataclass(frozen=True)
class Lost(Report):
    """The lease is no longer the receiver's."""

    reason: str


# Requests of the holder


@dataclass(frozen=True, kw_only=True)
class PutFile(Changing):
    """A piece of an adapter, kept under its hash. Answered by `Done`; the last piece is checked."""

    sha256: Sha256
    offset: Annotated[int, Range(0, MAX_FILE)]
    total: Annotated[int, Range(1, MAX_FILE)]
    data: Annotated[np.ndarray, ArrayOf(("uint8",), (None,))] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class HasFile(Changing):
    """Whether an adapter of this hash is there. Answered by `Found`."""

    sha256: Sha256


@dataclass(frozen=True)
class Found(Message):
    there: bool


@dataclass(frozen=True, kw_only=True)
class TellProgress(Changing):
    """How far the holder's job is, for whoever asks for the host's status. Answered by `Done`."""

    progress: JobProgress


@dataclass(frozen=True, kw_only=True)
class Kill(Changing):
    """SIGKILLs the engine, whatever it does. Answered by `Done` when it is gone."""

    ring_generation: int  # begins now; older reports are dropped


@dataclass(frozen=True, kw_only=True)
class Cancel(Changing):
    """Stops a job's work at the next step, on all ranks of a ring together. Answered by `Done`."""

    job: JobName
