"""What every host of a training is given next: units to encode, the ring, the state, updates. Pure.

Between `state.py` (where the run stands) and `session.py`, which calls `TrainingDispatch.work`
after all that happens. It looks at nothing but the state, so that after a loss the same code does
again whatever is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxmesh.training.data.encode_units import Crop
from fluxmesh.training.events import Dealt
from fluxmesh.training.micro_batches import deal
from fluxmesh.wire import messages
from fluxmesh_coordinator.jobs.ring import Ring
from fluxmesh_coordinator.jobs.state import Sender
from fluxmesh_coordinator.jobs.training.state import TrainingState
from fluxmesh_coordinator.jobs.training.tasks import (
    AdvanceTask,
    EncodeTask,
    GiveTask,
    OpenTask,
    PaintTask,
    Task,
    ValidateTask,
)

AHEAD = 2  # units of encoding in a host's line: one that it is at, and one that comes next
UNEQUAL = 1.3  # times as fast, from where on a host is dealt more


@dataclass(kw_only=True)
class TrainingDispatch:
    """Gives out work."""

    state: TrainingState
    send: Sender
    tell: Callable[[Dealt], None]
    answer: Callable[[object], None]  # the task that the run waits for is done
    stuck: Callable[[str], None]  # the hosts at hand can't do it

    def __post_init__(self) -> None:
        self._opening = self.state.names.opening()

    def work(self, task: Task, now: float) -> None:
        """Sends all that can be sent now of what the run asks for."""
        state = self.state
        if isinstance(task, EncodeTask):
            self._encode()
            return
        if not self._is_ready():
            return
        assert state.done is not None
        goal = task.update + 1 if isinstance(task, AdvanceTask) else state.reached
        if state.done < goal:
            self._update(state.done)
            state.pace.begins(now)
            return
        first = state.members[0]
        match task:
            case OpenTask():
                self.answer(None)
            case ValidateTask():
                first.validate()
            case PaintTask():
                first.paint()
            case GiveTask():
                state.vectors = {}
                first.give()

    def _encode(self) -> None:
        """Every host takes the next units, one after another."""
        state = self.state
        if not state.units and not any(state.encoding.values()):
            self.answer(None)
            return
        job = state.job
        for host in state.hosts.values():
            line = state.encoding.setdefault(host.rank, [])
            host.make_room()
            while state.units and len(line) < AHEAD:
                unit = state.units.pop(0)
                line.append(unit)
                work: messages.Work
                if isinstance(unit, Crop):
                    work = messages.EncodeSource(
                        fence=host.fence,
                        job=job.id,
                        ring_generation=host.ring_generation,
                        weights=job.weights,
                        pixels=job.pixels(unit),
                    )
                else:
                    work = messages.Encode(
                        fence=host.fence,
                        job=job.id,
                        ring_generation=host.ring_generation,
                        weights=job.weights,
                        prompt=unit.text,
                    )
                host.put(work)

    def _is_ready(self) -> bool:
        """Whether the ring is up, open and free; takes the next step towards it if not."""
        state = self.state
        if state.ring is None and not self._form():
            return False
        assert state.ring is not None
        if not state.ring.is_up:
            orders = state.ring.advance(state.hosts, state.job)
            for rank, message in orders:
                self.send(state.hosts[rank], message)
            return False
        for host in state.members:
            if not host.is_open and host.is_free:
                update, vectors = state.saved
                host.open(self._opening, update, vectors)
        if not all(host.is_open and host.is_free for host in state.members):
            return False
        if state.done is None:
            state.done = state.saved[0]
            self._dealt()
        return True

    def _form(self) -> bool:
        """Chooses who is in the ring, once all have ended what they were at."""
        state = self.state
        if not all(host.is_free for host in state.hosts.values()):
            return False
        choice = state.choose()
        if choice.winner is None:
            self.stuck(choice.reason)
            return False
        ranks = choice.winner.ranks
        state.ring = Ring.of(ranks, state.hosts, state.links.backend_of(ranks))
        for host in state.members:
            host.is_open = False
        return True

    def _hands_out(self, update: int) -> list[list[int]]:
        """The micro-batches of each member. Hosts that are about as fast get as many."""
        numbers, members = self.state.job.plan.request.micro_batches(update), self.state.members
        known = [host.seconds for host in members if host.seconds is not None]
        shares = [1.0] * len(members)
        if len(known) == len(members) and max(known) > UNEQUAL * min(known):
            shares = [1 / seconds for seconds in known]
        return deal(numbers, shares)

    def _dealt(self) -> None:
        request, members = self.state.job.plan.request, self.state.members
        parts = deal(request.micro_batches(0), [1.0] * len(members))
        shares = {host.rank: len(part) for host, part in zip(members, parts, strict=True)}
        self.tell(
            Dealt(
                updates=request.updates,
                micro_batches=request.grad_accumulate,
                batch_size=request.batch_size,
                shares=shares,
            )
        )

    def _update(self, update: int) -> None:
        members = self.state.members
        parts = len(self.state.job.plan.request.micro_batches(update))
        for host, numbers in zip(members, self._hands_out(update), strict=True):
            host.update(update, numbers, parts, together=len(members) > 1)
