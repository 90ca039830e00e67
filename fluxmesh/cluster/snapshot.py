"""What is known of a mesh at one moment: its hosts, its links, what was measured on them. Pure.

Agents tell most of it (`fluxmesh up` measures step times and link rates), the coordinator holds
it, and `placement.plan` reads it. All units are bytes, seconds and FLOP; nothing here is a guess
except `HostInfo.flops_per_second`, which stands in until a step at a size has been timed.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

from fluxmesh.bounds import Bits, Count, Pixels, Range, ShardIndex, Shards, Text, check_shard
from fluxmesh.cluster.backends import Fallback
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.errors import UsageError
from fluxmesh.request import AdapterRef, GenerateRequest

Placement = Literal["data", "sequence", "tensor"]
Platform = Literal["metal", "cuda", "cpu"]
"""What MLX computes with: Apple's GPU, NVIDIA's, or the processor."""
Layout = Literal["replicated", "sharded"]


@dataclass(frozen=True)
class ModelVariant:
    """Which weights an engine would have to hold for a request, whatever their layout."""

    model: str
    dtype: str = "bfloat16"
    bits: Bits | None = None
    adapters: Annotated[tuple[AdapterRef, ...], Count(64)] = ()
    fuse_adapters: bool = False
    text_bits: Bits | None = None  # of the text encoders, where they have others than `bits`

    @classmethod
    def of(
        cls,
        request: GenerateRequest,
        stored_bits: int | None = None,
        stored_text_bits: int | None = None,
    ) -> ModelVariant:
        """Those of a request; `stored_bits` and `stored_text_bits` are what the checkpoint itself
        is quantized to."""
        bits = stored_bits or request.bits
        text_bits = request.text_bits or stored_text_bits  # an engine refuses what isn't stored
        return cls(
            request.model,
            request.dtype,
            bits,
            request.adapters,
            request.fuse_adapters,
            None if text_bits == bits else text_bits,
        )

    @property
    def bits_of_text(self) -> int | None:
        """What the text encoders are quantized to."""
        return self.text_bits or self.bits

    @property
    def denoiser(self) -> ModelVariant:
        """The same for whatever text encoders: equal where the denoisers are."""
        return self if self.text_bits is None else replace(self, text_bits=None)


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What an engine has in memory: all of the transformer, or shard `shard` of `shards`."""

    weights: ModelVariant
    nbytes: int  # everything that the engine would free by letting go of it
    shards: Shards = 1
    shard: ShardIndex = 0
    content: str = ""  # `Checkpoint.content` of the files that it came from
    shares: Shares = EVEN  # of which `shard` is one

    def __post_init__(self) -> None:
        _check("nbytes", self.nbytes, 0)
        check_shard(self.shard, self.shards)
        self.shares.check(self.shards)

    @property
    def layout(self) -> Layout:
        return "replicated" if self.shards == 1 else "sharded"


def prompt_mark(prompt: str, padded: bool = True, negative: str | None = None) -> str:
    """By which an engine says that it remembers a prompt, and nobody can tell what was asked.

    Two may share one, if rarely: who is asked for it must be able to read it after all.
    """
    read = repr((prompt, padded, negative)).encode("utf-8", "replace")
    return hashlib.sha256(read).hexdigest()[:6]


Mark = Annotated[str, Text(6)]


@dataclass(frozen=True, kw_only=True)
class TextHolding:
    """What an engine has for reading prompts."""

    weights: ModelVariant
    nbytes: int = 0  # of text encoders in memory; 0 where they have left, or never came
    prompts: Annotated[tuple[Mark, ...], Count(64)] = ()  # marks of those that it remembers

    def __post_init__(self) -> None:
        _check("nbytes", self.nbytes, 0)

    def serves(self, weights: ModelVariant) -> bool:
        """Whether it would give the features that these weights do."""
        return self.weights == weights


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """A model that an engine keeps in memory beside the one that it works with."""

    holds: Holding
    text: TextHolding | None = None


KeptModels = Annotated[tuple[KeptModel, ...], Count(8)]  # the least recently used first


FIRSTS: tuple[str, ...] = ("kernels_seconds", "placement_seconds", "first_seconds")


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Times of one model with nothing else running, at one size: on one host, or on a ring."""

    model: str
    height: Pixels
    width: Pixels
    dtype: str
    bits: Bits | None
    step_seconds: float  # one denoising step of one image
    decode_seconds: float | None = None  # one image
    placement: Placement = "data"  # by which the step was made; "data" is by one host alone
    hosts: int = 1  # of the ring
    backend: str = ""  # that this ring formed over; "" is not known
    # By how much a first step took longer than the next: of an engine that had made none of this
    # model before, which compiles all kernels; of one that had, by other placements alone; and of
    # one that had by this placement, at other sizes.
    kernels_seconds: float | None = None
    placement_seconds: float | None = None
    first_seconds: float | None = None
    when: float = 0.0  # it was measured: seconds since 1970; 0 is not known
    shares: Shares = EVEN  # of the ring's hosts

    def __post_init__(self) -> None:
        _check("step_seconds", self.step_seconds)
        if self.decode_seconds is not None:
            _check("decode_seconds", self.decode_seconds)
        for name in FIRSTS:
            if (value := getattr(self, name)) is not None:
                _check(name, value, 0)
        _check("when", self.when, 0)
        self.shares.check(self.hosts)

    def with_firsts_of(self, older: StepTiming) -> StepTiming:
        """This one, with what `older` tells of first steps where this one saw none."""
        known = {name: getattr(self, name) for name in FIRSTS}
        kept = {name: getattr(older, name) for name in FIRSTS if known[name] is None}
        return replace(self, **kept)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A kind of step that an engine has made: the next such one finds its kernels compiled.

    They last as long as the engine's process, whatever it holds meanwhile.
    """

    model: str
    dtype: str
    bits: Bits | None
    placement: Placement
    hosts: Shards  # of the ring; 1 for `data`
    height: Pixels
    width: Pixels

    @classmethod
    def of(
        cls, weights: ModelVariant, placement: Placement, hosts: int, height: int, width: int
    ) -> StepShape:
        return cls(
            model=weights.model,
            dtype=weights.dtype,
            bits=weights.bits,
            placement=placement,
            hosts=1 if placement == "data" else hosts,
            height=height,
            width=width,
        )

    def is_of(self, weights: ModelVariant) -> bool:
        """Whether its kernels are those of these weights: adapters have few of their own."""
        mine = (self.model, self.dtype, self.bits)
        return mine == (weights.model, weights.dtype, weights.bits)

    def is_sized(self, other: StepShape) -> bool:
        """Whether the two differ in nothing but the size of the image."""
        return replace(self, height=other.height, width=other.width) == other


@dataclass(frozen=True)
class RingPlace:
    """Where an engine stands in the ring that it is in; without a name in none."""

    name: str = ""  # the same on all of its members, and nowhere else
    rank: int = 0
    size: int = 1
    backend: str = "ring"  # that it formed over


@dataclass(frozen=True)
class CollectiveTime:
    """One collective of one size: a gather along axis 0, or a sum."""

    nbytes: Annotated[int, Range(1, 1 << 40)]  # of the array that each rank gives
    seconds: float  # until the slowest rank has its result

    def __post_init__(self) -> None:
        _check("nbytes", self.nbytes)
        _check("seconds", self.seconds)


@dataclass(frozen=True, kw_only=True)
class RingTiming:
    """What collectives take the engines of some hosts, over the backend that runs them."""

    backend: str
    ranks: tuple[int, ...]  # of the mesh, in the order of the ring
    gathers: tuple[CollectiveTime, ...]
    sums: tuple[CollectiveTime, ...]
    hidden: float  # part of a gather that passes while products run beside it, 0 to 1
    forming_seconds: float = 0.0  # until all engines had joined; 0 is not known
    when: float = 0.0  # it was measured: seconds since 1970; 0 is not known

    def __post_init__(self) -> None:
        _check("hidden", self.hidden, 0)
        _check("forming_seconds", self.forming_seconds, 0)
        _check("when", self.when, 0)


Recent = tuple[tuple[str, tuple[float, ...]], ...]
"""By name, seconds that the latest jobs measured, the latest last (`planning/learning.py`)."""


@dataclass(frozen=True, kw_only=True)
class JobTiming:
    """What jobs took on some hosts, as the latest few have it (`planning/learning.py`)."""

    backend: str  # of the ring; "" for `data`
    ranks: tuple[int, ...]  # of the ring in its order, or the one host
    measured: StepTiming  # what is typical of `recent`; `when` is the latest job
    last_seconds: float  # a step of the latest job
    begin_seconds: float | None = None  # before the first step, where all is loaded: text
    gap_seconds: float | None = None  # of an image, beside steps and decode: what travels, waits
    recent: Recent = ()  # of each time that is known from more than one job

    def __post_init__(self) -> None:
        _check("last_seconds", self.last_seconds)
        for name in ("begin_seconds", "gap_seconds"):
            if (value := getattr(self, name)) is not None:
                _check(name, value, 0)
        _check_recent(self.recent)


@dataclass(frozen=True, kw_only=True)
class TextTiming:
    """What a host took to read a prompt that it did not remember."""

    rank: int  # of the mesh
    model: str
    dtype: str
    bits: Bits | None  # of the text encoders
    seconds: float  # their weights in memory; layer by layer, with the reading of them
    by_layers: bool = False
    when: float = 0.0  # it was measured: seconds since 1970; 0 is not known
    recent: Recent = ()  # of which `seconds` is typical

    def __post_init__(self) -> None:
        _check("seconds", self.seconds, 0)
        _check("when", self.when, 0)
        _check_recent(self.recent)


@dataclass(frozen=True)
class Timings:
    """What a mesh has measured of itself beside what its agents tell."""

    rings: tuple[RingTiming, ...] = ()
    jobs: tuple[JobTiming, ...] = ()
    texts: tuple[TextTiming, ...] = ()

    def ring(self, backend: str, ranks: tuple[int, ...]) -> RingTiming | None:
        """That of the ring of just these hosts, in this order."""
        return self._rings.get((backend, ranks))

    @cached_property
    def _rings(self) -> dict[tuple[str, tuple[int, ...]], RingTiming]:
        """By what they are of; of several the first."""
        return {(ring.backend, ring.ranks): ring for ring in reversed(self.rings)}


@dataclass(frozen=True, kw_only=True)
class HostInfo:
    """One host: an agent and the device that its engine computes on."""

    rank: int
    name: str
    kind: str  # of device, such as "Apple M2 Ultra"
    memory_bytes: int  # the most that its engine may use
    free_bytes: int  # of the device, beside what engines hold now
    flops_per_second: float  # in bfloat16; used where no step was timed
    load_rate: float  # bytes/s from the checkpoint's files into memory
    measured: tuple[StepTiming, ...] = ()
    holds: Holding | None = None
    text: TextHolding | None = None
    kept: KeptModels = ()  # beside `holds`: they leave when something else needs their memory
    device: str = ""  # agents that name the same one share its memory and its time
    platform: Platform = "cuda"
    machine_bytes: int = 0  # all memory of the machine; 0 is unknown
    compiled: tuple[StepShape, ...] = ()  # what its engine has made steps of
    ring: RingPlace = RingPlace()  # that its engine is in
    busy_seconds: float = 0.0  # until its lease is free, as those say who hold it or wait for it

    def __post_init__(self) -> None:
        _check("memory_bytes", self.memory_bytes, 0)
        _check("free_bytes", self.free_bytes, 0)
        _check("flops_per_second", self.flops_per_second)
        _check("load_rate", self.load_rate)

    @property
    def device_key(self) -> str:
        """The device's name, or one that no other host has."""
        return self.device or f"rank {self.rank}"

    @property
    def held_bytes(self) -> int:
        """Of all models in memory."""
        beside = sum(each.holds.nbytes for each in self.kept)
        if self.holds is not None:
            return self.holds.nbytes + beside
        return beside + (0 if self.text is None else self.text.nbytes)

    def turned_to(self, weights: ModelVariant) -> HostInfo:
        """The host as it is for a job with these weights: those that it keeps are there at once."""
        held = self.holds
        if held is not None and held.weights.denoiser == weights.denoiser:
            return self
        for each in self.kept:
            if each.holds.weights.denoiser == weights.denoiser:
                others = [other for other in self.kept if other is not each]
                others += [] if held is None else [KeptModel(holds=held, text=self.text)]
                return replace(self, holds=each.holds, text=each.text, kept=tuple(others))
        return self

    def has_kernels(self, weights: ModelVariant) -> bool:
        """Whether its engine has made a step of this model, at whatever size."""
        return any(shape.is_of(weights) for shape in self.compiled)

    def has_taken(self, shape: StepShape) -> bool:
        """Whether its engine has made such a step, at whatever size."""
        return any(made.is_sized(shape) for made in self.compiled)


@dataclass(frozen=True, kw_only=True)
class LinkInfo:
    """How fast `source` sends to `target`, both ranks, at the addresses that a ring would use."""

    source: int
    target: int
    rate: float  # bytes/s
    latency: float = 0.0  # seconds that one small message takes

    def __post_init__(self) -> None:
        _check("rate", self.rate)
        _check("latency", self.latency, 0)


@dataclass(frozen=True)
class MeshView:
    """The hosts that can be used, in rank order, and the links between them.

    A pair without a link can't be neighbours in a ring: in a thunderbolt ring only the hosts at
    the two ends of a cable have one.
    """

    hosts: tuple[HostInfo, ...]
    links: tuple[LinkInfo, ...] = ()
    backend: str = "ring"  # the hostfile's
    timings: Timings = Timings()
    fallback: Fallback = Fallback()
    size: int = 0  # hosts that the mesh has, with those that can't be used now; 0: these alone

    def __post_init__(self) -> None:
        ranks = [host.rank for host in self.hosts]
        if ranks != sorted(set(ranks)):
            raise UsageError(f"The ranks of a mesh must rise, and are {ranks}.")

    @cached_property
    def _links(self) -> dict[tuple[int, int], LinkInfo]:
        return {(link.source, link.target): link for link in self.links}

    @cached_property
    def _hosts(self) -> dict[int, HostInfo]:
        return {host.rank: host for host in self.hosts}

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(host.rank for host in self.hosts)

    def host(self, rank: int) -> HostInfo:
        return self._hosts[rank]

    def link(self, source: int, target: int) -> LinkInfo | None:
        return self._links.get((source, target))

    def ring_timing(self, ranks: tuple[int, ...]) -> RingTiming | None:
        """What the collectives of these hosts' ring took; None where nobody measured them."""
        return self.timings.ring(self.backend_of(ranks), ranks)

    def backend_of(self, ranks: tuple[int, ...]) -> str:
        """What a ring of these hosts forms over."""
        return self.fallback.backend(self.backend, ranks)

    @cached_property
    def _timed(self) -> dict[int, HostInfo]:
        on: dict[str, list[StepTiming]] = {}
        for host in self.hosts:
            alone = [job.measured for job in self.timings.jobs if job.ranks == (host.rank,)]
            on.setdefault(host.device_key, []).extend((*host.measured, *alone))
        latest = {key: sorted(own, key=lambda timing: -timing.when) for key, own in on.items()}
        return {
            host.rank: replace(
                host, measured=tuple(dict.fromkeys((*latest[host.device_key], *host.measured)))
            )
            for host in self.hosts
        }

    def timed(self, rank: int) -> HostInfo:
        """The host with all that was measured on its device, also by jobs and other agents there.

        The latest comes first.
        """
        return self._timed[rank]

    def like(self, rank: int) -> tuple[StepTiming, ...]:
        """What hosts of the same kind measured alone, the latest first: a hint for this one."""
        kind, own = self.host(rank).kind, self.host(rank).device_key
        timings = [
            measured
            for host in self.hosts
            if host.kind == kind and host.device_key != own
            for measured in self.timed(host.rank).measured
            if measured.placement == "data"
        ]
        return tuple(sorted(timings, key=lambda timing: -timing.when))


def _check(name: str, value: float, least: float | None = None) -> None:
    """Agents report these numbers, and the planner divides by most of them."""
    if not math.isfinite(value) or value < 0 or (least is None and value == 0):
        bound = "above" if least is None else "at least"
        raise UsageError(f"A host reports {name} as {value}; it must be {bound} 0.")


def _check_recent(recent: Recent) -> None:
    for name, values in recent:
        for value in values:
            _check(name, value, 0)
