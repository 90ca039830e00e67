"""A mesh in which time is a number: a session, and fake engines whose reports arrive in turn.

`simulated_jobs.py` stands on it: what is asked of the mesh, for a generation and for a training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

from fluxmesh import events
from fluxmesh.cluster.hostfile import Host
from fluxmesh.cluster.snapshot import Timings
from fluxmesh.planning.learning import learned
from fluxmesh.planning.plan import Plan
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.session import JobSession
from fluxmesh_coordinator.jobs.types import (
    Answered,
    Back,
    Gone,
    Input,
    Instruction,
    JobFinished,
    JobStuck,
    Learn,
    Leased,
    LeasedHost,
    LetGo,
    Links,
    Remember,
    Reported,
    SendToAgent,
    TellUser,
    Tick,
)
from tests.fakes import FakeEngine
from tests.unit.meshes import mac

SILENT_AGENT = "Its agent is silent."
S = TypeVar("S", bound=JobSession[Any])


def leased(rank: int, fence: int = 1) -> LeasedHost:
    host = Host(rank, "127.0.0.1", ("127.0.0.1",))
    return LeasedHost(
        info=mac(rank, holds=None), host=host, fence=fence, ring_generation=0, is_up=False
    )


@dataclass
class SimulatedMachine:
    """An agent and its engine, as far as a session can see them."""

    leased: LeasedHost
    engine: FakeEngine = field(default_factory=FakeEngine)
    line: deque[messages.EngineUnit] = field(default_factory=deque)
    running: Iterator[messages.Report] | None = None
    is_stopped: bool = False  # SIGSTOP of the engine
    made: list[tuple[int, int]] = field(default_factory=list)  # (image, step), of all its engines
    computed: list[int] = field(default_factory=list)  # micro-batches, the same

    @property
    def at(self) -> messages.EngineUnit | None:
        return self.line[0] if self.line else None

    @property
    def done(self) -> int:
        """Steps and micro-batches."""
        return len(self.made) + len(self.computed)

    def empty(self) -> None:
        """Its engine is gone."""
        self.engine, self.is_stopped = FakeEngine(), False
        self.break_off()

    def break_off(self) -> None:
        self.line.clear()
        self.running = None


class Simulation(Generic[S]):
    """Plays a job through; `faults` and `before` may break something before each report."""

    def __init__(self, session: S, hosts: int, links: Links) -> None:
        self.session, self.links = session, links
        self.machines = {rank: SimulatedMachine(leased(rank)) for rank in range(hosts)}
        self.ranks = tuple(self.machines)
        self.faults: Callable[[Any], None] = lambda _: None
        self.before: Callable[[messages.Report, int], None] = lambda report, rank: None
        self.now = 0.0
        self.learned = Timings()  # what the session measured
        self.reports = 0
        self.sent: list[SendToAgent] = []
        self.events: list[Any] = []
        self.heard: list[tuple[float, Input]] = []  # by the session
        self.out: list[list[Instruction]] = []  # what it said to each of these
        self.stuck: list[str] = []
        self.let_go: list[int] = []  # hosts that others may have
        self.end: JobFinished | None = None

    # What a kind of job is

    def drive(self) -> None:
        """Whoever stands above the session asks for more, if it has what it asked for."""

    def check(self) -> None:
        """It came to a good end."""
        raise NotImplementedError

    def can_begin(self, machine: SimulatedMachine) -> bool:
        """Whether the engine begins with what is first in its line."""
        return True

    def stepped(self, machine: SimulatedMachine, image: int, step: int) -> None:
        """An engine has made a step, whoever hears of it."""

    def reports_now(self, machine: SimulatedMachine, report: messages.Report) -> None:
        """The session is about to hear a report."""

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

    def begin(self) -> Self:
        """With the machines that are there now."""
        self.stuck.clear()
        hosts = tuple(machine.leased for machine in self.machines.values())
        self.feed(Leased(hosts, self.links))
        return self

    def turn(self, until: Callable[[], object] = lambda: False) -> bool:
        """The next report of each machine; where none comes, time passes. False when over.

        Breaks off before the first report at which `until`.
        """
        moved = False
        for rank in list(self.machines):
            self.faults(self)
            if until():
                return True
            moved = self.report(rank) or moved
        self.now += 0.1
        if not moved:
            self.now += 1.0
            self.tick()
        return self.end is None and not (self.stuck and not moved) and self.now < 3000

    def play(self, until: Callable[[], object] = lambda: False) -> Self:
        """To the end, as whoever runs jobs: where it is stuck, hosts are leased anew.

        Or to the moment before the first report at which `until`.
        """
        if not self.heard:
            self.begin()
        for _ in range(3000):
            if self.end is not None or self.error is not None or until():
                return self
            self.drive()
            if self.stuck:
                self.begin()
            self.turn(until)
        raise AssertionError("nothing ends this job")

    def tick(self) -> None:
        """Lets the session look at its clock."""
        self.feed(Tick())

    def report(self, rank: int) -> bool:
        machine = self.machines.get(rank)
        if machine is None or machine.is_stopped or machine.at is None:
            return False
        if machine.running is None:
            if not self.can_begin(machine):
                return False
            machine.running = machine.engine.work(machine.line[0])
        running, steps = machine.running, machine.engine.steps
        before = len(steps)
        report = next(running, None)
        for image, step in steps[before:]:
            machine.made.append((image, step))
            self.stepped(machine, image, step)
        if report is None:
            machine.line.popleft()
            machine.running = None
            return True
        self.reports += 1
        self.before(report, rank)
        if self.machines.get(rank) is machine and machine.running is running:
            if machine.is_stopped:  # in the middle of it: the report comes when it goes on
                machine.running = _after(report, running)
                return False
            self.reports_now(machine, report)
            self.feed(Reported(rank, report))
        return True

    def feed(self, event: Input) -> None:
        self.heard.append((self.now, event))
        self.carry_out(self.session.handle(event, self.now))

    def carry_out(self, instructions: list[Instruction]) -> None:
        self.out.append(instructions)
        for instruction in instructions:
            match instruction:
                case SendToAgent():
                    self.sent.append(instruction)
                    self._sent(instruction.rank, instruction.message)
                case TellUser():
                    self.events.append(instruction.event)
                case LetGo():
                    self.let_go.append(instruction.rank)
                case JobStuck():
                    self.stuck.append(instruction.reason)
                case Remember():
                    fallback = self.links.fallback.noted(instruction.fault)
                    self.links = replace(self.links, fallback=fallback)
                case Learn():
                    self.learned = learned(self.learned, instruction.news)
                case JobFinished():
                    assert self.end is None
                    self.end = instruction

    def _sent(self, rank: int, message: messages.Message) -> None:
        machine = self.machines.get(rank)
        if machine is None:
            return
        answer: messages.Message = messages.Done()
        match message:
            case messages.AskPorts():
                answer = messages.Ports((40000 + len(self.sent),))
            case messages.Kill():
                machine.empty()
            case messages.Cancel():
                if not (machine.is_stopped or isinstance(machine.at, messages.Join)):
                    machine.break_off()
                    ring_generation = self.session.state.hosts[rank].ring_generation
                    self.feed(
                        Reported(
                            rank,
                            messages.Cancelled(job=message.job, ring_generation=ring_generation),
                        )
                    )
            case messages.EngineUnit():
                machine.line.append(message)
        self.feed(Answered(rank, message, answer))

    # Faults

    def kill_engine(self, rank: int, late: int = 0) -> None:
        """An engine dies; another is given the last `late` messages: they were on their way."""
        machine = self.machines[rank]
        on_their_way = list(machine.line)[len(machine.line) - late :]
        machine.empty()
        machine.line.extend(on_their_way)
        self._failed(rank, "Died", "It was killed.", fatal=True)

    def stop_engine(self, rank: int) -> None:
        self.machines[rank].is_stopped = True

    def fail(self, rank: int, kind: str, text: str = "No.", setting: str = "") -> None:
        """An engine can't do its work, and says so."""
        self.machines[rank].break_off()
        self._failed(rank, kind, text, setting, fatal=False)

    def break_ring(self, rank: int, text: str, kind: str = "Raised") -> None:
        """An engine ends over what a neighbour did, or did not do in time."""
        self.machines[rank].empty()
        self._failed(rank, kind, text, fatal=True)

    def _failed(self, rank: int, kind: str, text: str, setting: str = "", *, fatal: bool) -> None:
        host = self.session.state.hosts.get(rank)
        if host is not None:
            self.feed(
                Reported(
                    rank,
                    messages.Failed(
                        ring_generation=host.ring_generation,
                        job="job",
                        kind=kind,
                        text=text,
                        fatal=fatal,
                        setting=setting,
                    ),
                )
            )

    def lose(self, rank: int, *, counts: bool = True) -> None:
        """An agent is out of reach."""
        del self.machines[rank]
        self.feed(Gone(rank, SILENT_AGENT, counts))

    def start_agent(self, rank: int, fence: int = 2) -> SimulatedMachine:
        """It is there again, leased anew, and the session does not know of it."""
        self.machines[rank] = SimulatedMachine(leased(rank, fence))
        return self.machines[rank]

    def bring_back(self, rank: int, fence: int = 2) -> None:
        self.feed(Back(self.start_agent(rank, fence).leased))

    # What came of it

    @property
    def error(self) -> Exception | None:
        """How the job failed: by itself, or because no host of the mesh is left."""
        if self.end is not None:
            return self.end.error
        return self.session.given_up(self.ranks) if self.stuck else None

    @property
    def is_idle(self) -> bool:
        return all(host.is_free for host in self.session.state.hosts.values())

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def lost(self) -> list[int]:
        return [event.host for event in self.of(events.HostLost)]

    def messages(self, kind: type[Any], rank: int | None = None) -> list[Any]:
        return [
            send.message
            for send in self.sent
            if isinstance(send.message, kind) and rank in (None, send.rank)
        ]


def _after(
    report: messages.Report, running: Iterator[messages.Report]
) -> Iterator[messages.Report]:
    yield report
    yield from running


def once(sim: Simulation[Any], when: Callable[[Any, int], bool], hurt: Callable[[], None]) -> None:
    """Does harm before the first report that `when` is true of."""
    done: list[bool] = []

    def before(report: Any, rank: int) -> None:
        if not done and when(report, rank):
            done.append(True)
            hurt()

    sim.before = before
