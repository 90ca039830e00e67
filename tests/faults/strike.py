"""A job that is struck at a chosen moment: who is hurt, when, how, and what came of it.

Stands on `mesh.py`; `test_deaths.py`, `test_hangs.py` and `tools/chaos.py` use it. Engines are
slowed down (`DELAYS`), so that a moment lasts long enough to be hit, and a step that runs twice is
counted twice. Steps are counted in two ways: what the coordinator asked for and what had been
acknowledged then (`Log`, exact), and what the engines counted themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np

from fluxmesh.cluster.snapshot import Placement
from fluxmesh.events import Encoded, Event, Loading, Picture, Planned, Step
from fluxmesh.models.flux1.config import FluxConfig
from fluxmesh.request import GenerateRequest, SourceImage
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents.client import AgentClient
from fluxmesh_coordinator.jobs.generation.images import ImageTable
from fluxmesh_coordinator.runtime.mesh import Mesh
from tests.alone import painted_alone
from tests.checkpoints import make_checkpoint
from tests.faults.mesh import LIMIT, Outcome, Up, paint
from tests.flux2_checkpoint import TWELVE_HEADS, make_flux2

STEP, DECODE, LOAD = 0.3, 0.3, 0.2  # seconds that an engine pauses
DELAYS = f"step={STEP},encode=0.2,decode={DECODE},load={LOAD}"
STEPS = 4
DEADLINE = 5.0  # seconds of silence that mean death, for steps as short as ours
SLACK = 10.0  # seconds that a death may cost beside the lost step; our loads are within it

# 6 heads: they divide by 1, 2 and 3 hosts.
TRANSFORMER = FluxConfig(
    in_channels=64,
    out_channels=64,
    vec_in_dim=32,
    context_in_dim=32,
    hidden_size=96,
    num_heads=6,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)

Moment = Literal["load", "encode", "first", "middle", "last", "decode", "save"]
MOMENTS: tuple[Moment, ...] = ("load", "first", "middle", "last", "decode", "save")


ModelFamily = Literal["flux1", "flux2"]
MODEL_FAMILIES: tuple[ModelFamily, ...] = ("flux1", "flux2")


def make_model(folder: Path, family: ModelFamily = "flux1") -> str:
    """A random checkpoint that 1, 2 and 3 hosts can share, FLUX.2's 4 too; every bias counts."""
    if family == "flux2":
        return str(make_flux2(folder, transformer=TWELVE_HEADS))
    return str(make_checkpoint(folder, transformer=TRANSFORMER).path)


ModelKind = Literal["flux1", "flux2", "base", "dev", "canny"]
MODEL_KINDS: tuple[ModelKind, ...] = ("flux1", "flux2", "base", "dev", "canny")
TOOL = "canny"  # in the path of one that follows a map, and paints nothing without


def make_kind(folder: Path, kind: ModelKind) -> str:
    """A random checkpoint, also of those that take more than a prompt: klein ("flux2") references,
    a base model and dev a negative prompt, canny a map. 1, 2 and 3 hosts can share it."""
    if kind == "base":
        return str(make_flux2(folder / kind, kind, transformer=TWELVE_HEADS))
    if kind in ("dev", TOOL):
        wide = TRANSFORMER.in_channels * (2 if kind == TOOL else 1)
        sizes = replace(TRANSFORMER, in_channels=wide)
        return str(make_checkpoint(folder / kind, transformer=sizes, guidance=True).path)
    return make_model(folder / kind, kind)


def conditions(kind: ModelKind, seed: int = 0) -> dict[str, Any]:
    """What a request gives such a model beside a prompt; nothing where it takes nothing."""
    draw = np.random.default_rng(seed)
    pictures = [draw.integers(0, 256, (64, 80, 3), dtype=np.uint8) for _ in range(2)]
    if kind == "flux2":
        return {"references": tuple(pictures[: 1 + seed % 2])}
    if kind in ("base", "dev"):
        return {"negative": "a house", "cfg": 2.0 + seed % 3}
    return {"control": pictures[0]} if kind == TOOL else {}


def painted_over(height: int, width: int, seed: int = 0) -> SourceImage:
    """A picture to begin from, of so many pixels, of which the left half is painted."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return SourceImage(pixels, 0.8, mask)


def hosts_of(family: ModelFamily) -> tuple[int, ...]:
    """The sizes of meshes whose every process is hurt."""
    return (2, 3) if family == "flux1" else (2, 4)


def request_of(model: str, **keys: Any) -> GenerateRequest:
    fields = {"seed": 5, "height": 32, "width": 48, "steps": STEPS, "n_images": 2, **keys}
    if Path(model).name == TOOL:
        fields = conditions(TOOL) | fields
    return GenerateRequest("two dogs", model=model, dtype="float32", **fields)


def request_for(model: str, placement: Placement, hosts: int) -> GenerateRequest:
    """One that gives every host something to do at any moment."""
    return request_of(model, n_images=hosts if placement == "data" else 2)


def alone(request: GenerateRequest) -> dict[int, np.ndarray]:
    """The pictures of one host that nobody hurts."""
    return dict(enumerate(painted_alone(request)))


def difference(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> int:
    """The largest difference of two pixels, of 255, between pictures `b` and the right ones."""
    return max(int(np.abs(a[k].astype(int) - b[k]).max()) for k in b)


def allowed(placement: str) -> int:
    """How far a pixel may be from that of one host."""
    return 0 if placement == "data" else 1


# When and whom


@dataclass(frozen=True)
class Fault:
    """Who is hurt, when, and how."""

    placement: Placement
    moment: Moment
    victim: Literal["engine", "agent"]
    rank: int
    number: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.victim}-{self.rank}-{self.moment}-{self.placement}"


def faults_of(hosts: int, number: signal.Signals) -> list[Fault]:
    """Every engine and every agent at every moment, for every placement."""
    return [
        Fault(placement, moment, victim, rank, number)
        for placement in ("data", "tensor", "sequence")
        for victim in ("engine", "agent")
        for rank in range(hosts)
        for moment in MOMENTS
    ]


def is_moment(moment: Moment, event: Event, steps: int) -> bool:
    """Whether `event` opens the moment: what it names is under way when it is told."""
    match moment:
        case "load":
            return isinstance(event, Loading)
        case "encode":
            return isinstance(event, Planned)
        case "first":
            return isinstance(event, Encoded)
        case "save":
            return isinstance(event, Picture)
    done = {"middle": steps // 2, "last": steps - 1, "decode": steps}[moment]
    return isinstance(event, Step) and event.step == done


# Counting


@dataclass
class Log:
    """What one coordinator asked for and what had come by then, in the order of its own loop."""

    reached: dict[int, int] = field(default_factory=dict)  # image -> steps acknowledged
    again: list[str] = field(default_factory=list)  # acknowledged steps that were asked for
    twice: list[str] = field(default_factory=list)  # steps that came twice


@contextmanager
def watched() -> Iterator[Log]:
    """Looks on while coordinators of this process work."""
    log = Log()
    acknowledge, post = ImageTable.acknowledge, AgentClient.post

    def acknowledged(self: ImageTable, index: int, step: int, *rest: Any, **more: Any) -> bool:
        is_news = acknowledge(self, index, step, *rest, **more)
        if not is_news:
            log.twice.append(f"step {step} of image {index}")
        log.reached[index] = max(step, log.reached.get(index, 0))
        return is_news

    async def posted(self: AgentClient, message: messages.Message) -> Any:
        if isinstance(message, messages.Paint):
            reached = log.reached.get(message.image, 0)
            if message.first < reached:
                log.again.append(f"image {message.image} from {message.first}, was at {reached}")
        return await post(self, message)

    with (
        mock.patch.object(ImageTable, "acknowledge", acknowledged),
        mock.patch.object(AgentClient, "post", posted),
    ):
        yield log


Life = tuple[int | None, int]  # an engine's process, and the steps it has counted


def lives(mesh: Mesh, hosts: int) -> dict[int, Life]:
    """Of each host that answers."""
    statuses = mesh.status()
    return {
        rank: (status.engine_pid, status.counters.steps)
        for rank in range(hosts)
        if isinstance(status := statuses[rank], messages.Status)
    }


def steps_run(begin: dict[int, Life], struck: dict[int, Life], end: dict[int, Life]) -> int:
    """Steps that all engines made between `begin` and `end`, dead ones up to `struck`."""
    total = 0
    for rank, (pid, steps) in end.items():
        total += steps
        was_pid, was = struck[rank]
        if was_pid == pid:
            total -= begin[rank][1]
        else:
            total += was - begin[rank][1]
    return total


# The job


@dataclass
class Struck:
    """What came of a job that was hurt."""

    outcome: Outcome
    log: Log
    begin: dict[int, Life]
    struck: dict[int, Life]
    end: dict[int, Life]
    at: float  # when it was hurt, on `time.monotonic`
    noticed: float | None  # seconds until a loss was told

    @property
    def steps_run(self) -> int:
        return steps_run(self.begin, self.struck, self.end)


def heal(up: Up, mesh: Mesh, placement: Placement, *, cold: bool = False) -> None:
    """Every host answers, is free, and holds its weights; or, `cold`, has a dead engine."""
    hosts = len(up.ports)
    for rank in range(hosts):
        up.status(mesh, rank)
    if not cold:
        warm = paint(mesh, request_of(up.model, steps=1, n_images=hosts), placement)
        assert warm.error is None, warm.error
        return
    # Nothing is to be loaded before the job asks for it.
    mesh._run(mesh._pool.tell({rank: messages.Keep(weights=None) for rank in range(hosts)}))
    for rank in range(hosts):
        pid = up.status(mesh, rank).engine_pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + LIMIT
    while any(up.status(mesh, rank).engine_pid for rank in range(hosts)):
        assert time.monotonic() < end, "an agent does not see that its engine is dead"
        time.sleep(0.05)


def strike(
    up: Up,
    mesh: Mesh,
    request: GenerateRequest,
    fault: Fault,
    hurt: Callable[[], None] | None = None,
) -> Struck:
    """Runs `request`, and does harm once, as `fault` says (or `hurt` does).

    What was stopped goes on once the job is over.
    """
    hosts = len(up.ports)
    begin = lives(mesh, hosts)
    struck: dict[int, Life] = {}
    times: list[float] = []
    noticed: list[float] = []
    stopped: list[int] = []

    def look(event: Event) -> None:
        is_other = isinstance(event, Loading) and event.host != fault.rank  # it may have no engine
        if not times and not is_other and is_moment(fault.moment, event, request.steps or STEPS):
            struck.update(lives(mesh, hosts))
            times.append(time.monotonic())
            if hurt is not None:
                hurt()
            else:
                stopped.append(up.pid(fault.victim, fault.rank))
                os.kill(stopped[0], fault.number)
        elif times and type(event).__name__ == "HostLost":
            noticed.append(time.monotonic() - times[0])

    try:
        with watched() as log:
            outcome = paint(mesh, request, fault.placement, look)
    finally:
        for pid in stopped:
            wake(pid)
    assert times, f"the moment {fault.moment} never came: {outcome}"
    at = times[0]
    return Struck(outcome, log, begin, struck, {}, at, noticed[0] if noticed else None)


def wake(pid: int) -> None:
    """SIGCONT, for a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
