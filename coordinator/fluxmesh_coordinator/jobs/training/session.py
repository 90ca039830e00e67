"""The life of a training: its units, its ring, its updates, and what a run is answered.

PURE; on `jobs/session.py`, which has what all jobs share, with one more input: `Wanted`, from the
run. `state.py` holds where the run stands, `dispatch.py` gives out work.

Every host holds the same state, and any death breaks the ring: all its engines end, and those that
are left form another. They go on from the state that was given last (the run's last checkpoint)
and do the updates since then once more. Micro-batches are functions of their numbers and sums are
exact, so the state comes out as it was: the run above never hears of it, it only waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.errors import FluxmeshError
from fluxmesh.training.run import UpdateResult
from fluxmesh.wire import messages
from fluxmesh.wire.messages import training
from fluxmesh_coordinator.jobs.host import QueuedWork
from fluxmesh_coordinator.jobs.model_check import other_base
from fluxmesh_coordinator.jobs.progress import RemainingTime
from fluxmesh_coordinator.jobs.session import JobSession
from fluxmesh_coordinator.jobs.training.dispatch import TrainingDispatch
from fluxmesh_coordinator.jobs.training.host import TrainingHost
from fluxmesh_coordinator.jobs.training.state import TrainingState
from fluxmesh_coordinator.jobs.training.tasks import (
    AdvanceTask,
    Answer,
    Arrays,
    Choice,
    EncodeTask,
    FinishTask,
    GiveTask,
    Halted,
    HaltTask,
    OpenTask,
    PaintTask,
    TrainingJob,
    UnitEncoded,
    ValidateTask,
    Wanted,
)
from fluxmesh_coordinator.jobs.types import Asked, LeasedHost


class TrainingSession(JobSession[TrainingHost]):
    """One run. A host that comes late joins at the next checkpoint."""

    state: TrainingState
    grows = True

    def __init__(self, job: TrainingJob, deadlines: Deadlines = DEADLINES) -> None:
        super().__init__(TrainingState(job), deadlines)
        self.state.pace.deadlines = deadlines
        self.is_halting = False
        self._remaining = RemainingTime()
        self._dispatch = TrainingDispatch(
            state=self.state,
            send=self.send,
            tell=self.tell,
            answer=self._answer,
            stuck=self.stuck,
        )

    # Hooks

    def new_host(self, leased: LeasedHost) -> TrainingHost:
        state = self.state
        return TrainingHost(leased, state.job, state.names, state.pace, self.send, self.now)

    def propose(self, hosts: Sequence[HostInfo]) -> Choice:
        return self.state.choose(hosts)

    def begun(self) -> None:
        self.state.ring_ends()

    def returned(self, host: TrainingHost) -> None:
        """It encodes at once, and joins in where nothing would have to be done again."""

    def asked(self, asked: Asked) -> None:
        assert isinstance(asked, Wanted)
        state, task = self.state, asked.task
        match task:
            case FinishTask():
                self.end(None)
                return
            case HaltTask():
                self._halt()
            case EncodeTask():
                state.units = list(task.units)
            case OpenTask():
                state.saved = (task.update, task.vectors)
                state.reached = task.update
        state.task = asked

    def go_on(self) -> None:
        state = self.state
        if state.is_killing:
            return  # what is left is dealt out when they are gone
        if self.is_halting:
            self._halt_on()
        elif state.task is not None:
            if state.hosts:
                self._dispatch.work(state.task.task, self.now)
            else:
                self.stuck("No host is left.")

    def reported(
        self, host: TrainingHost, report: messages.Report, unit: QueuedWork | None
    ) -> None:
        match report:
            case messages.TextEncoded():
                self._check_base(host, report.content)
                self._encoded(host, report.features)
            case messages.SourceEncoded():
                self._check_base(host, report.content)
                self._encoded(host, {"latents": report.latents})
            case training.Opened():
                host.is_open = True
                self._check_base(host, report.content)
            case training.Computed():
                host.computed(report.seconds)
                self.recovery.worked(host.rank)
                self.state.pace.moves(self.now)
            case training.UpdateDone():
                host.moved = report
                self._moved()
            case training.VectorPart():
                self._vector(host, report)
            case training.HeldOut():
                self._answer_if(ValidateTask, report.loss)
            case training.ProgressPainted():
                self._answer_if(PaintTask, report.pixels)

    def closing(self) -> None:
        for host in self.state.hosts.values():
            if host.is_open and host.killed is None:
                host.close()

    @property
    def title(self) -> str:
        return f"training, {self.state.job.plan.request.updates} updates"

    def progress(self, rank: int, now: float) -> messages.JobProgress:
        done, total = self.state.reached, self.state.job.plan.request.updates
        left = self._remaining.left(done, total, now)
        return messages.JobProgress(unit="update", done=done, total=total, seconds=left)

    # What the run is told

    def _answer(self, value: object = None) -> None:
        """The run's task is done."""
        assert self.state.task is not None
        self.tell(Answer(self.state.task.number, value))
        self.state.task = None

    def _answer_if(self, kind: type[object], value: object) -> None:
        if self.state.task is not None and isinstance(self.state.task.task, kind):
            self._answer(value)

    def _check_base(self, host: TrainingHost, content: str) -> None:
        """Ends the run where hosts hold different files, or others than its files will tell of."""
        self.check_model(host, content)
        job = self.state.job
        if job.content not in ("", content):
            self.end(other_base(job.weights.model, host.rank, host.info.name))

    def _encoded(self, host: TrainingHost, arrays: Arrays) -> None:
        """A unit of the host is done. What comes once the run ends, as where it was made of other
        files, is not told: it would be kept under the name of ours."""
        line = self.state.encoding.get(host.rank, [])
        if line and not self.state.is_ending:
            self.tell(UnitEncoded(line.pop(0), arrays))

    def _moved(self) -> None:
        """An update is done when all hosts have made the same move."""
        state = self.state
        moves = [host.moved for host in state.members if host.moved is not None]
        if len(moves) < len(state.members) or state.done is None:
            return
        state.pace.moves(self.now)
        self.recovery.advanced()
        first = moves[0]
        if len({(move.loss, move.images, move.bad) for move in moves}) > 1:
            self.end(FluxmeshError(f"The hosts' states differ. {state.remedy}"))
            return
        moved = UpdateResult(
            loss=first.loss,
            norm=first.norm,
            rate=first.rate,
            images=first.images,
            bad=first.bad,
            peak_bytes=max(move.peak_bytes for move in moves),
        )
        for host in state.members:
            host.moved = None
        if not first.bad:
            state.done += 1
        if state.done > state.reached:
            state.reached, state.latest = state.done, moved
            self._remaining.stepped(state.reached, self.now)
        task = state.task.task if state.task is not None else None
        if isinstance(task, AdvanceTask) and (first.bad or state.done == task.update + 1):
            self._answer(moved)

    def _vector(self, host: TrainingHost, part: training.VectorPart) -> None:
        vectors = self.state.vectors
        if part.vector not in vectors:
            vectors[part.vector] = np.empty(part.total, np.float32)
        vectors[part.vector][part.offset : part.offset + len(part.numbers)] = part.numbers
        if not part.is_last:
            return
        if self.state.task is None or not isinstance(self.state.task.task, GiveTask):
            return
        self.state.saved = (part.update, vectors)
        self._answer(vectors)
        if part.update < self.state.job.plan.request.updates:
            self._welcome()

    def _welcome(self) -> None:
        """Hosts that came back join in: now nothing would have to be done again."""
        winner = self.state.choose().winner
        if winner is not None and len(winner.ranks) > len(self.state.members):
            self.recovery.end_ring(self.now)

    # A halt

    def _halt(self) -> None:
        """Breaks off what runs; `_halt_on` answers when all is quiet."""
        self.is_halting = True
        self.state.units, self.state.encoding = [], {}
        self.break_off()

    def _halt_on(self) -> None:
        if all(host.is_free for host in self.state.hosts.values()):
            self.is_halting = False
            if self.state.task is not None:
                self._answer(Halted(self.state.done, self.state.latest))
