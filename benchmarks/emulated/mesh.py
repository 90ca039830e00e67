"""A mesh whose hosts compute by waiting: what its planner is told, chooses, and what steps take."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.emulated.report import SLOWER, EmulatedSetting, MeshOutcome, StepWay
from benchmarks.emulated.ring import EmulatedRing, built
from benchmarks.emulated.steps import StepPiece, computed, least, slower, traced
from benchmarks.flux2_peers import FluxmeshKlein
from benchmarks.limited import namespaces
from benchmarks.peers import Fluxmesh
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import (
    CollectiveTime,
    HostInfo,
    LinkInfo,
    MeshView,
    Placement,
    RingTiming,
    StepTiming,
    Timings,
)
from fluxmesh.models.base import Architecture
from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.planning.plan import Phase, plan
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import GenerateRequest
from fluxmesh.weights import hub
from tests.flux2_checkpoint import TEXT, architecture_of

STEP = 2.5e-3 * SLOWER  # seconds of a step of `tiny` at 128x128 on one host
STEPS = 28  # of the request that is planned
SLOWED = 2.0  # times as long as others takes the last host of some meshes
BURST = 3100  # bytes that pass a link at once: two packets


class TracedModels:
    """TracedModels of random weights, and what a rank's step of each takes here."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Fluxmesh, Architecture]] = {}
        self._traces: dict[tuple[Any, ...], list[StepPiece]] = {}
        self._fresh: set[tuple[Any, ...]] = set()  # of this round

    def begin_round(self) -> None:
        """Everything is measured again, where it is asked for."""
        self._fresh.clear()

    def of(self, name: str) -> tuple[Fluxmesh, Architecture]:
        if name not in self._made:
            self._made[name] = made(name)
        return self._made[name]

    def trace(
        self,
        model: str,
        side: int,
        placement: Placement = "data",
        rank: int = 0,
        hosts: int = 1,
        shares: Shares = EVEN,
    ) -> list[StepPiece]:
        """In seconds of this processor, the least of all rounds."""
        key = (model, side, placement, rank, hosts, shares)
        if key not in self._fresh:
            peer, sizes = self.of(model)
            pieces = traced(peer, sizes, (side, side), placement, rank, hosts, shares)
            self._traces[key] = least(pieces, self._traces.get(key, pieces))
            self._fresh.add(key)
        return self._traces[key]

    @functools.cached_property
    def scale(self) -> float:
        """Times as long as this processor takes a host, in slow motion.

        Of the first round: a step that was measured then is held against predictions of the last.
        """
        return STEP / computed(self.trace("tiny", 128))


def made(name: str) -> tuple[Fluxmesh, Architecture]:
    """`tiny`, or one of FLUX.2 klein's shape and its size."""
    mx.set_default_device(mx.cpu)
    tiny = hub.resolve("tiny", download=False).architecture
    if name == "tiny":
        return Fluxmesh(tiny.transformer, "bfloat16", None, low_memory=False), tiny
    klein = Flux2Config(
        in_channels=64,
        out_channels=64,
        context_in_dim=TEXT.width,
        hidden_size=tiny.transformer.hidden_size,
        num_heads=tiny.transformer.num_heads,
        depth=2,
        depth_single_blocks=6,
        axes_dim=(4, 4, 4, 4),
    )
    sizes = architecture_of("klein", klein)
    sizes = replace(sizes, defaults=replace(sizes.defaults, t5_max_length=tiny.text_length))
    return FluxmeshKlein(klein, "bfloat16", None, low_memory=False), sizes


class LeastTimings:
    """What was measured of meshes, of all rounds the least."""

    def __init__(self) -> None:
        self.rings: dict[tuple[int, int, int], RingTiming] = {}  # of a mesh, by hosts in the ring
        self._steps: dict[tuple[Any, ...], float] = {}

    def add_ring(self, key: tuple[int, int, int], ring: RingTiming) -> None:
        before = self.rings.get(key, ring)
        self.rings[key] = replace(
            ring,
            gathers=_least_of(ring.gathers, before.gathers),
            sums=_least_of(ring.sums, before.sums),
            hidden=max(ring.hidden, before.hidden),
        )

    def add_step(self, way: tuple[EmulatedSetting, Phase], seconds: float) -> None:
        key = self._key(way)
        self._steps[key] = min(seconds, self._steps.get(key, seconds))

    def step(self, way: tuple[EmulatedSetting, Phase]) -> float:
        return self._steps[self._key(way)]

    @staticmethod
    def _key(way: tuple[EmulatedSetting, Phase]) -> tuple[Any, ...]:
        setting, phase = way
        return setting, phase.placement, phase.ranks, phase.shares


def _least_of(
    one: Iterable[CollectiveTime], other: Iterable[CollectiveTime]
) -> tuple[CollectiveTime, ...]:
    """Two tables of one kind of collective, of each size the shorter time."""
    times: dict[int, float] = {}
    for timing in (*one, *other):
        times[timing.nbytes] = min(timing.seconds, times.get(timing.nbytes, timing.seconds))
    return tuple(CollectiveTime(*pair) for pair in sorted(times.items()))


class EmulatedMesh:
    """Hosts with links of one rate, as long as its settings are measured."""

    def __init__(
        self, hosts: int, gigabits: int, models: TracedModels, known: LeastTimings
    ) -> None:
        self.hosts, self.gigabits, self.models, self.known = hosts, gigabits, models, known
        self.rate = 1e9 / 8 * gigabits / SLOWER

    def outcomes(self, settings: Sequence[EmulatedSetting]) -> list[MeshOutcome]:
        """What came of settings on this mesh. Raises `Skipped` where there can't be such a one."""
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            devices = [(i,) for i in range(self.hosts)]
            where = stack.enter_context(namespaces(devices, self.rate, BURST))
            patient = built(scratch)
            rings: dict[int, EmulatedRing] = {}
            for size in range(2, self.hosts + 1):
                rings[size] = EmulatedRing(size, *where, scratch, patient)
                stack.callback(rings[size].close)
                self.known.add_ring((self.hosts, self.gigabits, size), rings[size].timing)
            planned = {setting: self._planned(setting) for setting in settings}
            for size, ring in rings.items():
                ways = [
                    (setting, phase)
                    for setting, (phases, _) in planned.items()
                    for phase in phases
                    if len(phase.ranks) == size
                ]
                steps = [self._pieces(setting, phase) for setting, phase in ways]
                for way, seconds in zip(ways, ring.walked(steps), strict=True):
                    self.known.add_step(way, seconds)
        return [self._outcome(setting, *found) for setting, found in planned.items()]

    def _outcome(
        self, setting: EmulatedSetting, phases: Sequence[Phase], chosen: Phase
    ) -> MeshOutcome:
        ways = []
        for phase in phases:
            if phase.placement == "data":  # sends nothing: takes what it was timed to take
                (pieces,) = self._pieces(setting, phase)
                ways.append(StepWay(phase, sum(piece.seconds for piece in pieces)))
            else:
                ways.append(StepWay(phase, self.known.step((setting, phase))))
        return MeshOutcome(setting, tuple(ways), ways[list(phases).index(chosen)])

    def _pieces(self, setting: EmulatedSetting, phase: Phase) -> list[list[StepPiece]]:
        """Of each host of a phase its step, in slow motion."""
        paces, scale = _paces(setting), self.models.scale
        model, size = (setting.model, setting.side, phase.placement), len(phase.ranks)
        return [
            slower(self.models.trace(*model, place, size, phase.shares), scale * paces[rank])
            for place, rank in enumerate(phase.ranks)
        ]

    def _planned(self, setting: EmulatedSetting) -> tuple[list[Phase], Phase]:
        """Every way to make the setting's step that can be taken, and the one that is chosen."""
        _, model = self.models.of(setting.model)
        sizes = ModelSizes(model)
        asked = GenerateRequest(
            prompt="",
            seed=0,
            model=setting.model,
            height=setting.side,
            width=setting.side,
            steps=STEPS,
        )
        found = plan(sizes.fill(asked), self._view(setting), sizes, is_read=True)
        options = [option for option in found.options if not option.problem]
        winner = found.winner
        assert winner is not None, found.reason
        return [option.phases[0] for option in options], winner.phases[0]

    def _view(self, setting: EmulatedSetting) -> MeshView:
        """What the planner would know of the mesh."""
        alone = self.models.scale * computed(self.models.trace(setting.model, setting.side))
        step = StepTiming(
            model=setting.model,
            height=setting.side,
            width=setting.side,
            dtype="bfloat16",
            bits=None,
            step_seconds=alone,
            decode_seconds=1e-6,  # nothing is decoded
        )
        hosts = tuple(
            HostInfo(
                rank=rank,
                name=f"host{rank}",
                kind="emulated",
                memory_bytes=1 << 40,
                free_bytes=1 << 40,
                flops_per_second=1e9,
                load_rate=1e18,  # what takes part has loaded
                platform="cpu",  # whose proportions its pieces have
                measured=(replace(step, step_seconds=alone * pace),),
            )
            for rank, pace in enumerate(_paces(setting))
        )
        ranks = range(setting.hosts)
        links = tuple(
            LinkInfo(source=a, target=b, rate=self.rate) for a in ranks for b in ranks if a != b
        )
        # All links are alike, and so are all rings of as many hosts.
        rings = tuple(
            replace(self.known.rings[self.hosts, self.gigabits, size], ranks=members)
            for size in range(2, self.hosts + 1)
            for members in itertools.combinations(ranks, size)
        )
        return MeshView(hosts, links, timings=Timings(rings))


def _paces(setting: EmulatedSetting) -> list[float]:
    """Of each host, times as long as one that is not slowed."""
    return [1.0] * (setting.hosts - 1) + [SLOWED if setting.is_slowed else 1.0]
