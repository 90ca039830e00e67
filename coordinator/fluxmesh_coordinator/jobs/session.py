"""One job's life on a mesh, of any kind: leased hosts, what they say, who is lost, and its end.

PURE: inputs go in (`types.Input`), instructions come out (`types.Instruction`), time is an
argument. `runtime/job_runner.py` stands above it and does what it says. What a kind of job does
with its hosts stands in `generation/session.py` and `training/session.py`: subclasses that fill in
the hooks. `recovery.py` takes losses, `state.py` says where the job stands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic

from fluxmesh import events
from fluxmesh.cluster.backends import BackendFault
from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs import failures
from fluxmesh_coordinator.jobs.host import HostState, QueuedWork
from fluxmesh_coordinator.jobs.recovery import Recovery
from fluxmesh_coordinator.jobs.state import H, JobState
from fluxmesh_coordinator.jobs.types import (
    Answered,
    Asked,
    Back,
    Gone,
    Input,
    Instruction,
    JobFinished,
    JobStuck,
    Leased,
    LeasedHost,
    Links,
    Proposal,
    Remember,
    Reported,
    SendToAgent,
    Stop,
    TellUser,
    Tick,
    Told,
)


class JobSession(ABC, Generic[H]):
    """One job: `begin` it with leased hosts, then `handle` what happens until `JobFinished`."""

    grows = False  # whether hosts that answer late are wanted too, not just those it began with

    def __init__(self, state: JobState[H], deadlines: Deadlines = DEADLINES) -> None:
        self.state, self.deadlines = state, deadlines
        self.recovery: Recovery[H] = Recovery(
            state, self.send, self.tell, self.end, self._remember, deadlines
        )
        self.now = 0.0
        self._out: list[Instruction] = []
        self._error: FluxmeshError | None = None  # how it ends
        self._cancel_by = 0.0  # then engines that do not let go are killed
        self._is_over = False

    # Hooks

    @abstractmethod
    def new_host(self, leased: LeasedHost) -> H:
        """A host whose lease was granted."""

    @abstractmethod
    def propose(self, hosts: Sequence[HostInfo]) -> Proposal:
        """How what is left would be done by these hosts."""

    @abstractmethod
    def begun(self) -> None:
        """`state.hosts` are new: nothing that others held or did is known there."""

    @abstractmethod
    def reported(self, host: H, report: messages.Report, unit: QueuedWork | None) -> None:
        """An engine tells of this job's work: of `unit`, which has left its line if that ended."""

    @abstractmethod
    def returned(self, host: H) -> None:
        """A host is back: it stands in `state.hosts` again."""

    @abstractmethod
    def go_on(self) -> None:
        """Sends all that can be sent now; called after everything that happens, but for the end."""

    def asked(self, asked: Asked) -> None:
        """The program above wants something."""

    def closing(self) -> None:
        """The end has begun, and hosts let go of what they do: a last word to them."""

    @property
    def title(self) -> str:
        """What it is, for those who wait for its hosts; nothing of a prompt."""
        return ""

    def progress(self, rank: int, now: float) -> messages.JobProgress:
        """How far it is, as one of its hosts is told."""
        return messages.JobProgress()

    # In

    @property
    def id(self) -> str:
        """The job's."""
        return self.state.job.id

    def begin(self, hosts: Sequence[LeasedHost], links: Links, now: float) -> list[Instruction]:
        """Starts, or goes on after `JobStuck`, with these hosts and no others."""
        return self.handle(Leased(tuple(hosts), links), now)

    def handle(self, event: Input, now: float) -> list[Instruction]:
        """What is to be done about `event`; nothing more comes after `JobFinished`."""
        if self._is_over:
            return []
        self.now = now
        match event:
            case Leased():
                self._leased(event)
            case Asked():
                self.asked(event)
            case Answered():
                self._answered(event)
            case Reported():
                self._reported(event)
            case Gone():
                self._gone(event.rank, event.reason, counts=event.counts)
            case Back():
                self._back(event.host)
            case Stop():
                self.end(CancelledError("Cancelled."))
            case Tick():
                self._tick()
        if self.state.is_ending:
            self._wind_down()
        else:
            self.recovery.settle()
            self.go_on()
        out, self._out = self._out, []
        return out

    def find(self, hosts: Sequence[HostInfo], links: Links) -> Proposal:
        """How what is left would be done by these hosts, without those that take part no more."""
        self.state.links = links
        return self.propose([host for host in hosts if self.recovery.takes(host.rank)])

    def given_up(self, ranks: Iterable[int]) -> FluxmeshError | None:
        """Why none of these hosts is used again in this job; None where one may be."""
        return self.recovery.given_up(ranks)

    # Out

    def send(self, host: HostState, message: messages.Changing) -> None:
        """Work is in the host's line from now on."""
        host.sent(message, self.now)
        self._out.append(SendToAgent(host.rank, message))

    def tell(self, event: Told) -> None:
        self._out.append(TellUser(event))

    def instruct(self, instruction: Instruction) -> None:
        """What only one kind of job says."""
        self._out.append(instruction)

    def _remember(self, fault: BackendFault) -> None:
        self._out.append(Remember(fault))

    def stuck(self, reason: str) -> None:
        """The hosts at hand can't go on."""
        self._out.append(JobStuck(reason))

    def finish(self) -> None:
        """There is nothing left to do."""
        self._is_over = True
        self._out.append(JobFinished(self._error))

    @property
    def _is_stopped(self) -> bool:
        """Whether it ends because somebody stopped it."""
        return isinstance(self._error, CancelledError)

    # What happens

    def _leased(self, leased: Leased) -> None:
        state = self.state
        for host in state.hosts.values():  # of a lease that is over
            state.give_back(host)
        state.links = leased.links
        state.hosts = {
            host.rank: self.new_host(host)
            for host in leased.hosts
            if self.recovery.takes(host.rank)
        }
        self.begun()

    def _answered(self, event: Answered) -> None:
        host, request, answer = self.state.hosts.get(event.rank), event.request, event.answer
        if host is None or getattr(request, "fence", None) != host.fence:
            return
        if isinstance(request, messages.Kill):
            if request.ring_generation != host.ring_generation:
                return
            host.killed = None
            if isinstance(answer, messages.Refused):
                self._gone(event.rank, answer.text)
            return
        generation = host.ring_generation
        if isinstance(request, messages.EngineUnit) and request.ring_generation != generation:
            return
        host.answered(request)
        if isinstance(answer, messages.Refused):
            if answer.code == "fence":
                self._gone(event.rank, answer.text)
            else:
                kind = failures.REFUSALS.get(answer.code, "")
                self._failed(host, kind, answer.text, fatal=False)
        elif isinstance(request, messages.AskPorts) and isinstance(answer, messages.Ports):
            ring, hosts = self.state.ring, self.state.hosts
            if ring is not None and not ring.is_told and host.rank in ring.ranks:
                for rank, message in ring.answered(host.rank, request.ip, answer.ports, hosts):
                    self.send(hosts[rank], message)

    def _reported(self, event: Reported) -> None:
        host, report = self.state.hosts.get(event.rank), event.report
        if host is None:
            return
        if isinstance(report, messages.Lost):
            self._gone(event.rank, report.reason)
            return
        if not isinstance(report, messages.EngineReport):
            return
        if report.ring_generation != host.ring_generation:  # left over from an engine that is gone
            if isinstance(report, messages.Failed) and not self.state.is_ending:
                self.recovery.explained(host.rank, report)
            return
        if isinstance(report, messages.WorkReport) and report.job not in ("", self.id):
            return
        unit = host.heard(report, self.now)
        match report:
            case messages.Joined():
                if self.state.ring is not None:
                    self.state.ring.joined.add(host.rank)
                self.reported(host, report, unit)
            case messages.LoadProgress():
                part, done, total = report.component, report.done_bytes, report.total_bytes
                self.tell(events.Loading(part, done, total, host.rank))
                self.reported(host, report, unit)
            case messages.Cancelled():
                host.cancelled(self.now)
            case messages.Failed():
                self._failed(host, report.kind, report.text, report.setting, fatal=report.fatal)
            case _:
                self.reported(host, report, unit)

    def check_model(self, host: HostState, content: str) -> None:
        """Ends the job where hosts hold different files: a ring must not compute with them."""
        error = self.state.model_check.hear(host.rank, host.info.name, content)
        if error is not None:
            self.end(error)

    def _back(self, leased: LeasedHost) -> None:
        state, rank = self.state, leased.rank
        if not state.is_ending and rank not in state.hosts and self.recovery.takes(rank):
            state.hosts[rank] = self.new_host(leased)
            self.returned(state.hosts[rank])

    def _failed(self, host: H, kind: str, text: str, setting: str = "", *, fatal: bool) -> None:
        if self.state.is_ending:
            host.let_go()
        else:
            self.recovery.failed(host, kind, text, setting, fatal=fatal, now=self.now)

    def _gone(self, rank: int, reason: str, *, counts: bool = True) -> None:
        if self.state.is_ending:
            self.state.hosts.pop(rank, None)
        else:
            self.recovery.gone(rank, reason, self.now, counts=counts)

    def _tick(self) -> None:
        """Finds who is overdue."""
        for rank, host in list(self.state.hosts.items()):
            reason = host.overdue(self.now) if rank in self.state.hosts else ""
            if reason and host.killed is not None:
                self._gone(rank, reason)
            elif reason and not self.state.is_ending:
                self.recovery.overdue(host, reason, self.now)

    # The end

    def break_off(self) -> None:
        """Cancels what runs; hosts are free when they have let go of it."""
        for host in list(self.state.hosts.values()):
            host.forget_unsent()
            if host.killed is not None or not host.line:
                continue
            if host.has(messages.Join):  # a ring that forms hears of no cancel
                self.recovery.end_ring(self.now)
            else:
                self.send(host, messages.Cancel(fence=host.fence, job=self.id))

    def end(self, error: FluxmeshError | None) -> None:
        """Hosts let go of the job; `JobFinished` with `error` when all have."""
        state = self.state
        if state.is_ending:
            return
        state.is_ending, self._error = True, error
        patience = max((host.cancel_deadline() for host in state.hosts.values()), default=0.0)
        if self._is_stopped:
            patience = min(patience, self.deadlines.stop)
        self._cancel_by = self.now + patience
        self.break_off()
        self.closing()

    def _wind_down(self) -> None:
        hosts = list(self.state.hosts.values())
        if self._is_stopped and self.now >= self._cancel_by:
            # Whoever stopped it does not wait for a step of many seconds: without a lease its
            # agent ends that, and the engine only where it takes longer than to load again.
            self.finish()
            return
        for host in hosts:
            if not host.is_free and host.killed is None and self.now >= self._cancel_by:
                self.recovery.kill(host, host.ring_generation + 1, self.now)
        if all(host.is_free for host in hosts):
            self.finish()
