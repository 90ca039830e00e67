"""How a host and its engine stand: what an agent answers, and what its engine tells it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fluxmesh.bounds import Count
from fluxmesh.cluster.snapshot import (
    Holding,
    KeptModels,
    Platform,
    StepShape,
    StepTiming,
    TextHolding,
)
from fluxmesh.wire.messages.base import Components, JobName, JobTitle, Message

State = Literal["idle", "loading", "ready", "busy", "failed"]


@dataclass(frozen=True)
class Reading:
    """A component of a model that an engine reads now."""

    component: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """How far a job is, as its coordinator tells the hosts that it has leased."""

    unit: Literal["", "image", "update"] = ""  # that it is counted in; "": not at all
    done: int = 0
    total: int = 0
    step: int = 0  # done of the image that this host works at
    steps: int = 0  # of it; 0: at none
    seconds: float = 0.0  # until the job is over; 0: not known


@dataclass(frozen=True, kw_only=True)
class LeaseHolder:
    """Who has a host's lease, and for what."""

    user: str  # as the agent's allowlist calls the holder's key
    title: JobTitle
    progress: JobProgress  # as was told last, with the seconds that are left now


@dataclass(frozen=True, kw_only=True)
class WaitingJob:
    """Who waits for a host's lease."""

    user: str
    title: JobTitle
    seconds: float  # until it begins, as far as is known


JobsInLine = Annotated[tuple[WaitingJob, ...], Count(64)]  # the first ones
StepsMade = Annotated[tuple[StepShape, ...], Count(64)]  # of an engine, the latest one last


@dataclass(frozen=True, kw_only=True)
class EngineCounters(Message):
    """What an engine has done since it started, as it counted itself."""

    images: int = 0  # denoised to the end
    steps: int = 0
    reused: int = 0  # of these, steps that a cache made cheap
    encodes: int = 0  # of prompts
    pictures: int = 0  # read beside a prompt
    decodes: int = 0
    sent_bytes: int = 0  # in collectives
    transformer_bytes: int = 0  # of weights held now: blocks, modulation and the rest
    block_bytes: int = 0  # of these, blocks and modulation: what a shard divides
    peak_bytes: int = 0
    load_peak_bytes: int = 0  # while the transformer was loaded
    busy_seconds: float = 0.0  # in units of work
    agree_seconds: float = 0.0  # of these, until the ranks of a ring agreed whether to go on


@dataclass(frozen=True, kw_only=True)
class Status(Message):
    """One host at one moment."""

    state: State
    ring_generation: int
    pid: int
    engine_pid: int | None
    name: str  # of the machine
    kind: str  # of its device
    device: str  # agents that name the same one share it
    mlx_version: str
    python_version: str
    memory_bytes: int
    free_bytes: int
    load_rate: float  # bytes/s
    flops_per_second: float
    clock: float  # seconds since 1970
    holds: Holding | None
    measured: tuple[StepTiming, ...]
    counters: EngineCounters
    holder: str  # client that holds the lease, or ""
    job: JobName  # that runs here, or holds the lease with nothing to do here now; or ""
    waiting: int  # coordinators in line
    reason: str = ""  # of the last failure
    ring: str = ""  # that its engine is in: `ring_name` of the nonce; "" outside of one
    ring_rank: int = 0
    ring_size: int = 1
    ring_backend: str = "ring"  # that it formed over
    platform: Platform = "cpu"
    machine_bytes: int = 0  # all memory of the machine; 0 is unknown
    pressure: str = ""  # "warning" or "critical": the machine is short of memory
    text: TextHolding | None = None
    loading: Reading | None = None  # what its engine reads now
    components: Components = ()  # that are in memory: `holds` tells of which weights
    compiled: StepsMade = ()
    busy_seconds: float = 0.0  # until its lease is free, as far as is known
    lease: LeaseHolder | None = None
    line: JobsInLine = ()
    kept: KeptModels = ()  # models in memory beside `holds`


# Between an agent and its engine alone


@dataclass(frozen=True, kw_only=True)
class Device(Message):
    """What the engine computes on; the first that it says."""

    kind: str  # such as "Apple M2 Ultra"
    name: str  # of the device on its machine: "gpu 0"
    mlx_version: str
    memory_bytes: int  # the most that it may use
    flops_per_second: float
    platform: Platform = "cpu"


@dataclass(frozen=True, kw_only=True)
class Account(Message):
    """What the engine has done and holds, before a report that says so.

    `is_over`: the unit of work, or the `Join`, has ended, however it did.
    """

    is_over: bool
    holds: Holding | None
    counters: EngineCounters
    load_rate: float  # bytes/s of the last load; 0 before one
    text: TextHolding | None = None
    components: Components = ()
    compiled: StepsMade = ()
    kept: KeptModels = ()
