"""One training as its session sees it: what it is, what the run asks for, what comes of it. Pure.

The vocabulary of `session.py`, beside that of `jobs/types.py`. A run (`fluxmesh/training/run.py`)
asks for one `Task` after another; each is answered by one `Result`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np

from fluxmesh.cluster.snapshot import HostInfo, MeshView, ModelVariant
from fluxmesh.planning.remedies import Remedy, of_training
from fluxmesh.training.data.encode_units import Caption, Crop, Unit, caption_name, crop_name
from fluxmesh.training.needs import NUMBER_BYTES
from fluxmesh.training.plan import NO_CAPTION, TrainingPlan
from fluxmesh.training.run import UpdateResult
from fluxmesh.wire.messages.training import PutFeatures
from fluxmesh_coordinator.jobs.types import Asked, Job, Links, Result

A = TypeVar("A")
Vectors = Mapping[str, np.ndarray]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TrainingJob(Job):
    """A run, ready for a mesh."""

    plan: TrainingPlan
    weights: ModelVariant
    base_bytes: int  # of the transformer in memory
    size: int  # numbers that are trained
    content: str = ""  # `Checkpoint.content` of the base here; "": nobody knows
    ways: tuple[Remedy, ...] = ()  # how it can be done, as `training/needs.py` has them
    features: Callable[[Unit], Arrays] = field(repr=False)  # what a unit was encoded to
    pixels: Callable[[Crop], np.ndarray] = field(repr=False)  # uint8 [height, width, 3]

    @property
    def needed_bytes(self) -> int:
        """What a host must have at least: activations come on top."""
        return self.base_bytes + NUMBER_BYTES * self.size


# What a run asks for


class Task(Generic[A]):
    """Base of what a run asks for; `A` is what it is answered with."""


@dataclass(frozen=True)
class EncodeTask(Task[None]):
    """Every unit becomes an `UnitEncoded`, in any order."""

    units: tuple[Unit, ...]


@dataclass(frozen=True)
class OpenTask(Task[None]):
    """The hosts get ready, at a state that `update` updates have led to."""

    update: int
    vectors: Vectors = field(repr=False)


@dataclass(frozen=True)
class AdvanceTask(Task[UpdateResult]):
    """Gives a `UpdateResult`."""

    update: int  # counted from 0


@dataclass(frozen=True)
class ValidateTask(Task[float]):
    """Gives the loss."""


@dataclass(frozen=True)
class PaintTask(Task[np.ndarray]):
    """Gives the pixels."""


@dataclass(frozen=True)
class GiveTask(Task[Vectors]):
    """Gives the state's vectors. What a host that dies later costs is counted from here."""


@dataclass(frozen=True)
class HaltTask(Task["Halted"]):
    """Breaks off whatever runs. Gives a `Halted`."""


@dataclass(frozen=True)
class FinishTask(Task[None]):
    """The end: hosts let go of the training."""


@dataclass(frozen=True)
class Wanted(Asked):
    """The run asks for something."""

    number: int  # of the task, so that an answer that comes late is known for one
    task: Task[Any]

    def with_arrays(self, change: Callable[[np.ndarray], np.ndarray]) -> Self:
        if not isinstance(self.task, OpenTask):
            return self
        vectors = {name: change(vector) for name, vector in self.task.vectors.items()}
        return replace(self, task=replace(self.task, vectors=vectors))


# What comes of it


@dataclass(frozen=True)
class Answer(Result):
    """A task is done."""

    number: int
    value: object = None


@dataclass(frozen=True)
class UnitEncoded(Result):
    unit: Unit
    arrays: Arrays = field(repr=False)


@dataclass(frozen=True)
class Halted:
    """Nothing runs any more."""

    update: int | None  # updates that the hosts' state has behind it; None where there is none
    moved: UpdateResult | None  # the last of these


# What engines are told of the run


@dataclass(frozen=True, kw_only=True)
class Opening:
    """`OpenTraining`'s account of a run."""

    request: str
    sizes: np.ndarray = field(repr=False)
    captions: np.ndarray = field(repr=False)
    repeats: np.ndarray = field(repr=False)
    priors: int


class Names:
    """Captions by number, and which features a piece of work needs."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.plan = job, job.plan
        self._texts = self.plan.captions
        self._numbers = {text: str(number) for number, text in enumerate(self._texts)}
        self._numbers[NO_CAPTION] = NO_CAPTION

    def opening(self) -> Opening:
        plan = self.plan
        prompt = plan.request.progress_prompt
        request = replace(
            plan.request,
            dataset="",
            model="",
            output_dir="",
            prior_folder="",
            cache_dir=None,
            trigger="",
            resume=False,
            progress_prompt=self._numbers[prompt] if prompt else "",
        )
        captions = [int(self._numbers[example.caption]) for example in plan.examples]
        return Opening(
            request=json.dumps(dataclasses.asdict(request)),
            sizes=np.array([example.size for example in plan.examples], np.int32),
            captions=np.array(captions, np.int32),
            repeats=np.array([example.repeats for example in plan.examples], np.int32),
            priors=len(set(plan.priors)),
        )

    def of_micro_batches(self, numbers: Iterable[int]) -> list[str]:
        """Features that micro-batches are made of."""
        names = []
        for number in numbers:
            for part in self.plan.parts(number):
                for item, caption in zip(part.items, part.captions, strict=True):
                    image, crop = item
                    names += [crop_name(image, crop), caption_name(self._numbers[caption])]
        return list(dict.fromkeys(names))

    def held_out(self) -> list[str]:
        """Features that validation needs."""
        names = []
        for image in self.plan.held_out:
            caption = self.plan.examples[image].caption
            names += [crop_name(image, 0), caption_name(self._numbers[caption])]
        return list(dict.fromkeys(names))

    def prompt(self) -> list[str]:
        """Features that the progress picture needs."""
        return [caption_name(self._numbers[self.plan.request.progress_prompt])]

    def unit(self, name: str) -> Unit:
        """What features of this name were encoded from."""
        kind, _, rest = name.partition(" ")
        if kind == "crop":
            image, crop = rest.split()
            return Crop(int(image), int(crop))
        return Caption(self._texts[int(rest)] if rest else NO_CAPTION)

    def name_of(self, unit: Unit) -> str:
        """The other way round."""
        if isinstance(unit, Crop):
            return crop_name(unit.image, unit.crop)
        return caption_name(self._numbers[unit.text])

    def put(self, name: str, fence: int, ring_generation: int) -> PutFeatures:
        """The message that brings features to a host."""
        return PutFeatures(
            fence=fence,
            job=self.job.id,
            ring_generation=ring_generation,
            name=name,
            features=self.job.features(self.unit(name)),
        )


# Who takes part


@dataclass(frozen=True)
class Chosen:
    """The hosts of a training, in the order of their ring."""

    ranks: tuple[int, ...]
    seconds: float = 0.0  # nobody can say how long it takes
    text_rank: int | None = None


@dataclass(frozen=True)
class Choice:
    """`winner` is None where no host can take part, for `reason`."""

    winner: Chosen | None
    reason: str = ""
    remedies: tuple[Remedy, ...] = ()  # as a plan has them


def choose(job: TrainingJob, hosts: Sequence[HostInfo], links: Links) -> Choice:
    """As many hosts as have the memory and can form a ring."""
    if not hosts:
        return Choice(None, "No host of the mesh can be used now.")
    fitting = _fitting(job.needed_bytes, hosts)
    if not fitting:
        room = _room(hosts)
        most = max(min(host.memory_bytes, room[host.device_key]) for host in hosts)
        return Choice(
            None,
            f"Training {job.weights.model} needs {job.needed_bytes / 1e9:.1f} GB on a host for the "
            f"weights alone, and none may use more than {most / 1e9:.1f} GB.",
            of_training(
                job.ways,
                MeshView(tuple(hosts)),
                lambda needed, view: bool(_fitting(needed, view.hosts)),
            ),
        )
    return Choice(Chosen(next(ring for ring in _rings(fitting) if _is_linked(ring, links))))


def _fitting(needed: int, hosts: Sequence[HostInfo]) -> list[int]:
    """The hosts that have so many bytes for it, where those of one device share its memory."""
    fitting, room = [], _room(hosts)
    for host in sorted(hosts, key=lambda host: host.rank):
        if needed <= min(host.memory_bytes, room[host.device_key]):
            room[host.device_key] -= needed
            fitting.append(host.rank)
    return fitting


def _room(hosts: Sequence[HostInfo]) -> dict[str, int]:
    """Bytes that each device has, once its hosts have let go of what they hold."""
    room: dict[str, int] = {}
    for host in hosts:
        room[host.device_key] = room.get(host.device_key, host.free_bytes) + host.held_bytes
    return room


def _rings(ranks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All of them, then fewer and fewer neighbours."""
    twice = [*ranks, *ranks]
    yield tuple(ranks)
    for count in range(len(ranks) - 1, 0, -1):
        for first in range(len(ranks)):
            yield tuple(sorted(twice[first : first + count]))


def _is_linked(ranks: tuple[int, ...], links: Links) -> bool:
    """Whether each can send to the next one; a mesh that never measured its links has all."""
    if len(ranks) == 1 or not links.links:
        return True
    known = {(link.source, link.target) for link in links.links}
    return all(pair in known for pair in zip(ranks, ranks[1:] + ranks[:1], strict=True))
