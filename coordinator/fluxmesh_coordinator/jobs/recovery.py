"""What is done when an engine dies, a host is gone or nothing moves. Pure.

Below `session.py`. Outside of a ring a death is one host's affair: what it had in line is given
back, and its engine starts anew. In a ring the survivors may hang for ever, so all its engines are
ended, and then what is left is planned with the hosts that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fluxmesh.errors import FluxmeshError
from fluxmesh.events import Event, HostLost
from fluxmesh.wire import messages
from fluxmesh_coordinator import failures
from fluxmesh_coordinator.jobs.generation.state import Course, Send
from fluxmesh_coordinator.jobs.health import Blame
from fluxmesh_coordinator.jobs.host import Worker

MAX_ATTEMPTS = 5  # rings that fail one after another without a step in between


class Recovery:
    """Takes losses; `end` is called where the job can't go on at all."""

    def __init__(
        self,
        course: Course,
        send: Send,
        tell: Callable[[Event], None],
        end: Callable[[FluxmeshError], None],
    ) -> None:
        self.course, self.send, self.tell, self.end = course, send, tell, end
        self._blame = Blame()
        self._attempts = 0

    def takes(self, rank: int) -> bool:
        """Whether a host may take part (again)."""
        return self._blame.takes(rank)

    def worked(self, rank: int) -> None:
        """A host made a step."""
        self._blame.worked(rank)

    def moved(self) -> None:
        """A step was acknowledged: whatever failed before, the ring works."""
        self._attempts = 0

    def failed(self, worker: Worker, kind: str, text: str, fatal: bool, now: float) -> None:
        """An engine died (`fatal`), or could not do its work; `kind` is the error's class."""
        name = worker.info.name
        if not fatal and kind in failures.FINAL:
            self.end(failures.error_of(kind, text))
            return
        # A survivor of a broken ring fails too; the one to blame is the one that died.
        blamed = kind == failures.DIED or not self.course.has_ring_with(worker.rank)
        if kind == failures.LATE:
            blamed, self.course.shuns_rings = False, True
        self.engine_lost(worker, text, now, blamed=blamed)
        if not fatal and kind in failures.OF_HOST:
            self._drop(worker.rank)
            if not self.course.workers:
                self.end(failures.error_of(kind, f"{name}: {text}"))

    def overdue(self, worker: Worker, reason: str, now: float) -> None:
        """An engine gave no sign in time. It may have been slow: deadlines are longer now."""
        ring = self.course.ring
        in_ring = ring is not None and self.course.has_ring_with(worker.rank)
        for rank in ring.ranks if ring is not None and in_ring else (worker.rank,):
            if rank in self.course.workers:
                self.course.workers[rank].patience *= 2
        # In a ring all wait for the one that hangs, and nobody knows which one that is.
        self.engine_lost(worker, reason, now, blamed=not in_ring)

    def engine_lost(self, worker: Worker, reason: str, now: float, *, blamed: bool) -> None:
        """What an engine had in line goes to others; in a ring, all engines end."""
        course, rank = self.course, worker.rank
        self.tell(HostLost(rank, worker.info.name, reason))
        course.losses += 1
        if blamed:
            self._blame.failed(rank, now)
        if course.has_ring_with(rank):
            self._end_ring(reason, now)
        else:
            course.give_back(worker)
            # Also if it is dead: what is on its way would start another, and be told twice.
            self.kill(worker, worker.epoch + 1, now)
        if not self.takes(rank):
            self._drop(rank)
            if not course.workers:
                self.end(FluxmeshError(f"{worker.info.name} failed twice: {reason}"))

    def gone(self, rank: int, reason: str, now: float, *, counts: bool = True) -> None:
        """A host is out of reach; `counts` where that is a failure of its own."""
        course, worker = self.course, self.course.workers.get(rank)
        if worker is None:
            return
        self.tell(HostLost(rank, worker.info.name, reason))
        course.losses += 1
        if counts and worker.killed is None:  # else it hung, and that was counted
            self._blame.failed(rank, now)
        broke_ring = course.has_ring_with(rank)
        self._drop(rank)
        if broke_ring:
            self._end_ring(reason, now)

    def kill(self, worker: Worker, epoch: int, now: float) -> None:
        """Ends a host's engine, whatever it does; `epoch` begins there."""
        worker.kill(epoch, now)
        self.send(worker, messages.Kill(worker.fence, epoch))

    def _drop(self, rank: int) -> None:
        """Goes on without a host."""
        course, worker = self.course, self.course.workers.pop(rank, None)
        if worker is None:
            return
        course.give_back(worker)
        if not course.phases:
            course.needs_plan = course.needs_plan or not course.workers
            return
        left = tuple(other for other in course.phases[0].ranks if other in course.workers)
        if any(set(phase.ranks) - set(course.workers) for phase in course.phases[1:]):
            course.needs_plan = True  # a ring that was to work later
        elif course.in_ring:
            course.needs_plan = course.needs_plan or rank in course.phases[0].ranks
        elif left:
            course.phases[0] = replace(course.phases[0], ranks=left)
        else:
            course.needs_plan = True

    def _end_ring(self, reason: str, now: float) -> None:
        """Ends the engines of all members; once they are gone, what is left is planned."""
        course, ring = self.course, self.course.ring
        assert ring is not None
        members = [course.workers[rank] for rank in ring.ranks if rank in course.workers]
        course.album.give_back(ring.ranks[0])
        epoch = 1 + max([ring.epoch, *(worker.epoch for worker in members)])
        course.ring, course.phases, course.needs_plan = None, [], True
        for worker in members:
            course.give_back(worker)
            self.kill(worker, epoch, now)
        self._attempts += 1
        if self._attempts >= MAX_ATTEMPTS:
            self.end(FluxmeshError(f"{MAX_ATTEMPTS} rings failed one after another: {reason}"))
