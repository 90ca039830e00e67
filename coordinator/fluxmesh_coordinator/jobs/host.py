"""One host of a running job: what its engine has in line, and when its silence means death. Pure.

Below `session.py`. An engine does its units of work one after another; the first in line is the
one that it is at. A step that was timed before must come again in time; what takes long by itself
(loading, encoding, a first step, a decode) ticks meanwhile, and may not take longer than the unit's
own class says (`messages.EngineUnit`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from fluxmesh.cluster import hostfile
from fluxmesh.cluster.snapshot import (
    Holding,
    HostInfo,
    Placement,
    RingPlace,
    StepShape,
    TextHolding,
)
from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.wire.messages import (
    WARM_STEP,
    Beat,
    EngineUnit,
    Join,
    LoadProgress,
    Message,
    Paint,
    Report,
)
from fluxmesh_coordinator.jobs.types import LeasedHost

SLACK = 4.0  # times what a step took before

Readiness = Literal["new engine", "new placement", "new shape", "loading", "warm"]
"""For a first step: no kernel of the model is compiled; none of this placement's is; those of this
size aren't; all are, and its weights come first; nothing is to be done before."""


@dataclass
class QueuedWork:
    """Work in line, or a ring to join."""

    message: EngineUnit
    since: float | None = None  # when it became the first in line


class HostState:
    """One host, its engine, and what it was given."""

    def __init__(self, leased: LeasedHost, now: float, deadlines: Deadlines = DEADLINES) -> None:
        self.deadlines = deadlines
        self.entry: hostfile.Host = leased.host
        self.info: HostInfo = leased.info
        self.fence = leased.fence
        self.ring_generation = leased.ring_generation
        self.ring = RingPlace(leased.ring, leased.ring_rank, leased.ring_size, leased.ring_backend)
        self.line: deque[QueuedWork] = deque()
        self.is_loaded = False  # with what the phase needs
        self.killed: float | None = None  # since when its engine is being ended
        self.patience = 1.0  # deadlines are this many times as long: each alarm may be a false one
        self._is_new = not leased.is_up  # the engine has given no sign yet
        self._shapes: set[tuple[Placement, int, int]] = set()  # of which it has made a step
        self._step_seconds: dict[tuple[Placement, int, int], float] = {}
        self._guesses: dict[tuple[Placement, int, int], float] = {}  # where nothing was timed
        self._heard = now  # when the engine last gave a sign
        self._read = now  # when it last told of bytes that it loaded
        self._at = ""  # what it told last, if it ticked
        self._moved = now  # when the last step was done

    @property
    def rank(self) -> int:
        return self.info.rank

    @property
    def now(self) -> HostInfo:
        """The host as a plan sees it, in the ring in which its engine is now."""
        return replace(self.info, ring=self.ring)

    @property
    def is_free(self) -> bool:
        """Whether it has nothing to do."""
        return not self.line and self.killed is None

    @property
    def is_in_collective(self) -> bool:
        """Whether its engine joins a ring now, or may wait for others in one."""
        unit = self.line[0].message if self.line else None
        return isinstance(unit, Join) or (unit is not None and unit.is_collective)

    def has(self, *kinds: type[Message]) -> bool:
        """Whether something of these kinds is in line."""
        return any(isinstance(unit.message, kinds) for unit in self.line)

    def sent(self, message: Message, now: float) -> None:
        """It is on its way: work of which something is reported is the last in line from now on."""
        if isinstance(message, EngineUnit) and message.reports:
            self.line.append(QueuedWork(message, None if self.line else now))

    def answered(self, request: Message) -> None:
        """The agent has taken a message of this ring generation in."""

    def heard(self, report: Report, now: float) -> QueuedWork | None:
        """A sign from the engine. The work in line that it is of; over now, if it ends with it."""
        self._heard, self._is_new = now, False
        self._at = report.doing if isinstance(report, Beat) else ""
        if isinstance(report, LoadProgress):
            self._read = now
        unit = next((unit for unit in self.line if unit.message.gave(report)), None)
        if unit is not None and unit.message.is_ended_by(report):
            self.line = deque(other for other in self.line if other is not unit)
            if self.line and self.line[0].since is None:
                self.line[0].since = now
        return unit

    def readiness(self, paint: Paint) -> Readiness:
        """How ready its engine is for the first step, by this job or earlier ones."""
        held, weights = self.info.holds, paint.weights
        if not self.info.has_kernels(weights):
            return "new engine"
        if (shape := self._kind(paint)) not in self.info.compiled:
            return "new shape" if self.info.has_taken(shape) else "new placement"
        return (
            "warm" if held is not None and held.weights.denoiser == weights.denoiser else "loading"
        )

    def stepped(
        self,
        paint: Paint,
        seconds: float,
        now: float,
        *,
        begun: float | None = None,
        reused: bool = False,
    ) -> None:
        """A step is done: the next one is expected in about the time that this one took.

        `begun`: when the image became the first in line, if it did. `reused`: a cache made the step
        cheap, which the next one need not be.
        """
        shape = _shape(paint)
        took = seconds
        if shape in self._shapes:
            took = now - max(self._moved, now if begun is None else begun)
        self._shapes.add(shape)
        if (kind := self._kind(paint)) not in self.info.compiled:
            self.info = replace(self.info, compiled=(*self.info.compiled, kind))
        known = self._step_seconds.get(shape, 0.0) if reused else 0.0
        self._step_seconds[shape] = max(seconds, took, known)
        self._moved = now

    def step_deadline(self, paint: Paint) -> float:
        """Seconds in which a step that is not the first of its shape must come."""
        expected = self._step_seconds.get(_shape(paint), 0.0)
        return max(self.deadlines.silence, SLACK * expected) * self.patience

    def expect(self, paint: Paint, seconds: float, *, measured: bool) -> None:
        """How long a step takes by what was measured, or was reckoned, until one is timed here."""
        known = self._step_seconds if measured else self._guesses
        known.setdefault(_shape(paint), seconds)

    def cancel_deadline(self) -> float:
        """Seconds in which it lets go of what it does: it hears of a cancel between two steps."""
        paints = [unit.message for unit in self.line if isinstance(unit.message, Paint)]
        return max([self.deadlines.silence, *map(self.step_deadline, paints)])

    def let_go(self) -> None:
        """The engine does nothing more of what it had in line."""
        self.line.clear()

    def cancelled(self, now: float) -> None:
        """The engine has let go of what it had in line when it was told to."""
        self.line.clear()

    def forget_unsent(self) -> None:
        """What waits here to be sent is not sent."""

    def kill(self, ring_generation: int, now: float) -> None:
        """The engine is being ended, with all that it held, knew and had in line; that generation
        begins.

        Nothing of an older ring generation is done or told from then on, even if it is on its way
        now.
        """
        self.ring_generation, self.killed = ring_generation, now
        self.line.clear()
        self.is_loaded = False
        self.ring = RingPlace()
        self.info = replace(self.info, compiled=(), text=None)
        self._shapes.clear()
        self._is_new = True
        self._at = ""
        self._heard = self._moved = now

    def hold(self, holding: Holding | None) -> int:
        """The engine holds this now; returns by how many bytes that is more than before.

        None is nothing at all: what it had for reading prompts is gone, too.
        """
        before = self.info.held_bytes
        if holding is None:
            self.info = replace(self.info, holds=None, text=None, kept=())
        else:
            self.info = replace(self.info, holds=holding)
        return self.info.held_bytes - before

    def can_read(self, text: TextHolding) -> int:
        """The engine has this for reading prompts now; returns as `hold` does."""
        before = self.info.held_bytes
        self.info = replace(self.info, text=text)
        return self.info.held_bytes - before

    def overdue(self, now: float) -> str:
        """What did not happen in time, "" where all is well."""
        if self.killed is not None:
            late = now - self.killed > self.deadlines.kill
            return "its agent does not end its engine" if late else ""
        if not self.line:
            return ""
        unit = self.line[0]
        assert unit.since is not None
        message, patience = unit.message, self.patience
        if isinstance(message, Paint) and _shape(message) in self._shapes:
            limit = self.step_deadline(message)
            late = now - max(self._moved, unit.since) > limit
            return f"a step did not come within {limit:.0f} s" if late else ""
        silent, limit = now - max(self._heard, unit.since), self._silence(unit) * patience
        if silent > limit:
            return f"it gave no sign for {silent:.0f} s while {message.doing}"
        budget = self._budget(message) * patience
        spent = now - max(self._read, unit.since)  # weights are read as fast as the disk is
        return message.late(budget) if spent > budget else ""

    def _kind(self, paint: Paint) -> StepShape:
        """The kind of step that its engine makes of an image."""
        hosts = self.ring.size
        return StepShape.of(paint.weights, paint.placement, hosts, paint.height, paint.width)

    def _silence(self, unit: QueuedWork) -> float:
        """Seconds that the first in line may go without a sign."""
        if unit.message.ticks and not self._is_new:
            return self.deadlines.silence
        return self.deadlines.first_sign

    def _budget(self, message: EngineUnit) -> float:
        """Seconds that a unit may take, or its first step, while it ticks."""
        if isinstance(message, Paint) and self._at == WARM_STEP:
            shape = _shape(message)
            expected = self._step_seconds.get(shape, self._guesses.get(shape, 0.0))
            return max(self.deadlines.first_step, SLACK * expected)
        return message.limit(self.deadlines)


def _shape(paint: Paint) -> tuple[Placement, int, int]:
    return paint.placement, paint.height, paint.width
