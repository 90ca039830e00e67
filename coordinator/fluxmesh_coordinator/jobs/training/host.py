"""One host of a training: what its engine holds of it, and what waits to be sent there. Pure.

Below `state.py`, on `jobs/host.py` (deadlines). States and features are large: they are sent a few
at a time, so that no agent's answer waits behind a queue of gigabytes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from fluxmesh.deadlines import DEADLINES, Deadlines
from fluxmesh.wire import messages
from fluxmesh.wire.messages import training
from fluxmesh_coordinator.jobs.host import SLACK, HostState
from fluxmesh_coordinator.jobs.state import Sender
from fluxmesh_coordinator.jobs.training.tasks import Names, Opening, TrainingJob, Vectors
from fluxmesh_coordinator.jobs.types import LeasedHost

WINDOW = 16 << 20  # bytes on their way to a host that it has not answered yet
KEPT = 1 << 30  # bytes of features that a host keeps
SMOOTH = 0.3  # of the running mean of a micro-batch's seconds
LATE = 8.0  # times the longest that nothing was done before: then the ring hangs


@dataclass
class Pace:
    """How fast the micro-batches of a ring come."""

    since: float = 0.0  # when something was done last
    longest: float | None = None  # seconds in which nothing was done, in this ring
    deadlines: Deadlines = DEADLINES

    def begins(self, now: float) -> None:
        """An update does."""
        self.since = now

    def moves(self, now: float) -> None:
        """A micro-batch, or an update, is done."""
        self.longest = max(self.longest or 0.0, now - self.since)
        self.since = now

    def ring_ends(self) -> None:
        """The next ring has kernels to compile."""
        self.longest = None

    @property
    def limit(self) -> float:
        """Seconds in which something is done, if nothing hangs."""
        if self.longest is None:
            return self.deadlines.first_micro_batch
        return max(self.deadlines.micro_batch, LATE * self.longest)


class TrainingHost(HostState):
    """A host, its engine, and its part in the training."""

    def __init__(
        self,
        leased: LeasedHost,
        job: TrainingJob,
        names: Names,
        pace: Pace,
        send: Sender,
        now: float,
    ) -> None:
        """`pace` is that of the ring that it is in, `send` puts a message on its way."""
        super().__init__(leased, now, pace.deadlines)
        self.job, self.names, self.pace, self._send = job, names, pace, send
        self.is_open = False
        self.has_room = False  # it was told to make room for encoders
        self.moved: training.UpdateDone | None = None  # what it said of the update under way
        self.seconds: float | None = None  # of a micro-batch
        self._computed = 0  # micro-batches, by this engine
        self._backlog: deque[messages.Changing] = deque()
        self._under_way = 0  # bytes
        self._features: OrderedDict[str, int] = OrderedDict()  # bytes of each that it holds

    @property
    def is_free(self) -> bool:
        return super().is_free and not self._backlog

    # Deadlines

    def overdue(self, now: float) -> str:
        late = super().overdue(now)
        limit = self.pace.limit * self.patience
        if not late and self.has(training.Update) and now - self.pace.since > limit:
            return f"no micro-batch was done for {limit:.0f} s"
        return late

    def cancel_deadline(self) -> float:
        """An update hears of a cancel between two micro-batches."""
        return max(self.deadlines.silence, SLACK * (self.pace.longest or 0.0)) * self.patience

    # Sending

    def put(self, message: messages.Changing) -> None:
        """Sends it after all that was put before."""
        self._backlog.append(message)
        self._pump()

    def _pump(self) -> None:
        """Sends what the window allows."""
        while self._backlog:
            size = self._backlog[0].array_bytes
            if self._under_way and size and self._under_way + size > WINDOW:
                return
            message = self._backlog.popleft()
            self._under_way += size
            self._send(self, message)

    def answered(self, request: messages.Message) -> None:
        self._under_way = max(0, self._under_way - request.array_bytes)
        self._pump()

    def forget_unsent(self) -> None:
        for message in self._backlog:
            if isinstance(message, training.PutFeatures):
                self._features.pop(message.name, None)
        self._backlog.clear()

    def let_go(self) -> None:
        super().let_go()
        self.forget_unsent()

    def cancelled(self, now: float) -> None:
        after = [u for u in self.line if isinstance(u.message, training.CloseTraining)]
        self.line = deque(after)
        for unit in after:
            unit.since = now

    def kill(self, ring_generation: int, now: float) -> None:
        super().kill(ring_generation, now)
        self._backlog.clear()
        self._under_way = 0
        self._features.clear()
        self._computed = 0
        self.is_open = self.has_room = False
        self.moved = None

    # Its part

    def make_room(self) -> None:
        """Has the transformer leave where it and the encoders don't fit together."""
        if not self.has_room:
            self.put(
                training.MakeRoom(
                    fence=self.fence,
                    job=self.job.id,
                    ring_generation=self.ring_generation,
                    weights=self.job.weights,
                )
            )
            self.has_room = True

    def open(self, opening: Opening, update: int, vectors: Vectors) -> None:
        """Hands it the run, at a state."""
        fence, job, ring_generation = self.fence, self.job.id, self.ring_generation
        for name, vector in vectors.items() if update else ():
            for offset, numbers in training.in_pieces(vector):
                self.put(
                    training.PutVector(
                        fence=fence,
                        job=job,
                        ring_generation=ring_generation,
                        vector=name,
                        offset=offset,
                        total=len(vector),
                        numbers=numbers,
                    )
                )
        self.put(
            training.OpenTraining(
                fence=fence,
                job=job,
                ring_generation=ring_generation,
                weights=self.job.weights,
                request=opening.request,
                update=update,
                sizes=opening.sizes,
                captions=opening.captions,
                repeats=opening.repeats,
                priors=opening.priors,
            )
        )

    def bring(self, needed: Sequence[str]) -> None:
        """Sends the features that it lacks; what was not used for longest makes room for them."""
        for name in needed:
            if name in self._features:
                self._features.move_to_end(name)
        lacks = [
            self.names.put(name, self.fence, self.ring_generation)
            for name in needed
            if name not in self._features
        ]
        for features in lacks:
            self._features[features.name] = features.array_bytes
        dropped = []
        while sum(self._features.values()) > KEPT and next(iter(self._features)) not in needed:
            dropped.append(self._features.popitem(last=False)[0])
        if dropped:
            drop = training.DropFeatures(
                fence=self.fence,
                job=self.job.id,
                ring_generation=self.ring_generation,
                features=tuple(dropped),
            )
            self.put(drop)
        for features in lacks:
            self.put(features)

    def update(self, update: int, numbers: Sequence[int], parts: int, *, together: bool) -> None:
        """Has it compute these micro-batches of the `parts` of an update, and make the move."""
        self.moved = None
        self.bring(self.names.of_micro_batches(numbers))
        self.put(
            training.Update(
                fence=self.fence,
                job=self.job.id,
                ring_generation=self.ring_generation,
                update=update,
                numbers=tuple(numbers),
                parts=parts,
                together=together,
            )
        )

    def validate(self) -> None:
        """Has it measure on what was held out."""
        self.bring(self.names.held_out())
        self.put(
            training.Validate(
                fence=self.fence, job=self.job.id, ring_generation=self.ring_generation
            )
        )

    def paint(self) -> None:
        """Has it paint the progress prompt."""
        self.bring(self.names.prompt())
        self.put(
            training.PaintProgress(
                fence=self.fence, job=self.job.id, ring_generation=self.ring_generation
            )
        )

    def give(self) -> None:
        """Has it send its state."""
        self.put(
            training.GiveVectors(
                fence=self.fence, job=self.job.id, ring_generation=self.ring_generation
            )
        )

    def close(self) -> None:
        """Has it leave the transformer as it was."""
        self.put(
            training.CloseTraining(
                fence=self.fence, job=self.job.id, ring_generation=self.ring_generation
            )
        )

    def computed(self, seconds: float) -> None:
        """A micro-batch is done; the first one of an engine compiles, and tells nothing."""
        self._computed += 1
        if self._computed > 1:
            known = seconds if self.seconds is None else self.seconds
            self.seconds = known + SMOOTH * (seconds - known)
