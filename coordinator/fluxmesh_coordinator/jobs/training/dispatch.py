"""What every host of a training is given next: units to encode, the ring, the state, updates. Pure.

Between `train_course.py` (where the run stands) and `train_session.py`, which calls
`TrainDispatch.work` after all that happens. It looks at nothing but the state, so that after a
loss the same code does again whatever is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxmesh.training.data.encode_units import Crop
from fluxmesh.training.events import Dealt
from fluxmesh.training.micro_batches import deal
from fluxmesh.wire import messages
from fluxmesh.wire import training_messages as training
from fluxmesh_coordinator.jobs.ring import Ring
from fluxmesh_coordinator.jobs.training import tasks as train_jobs
from fluxmesh_coordinator.jobs.training.host import Send
from fluxmesh_coordinator.jobs.training.state import TrainCourse

AHEAD = 2  # units of encoding in a host's line: one that it is at, and one that comes next
UNEQUAL = 1.3  # times as fast, from where on a host is dealt more


@dataclass
class TrainDispatch:
    """Gives out work, through `send`."""

    course: TrainCourse
    send: Send
    tell: Callable[[Dealt], None]
    answer: Callable[[object], None]  # the task that the run waits for is done
    stuck: Callable[[str], None]  # the hosts at hand can't do it
    begins: Callable[[float], None]  # an update does

    def __post_init__(self) -> None:
        self._opening = self.course.names.opening()
        self._now = 0.0

    def work(self, task: train_jobs.Task, now: float) -> None:
        """Sends all that can be sent now of what the run asks for."""
        course = self.course
        self._now = now
        if isinstance(task, train_jobs.Encode):
            self._encode()
            return
        if not self._is_ready():
            return
        assert course.done is not None
        goal = course.reached
        if isinstance(task, train_jobs.Advance):
            goal = task.update + 1
        if course.done < goal:
            self._update(course.done)
            return
        first, now = course.members[0], self._now
        match task:
            case train_jobs.Open():
                self.answer(None)
            case train_jobs.Validate():
                first.bring(course.names.held_out(), now)
                first.put(training.Validate(*first.head()), now)
            case train_jobs.Paint():
                first.bring(course.names.prompt(), now)
                first.put(training.PaintProgress(*first.head()), now)
            case train_jobs.Give():
                course.vectors = {}
                first.put(training.GiveVectors(*first.head()), now)

    def _encode(self) -> None:
        """Every host takes the next units, one after another."""
        course = self.course
        if not course.units and not any(course.encoding.values()):
            self.answer(None)
            return
        for hand in course.hands.values():
            line = course.encoding.setdefault(hand.rank, [])
            if not hand.has_room:
                hand.put(training.MakeRoom(*hand.head(), course.job.weights), self._now)
                hand.has_room = True
            while course.units and len(line) < AHEAD:
                unit = course.units.pop(0)
                line.append(unit)
                head = (*hand.head(), course.job.weights)
                if isinstance(unit, Crop):
                    hand.put(messages.EncodeSource(*head, course.job.pixels(unit)), self._now)
                else:
                    hand.put(messages.Encode(*head, unit.text), self._now)

    def _is_ready(self) -> bool:
        """Whether the ring is up, open and free; takes the next step towards it if not."""
        course = self.course
        if course.ring is None and not self._form():
            return False
        assert course.ring is not None
        if not course.ring.is_up:
            self._join()
            return False
        for hand in course.members:
            if not hand.is_open and hand.is_free:
                hand.open(self._opening, *course.state, self._now)
        if not all(hand.is_open and hand.is_free for hand in course.members):
            return False
        if course.done is None:
            course.done = course.state[0]
            self._dealt()
        return True

    def _form(self) -> bool:
        """Chooses who is in the ring, once all have ended what they were at."""
        course = self.course
        if not all(hand.is_free for hand in course.hands.values()):
            return False
        found = course.choose()
        if found.winner is None:
            self.stuck(found.reason)
            return False
        workers = course.workers
        course.ring = Ring.of(found.winner.ranks, workers)
        for hand in course.members:
            hand.is_open = False
        return True

    def _join(self) -> None:
        course = self.course
        ring, backend = course.ring, course.links.backend
        assert ring is not None
        workers = course.workers
        orders = []
        if not ring.is_asked:
            orders += ring.ask(workers, backend)
        if ring.has_ports and not ring.is_told:
            orders += ring.join(workers, course.job, backend)
        for rank, message in orders:
            if isinstance(message, messages.Join):
                workers[rank].put(message, self._now)
            self.send(workers[rank], message)

    def _hands_out(self, update: int) -> list[list[int]]:
        """The micro-batches of each member. Hosts that are about as fast get as many."""
        numbers, members = self.course.job.plan.request.micro_batches(update), self.course.members
        known = [hand.seconds for hand in members if hand.seconds is not None]
        shares = [1.0] * len(members)
        if len(known) == len(members) and max(known) > UNEQUAL * min(known):
            shares = [1 / seconds for seconds in known]
        return deal(numbers, shares)

    def _dealt(self) -> None:
        request, members = self.course.job.plan.request, self.course.members
        shares = deal(request.micro_batches(0), [1.0] * len(members))
        told = {hand.rank: len(share) for hand, share in zip(members, shares, strict=True)}
        self.tell(Dealt(request.updates, request.grad_accumulate, request.batch_size, told))

    def _update(self, update: int) -> None:
        course = self.course
        parts = len(course.job.plan.request.micro_batches(update))
        members, together = course.members, len(course.members) > 1
        for hand, numbers in zip(members, self._hands_out(update), strict=True):
            hand.moved = None
            hand.bring(course.names.of_micro_batches(numbers), self._now)
            head = hand.head()
            told = training.Update(*head, update, tuple(numbers), parts, together)
            hand.put(told, self._now)
        self.begins(self._now)
