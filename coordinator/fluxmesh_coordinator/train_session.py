"""A training's life on a mesh: its ring, its updates, and what to do when a host dies.

PURE, as `session.py` and with the same ends: events go in (`jobs.Input`, and `Wanted` from the
run), instructions come out. `conduct.py` does what it says; `train_losses.py` takes losses.

Every host holds the same state, and any death breaks the ring: all its engines end, and those that
are left form another. They go on from the state that was given last (the run's last checkpoint)
and do the updates since then once more. Micro-batches are functions of their numbers and sums are
exact, so the state comes out as it was: the run above never hears of it, it only waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fluxmesh import events, messages
from fluxmesh.cluster import HostInfo
from fluxmesh.errors import CancelledError, FluxmeshError
from fluxmesh.training import messages as training
from fluxmesh.training.events import Dealt, TrainEvent
from fluxmesh.training.run import Moved
from fluxmesh.training.sampling import deal
from fluxmesh.training.units import Crop, Unit
from fluxmesh_coordinator import failures, train_jobs
from fluxmesh_coordinator.hosts import Worker
from fluxmesh_coordinator.jobs import (
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
from fluxmesh_coordinator.rings import Ring
from fluxmesh_coordinator.train_hands import Hand
from fluxmesh_coordinator.train_jobs import Choice, Names, TrainJob, UnitEncoded, Vectors, Wanted
from fluxmesh_coordinator.train_losses import Losses

AHEAD = 2  # units of encoding in a host's line: one that it is at, and one that comes next
UNEQUAL = 1.3  # times as fast, from where on a host is dealt more


class TrainSession:
    """One run: `begin` it with leased hosts, then `handle` what happens until `Finished`."""

    def __init__(self, job: TrainJob) -> None:
        self.job, self.names = job, Names(job)
        self.hands: dict[int, Hand] = {}  # by rank; those that can be used
        self.links = Links()
        self.ring: Ring | None = None
        self.task: Wanted | None = None
        self.is_halting = False
        self.is_ending = False
        self._opening = self.names.opening()
        self._losses = Losses(self, self._tell, self.end)
        self._state: tuple[int, Vectors] = (0, {})  # to go on from
        self._done: int | None = None  # updates that the ring's state has behind it
        self._reached = 0  # updates that the run knows of
        self._latest: Moved | None = None  # what the last of them did
        self._vectors: dict[str, np.ndarray] = {}  # that come
        self._units: list[Unit] = []  # to be encoded
        self._encoding: dict[int, list[Unit]] = {}  # by rank, in the order of its line
        self._error: FluxmeshError | None = None
        self._now = 0.0
        self._out: list[Instruction] = []
        self._is_over = False

    # In and out

    @property
    def id(self) -> str:
        """The job's."""
        return self.job.id

    def begin(self, hosts: Sequence[LeasedHost], links: Links, now: float) -> list[Instruction]:
        """Starts, or goes on after `Stuck`, with these hosts and no others."""
        self._now, self.links = now, links
        self.hands = {
            leased.rank: self._hand(leased) for leased in hosts if self._losses.takes(leased.rank)
        }
        self.ring, self._done = None, None
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
                self._losses.gone(event.rank, event.reason, now)
            case Back():
                if self._losses.takes(event.host.rank) and event.host.rank not in self.hands:
                    self.hands[event.host.rank] = self._hand(event.host)
            case Stop():
                self.end(CancelledError("Cancelled."))
            case Tick():
                self._losses.look(now)
        return self._go_on()

    def find(self, hosts: Sequence[HostInfo], links: Links) -> Choice:
        """Which of these hosts would take part."""
        usable = [host for host in hosts if self._losses.takes(host.rank)]
        return train_jobs.choose(self.job, usable, links)

    def has_given_up(self, ranks: Iterable[int]) -> bool:
        """Whether all of these hosts failed too often to be used again."""
        return not any(self._losses.takes(rank) for rank in ranks)

    @property
    def members(self) -> list[Hand]:
        """Who is in the ring, in its order."""
        ranks = () if self.ring is None else self.ring.ranks
        return [self.hands[rank] for rank in ranks if rank in self.hands]

    @property
    def is_open(self) -> bool:
        """Whether every host of the ring has the state."""
        return self._done is not None

    def _hand(self, leased: LeasedHost) -> Hand:
        return Hand(leased, self.job, self.names, self._send, self._now)

    def _send(self, worker: Worker, message: messages.Changing) -> None:
        self._out.append(Send(worker.rank, message))

    def _tell(self, event: events.Event | TrainEvent | Result) -> None:
        self._out.append(Tell(event))

    def _answer(self, value: object = None) -> None:
        """The run's task is done."""
        assert self.task is not None
        self._tell(train_jobs.Answer(self.task.number, value))
        self.task = None

    # What is to be done next

    def _go_on(self) -> list[Instruction]:
        if self.is_ending:
            self._wind_down()
        elif any(hand.worker.killed is not None for hand in self.hands.values()):
            pass  # what is left is dealt out when they are gone
        elif self.is_halting:
            self._halt_on()
        elif self.task is not None:
            if not self.hands:
                self._out.append(Stuck("No host is left."))
            else:
                self._work(self.task.task)
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
            self._units = list(task.units)
        if isinstance(task, train_jobs.Open):
            self._state = (task.update, task.vectors)
            self._reached = task.update
        self.task = wanted

    def _work(self, task: train_jobs.Task) -> None:
        if isinstance(task, train_jobs.Encode):
            self._encode()
            return
        if not self._is_ready():
            return
        assert self._done is not None
        goal = self._reached
        if isinstance(task, train_jobs.Advance):
            goal = task.update + 1
        if self._done < goal:
            self._update(self._done)
            return
        first, now = self.members[0], self._now
        match task:
            case train_jobs.Open():
                self._answer()
            case train_jobs.Validate():
                first.bring(self.names.held_out(), now)
                first.put(training.Validate(*first.head()), now)
            case train_jobs.Paint():
                first.bring(self.names.prompt(), now)
                first.put(training.PaintProgress(*first.head()), now)
            case train_jobs.Give():
                self._vectors = {}
                first.put(training.GiveVectors(*first.head()), now)

    def _encode(self) -> None:
        """Every host takes the next units, one after another."""
        if not self._units and not any(self._encoding.values()):
            self._answer()
            return
        for hand in self.hands.values():
            line = self._encoding.setdefault(hand.rank, [])
            if not hand.has_room:
                hand.put(training.MakeRoom(*hand.head(), self.job.weights), self._now)
                hand.has_room = True
            while self._units and len(line) < AHEAD:
                unit = self._units.pop(0)
                line.append(unit)
                head = (*hand.head(), self.job.weights)
                if isinstance(unit, Crop):
                    hand.put(messages.EncodeSource(*head, self.job.pixels(unit)), self._now)
                else:
                    hand.put(messages.Encode(*head, unit.text), self._now)

    def _is_ready(self) -> bool:
        """Whether the ring is up, open and free; takes the next step towards it if not."""
        if self.ring is None and not self._form():
            return False
        assert self.ring is not None
        if not self.ring.is_up:
            self._join()
            return False
        for hand in self.members:
            if not hand.is_open and hand.is_free:
                hand.open(self._opening, *self._state, self._now)
        if not all(hand.is_open and hand.is_free for hand in self.members):
            return False
        if self._done is None:
            self._done = self._state[0]
            self._dealt()
        return True

    def _form(self) -> bool:
        """Chooses who is in the ring, once all have ended what they were at."""
        if not all(hand.is_free for hand in self.hands.values()):
            return False
        found = train_jobs.choose(
            self.job, [hand.worker.info for hand in self.hands.values()], self.links
        )
        if found.winner is None:
            self._out.append(Stuck(found.reason))
            return False
        workers = {rank: hand.worker for rank, hand in self.hands.items()}
        self.ring = Ring.of(found.winner.ranks, workers)
        for hand in self.members:
            hand.is_open = False
        return True

    def _join(self) -> None:
        ring, backend = self.ring, self.links.backend
        assert ring is not None
        workers = {rank: hand.worker for rank, hand in self.hands.items()}
        orders = []
        if not ring.is_asked:
            orders += ring.ask(workers, backend)
        if ring.has_ports and not ring.is_told:
            orders += ring.join(workers, self.job, backend)
        for rank, message in orders:
            if isinstance(message, messages.Join):
                workers[rank].put(message, self._now)
            self._send(workers[rank], message)

    def _hands_out(self, update: int) -> list[list[int]]:
        """The micro-batches of each member. Hosts that are about as fast get as many."""
        numbers, members = self.job.plan.request.micro_batches(update), self.members
        known = [hand.seconds for hand in members if hand.seconds is not None]
        shares = [1.0] * len(members)
        if len(known) == len(members) and max(known) > UNEQUAL * min(known):
            shares = [1 / seconds for seconds in known]
        return deal(numbers, shares)

    def _dealt(self) -> None:
        request, members = self.job.plan.request, self.members
        shares = deal(request.micro_batches(0), [1.0] * len(members))
        told = {hand.rank: len(share) for hand, share in zip(members, shares, strict=True)}
        self._tell(Dealt(request.updates, request.grad_accumulate, request.batch_size, told))

    def _update(self, update: int) -> None:
        parts = len(self.job.plan.request.micro_batches(update))
        members, together = self.members, len(self.members) > 1
        for hand, numbers in zip(members, self._hands_out(update), strict=True):
            hand.moved = None
            hand.bring(self.names.of_micro_batches(numbers), self._now)
            head = hand.head()
            told = training.Update(*head, update, tuple(numbers), parts, together)
            hand.put(told, self._now)
        self._losses.begins(self._now)

    # What agents say

    def _answered(self, event: Answered) -> None:
        hand, request, answer = self.hands.get(event.rank), event.request, event.answer
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
            ring = self.ring
            if ring is not None and not ring.is_told and hand.rank in ring.ranks:
                workers = {rank: other.worker for rank, other in self.hands.items()}
                for rank, message in ring.answered(hand.rank, request.ip, answer.ports, workers):
                    self._send(workers[rank], message)

    def _reported(self, event: Reported) -> None:
        hand, report = self.hands.get(event.rank), event.report
        if hand is None:
            return
        if isinstance(report, messages.Lost):
            self._losses.gone(event.rank, report.reason, self._now)
            return
        worker, now = hand.worker, self._now
        if getattr(report, "epoch", worker.epoch) != worker.epoch:
            return  # left over from an engine that is gone
        if getattr(report, "job", "") not in ("", self.job.id):
            return
        worker.heard(report, now)
        match report:
            case messages.Joined():
                worker.done(messages.Join, now)
                if self.ring is not None:
                    self.ring.joined.add(worker.rank)
            case messages.Progress():
                part, done, total = report.component, report.done_bytes, report.total_bytes
                self._tell(events.Loading(part, done, total, worker.rank))
            case messages.Encoded():
                worker.done(messages.Encode, now)
                self._encoded(hand, {"t5": report.t5, "clip": report.clip})
            case messages.SourceEncoded():
                worker.done(messages.EncodeSource, now)
                self._encoded(hand, {"latents": report.latents})
            case messages.Cancelled():
                worker.line.clear()
            case messages.Failed():
                self._losses.failed(hand, report.kind, report.text, report.fatal, now)
            case training.Opened():
                worker.done(training.OpenTraining, now)
                hand.is_open = True
            case training.Computed():
                hand.computed(report.seconds)
                self._losses.moved(now)
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

    def _answer_if(self, kind: type[object], value: object) -> None:
        if self.task is not None and isinstance(self.task.task, kind):
            self._answer(value)

    def _encoded(self, hand: Hand, arrays: dict[str, np.ndarray]) -> None:
        line = self._encoding.get(hand.rank, [])
        if line:
            self._tell(UnitEncoded(line.pop(0), arrays))

    def _moved(self) -> None:
        """An update is done when all hosts have made the same move."""
        found = [hand.moved for hand in self.members if hand.moved is not None]
        if len(found) < len(self.members) or self._done is None:
            return
        self._losses.advanced(self._now)
        first = found[0]
        if len({(one.loss, one.images, one.bad) for one in found}) > 1:
            self.end(FluxmeshError("The hosts' states differ; go on with --resume."))
            return
        peak = max(one.peak_bytes for one in found)
        moved = Moved(first.loss, first.norm, first.rate, first.images, first.bad, peak)
        for hand in self.members:
            hand.moved = None
        if not first.bad:
            self._done += 1
        if self._done > self._reached:
            self._reached, self._latest = self._done, moved
        task = self.task.task if self.task is not None else None
        if isinstance(task, train_jobs.Advance) and (first.bad or self._done == task.update + 1):
            self._answer(moved)

    def _vector(self, hand: Hand, part: training.VectorPart) -> None:
        vector = self._vectors.setdefault(part.vector, np.empty(part.total, np.float32))
        vector[part.offset : part.offset + len(part.numbers)] = part.numbers
        if not part.is_last:
            return
        hand.worker.done(training.GiveVectors, self._now)
        if self.task is None or not isinstance(self.task.task, train_jobs.Give):
            return
        self._state = (part.update, self._vectors)
        self._answer(self._vectors)
        if part.update < self.job.plan.request.updates:
            self._welcome()

    def _welcome(self) -> None:
        """Hosts that came back join in: now nothing would have to be done again."""
        infos = [hand.worker.info for hand in self.hands.values()]
        found = train_jobs.choose(self.job, infos, self.links).winner
        if found is not None and len(found.ranks) > len(self.members):
            self._losses.part(self._now)

    def parted(self) -> None:
        """The ring is no more, nor the state that its hosts held."""
        self.ring, self._done = None, None

    def give_back(self, rank: int) -> None:
        """What a host was encoding is for others."""
        self._units = self._encoding.pop(rank, []) + self._units

    # The end

    def _halt(self) -> None:
        """Breaks off what runs; `_halt_on` answers when all is quiet."""
        self.is_halting = True
        self._units, self._encoding = [], {}
        self._break_off()

    def _break_off(self) -> None:
        for hand in list(self.hands.values()):
            hand.forget_unsent()
            worker = hand.worker
            if worker.killed is not None or not worker.line:
                continue
            if worker.has(messages.Join):  # a ring that forms hears of no cancel
                self._losses.part(self._now)
                return
            self._send(worker, messages.Cancel(worker.fence, self.job.id))

    def _halt_on(self) -> None:
        if all(hand.is_free for hand in self.hands.values()):
            self.is_halting = False
            if self.task is not None:
                self._answer(train_jobs.Halted(self._done, self._latest))

    def end(self, error: FluxmeshError | None) -> None:
        """Hosts let go; `Finished` with `error` when all have."""
        if self.is_ending:
            return
        self.is_ending, self._error = True, error
        self._break_off()
        for hand in self.hands.values():
            if hand.is_open and hand.worker.killed is None:
                hand.put(training.CloseTraining(*hand.head()), self._now)
        self._losses.must_end(self._now)

    def _wind_down(self) -> None:
        self._losses.end_late(self._now)
        if all(hand.is_free for hand in self.hands.values()):
            self._is_over = True
            self._out.append(Finished(self._error))
