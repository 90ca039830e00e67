"""What is done when an engine dies, a host is gone or nothing moves; of any kind of job. Pure.

Below `session.py`. Outside of a ring a death is one host's affair: what it had in line is given
back, and its engine starts anew. In a ring the survivors may hang for ever, so all its engines are
ended, and then what is left is dealt out to the hosts that are left. A host that has failed too
often (`health.py`) takes part no more; nor does one whose files or memory are not what the job
needs, which is not lost: its engine lives, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Self

from fluxmesh.cluster.backends import BackendFault
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError
from fluxmesh.events import BackendChanged, HostLost, HostUnfit
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs import failures
from fluxmesh_coordinator.jobs.backend_faults import BackendFaults
from fluxmesh_coordinator.jobs.health import ENOUGH, HostHealth
from fluxmesh_coordinator.jobs.host import HostState
from fluxmesh_coordinator.jobs.state import H, JobState, Sender

MAX_ATTEMPTS = 5  # rings that fail one after another, and nothing is done in between


class Recovery(Generic[H]):
    """Takes losses; `end` is called where the job can't go on at all."""

    def __init__(
        self,
        state: JobState[H],
        send: Sender,
        tell: Callable[[HostLost | HostUnfit | BackendChanged], None],
        end: Callable[[FluxmeshError], None],
        remember: Callable[[BackendFault], None],
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        self.state, self.send, self.tell, self.end = state, send, tell, end
        self._health = HostHealth(deadlines)
        self._backends = BackendFaults(state, tell, remember, deadlines)
        self._reasons: dict[int, Reason] = {}  # why hosts take part no more
        self._attempts = 0
        self._calm = 0  # steps or micro-batches since somebody was overdue

    def takes(self, rank: int) -> bool:
        """Whether a host may take part (again)."""
        return self._health.takes(rank)

    def given_up(self, ranks: Iterable[int]) -> FluxmeshError | None:
        """Why none of these hosts may take part any more; None where one may."""
        ranks = list(ranks)
        if any(self.takes(rank) for rank in ranks):
            return None
        reasons = [self._reasons[rank] for rank in ranks if rank in self._reasons]
        if len(ranks) == 1 and reasons and reasons[0].is_here:
            return reasons[0].error(reasons[0].text)  # nobody asks which host it was
        said: dict[str, list[str]] = {}  # what hosts have in common is told once
        for reason in reasons:
            said.setdefault(reason.text, []).append(reason.name)
        sentences = [
            f"{' and '.join(dict.fromkeys(names))}: {text}" if any(names) else text
            for text, names in said.items()
        ]
        last = reasons[-1].error if reasons else FluxmeshError
        if len(sentences) == 1:
            return last(sentences[0])
        return last(" ".join(["No host can go on.", *sentences]))

    # What moves

    def worked(self, rank: int) -> None:
        """A host has done a step, or a micro-batch."""
        self._health.worked(rank)
        self._calm += 1
        if self._calm == ENOUGH:  # else each of a day's alarms would double the wait for the next
            for host in self.state.hosts.values():
                host.patience = 1.0

    def advanced(self) -> None:
        """The job has something behind it that it had not before: its ring works."""
        self._attempts = 0

    # What is lost

    def failed(
        self, host: H, kind: str, text: str, setting: str = "", *, fatal: bool, now: float
    ) -> None:
        """An engine died (`fatal`), or could not do its work; `kind` is the error's class, and
        `setting` what it says is at fault."""
        if not fatal and failures.is_final(kind):
            self.end(failures.error_of(kind, text, setting))
            return
        if not fatal and failures.is_of_host(kind):
            self._unfit(host, failures.error_of(kind, text, setting), now)
            return
        # A survivor of a broken ring fails too; the one to blame is the one that died, or that
        # says itself what it could not do.
        blamed = kind not in failures.OF_RING or not self.state.shares_ring(host.rank)
        if kind == failures.LATE:
            self.state.shuns_rings = True
        fault = self._backends.dies(host, kind, text, now) if fatal else None
        self._engine_lost(host, text, now, blamed=blamed, fault=fault)

    def overdue(self, host: H, reason: str, now: float) -> None:
        """An engine gave no sign in time. It may have been slow: deadlines are longer now."""
        self._calm = 0
        ring, together = self.state.ring, self.state.shares_ring(host.rank)
        for rank in ring.ranks if ring is not None and together else (host.rank,):
            if rank in self.state.hosts:
                self.state.hosts[rank].patience *= 2
        # In a ring all wait for the one that hangs, and nobody knows which one that is.
        fault = self._backends.hangs(host, reason)
        self._engine_lost(host, reason, now, blamed=not together, fault=fault)

    def gone(self, rank: int, reason: str, now: float, *, counts: bool) -> None:
        """A host is out of reach; `counts` where that is a failure, not this side's absence."""
        host = self.state.hosts.get(rank)
        if host is None:
            return
        broke_ring = self.state.has_ring_with(rank)
        self._backends.host_lost(rank)
        self._lost(host, reason)
        if counts and host.killed is None:  # else it hung, and that was counted
            self._health.failed(rank, now)
        self._drop(rank)
        if broke_ring:
            self._ring_broke(reason, now, counts=counts)
        if not self.takes(rank):
            self._leave_out(host, Reason.twice(host, reason))

    def explained(self, rank: int, report: messages.Failed) -> None:
        """An engine failed whose ring has been ended already, over what a neighbour told."""
        if report.kind == failures.LATE and report.job == self.state.job.id:
            self.state.shuns_rings = True
        self._backends.explained(rank, report.ring_generation, report.kind)

    def settle(self) -> None:
        """After all that happens: other backends have tries of their own."""
        if self._backends.settle():
            self._attempts = 0

    def end_ring(self, now: float) -> None:
        """Ends the engines of all members, and with them what they hold."""
        ring, hosts = self.state.ring, self.state.hosts
        if ring is None:
            return
        members = [hosts[rank] for rank in ring.ranks if rank in hosts]
        ring_generation = 1 + max(
            [ring.ring_generation, *(member.ring_generation for member in members)]
        )
        self.state.ring_ends()
        for member in members:
            self.state.give_back(member)
            self.kill(member, ring_generation, now)

    def kill(self, host: HostState, ring_generation: int, now: float) -> None:
        """Ends a host's engine, whatever it does; `ring_generation` begins there."""
        host.kill(ring_generation, now)
        self.send(host, messages.Kill(fence=host.fence, ring_generation=ring_generation))

    # Within

    def _engine_lost(
        self, host: H, reason: str, now: float, *, blamed: bool, fault: BackendFault | None
    ) -> None:
        """What an engine had in line goes to others; in a ring, all engines end.

        With a `fault` it is the ring's backend that failed, and not this host.
        """
        if fault is not None and fault.is_out:  # `settle` tells it
            self.state.losses += 1
        else:
            self._lost(host, reason)
        if blamed and fault is None:
            self._health.failed(host.rank, now)
        self._end_engine(host, reason, now)
        if not self.takes(host.rank):
            self._leave_out(host, Reason.twice(host, reason))

    def _unfit(self, host: H, why: FluxmeshError, now: float) -> None:
        """A host's files or memory are not what the job needs: it would say so again."""
        self.state.losses += 1
        self._health.leave_out(host.rank)
        self._end_engine(host, str(why), now)
        name = host.info.name
        is_here = host.entry.is_local
        reason = Reason(
            kind=type(why), text=str(why), setting=why.setting, name=name, is_here=is_here
        )
        self._leave_out(host, reason)
        if self.state.hosts:  # else it is how the job ends, unless others of the mesh can help
            self.tell(HostUnfit(host.rank, name, str(why)))

    def _end_engine(self, host: H, reason: str, now: float) -> None:
        if self.state.has_ring_with(host.rank):
            self._ring_broke(reason, now, counts=True)
        else:
            self.state.give_back(host)
            # Also if it is dead: what is on its way would start another, and be told twice.
            self.kill(host, host.ring_generation + 1, now)

    def _lost(self, host: H, reason: str) -> None:
        self.tell(HostLost(host.rank, host.info.name, reason))
        self.state.losses += 1

    def _leave_out(self, host: H, why: Reason) -> None:
        """Goes on without a host for good. Others of the mesh may help where none is left."""
        self._reasons[host.rank] = why
        self._drop(host.rank)

    def _drop(self, rank: int) -> None:
        host = self.state.hosts.pop(rank, None)
        if host is not None:
            self.state.give_back(host)
            self.state.goes_on_without(rank)

    def _ring_broke(self, reason: str, now: float, *, counts: bool) -> None:
        self.end_ring(now)
        self._attempts += counts
        if self._attempts >= MAX_ATTEMPTS:
            text = f"{MAX_ATTEMPTS} rings failed one after another: {_sentence(reason)}"
            self.end(FluxmeshError(f"{text} {self.state.remedy}".rstrip()))


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a host takes part no more."""

    kind: type[FluxmeshError]
    text: str
    setting: str = ""  # that is at fault
    name: str = ""  # of the host, where the text does not say it
    is_here: bool = False  # the host is this machine

    def error(self, text: str) -> FluxmeshError:
        """Of its kind, in these words."""
        return self.kind(text, setting=self.setting)

    @classmethod
    def twice(cls, host: HostState, reason: str) -> Self:
        """Its engine, or its agent, was lost too often."""
        return cls(kind=FluxmeshError, text=f"{host.info.name} failed twice: {_sentence(reason)}")


def _sentence(reason: str) -> str:
    return f"{reason.rstrip('.')}."
