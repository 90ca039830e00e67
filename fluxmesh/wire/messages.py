"""What coordinator, agent and engine say to one another: one frozen dataclass a message. Pure.

`protocol.py` turns them into a msgpack header and raw frames and back, and holds the limits; the
transports carry them. A field of type `np.ndarray` travels as a frame of its own, uncopied.

    coordinator ── request ──► agent ── work ──► engine
    coordinator ◄── answer, report ── agent ◄── report ── engine

Every request of a coordinator gets one answer (`Answer`s below; `Refused` where it can't be done),
matched by the `seq` of the envelope. Reports come by themselves, between the answers. What changes
a host (`Changing`) carries the `fence` of the sender's lease, and an agent refuses an old one.
Work carries `job` and `ring_generation`; reports repeat them, so that what is left over from
another job or ring is recognised and dropped. A ring cannot be rebuilt inside a process: each
change of its members ends all engines and begins a new generation, with fresh ports and a fresh
nonce.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fluxmesh.cluster.snapshot import (
    CollectiveTime,
    Holding,
    ModelVariant,
    Platform,
    StepShape,
    StepTiming,
)

State = Literal["idle", "loading", "ready", "busy", "failed"]


@dataclass(frozen=True)
class Message:
    """Base of all messages."""


@dataclass(frozen=True)
class Changing(Message):
    """A request that changes the host: only the holder of its lease may send it."""

    fence: int


# Requests that any trusted coordinator may send


@dataclass(frozen=True)
class Hello(Message):
    """Opens a connection; answered by `Welcome`. `client` is random, new for each coordinator."""

    client: str
    version: str  # of fluxmesh


@dataclass(frozen=True)
class Heartbeat(Message):
    """Sent by both sides each second; a coordinator's renews its lease and its place in line."""


@dataclass(frozen=True)
class AskStatus(Message):
    """Answered by `Status`."""


@dataclass(frozen=True)
class AskLogs(Message):
    """Answered by `Logs`: the last `lines` lines."""

    lines: int = 100


@dataclass(frozen=True)
class AskLease(Message):
    """Answered by `Done`; then `LeaseQueued` reports until `Granted`.

    `seconds` is how long the job may take, for those who wait behind it.
    """

    job: str
    seconds: float = 0.0


@dataclass(frozen=True)
class LeaveQueue(Message):
    """Gives up a lease, or the place in line for one. Answered by `Done`."""


@dataclass(frozen=True)
class ShutDown(Message):
    """`fluxmesh down`: kills the engine and ends the agent; answered by `Done` first."""


@dataclass(frozen=True)
class ListenForLink(Message):
    """Opens a port at `ip` for one `ProbeLink` that says `token`. Answered by `Ports`."""

    ip: str
    token: bytes


@dataclass(frozen=True)
class ProbeLink(Message):
    """Sends `nbytes` to another agent's `ListenForLink`. Answered by `LinkRate`."""

    ip: str
    port: int
    token: bytes
    nbytes: int = 64 << 20


@dataclass(frozen=True)
class Keep(Message):
    """What a host is to hold whenever nobody has a use for its engine. Answered by `Done`.

    The agent remembers it, and loads what is missing of it by itself: after the engine was ended
    with a broken ring, or died. None: nothing.
    """

    weights: ModelVariant | None
    shards: int = 1
    shard: int = 0
    components: tuple[str, ...] = ()  # as in `Load`


@dataclass(frozen=True)
class NoteSize(Message):
    """Pictures of this size were asked for in the mesh, and this host could make them too.

    One that holds the weights gets ready for them once it has nothing to do. Answered by `Done`.
    """

    weights: ModelVariant
    height: int  # pixels
    width: int


@dataclass(frozen=True)
class LeaveRing(Message):
    """The ring that the engine is in was made of what a loss had left of another.

    The next job will want the whole one, whose engines are in no ring or in that one: so this one
    makes place for a new one that loads again, once the host is idle. Answered by `Done`.
    """


def ring_name(nonce: bytes) -> str:
    """What `Status` calls a ring: who knows the name does not know the nonce."""
    return hashlib.sha256(nonce).hexdigest()[:16]


# Requests of the holder of the lease


@dataclass(frozen=True)
class AskPorts(Changing):
    """`count` ports that are free at `ip`. Answered by `Ports`."""

    ip: str
    count: int = 1


@dataclass(frozen=True)
class PutFile(Changing):
    """A piece of an adapter, kept under its hash. Answered by `Done`; the last piece is checked."""

    sha256: str
    offset: int
    total: int
    data: np.ndarray = field(repr=False, compare=False)  # uint8


@dataclass(frozen=True)
class HasFile(Changing):
    """Whether an adapter of this hash is there. Answered by `Found`."""

    sha256: str


@dataclass(frozen=True)
class Kill(Changing):
    """SIGKILLs the engine, whatever it does. Answered by `Done` when it is gone."""

    ring_generation: int  # begins now; older reports are dropped


@dataclass(frozen=True)
class Join(Changing):
    """Joins a ring (`backends.Joining`); an engine that is in another one is killed first.

    Answered by `Done` at once, and reported by `Joined` or `Failed`. `size` 1 means no ring.
    """

    ring_generation: int
    rank: int  # in the ring
    size: int
    backend: str = "ring"
    envs: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    nonce: bytes = b""


@dataclass(frozen=True)
class Cancel(Changing):
    """Stops a job's work at the next step, on all ranks of a ring together. Answered by `Done`."""

    job: str


@dataclass(frozen=True)
class Work(Changing):
    """Base of what the engine does. Answered by `Done` when it is in line; reports follow.

    The engine does what it is given one after another, in the order in which it came.
    """

    job: str
    ring_generation: int


@dataclass(frozen=True)
class Load(Work):
    """Makes the engine hold a transformer, whole or a shard of it, and `components` beside it.

    What it holds of other weights leaves first. Reported by `LoadProgress` and `Loaded`.
    """

    weights: ModelVariant  # adapters by hash: AdapterRef(sha256, scale)
    shards: int = 1
    shard: int = 0
    components: tuple[str, ...] = ()  # of "text encoders", "transformer", "autoencoder"
    low_memory: bool = False


@dataclass(frozen=True)
class Encode(Work):
    """Runs the text encoders. Reported by `TextEncoded`."""

    weights: ModelVariant
    prompt: str = field(repr=False)  # a log that names a message names no prompt
    t5_padding: bool = True
    stay: bool = True  # whether the encoders may stay in memory afterwards


@dataclass(frozen=True)
class EncodeSource(Work):
    """Encodes the picture to begin from. Reported by `SourceEncoded`."""

    weights: ModelVariant
    pixels: np.ndarray = field(repr=False, compare=False)  # uint8 [height, width, 3]


@dataclass(frozen=True)
class Paint(Work):
    """Denoises one image from step `first`, alone or with the ring.

    Reported by `Stepped` each step. All ranks of a ring get the same; each reports its steps, and
    rank 0 the latents.
    """

    weights: ModelVariant
    placement: Literal["data", "sequence", "tensor"]
    image: int  # counted from 0
    height: int  # pixels
    width: int
    steps: int
    first: int  # steps already done; 0 begins from noise
    guidance: float
    low_memory: bool
    preview: bool  # decode the expected picture after each step
    strength: float  # of `source`; 1.0 without one
    # float32 [1, L, 4C] after `first` steps; None where that is none: it begins from the noise
    latents: np.ndarray | None = field(repr=False, compare=False)
    noise: np.ndarray = field(repr=False, compare=False)  # float32 [1, L, 4C]
    t5: np.ndarray = field(repr=False, compare=False)  # as `TextEncoded` gave it
    clip: np.ndarray = field(repr=False, compare=False)
    source: np.ndarray | None = field(default=None, repr=False, compare=False)  # float32 [1, L, 4C]
    mask: np.ndarray | None = field(
        default=None, repr=False, compare=False
    )  # uint8 [height, width]
    cache: float = 0.0  # threshold of step caching; 0 computes every step
    # With a cache and `first`: the latest step that was computed, counted from 0, and the latents
    # float32 [1, L, 4C] that it began from; None where these are the very first.
    basis: int = 0
    basis_latents: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Decode(Work):
    """Latents to pictures, all in one batch. Reported by a `Pictured` for each."""

    weights: ModelVariant
    images: tuple[int, ...]
    height: int  # pixels
    width: int
    latents: np.ndarray = field(repr=False, compare=False)  # float32 [images, L, 4C]


@dataclass(frozen=True)
class Measure(Work):
    """Times a step and a decode, alone or with the ring, after a trial picture (`Warm`).

    Reported by `Timed`.
    """

    weights: ModelVariant
    height: int  # pixels
    width: int
    placement: Literal["data", "sequence", "tensor"] = "data"


@dataclass(frozen=True)
class Warm(Work):
    """Makes a step of one picture of noise, alone or with the ring, and a decode; keeps neither.

    What is compiled or allocated at the first picture of a size then is. Reported by `Warmed`.
    """

    weights: ModelVariant
    height: int  # pixels
    width: int
    placement: Literal["data", "sequence", "tensor"] = "data"


@dataclass(frozen=True)
class MeasureRing(Work):
    """Times the collectives of the engine's ring by size, within `seconds` or so.

    All ranks of a ring are given it, and take part also where the job was cancelled. Needs no
    weights. Reported by `RingTimed`.
    """

    seconds: float = 2.0


# Answers


@dataclass(frozen=True)
class Done(Message):
    """What was asked for is done, or in line."""


@dataclass(frozen=True)
class Refused(Message):
    """What was asked for can't be done; `text` is the sentence that the user reads."""

    code: Literal[
        "version", "malformed", "fence", "usage", "model", "memory", "busy", "network", "internal"
    ]
    text: str


@dataclass(frozen=True)
class Welcome(Message):
    """Who answers: `boot` is random, new for each start of the agent."""

    boot: str
    version: str  # of fluxmesh
    status: Status


@dataclass(frozen=True)
class EngineCounters(Message):
    """What an engine has done since it started, as it counted itself."""

    images: int = 0  # denoised to the end
    steps: int = 0
    reused: int = 0  # of these, steps that a cache made cheap
    encodes: int = 0
    decodes: int = 0
    sent_bytes: int = 0  # in collectives
    transformer_bytes: int = 0  # of weights held now: blocks, modulation and the rest
    block_bytes: int = 0  # of these, blocks and modulation: what a shard divides
    peak_bytes: int = 0
    load_peak_bytes: int = 0  # while the transformer was loaded
    busy_seconds: float = 0.0  # in units of work
    agree_seconds: float = 0.0  # of these, until the ranks of a ring agreed whether to go on


@dataclass(frozen=True)
class Reading:
    """A component of a model that an engine reads now."""

    component: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
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
    job: str  # that runs here, or holds the lease with nothing to do here now; or ""
    waiting: int  # coordinators in line
    reason: str = ""  # of the last failure
    ring: str = ""  # that its engine is in: `ring_name` of the nonce; "" outside of one
    ring_rank: int = 0
    ring_size: int = 1
    platform: Platform = "cpu"
    machine_bytes: int = 0  # all memory of the machine; 0 is unknown
    pressure: str = ""  # "warning" or "critical": the machine is short of memory
    loading: Reading | None = None  # what its engine reads now
    components: tuple[str, ...] = ()  # that are in memory: `holds` tells of which weights
    compiled: tuple[StepShape, ...] = ()  # what its engine has made steps of, the latest one last


@dataclass(frozen=True)
class Ports(Message):
    ports: tuple[int, ...]


@dataclass(frozen=True)
class Found(Message):
    there: bool


@dataclass(frozen=True)
class LinkRate(Message):
    rate: float  # bytes/s
    latency: float  # seconds


@dataclass(frozen=True)
class Logs(Message):
    lines: tuple[str, ...]


# Reports


@dataclass(frozen=True)
class Report(Message):
    """Base of what an agent tells by itself."""


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


@dataclass(frozen=True)
class Joined(Report):
    ring_generation: int
    rank: int


PEER_LATE = "PeerLate"  # a `Failed` of a ring: a GPU's watchdog ended what waited for too long


@dataclass(frozen=True)
class Failed(Report):
    """The engine ended, or could not do its work. `fatal`: it is gone, and all that it held."""

    ring_generation: int
    job: str
    # A class of fluxmesh.errors; "Raised": the engine ended itself over an exception, as those do
    # whose neighbour in a ring is gone; PEER_LATE; "Died": something else ended it.
    kind: str
    text: str
    fatal: bool


@dataclass(frozen=True)
class LoadProgress(Report):
    """Bytes of a component read so far."""

    job: str
    ring_generation: int
    component: str
    done_bytes: int
    total_bytes: int


WARM_STEP = "step"  # what a `Beat` calls the first step of an image whose kernels are compiled


@dataclass(frozen=True)
class Beat(Report):
    """The engine works at something that gives no other sign: loading, encoding, the first step of
    an image, decoding."""

    job: str
    ring_generation: int
    doing: str


@dataclass(frozen=True)
class Loaded(Report):
    job: str
    ring_generation: int
    holding: Holding
    seconds: float


@dataclass(frozen=True)
class TextEncoded(Report):
    job: str
    ring_generation: int
    seconds: float
    cached: bool
    peak_bytes: int
    content: str  # `Checkpoint.content` of the files that the encoders came from
    t5: np.ndarray = field(repr=False, compare=False)  # [1, T, width], bfloat16 as uint16
    clip: np.ndarray = field(repr=False, compare=False)  # [1, width], the same


@dataclass(frozen=True)
class SourceEncoded(Report):
    job: str
    ring_generation: int
    latents: np.ndarray = field(repr=False, compare=False)  # float32 [1, L, 4C]


@dataclass(frozen=True)
class Stepped(Report):
    """A step is done and evaluated; `latents` from rank 0 of a ring alone, and from `data`."""

    job: str
    ring_generation: int
    image: int
    step: int  # steps done, from 1
    seconds: float
    peak_bytes: int
    latents: np.ndarray | None = field(default=None, repr=False, compare=False)
    preview: np.ndarray | None = field(default=None, repr=False, compare=False)  # uint8 [h, w, 3]
    reused: bool = False  # most of its blocks were not run: an approximation that was asked for


@dataclass(frozen=True)
class Pictured(Report):
    job: str
    ring_generation: int
    image: int
    seconds: float
    peak_bytes: int
    pixels: np.ndarray = field(repr=False, compare=False)  # uint8 [height, width, 3]


@dataclass(frozen=True)
class Timed(Report):
    job: str
    ring_generation: int
    measured: StepTiming


@dataclass(frozen=True)
class Warmed(Report):
    job: str
    ring_generation: int
    seconds: float


@dataclass(frozen=True)
class RingTimed(Report):
    """What `MeasureRing` found, the same on all ranks; times are those of the slowest one."""

    job: str
    ring_generation: int
    gathers: tuple[CollectiveTime, ...]
    sums: tuple[CollectiveTime, ...]
    hidden: float  # part of a gather that passes while products run beside it, 0 to 1


@dataclass(frozen=True)
class Cancelled(Report):
    """The engine has let go of a job's work, and is ready for more."""

    job: str
    ring_generation: int


# Between an agent and its engine alone


@dataclass(frozen=True)
class Device(Message):
    """What the engine computes on; the first that it says."""

    kind: str  # such as "Apple M2 Ultra"
    name: str  # of the device on its machine: "gpu 0"
    mlx_version: str
    memory_bytes: int  # the most that it may use
    flops_per_second: float
    platform: Platform = "cpu"


@dataclass(frozen=True)
class Account(Message):
    """What the engine has done and holds, before a report that says so.

    `is_over`: the unit of work, or the `Join`, has ended, however it did.
    """

    is_over: bool
    holds: Holding | None
    counters: EngineCounters
    load_rate: float  # bytes/s of the last load; 0 before one
    components: tuple[str, ...] = ()
    compiled: tuple[StepShape, ...] = ()  # what it has made steps of, the latest one last
