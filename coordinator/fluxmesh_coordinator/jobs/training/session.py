"""A training's life on a mesh: its ring, its updates, and what to do when a host dies.

PURE, as `session.py` and with the same ends: events go in (`jobs.Input`, and `Wanted` from the
run), instructions come out. `conduct.py` does what it says; `train_course.py` holds where the run
stands, `train_dispatch.py` gives out work, `train_losses.py` takes losses.

Every host holds the same state, and any death breaks the ring: all its engines end, and those that
are left form another. They go on from the state that was given last (the run's last checkpoint)
and do the updates since then once more. Micro-batches are functions of their numbers and sums are
exact, so the state comes out as it was: the run above never hears of it, it only waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fluxmesh import events
from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh.training.events import TrainEvent
from fluxmesh.training.run import Moved
from fluxmesh.wire import messages
from fluxmesh.wire import training_messages as training
from fluxmesh_coordinator import failures
from fluxmesh_coordinator.jobs.host import Worker
from fluxmesh_coordinator.jobs.training import tasks as train_jobs
from fluxmesh_coordinator.jobs.training.dispatch import TrainDispatch
from fluxmesh_coordinator.jobs.training.host import Hand
from fluxmesh_coordinator.jobs.training.losses import Losses
from fluxmesh_coordinator.jobs.training.state import TrainCourse
from fluxmesh_coordinator.jobs.training.tasks import Choice, TrainJob, UnitEncoded, Wanted
from fluxmesh_coordinator.jobs.types import (
    Answered,
    Back,
    Finished,
    Gone,
    Input,
    Instruction,
    LeasedHost,
    Links,
    Reported,
    Result,
    Send,
    Stop,
    Stuck,
    Tell,
    Tick,
)


class TrainSession:
    """One run: `begin` it with leased hosts, then `handle` what happens until `Finished`."""

    def __init__(self, job: TrainJob) -> None:
        self.course = TrainCourse(job)
        self.is_halting = False
        self._losses = Losses(self.course, self._tell, self.end)
        self._dispatch = TrainDispatch(
            self.course, self._send, self._tell, self._answer, self._stuck, self._losses.begins
        )
        self._error: FluxmeshError | None = None
        self._now = 0.0
        self._out: list[Instruction] = []
        self._is_over = False

    # In and out

    @property
    def id(self) -> str:
        """The job's."""
        return self.course.job.id

    @property
    def grows(self) -> bool:
        """Yes: a host that comes late joins at the next checkpoint."""
        return True

    def begin(self, hosts: Sequence[LeasedHost], links: Links, now: float) -> list[Instruction]:
        """Starts, or goes on after `Stuck`, with these hosts and no others."""
        self._now, self.course.links = now, links
        self.course.hands = {
            leased.rank: self._hand(leased) for leased in hosts if self._losses.takes(leased.rank)
        }
        self.course.parted()
        return self._go_on()

    def handle(self, event: Input | Wanted, now: float) -> list[Instruction]:
        """What is to be done about `event`; nothing more comes after `Finished`."""
        if self._is_over:
            return []
        self._now = now
        match event:
            case Wanted():
                self._wanted(event)
            case Answered():
                self._answered(event)
            case Reported():
                self._reported(event)
            case Gone():
                self._losses.gone(event.rank, event.reason, now, counts=event.counts)
            case Back():
                if self._losses.takes(event.host.rank) and event.host.rank not in self.course.hands:
                    self.course.hands[event.host.rank] = self._hand(event.host)
            case Stop():
                self.end(CancelledError("Cancelled."))
            case Tick():
                self._losses.look(now)
        return self._go_on()

    def find(self, hosts: Sequence[HostInfo], links: Links) -> Choice:
        """Which of these hosts would take part."""
        self.course.links = links
        return self.course.choose([host for host in hosts if self._losses.takes(host.rank)])

    def has_given_up(self, ranks: Iterable[int]) -> bool:
        """Whether all of these hosts failed too often to be used again."""
        return not any(self._losses.takes(rank) for rank in ranks)

    def _hand(self, leased: LeasedHost) -> Hand:
        return Hand(leased, self.course.job, self.course.names, self._send, self._now)

    def _send(self, worker: Worker, message: messages.Changing) -> None:
        self._out.append(Send(worker.rank, message))

    def _tell(self, event: events.Event | TrainEvent | Result) -> None:
        self._out.append(Tell(event))

    def _answer(self, value: object = None) -> None:
        """The run's task is done."""
        assert self.course.task is not None
        self._tell(train_jobs.Answer(self.course.task.number, value))
        self.course.task = None

    def _stuck(self, reason: str) -> None:
        self._out.append(Stuck(reason))

    # What is to be done next

    def _go_on(self) -> list[Instruction]:
        if self.course.is_ending:
            self._wind_down()
        elif any(hand.worker.killed is not None for hand in self.course.hands.values()):
            pass  # what is left is dealt out when they are gone
        elif self.is_halting:
            self._halt_on()
        elif self.course.task is not None:
            if not self.course.hands:
                self._stuck("No host is left.")
            else:
                self._dispatch.work(self.course.task.task, self._now)
        out, self._out = self._out, []
        return out

    def _wanted(self, wanted: Wanted) -> None:
        task = wanted.task
        if isinstance(task, train_jobs.Finish):
            self.end(None)
            return
        if isinstance(task, train_jobs.Halt):
            self._halt()
        if isinstance(task, train_jobs.Encode):
            self.course.units = list(task.units)
        if isinstance(task, train_jobs.Open):
            self.course.state = (task.update, task.vectors)
            self.course.reached = task.update
        self.course.task = wanted

    # What agents say

    def _answered(self, event: Answered) -> None:
        hand, request, answer = self.course.hands.get(event.rank), event.request, event.answer
        if hand is None or getattr(request, "fence", None) != hand.worker.fence:
            return
        if isinstance(request, messages.Kill):
            if request.epoch != hand.worker.epoch:
                return
            hand.worker.killed = None
            if isinstance(answer, messages.Refused):
                self._losses.gone(event.rank, answer.text, self._now)
            return
        if getattr(request, "epoch", hand.worker.epoch) != hand.worker.epoch:
            return
        hand.answered(request, self._now)
        if isinstance(answer, messages.Refused):
            if answer.code == "fence":
                self._losses.gone(event.rank, answer.text, self._now)
            else:
                kind = failures.REFUSALS.get(answer.code, "")
                self._losses.failed(hand, kind, answer.text, False, self._now)
        elif isinstance(request, messages.AskPorts) and isinstance(answer, messages.Ports):
            ring = self.course.ring
            if ring is not None and not ring.is_told and hand.rank in ring.ranks:
                workers = self.course.workers
                for rank, message in ring.answered(hand.rank, request.ip, answer.ports, workers):
                    self._send(workers[rank], message)

    def _reported(self, event: Reported) -> None:
        hand, report = self.course.hands.get(event.rank), event.report
        if hand is None:
            return
        if isinstance(report, messages.Lost):
            self._losses.gone(event.rank, report.reason, self._now)
            return
        worker, now = hand.worker, self._now
        if getattr(report, "epoch", worker.epoch) != worker.epoch:
            return  # left over from an engine that is gone
        if getattr(report, "job", "") not in ("", self.course.job.id):
            return
        worker.heard(report, now)
        match report:
            case messages.Joined():
                worker.done(messages.Join, now)
                if self.course.ring is not None:
                    self.course.ring.joined.add(worker.rank)
            case messages.Progress():
                part, done, total = report.component, report.done_bytes, report.total_bytes
                self._tell(events.Loading(part, done, total, worker.rank))
            case messages.Encoded():
                worker.done(messages.Encode, now)
                self._holds(worker, report.content)
                self._encoded(hand, {"t5": report.t5, "clip": report.clip})
            case messages.SourceEncoded():
                worker.done(messages.EncodeSource, now)
                self._encoded(hand, {"latents": report.latents})
            case messages.Cancelled():
                hand.cancelled(now)
            case messages.Failed():
                self._losses.failed(hand, report.kind, report.text, report.fatal, now)
            case training.Opened():
                worker.done(training.OpenTraining, now)
                self._holds(worker, report.content)
                hand.is_open = True
            case training.Computed():
                hand.computed(report.seconds)
                self._losses.worked(hand.rank, now)
            case training.Moved():
                worker.done(training.Update, now)
                hand.moved = report
                self._moved()
            case training.VectorPart():
                self._vector(hand, report)
            case training.HeldOut():
                worker.done(training.Validate, now)
                self._answer_if(train_jobs.Validate, report.loss)
            case training.Painted():
                worker.done(training.PaintProgress, now)
                self._answer_if(train_jobs.Paint, report.pixels)
            case training.Closed():
                worker.done(training.CloseTraining, now)

    def _holds(self, worker: Worker, content: str) -> None:
        """Before an update, all hosts have told which files they hold."""
        error = self.course.contents.hear(worker.rank, worker.info.name, content)
        if error is not None:
            self.end(error)

    def _answer_if(self, kind: type[object], value: object) -> None:
        if self.course.task is not None and isinstance(self.course.task.task, kind):
            self._answer(value)

    def _encoded(self, hand: Hand, arrays: dict[str, np.ndarray]) -> None:
        line = self.course.encoding.get(hand.rank, [])
        if line:
            self._tell(UnitEncoded(line.pop(0), arrays))

    def _moved(self) -> None:
        """An update is done when all hosts have made the same move."""
        course = self.course
        found = [hand.moved for hand in course.members if hand.moved is not None]
        if len(found) < len(course.members) or course.done is None:
            return
        self._losses.advanced(self._now)
        first = found[0]
        if len({(one.loss, one.images, one.bad) for one in found}) > 1:
            self.end(FluxmeshError("The hosts' states differ; go on with --resume."))
            return
        peak = max(one.peak_bytes for one in found)
        moved = Moved(first.loss, first.norm, first.rate, first.images, first.bad, peak)
        for hand in course.members:
            hand.moved = None
        if not first.bad:
            course.done += 1
        if course.done > course.reached:
            course.reached, course.latest = course.done, moved
        task = course.task.task if course.task is not None else None
        if isinstance(task, train_jobs.Advance) and (first.bad or course.done == task.update + 1):
            self._answer(moved)

    def _vector(self, hand: Hand, part: training.VectorPart) -> None:
        vectors = self.course.vectors
        if part.vector not in vectors:
            vectors[part.vector] = np.empty(part.total, np.float32)
        vectors[part.vector][part.offset : part.offset + len(part.numbers)] = part.numbers
        if not part.is_last:
            return
        hand.worker.done(training.GiveVectors, self._now)
        if self.course.task is None or not isinstance(self.course.task.task, train_jobs.Give):
            return
        self.course.state = (part.update, vectors)
        self._answer(vectors)
        if part.update < self.course.job.plan.request.updates:
            self._welcome()

    def _welcome(self) -> None:
        """Hosts that came back join in: now nothing would have to be done again."""
        found = self.course.choose().winner
        if found is not None and len(found.ranks) > len(self.course.members):
            self._losses.part(self._now)

    # The end

    def _halt(self) -> None:
        """Breaks off what runs; `_halt_on` answers when all is quiet."""
        self.is_halting = True
        self.course.units, self.course.encoding = [], {}
        self._break_off()

    def _break_off(self) -> None:
        for hand in list(self.course.hands.values()):
            hand.forget_unsent()
            worker = hand.worker
            if worker.killed is not None or not worker.line:
                continue
            if worker.has(messages.Join):  # a ring that forms hears of no cancel
                self._losses.part(self._now)
                return
            self._send(worker, messages.Cancel(worker.fence, self.course.job.id))

    def _halt_on(self) -> None:
        if all(hand.is_free for hand in self.course.hands.values()):
            self.is_halting = False
            if self.course.task is not None:
                self._answer(train_jobs.Halted(self.course.done, self.course.latest))

    def end(self, error: FluxmeshError | None) -> None:
        """Hosts let go; `Finished` with `error` when all have."""
        if self.course.is_ending:
            return
        self.course.is_ending, self._error = True, error
        self._break_off()
        for hand in self.course.hands.values():
            if hand.is_open and hand.worker.killed is None:
                hand.put(training.CloseTraining(*hand.head()), self._now)
        self._losses.must_end(self._now)

    def _wind_down(self) -> None:
        self._losses.end_late(self._now)
        if all(hand.is_free for hand in self.course.hands.values()):
            self._is_over = True
            self._out.append(Finished(self._error))
