"""What a training does when an engine dies, a host is gone or nothing moves. Pure.

Below `train_session.py`. Before there is a ring, a death is one host's affair. In a ring the
survivors may hang for ever: all engines end, and those that are left form another.
"""

from __future__ import annotations

from collections.abc import Callable

from fluxmesh.errors import FluxmeshError
from fluxmesh.events import HostLost
from fluxmesh.wire import messages
from fluxmesh.wire import training_messages as training
from fluxmesh_coordinator import failures
from fluxmesh_coordinator.blame import ENOUGH, Blame
from fluxmesh_coordinator.hosts import SILENCE
from fluxmesh_coordinator.train_course import TrainCourse
from fluxmesh_coordinator.train_hands import Hand
from fluxmesh_coordinator.jobs.health import Blame
from fluxmesh_coordinator.jobs.host import SILENCE
from fluxmesh_coordinator.jobs.training.host import Hand
from fluxmesh_coordinator.jobs.training.state import TrainCourse

MAX_ATTEMPTS = 5  # rings that fail one after another without an update in between
FIRST = 300.0  # seconds in which a new ring's first micro-batch is done
SLACK = 8.0  # times the longest that nothing was done before, or
LEAST = 30.0  # seconds, whichever is longer: then the ring hangs


class Losses:
    """Takes losses for a course."""

    def __init__(
        self,
        course: TrainCourse,
        tell: Callable[[HostLost], None],
        end: Callable[[FluxmeshError], None],
    ) -> None:
        self.course, self.tell, self.end = course, tell, end
        self._blame = Blame()
        self._attempts = 0
        self._calm = 0  # micro-batches since somebody was overdue
        self._since = 0.0  # when something was done last
        self._longest: float | None = None  # that nothing was done, in this ring
        self._end_by = 0.0

    def takes(self, rank: int) -> bool:
        """Whether a host may take part (again)."""
        return self._blame.takes(rank)

    # What moves

    def begins(self, now: float) -> None:
        """An update begins."""
        self._since = now

    def worked(self, rank: int, now: float) -> None:
        """A host has done a micro-batch."""
        self._blame.worked(rank)
        self._moved(now)
        self._calm += 1
        if self._calm == ENOUGH:  # else each of a day's alarms would double the wait for the next
            for hand in self.course.hands.values():
                hand.worker.patience = 1.0

    def _moved(self, now: float) -> None:
        self._longest = max(self._longest or 0.0, now - self._since)
        self._since = now

    def advanced(self, now: float) -> None:
        """An update is done."""
        self._moved(now)
        self._attempts = 0

    @property
    def _limit(self) -> float:
        longest = self._longest
        members = self.course.members
        patience = max((hand.worker.patience for hand in members), default=1.0)
        return patience * (FIRST if longest is None else max(LEAST, SLACK * longest))

    def look(self, now: float) -> None:
        """Finds who is overdue."""
        course = self.course
        for rank, hand in list(course.hands.items()):
            reason = hand.worker.overdue(now) if rank in course.hands else ""
            if reason and hand.worker.killed is not None:
                self.gone(rank, reason, now)
            elif reason and not course.is_ending:
                self._overdue(hand, reason, now)
        updating = [hand for hand in course.members if hand.worker.has(training.Update)]
        if updating and not course.is_ending and now - self._since > self._limit:
            self._overdue(updating[0], f"no micro-batch was done for {self._limit:.0f} s", now)

    def _overdue(self, hand: Hand, reason: str, now: float) -> None:
        """Somebody gave no sign in time. It may have been slow: deadlines are longer now."""
        self._calm = 0
        in_ring = self._is_in_ring(hand)
        for other in self.course.members if in_ring else [hand]:
            other.worker.patience *= 2
        # In a ring all wait for the one that hangs, and nobody knows which one that is.
        self._engine_lost(hand, reason, now, blamed=not in_ring)

    # What is lost

    def failed(self, hand: Hand, kind: str, text: str, fatal: bool, now: float) -> None:
        """An engine died (`fatal`), or could not do its work; `kind` is the error's class."""
        course = self.course
        if course.is_ending:
            hand.forget_unsent()
            hand.worker.line.clear()
            return
        if not fatal and kind in failures.FINAL:
            self.end(failures.error_of(kind, text))
            return
        # A survivor of a broken ring fails too; the one to blame is the one that died.
        blamed = not fatal or kind == failures.DIED or not self._is_in_ring(hand)
        self._engine_lost(hand, text, now, blamed=blamed)
        if not fatal and kind in failures.OF_HOST:
            course.hands.pop(hand.rank, None)
            self._blame.leave_out(hand.rank)
            if not course.hands:
                self.end(failures.error_of(kind, f"{hand.worker.info.name}: {text}"))

    def gone(self, rank: int, reason: str, now: float, *, counts: bool = True) -> None:
        """A host is out of reach; `counts` where that is a failure of its own."""
        course, hand = self.course, self.course.hands.pop(rank, None)
        if hand is None or course.is_ending:
            return
        self.tell(HostLost(rank, hand.worker.info.name, reason))
        if counts and hand.worker.killed is None:  # else it hung, and that was counted
            self._blame.failed(rank, now)
        course.give_back(rank)
        if course.ring is not None and rank in course.ring.ranks:
            if counts:
                self._broken(reason, now)
            else:
                self.part(now)

    def part(self, now: float) -> None:
        """Ends the ring: all its engines, and with them what they hold."""
        course = self.course
        ring, members = course.ring, course.members
        course.parted()
        self._longest = None
        epochs = [hand.worker.epoch for hand in members]
        epoch = 1 + max([*epochs, *([] if ring is None else [ring.epoch])], default=0)
        for hand in members:
            self._kill(hand, epoch, now)

    def _is_in_ring(self, hand: Hand) -> bool:
        ring = self.course.ring
        return ring is not None and len(ring.ranks) > 1 and hand.rank in ring.ranks

    def _engine_lost(self, hand: Hand, reason: str, now: float, *, blamed: bool) -> None:
        course, rank = self.course, hand.rank
        self.tell(HostLost(rank, hand.worker.info.name, reason))
        if blamed:
            self._blame.failed(rank, now)
        course.give_back(rank)
        if course.ring is not None and rank in course.ring.ranks:
            self._broken(reason, now)
        else:  # also if it is dead: what is on its way would start another, and be told twice
            self._kill(hand, hand.worker.epoch + 1, now)
        if not self.takes(rank):
            course.hands.pop(rank, None)

    def _broken(self, reason: str, now: float) -> None:
        self.part(now)
        self._attempts += 1
        if self._attempts >= MAX_ATTEMPTS:
            text = f"{MAX_ATTEMPTS} rings failed one after another: {reason}"
            self.end(FluxmeshError(f"{text} Go on with --resume."))

    def _kill(self, hand: Hand, epoch: int, now: float) -> None:
        hand.lost()
        hand.worker.kill(epoch, now)
        hand.put(messages.Kill(hand.worker.fence, epoch), now)

    # The end

    def must_end(self, now: float) -> None:
        """Engines that do not let go soon are killed."""
        self._end_by = now + max(SILENCE, 2 * (self._longest or 0.0))

    def end_late(self, now: float) -> None:
        if now < self._end_by:
            return
        for hand in self.course.hands.values():
            if hand.worker.killed is None and not hand.is_free:
                self._kill(hand, hand.worker.epoch + 1, now)
