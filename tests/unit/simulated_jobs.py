"""Fake engines that train, for a session that is pure: reports arrive in turn, time is a number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import Weights
from fluxmesh.models.flux1.config import AutoencoderConfig, FluxConfig, ScheduleConfig
from fluxmesh.training.data.dataset import Example
from fluxmesh.training.data.encode_units import Crop, Unit
from fluxmesh.training.plan import prepare
from fluxmesh.training.request import TrainRequest
from fluxmesh.weights.checkpoint import ModelDefaults
from fluxmesh.wire import messages
from fluxmesh.wire import training_messages as training
from fluxmesh_coordinator.jobs.training import tasks as train_jobs
from fluxmesh_coordinator.jobs.training.session import TrainSession
from fluxmesh_coordinator.jobs.training.tasks import TrainJob, Wanted
from fluxmesh_coordinator.jobs.types import (
    Answered,
    Finished,
    Gone,
    LeasedHost,
    Links,
    Reported,
    Send,
    Stuck,
    Tell,
    Tick,
)
from tests.unit.meshes import GB, mac

SIZE = 100  # numbers that are trained


@dataclass
class Base:
    """As much of a checkpoint as a plan reads."""

    transformer: FluxConfig = field(default_factory=FluxConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    defaults: ModelDefaults = field(default_factory=lambda: ModelDefaults(4, 4.0, 64, 64, 16))


def job(**changed: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "dataset": "data",
        "seed": 1,
        "iterations": 24,
        "grad_accumulate": 8,
        "num_augmentations": 2,
        "validation": 1,
        "caption_dropout": 0.3,
        "progress_prompt": "a cat",
    }
    request = TrainRequest(**fields | changed)
    examples = [Example("", f"caption {i % 3}", f"{i:064x}", (64, 64), b"") for i in range(5)]
    plan = prepare(request, examples, Base())  # type: ignore[arg-type]

    def features(unit: Unit) -> dict[str, np.ndarray]:
        if isinstance(unit, Crop):
            return {"latents": np.zeros((1, 16, 64), np.float32)}
        return {"t5": np.zeros((1, 4, 8), np.uint16), "clip": np.zeros((1, 8), np.uint16)}

    def pixels(crop: Crop) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)

    return TrainJob("job", plan, Weights("m"), 24 * GB, SIZE, b"secret", features, pixels)


class Engine:
    """What an engine of a training remembers, and what it would say."""

    def __init__(self) -> None:
        self.features: set[str] = set()
        self.vectors: dict[str, np.ndarray] = {}
        self.update: int | None = None
        self.request: TrainRequest | None = None
        self.content = "same"  # of the files that it reads

    def work(self, message: Any) -> Iterator[messages.Report]:
        head = (getattr(message, "job", ""), message.epoch)
        match message:
            case messages.Join():
                yield messages.Joined(message.epoch, message.rank)
            case messages.Encode():
                array = np.full((1, 4, 8), len(message.prompt), np.uint16)
                yield messages.Encoded(*head, 0.1, False, 1, self.content, array, array[0])
            case messages.EncodeSource():
                yield messages.SourceEncoded(*head, np.zeros((1, 16, 64), np.float32))
            case training.PutVector():
                assert message.total == SIZE
                vector = self.vectors.setdefault(message.vector, np.zeros(SIZE, np.float32))
                vector[message.offset : message.offset + len(message.numbers)] = message.numbers
            case training.OpenTraining():
                assert (message.update > 0) == bool(self.vectors)
                if message.update:  # the state says how old it is: see `GiveVectors`
                    assert self.vectors["weights"][0] == message.update
                self.update = message.update
                yield training.Opened(*head, SIZE, self.content)
            case training.PutFeatures():
                self.features.add(message.name)
            case training.DropFeatures():
                self.features -= set(message.features)
            case training.Update():
                assert message.update == self.update
                for number in message.numbers:
                    yield training.Computed(*head, number, 0.5)
                self.update += 1
                told = (1 / self.update, 1.0, 0.1, 8, 0, 1.0, 100)
                yield training.Moved(*head, self.update, *told)
            case training.GiveVectors():
                assert self.update is not None
                vector = np.full(SIZE, self.update, np.float32)
                yield training.VectorPart(*head, self.update, "weights", 0, SIZE, False, vector)
                yield training.VectorPart(*head, self.update, "first", 0, SIZE, True, vector)
            case training.Validate():
                yield training.HeldOut(*head, 0.5)
            case training.PaintProgress():
                yield training.Painted(*head, np.zeros((8, 8, 3), np.uint8))
            case training.CloseTraining():
                yield training.Closed(*head)


@dataclass
class Machine:
    leased: LeasedHost
    engine: Engine = field(default_factory=Engine)
    line: deque[Any] = field(default_factory=deque)
    running: Iterator[messages.Report] | None = None
    is_stopped: bool = False
    computed: list[int] = field(default_factory=list)


class Simulation:
    """A session, its machines, and what the run hears."""

    def __init__(self, hosts: int, links: Links | None = None, **changed: Any) -> None:
        self.job = job(**changed)
        self.session = TrainSession(self.job)
        self.machines = {rank: self.machine(rank) for rank in range(hosts)}
        self.now, self.number = 0.0, 0
        self.told: list[Any] = []
        self.sent: list[Send] = []
        self.stuck: list[str] = []
        self.end: Finished | None = None
        self.before: Callable[[Any, int], None] = lambda report, rank: None
        leased = [machine.leased for machine in self.machines.values()]
        self._do(self.session.begin(leased, links or Links(), self.now))

    def machine(self, rank: int, fence: int = 1) -> Machine:
        host = Host(rank, "127.0.0.1", ("127.0.0.1",))
        return Machine(LeasedHost(mac(rank, holds=None), host, fence, 0, is_up=False))

    def ask(self, task: train_jobs.Task) -> Any:
        """What the task gives."""
        self.number += 1
        self.feed(Wanted(self.number, task))
        for _ in range(10_000):
            found = [a for a in self.of(train_jobs.Answer) if a.number == self.number]
            if found or self.end is not None or self.stuck:
                break
            self.turn()
        assert found, (self.end, self.stuck)
        return found[0].value

    def opened(self) -> Simulation:
        self.ask(train_jobs.Open(0, {}))
        return self

    def turn(self) -> None:
        """A report of each machine; where none comes, time passes."""
        self.now += 0.1
        moved = [self.report(rank) for rank in list(self.machines)]
        if not any(moved):
            self.now += 1.0
        self.feed(Tick())

    def report(self, rank: int) -> bool:
        machine = self.machines.get(rank)
        if machine is None or machine.is_stopped or not (machine.running or machine.line):
            return False
        first = machine.line[0]
        if isinstance(first, training.Update) and not self._can_move(first):
            return False
        if machine.running is None:
            if isinstance(first, training.Update):
                needed = self.session.course.names.of_micro_batches(first.numbers)
                assert set(needed) <= machine.engine.features
            machine.running = machine.engine.work(first)
        report = next(machine.running, None)
        if report is None:
            machine.line.popleft()
            machine.running = None
            return True
        self.before(report, rank)
        if machine.running is None or self.machines.get(rank) is not machine:
            return True  # it was struck
        if isinstance(report, training.Computed):
            machine.computed.append(report.number)
        self.feed(Reported(rank, report))
        return True

    def _can_move(self, update: training.Update) -> bool:
        """A ring's update begins when all have it, here: as its sum would wait for all."""
        together = [m for m in self.machines.values() if m.line and m.line[0].epoch == update.epoch]
        ready = [m for m in together if isinstance(m.line[0], training.Update) and not m.is_stopped]
        ring = self.session.course.ring
        return ring is not None and (
            any(m.running for m in together) or len(ready) == len(ring.ranks)
        )

    def feed(self, event: Any) -> None:
        self._do(self.session.handle(event, self.now))

    def _do(self, instructions: Any) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self.sent.append(instruction)
                    self._sent(instruction.rank, instruction.message)
                case Tell():
                    self.told.append(instruction.event)
                case Stuck():
                    self.stuck.append(instruction.reason)
                case Finished():
                    self.end = instruction

    def _sent(self, rank: int, message: Any) -> None:
        machine = self.machines.get(rank)
        if machine is None:
            return
        answer: messages.Message = messages.Done()
        match message:
            case messages.AskPorts():
                answer = messages.Ports((40000 + len(self.sent),))
            case messages.Kill():
                self._empty(machine)
            case messages.Cancel():
                machine.line.clear()
                machine.running = None
                epoch = self.session.course.hands[rank].worker.epoch
                self.feed(Reported(rank, messages.Cancelled(message.job, epoch)))
            case messages.Work() | messages.Join():
                machine.line.append(message)
        self.feed(Answered(rank, message, answer))

    def _empty(self, machine: Machine) -> None:
        machine.engine, machine.running, machine.is_stopped = Engine(), None, False
        machine.line.clear()

    # Faults

    def kill(self, rank: int, late: int = 0) -> None:
        """An engine dies; another is given the last `late` messages: they were on their way."""
        machine = self.machines[rank]
        on_their_way = list(machine.line)[len(machine.line) - late :]
        self._empty(machine)
        machine.line.extend(on_their_way)
        epoch = self.session.course.hands[rank].worker.epoch
        self.feed(Reported(rank, messages.Failed(epoch, "job", "Died", "It was killed.", True)))

    def fail(self, rank: int, kind: str) -> None:
        machine = self.machines[rank]
        machine.running = None
        machine.line.clear()
        epoch = self.session.course.hands[rank].worker.epoch
        self.feed(Reported(rank, messages.Failed(epoch, "job", kind, "No.", False)))

    def lose(self, rank: int) -> None:
        del self.machines[rank]
        self.feed(Gone(rank, "Its agent is silent."))

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.told if isinstance(event, kind)]

    def messages(self, kind: type[Any]) -> list[Any]:
        return [send.message for send in self.sent if isinstance(send.message, kind)]


def train(sim: Simulation, updates: int = 3, checkpoint: int = 1) -> list[float]:
    """A run's loop; the losses that it hears."""
    losses = []
    for update in range(updates):
        losses.append(sim.ask(train_jobs.Advance(update)).loss)
        if (update + 1) % checkpoint == 0:
            vectors = sim.ask(train_jobs.Give())
            assert vectors["weights"][0] == update + 1
    return losses


LOSSES = [1.0, 1 / 2, 1 / 3]


def once(sim: Simulation, when: Callable[[Any, int], bool], hurt: Callable[[], None]) -> None:
    """Does harm before the first report that `when` is true of."""
    done: list[bool] = []

    def before(report: Any, rank: int) -> None:
        if not done and when(report, rank):
            done.append(True)
            hurt()

    sim.before = before
