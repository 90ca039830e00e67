"""A mesh in which time is a number: a session, and fake engines whose reports arrive in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fluxmesh import events
from fluxmesh.cluster.hostfile import Host
from fluxmesh.planning.plan import Plan
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.generation.session import Session
from fluxmesh_coordinator.jobs.types import (
    Answered,
    Finished,
    Gone,
    Input,
    Job,
    LeasedHost,
    Links,
    Reported,
    Send,
    Stuck,
    Tell,
    Tick,
)
from tests.fakes import FakeEngine
from tests.unit.meshes import ask, full, mac, small

SIZES = small()


@dataclass
class Machine:
    """An agent and its engine, as far as a session can see them."""

    leased: LeasedHost
    engine: FakeEngine | None = None
    line: deque[messages.Work | messages.Join] = field(default_factory=deque)
    running: Iterator[messages.Report] | None = None
    is_stopped: bool = False  # SIGSTOP of the engine
    made: list[tuple[int, int]] = field(default_factory=list)  # (image, step), of all its engines

    @property
    def at(self) -> messages.Work | messages.Join | None:
        return self.line[0] if self.line else None


class Simulation:
    """Plays a job through; `faults` may break something before each report."""

    def __init__(self, hosts: int = 1, *, faults: Any = None, **keys: Any) -> None:
        placement = keys.pop("placement", None)
        force_shard = keys.pop("force_shard", False)
        self.request = ask(**{"height": 32, "width": 32, "steps": 3, **keys})
        self.faults: Callable[[Simulation], None] = faults or (lambda _: None)
        # Links so fast that more hosts are always faster.
        view = full(*[mac(rank, holds=None) for rank in range(hosts)], rate=1e18)
        self.links = Links(tuple(replace(link, latency=0.0) for link in view.links))
        self.machines = {host.rank: self.machine(host.rank) for host in view.hosts}
        job = Job("job", self.request, SIZES, b"secret", placement, force_shard)
        self.session = Session(job)
        self.now = 0.0
        self.sent: list[Send] = []
        self.told: list[events.Event] = []
        self.acknowledged: dict[int, int] = {}
        self.repeated: list[tuple[int, int]] = []  # steps made after they were acknowledged
        self.end: Finished | None = None
        self.stuck: list[str] = []
        self.reports = 0

    def machine(self, rank: int, fence: int = 1) -> Machine:
        host = Host(rank, "127.0.0.1", ("127.0.0.1",))
        return Machine(LeasedHost(mac(rank, holds=None), host, fence, 0, is_up=False))

    def give(self, nbytes: int) -> None:
        """Each host has so much memory, before it begins."""
        for machine in self.machines.values():
            info = replace(machine.leased.info, memory_bytes=nbytes, free_bytes=nbytes)
            machine.leased = replace(machine.leased, info=info)

    def plan(self) -> Plan:
        """How it would be done, before it begins."""
        hosts = [machine.leased.info for machine in self.machines.values()]
        return self.session.find(hosts, self.links)

    # Running

    def begin(self) -> Simulation:
        hosts = [machine.leased for machine in self.machines.values()]
        self._do(self.session.begin(hosts, self.links, self.now))
        return self

    def run(self, limit: int = 5000) -> Simulation:
        """Until the end, or until nothing is left that could happen."""
        self.begin()
        for _ in range(limit):
            if self.end is not None or not self.turn():
                break
        return self

    def turn(self) -> bool:
        """The next report of each machine; where none comes, time passes. False when over."""
        moved = False
        for rank in list(self.machines):
            self.faults(self)
            moved = self.report(rank) or moved
        self.now += 0.1
        if not moved:
            self.now += 1.0
            self.feed(Tick())
        return self.end is None and not (self.stuck and not moved) and self.now < 3000

    def turn_clock(self) -> None:
        """Lets the session look at its clock."""
        self.feed(Tick())

    def report(self, rank: int) -> bool:
        machine = self.machines.get(rank)
        if machine is None or machine.is_stopped or machine.at is None:
            return False
        if machine.engine is None:
            machine.engine = FakeEngine()
        if machine.running is None:
            machine.running = machine.engine.work(machine.line[0])
        before = len(machine.engine.steps)
        report = next(machine.running, None)
        for image, step in machine.engine.steps[before:]:
            machine.made.append((image, step))
            if step <= self.acknowledged.get(image, 0) and machine.engine.rank == 0:
                self.repeated.append((image, step))
        if report is None:
            machine.line.popleft()
            machine.running = None
            return True
        if isinstance(report, messages.Stepped) and report.latents is not None:
            known = self.acknowledged.get(report.image, 0)
            self.acknowledged[report.image] = max(known, report.step)
        self.reports += 1
        self.feed(Reported(rank, report))
        return True

    def feed(self, event: Input) -> None:
        self._do(self.session.handle(event, self.now))

    def _do(self, instructions: Any) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self.sent.append(instruction)
                    self._sent(instruction)
                case Tell():
                    self.told.append(instruction.event)
                case Stuck():
                    self.stuck.append(instruction.reason)
                case Finished():
                    self.end = instruction

    def _sent(self, send: Send) -> None:
        machine, message = self.machines.get(send.rank), send.message
        if machine is None:
            return
        answer: messages.Message = messages.Done()
        match message:
            case messages.AskPorts():
                answer = messages.Ports((40000 + len(self.sent),))
            case messages.Kill():
                self._empty(machine)
            case messages.Cancel():
                if not machine.is_stopped:
                    machine.line.clear()
                    machine.running = None
                    epoch = self.session.course.workers[send.rank].epoch
                    self.feed(Reported(send.rank, messages.Cancelled(message.job, epoch)))
            case messages.Work() | messages.Join():
                machine.line.append(message)
        self.feed(Answered(send.rank, message, answer))

    # Faults

    def kill_engine(self, rank: int) -> None:
        machine = self.machines[rank]
        epoch = self.session.course.workers[rank].epoch
        self._empty(machine)
        self.feed(Reported(rank, messages.Failed(epoch, "job", "Died", "It was killed.", True)))

    def stop_engine(self, rank: int) -> None:
        self.machines[rank].is_stopped = True

    def fail(self, rank: int, kind: str, text: str = "x.", *, fatal: bool = False) -> None:
        machine = self.machines[rank]
        machine.line.clear()
        machine.running = None
        epoch = self.session.course.workers[rank].epoch
        self.feed(Reported(rank, messages.Failed(epoch, "job", kind, text, fatal)))

    def lose(self, rank: int) -> None:
        del self.machines[rank]
        self.feed(Gone(rank, "Its agent is silent."))

    def _empty(self, machine: Machine) -> None:
        machine.engine, machine.running, machine.is_stopped = None, None, False
        machine.line.clear()

    # What came of it

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.told if isinstance(event, kind)]

    def messages(self, kind: type[Any], rank: int | None = None) -> list[Any]:
        return [
            send.message
            for send in self.sent
            if isinstance(send.message, kind) and rank in (None, send.rank)
        ]
