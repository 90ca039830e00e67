"""Engines and agents that count instead of computing: for tests of whoever gives them work.

`FakeEngine` is pure: a unit of work goes in, the reports of a real engine come out, and the
latents after a step depend on what they were before it and on nothing else, so that a picture
shows whether each of its steps was made exactly once and in order. `FakeMesh` puts it into real
agents that are joined by the in-process transport.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from fluxmesh.cluster.snapshot import CollectiveTime, Holding, LinkInfo, StepShape, StepTiming
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.planning.workload import ModelSizes
from fluxmesh.request import GenerateRequest, PromptCut, cut_of
from fluxmesh.sampling.latents import initial_noise
from fluxmesh.storage.homes import AgentHome, private_folder
from fluxmesh.wire import messages
from fluxmesh.wire.transport.inproc import Network
from fluxmesh_agent.service import Service
from fluxmesh_agent.supervisor import EngineOptions
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from tests.fake_training import FakeTraining

GB = 10**9
# Shapes of a prompt's features, which hold its length: no real model's, for nobody but an engine
# knows what they are.
FEATURES = {"words": (1, 4, 8), "mood": (1, 8), "pose": (2, 3, 3, 2)}
READ = 12  # tokens of a prompt: a word each, and an end
KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"  # of nobody: the in-process transport asks none


def one_step(latents: np.ndarray, step: int) -> np.ndarray:
    """The latents after step `step` (from 1): float32, of the same shape."""
    return (latents * np.float32(0.5) + np.float32(step)).astype(np.float32)


def reuses(step: int, basis: int, steps: int) -> bool:
    """Whether a cache skips step `step` (from 1) where step `basis` (from 0) was last computed."""
    return step < steps and step - 1 - basis < 3


def reused_step(latents: np.ndarray, step: int, basis_latents: np.ndarray) -> np.ndarray:
    """The latents after a step that is made of what a step from `basis_latents` computed."""
    return (one_step(latents, step) + np.float32(0.25) * basis_latents).astype(np.float32)


def encoded(pictures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a fake engine makes of pictures: each one's mean, in a shape that nobody else knows."""
    return {
        name: np.full((1, 2, 3, 16), np.float32(picture.mean()), np.float32)
        for name, picture in pictures.items()
    }


def cut(text: str) -> PromptCut | None:
    """What of a text a fake engine leaves out."""
    return cut_of(text, lambda words: len(words.split()) + 1, READ)


def influence(conditions: Mapping[str, np.ndarray] | None) -> np.float32:
    """What conditions add to the latents at each step: it tells their order, and their number."""
    means = [array.flat[0] for _, array in sorted((conditions or {}).items())]
    return np.float32(sum((k + 1) * mean / 1000 for k, mean in enumerate(means)))


def developed(latents: np.ndarray, height: int, width: int) -> np.ndarray:
    """One image's picture, uint8 [height, width, 3]."""
    shade = int(abs(float(latents.mean())) * 1000) % 256
    picture = np.full((height, width, 3), shade, np.uint8)
    picture[0, 0] = int(abs(float(latents.flat[0])) * 1000) % 256
    return picture


def expected(request: GenerateRequest, sizes: ModelSizes, image: int) -> np.ndarray:
    """The picture that image `image` must be, whoever paints it."""
    height = request.height or sizes.defaults.height
    width = request.width or sizes.defaults.width
    model = sizes.architecture
    seed = request.seed_of(image)
    latents = initial_noise(seed, height, width, model.latent_channels, model.downsampling)
    steps, basis = request.steps or sizes.defaults.steps, None
    pull = influence(encoded(model.pictures(request)))
    for step in range(1, steps + 1):
        if request.cache and basis is not None and reuses(step, basis[0], steps):
            latents = reused_step(latents, step, basis[1])
        else:
            basis = (step - 1, latents)
            latents = one_step(latents, step) + pull
    return developed(latents, height, width)


class FakeEngine:
    """Does units of work at once; remembers what it did."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1  # in its ring
        self.steps: list[tuple[int, int]] = []  # (image, step) that it made
        self.holding: Holding | None = None
        self.counters = messages.EngineCounters()
        self.content = "same"  # of the files that it reads
        self.components: tuple[str, ...] = ()
        self.compiled: tuple[StepShape, ...] = ()
        self.training = FakeTraining()
        self.collective_rate = 1e18  # bytes/s of its ring
        self.ring_step_seconds = 0.1  # that it tells of a step with others
        self.kernels_seconds = self.shape_seconds = 0.0  # that its first steps take longer

    def work(self, unit: messages.EngineUnit) -> Iterator[messages.Report]:
        """Its reports, one a `next`."""
        match unit:
            case messages.Join():
                self.rank, self.size = unit.rank, unit.size
                yield messages.Joined(ring_generation=unit.ring_generation, rank=unit.rank)
            case messages.Load():
                for component in unit.components:
                    yield messages.LoadProgress(
                        job=unit.job,
                        ring_generation=unit.ring_generation,
                        component=component,
                        done_bytes=0,
                        total_bytes=8,
                    )
                    yield messages.LoadProgress(
                        job=unit.job,
                        ring_generation=unit.ring_generation,
                        component=component,
                        done_bytes=8,
                        total_bytes=8,
                    )
                    self._has(component)
                self.holding = Holding(
                    weights=unit.weights,
                    nbytes=GB,
                    shards=unit.shards,
                    shard=unit.shard,
                    content=self.content,
                )
                yield messages.Loaded(
                    job=unit.job,
                    ring_generation=unit.ring_generation,
                    holding=self.holding,
                    seconds=0.1,
                )
            case messages.Encode():
                self._count(encodes=1)
                self._has("text encoders")
                features = {
                    name: np.full(shape, len(unit.prompt), np.uint16)
                    for name, shape in FEATURES.items()
                }
                yield messages.TextEncoded(
                    job=unit.job,
                    ring_generation=unit.ring_generation,
                    seconds=0.1,
                    cached=False,
                    peak_bytes=3,
                    content=self.content,
                    revision=f"of the {self.content}",
                    cut=cut(unit.prompt),
                    negative_cut=cut(unit.negative or ""),
                    features=features,
                )
            case messages.EncodeSource():
                yield messages.SourceEncoded(
                    job=unit.job,
                    ring_generation=unit.ring_generation,
                    content=self.content,
                    # Of a model of `meshes.small`: 16 channels, 2 pixels a latent.
                    latents=np.zeros_like(initial_noise(0, *unit.pixels.shape[:2], 16, 2)),
                )
            case messages.EncodePictures():
                self._count(pictures=len(unit.named))
                yield messages.PicturesEncoded(
                    job=unit.job,
                    ring_generation=unit.ring_generation,
                    content=self.content,
                    reader=self.content if unit.reader else "",
                    conditions=encoded(unit.named),
                )
            case messages.Paint():
                yield from self._paint(unit)
            case messages.Measure():
                timed = StepTiming(
                    model=unit.weights.model,
                    height=unit.height,
                    width=unit.width,
                    dtype=unit.weights.dtype,
                    bits=unit.weights.bits,
                    step_seconds=0.1,
                    decode_seconds=0.1,
                    placement=unit.placement,
                    hosts=1 if unit.placement == "data" else self.size,
                )
                self._has_made(unit)
                yield messages.Timed(
                    job=unit.job, ring_generation=unit.ring_generation, measured=timed
                )
            case messages.Warm():
                self._has_made(unit)
                self.holding = self.holding or Holding(
                    weights=unit.weights, nbytes=GB, content=self.content
                )
                yield messages.Beat(
                    job=unit.job, ring_generation=unit.ring_generation, doing="first step"
                )
                yield messages.Warmed(
                    job=unit.job, ring_generation=unit.ring_generation, seconds=0.1
                )
            case messages.MeasureRing():
                rate = self.collective_rate
                table = tuple(CollectiveTime(4 << k, (4 << k) / rate) for k in (10, 17, 23))
                yield messages.RingTimed(
                    job=unit.job,
                    ring_generation=unit.ring_generation,
                    gathers=table,
                    sums=table,
                    hidden=0.5,
                )
            case messages.Decode():
                for place, image in enumerate(unit.images):
                    self._count(decodes=1)
                    latents = unit.latents[place : place + 1]
                    pixels = developed(latents, unit.height, unit.width)
                    yield messages.Pictured(
                        job=unit.job,
                        ring_generation=unit.ring_generation,
                        image=image,
                        seconds=0.1,
                        peak_bytes=5,
                        pixels=pixels,
                    )
            case _:
                yield from self.training.work(unit, self.content)

    def _paint(self, unit: messages.Paint) -> Iterator[messages.Report]:
        latents = unit.noise if unit.latents is None else unit.latents
        basis = None
        if unit.first:  # a cache that was lost is made again
            begun = unit.noise if unit.basis_latents is None else unit.basis_latents
            basis = (unit.basis, begun)
        for step in range(unit.first + 1, unit.steps + 1):
            reused = bool(unit.cache and basis and reuses(step, basis[0], unit.steps))
            if basis is not None and reused:
                latents = reused_step(latents, step, basis[1])
            else:
                basis = (step - 1, latents)
                latents = one_step(latents, step) + influence(unit.conditions)
            self.steps.append((unit.image, step))
            compiling = self._has_made(unit)
            self._count(steps=1, reused=int(reused), images=int(step == unit.steps))
            seconds = 0.1 if unit.placement == "data" else self.ring_step_seconds
            is_first = unit.placement == "data" or self.rank == 0
            is_shown = bool(unit.preview_every) and step % unit.preview_every == 0
            yield messages.Stepped(
                job=unit.job,
                ring_generation=unit.ring_generation,
                image=unit.image,
                step=step,
                is_last=step == unit.steps,
                seconds=seconds + compiling,
                peak_bytes=4,
                latents=latents if is_first else None,
                projected=np.full((2, 3, 3), step, np.uint8) if is_first and is_shown else None,
                reused=reused,
            )

    def _has_made(self, unit: messages.Paint | messages.Measure | messages.Warm) -> float:
        """Keeps a step in mind; seconds that it took to compile."""
        shape = StepShape.of(unit.weights, unit.placement, self.size, unit.height, unit.width)
        if shape in self.compiled:
            return 0.0
        is_new = not any(made.is_of(unit.weights) for made in self.compiled)
        self.compiled = (*self.compiled, shape)
        return self.shape_seconds + is_new * self.kernels_seconds

    def _has(self, component: str) -> None:
        self.components = tuple(dict.fromkeys((*self.components, component)))

    def _count(self, **more: int) -> None:
        for name, value in more.items():
            now = getattr(self.counters, name) + value
            self.counters = dataclasses.replace(self.counters, **{name: now})


class FakeSupervisor:
    """Stands in for an agent's `Supervisor`: its engine is a `FakeEngine` in the same loop."""

    def __init__(
        self,
        on_message: Callable[[messages.Message], None],
        on_end: Callable[[str], None],
        memory: int | None = None,
        pause: float = 0.002,
    ) -> None:
        """`pause` is how many seconds each report takes."""
        self.on_message, self.on_end, self.pause = on_message, on_end, pause
        self.options = EngineOptions(memory=memory)
        self.engine: FakeEngine | None = None
        self.starts = 0
        self.content = "same"  # of the files that engines read
        self._goes = asyncio.Event()  # not while it is stopped
        self._line: asyncio.Queue[messages.Message] = asyncio.Queue()
        self._cancelled: Counter[str] = Counter()  # `Cancel`s of each job that are in line
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return None if self.engine is None else 4711

    @property
    def made(self) -> list[tuple[int, int]]:
        """(image, step) that the engine that runs has made."""
        return [] if self.engine is None else self.engine.steps

    def end_orphan(self) -> None:
        """There is none."""

    def start(self, envs: tuple[tuple[str, str], ...] = ()) -> None:
        self.engine = FakeEngine()
        self.engine.content = self.content
        self.starts += 1
        self._line, self._cancelled = asyncio.Queue(), Counter()
        self._goes.set()
        self._task = asyncio.create_task(self._run(self.engine))

    def send(self, message: messages.Message) -> None:
        if isinstance(message, messages.Cancel):
            self._cancelled[message.job] += 1
        self._line.put_nowait(message)

    async def kill(self) -> None:
        self._end()

    async def gone(self) -> None:
        """They end at once."""

    def die(self) -> None:
        """SIGKILL by somebody else."""
        self._end()
        self.on_end("The engine was killed by signal 9.")

    def stop(self) -> None:
        """SIGSTOP."""
        self._goes.clear()

    def go_on(self) -> None:
        """SIGCONT."""
        self._goes.set()

    def _end(self) -> None:
        self.engine = None
        if self._task is not None:
            self._task.cancel()

    async def _run(self, engine: FakeEngine) -> None:
        device = messages.Device(
            kind="fake device",
            name=f"fake {id(self)}",
            mlx_version="0",
            memory_bytes=100 * GB,
            flops_per_second=1e15,
        )
        self.on_message(device)
        while True:
            unit = await self._line.get()
            if isinstance(unit, messages.Cancel):
                self._cancelled -= Counter([unit.job])  # what comes after it is new work
                self.on_message(messages.Cancelled(job=unit.job, ring_generation=0))
                continue
            if isinstance(unit, messages.EngineUnit):
                for report in engine.work(unit):
                    await asyncio.sleep(self.pause)
                    await self._goes.wait()
                    if getattr(unit, "job", "") in self._cancelled:
                        break
                    self.on_message(report)
                account = messages.Account(
                    is_over=True,
                    holds=engine.holding,
                    counters=engine.counters,
                    load_rate=1e9,
                    components=engine.components,
                    compiled=engine.compiled,
                )
                self.on_message(account)


class FakeMesh:
    """Agents in this event loop, real but for their engines, on the in-process transport."""

    def __init__(self, folder: Path, hosts: int, deadlines: Deadlines = DEADLINES) -> None:
        self.network, self.deadlines = Network(), deadlines
        self.folder = folder
        self.services: dict[int, Service] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        entries = [
            {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": f"127.0.0.1:{47100 + rank}"}
            for rank in range(hosts)
        ]
        members = [Member(rank, f"host:{rank}", KEY, "", "", "") for rank in range(hosts)]
        pairs = [(a, b) for a in range(hosts) for b in range(hosts) if a != b]
        links = tuple(LinkInfo(source=a, target=b, rate=1e18) for a, b in pairs)
        self.record = MeshRecord("mesh.json", json.dumps(entries), tuple(members), links=links)

    async def __aenter__(self) -> Self:
        for rank in range(len(self.record.members)):
            self.start(rank)
        return self

    async def __aexit__(self, *_error: object) -> None:
        for rank in list(self.services):
            await self.kill(rank)

    def start(self, rank: int) -> None:
        """An agent of that rank, as after `fluxmesh up`."""
        home = AgentHome(private_folder(self.folder / f"agent-{rank}"))
        listener = self.network.listen(f"host:{rank}")
        service = Service(listener, home, EngineOptions(), deadlines=self.deadlines)
        service.supervisor = FakeSupervisor(  # type: ignore[assignment]
            service._engine_said, service._engine_ended
        )
        self.services[rank] = service
        self._tasks[rank] = asyncio.create_task(service.run())

    def engine(self, rank: int) -> FakeSupervisor:
        supervisor = self.services[rank].supervisor
        assert isinstance(supervisor, FakeSupervisor)
        return supervisor

    async def kill(self, rank: int) -> None:
        """SIGKILL of an agent: its engine ends with it, and all its connections."""
        del self.services[rank]
        task = self._tasks.pop(rank)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        listener = self.network.listeners.get(f"host:{rank}")
        if listener is not None:
            await listener.close()
