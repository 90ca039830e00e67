"""One host of a training: what its engine holds of it, and what waits to be sent there. Pure.

Below `train_session.py`, on `hosts.py` (deadlines). States and features are large: they are sent a
few at a time, so that no agent's answer waits behind a queue of gigabytes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import numpy as np

from fluxmesh.wire import messages
from fluxmesh.wire import training_messages as training
from fluxmesh_coordinator.jobs.host import Worker
from fluxmesh_coordinator.jobs.training.tasks import Names, Opening, TrainJob, Vectors
from fluxmesh_coordinator.jobs.types import LeasedHost

WINDOW = 16 << 20  # bytes on their way to a host that it has not answered yet
PIECE = 1 << 20  # numbers of a vector in a message
KEPT = 1 << 30  # bytes of features that a host keeps
SMOOTH = 0.3  # of the running mean of a micro-batch's seconds
# Work that ends with no report.
SILENT = (training.PutVector, training.PutFeatures, training.DropFeatures, training.MakeRoom)

Send = Callable[[Worker, messages.Changing], None]


class Hand:
    """A host, its engine, and its part in the training."""

    def __init__(self, leased: LeasedHost, job: TrainJob, names: Names, send: Send, now: float):
        self.worker = Worker(leased, now)
        self.job, self.names, self._send = job, names, send
        self.is_open = False
        self.has_room = False  # it was told to make room for encoders
        self.moved: training.Moved | None = None  # what it said of the update under way
        self.seconds: float | None = None  # of a micro-batch
        self._computed = 0  # micro-batches, by this engine
        self._backlog: deque[messages.Changing] = deque()
        self._under_way = 0  # bytes
        self._features: OrderedDict[str, int] = OrderedDict()  # bytes of each that it holds

    @property
    def rank(self) -> int:
        return self.worker.rank

    @property
    def is_free(self) -> bool:
        return self.worker.is_free and not self._backlog

    def head(self) -> tuple[int, str, int]:
        """What all work begins with."""
        return self.worker.fence, self.job.id, self.worker.epoch

    # Sending

    def put(self, message: messages.Changing, now: float) -> None:
        """Sends it after all that was put before."""
        self._backlog.append(message)
        self.pump(now)

    def pump(self, now: float) -> None:
        """Sends what the window allows."""
        while self._backlog:
            size = _bytes(self._backlog[0])
            if self._under_way and size and self._under_way + size > WINDOW:
                return
            message = self._backlog.popleft()
            self._under_way += size
            if isinstance(message, messages.Work) and not isinstance(message, SILENT):
                self.worker.put(message, now)
            self._send(self.worker, message)

    def answered(self, request: messages.Message, now: float) -> None:
        """The agent has taken a message in."""
        self._under_way = max(0, self._under_way - _bytes(request))
        self.pump(now)

    def forget_unsent(self) -> None:
        """What waits is not sent."""
        for message in self._backlog:
            if isinstance(message, training.PutFeatures):
                self._features.pop(message.name, None)
        self._backlog.clear()

    def cancelled(self, now: float) -> None:
        """The engine has let go of all that it had in line before it was told to."""
        after = [u for u in self.worker.line if isinstance(u.message, training.CloseTraining)]
        self.worker.line = deque(after)
        for unit in after:
            unit.since = now

    def lost(self) -> None:
        """The engine is gone, or is being ended, with all that it held."""
        self._backlog.clear()
        self._under_way = 0
        self._features.clear()
        self._computed = 0
        self.is_open = self.has_room = False
        self.moved = None

    # Its part

    def open(self, opening: Opening, update: int, vectors: Vectors, now: float) -> None:
        """Hands it the run, at a state."""
        fence, job, epoch = self.head()
        for name, vector in vectors.items() if update else ():
            for offset in range(0, len(vector), PIECE):
                piece, total = vector[offset : offset + PIECE], len(vector)
                self.put(training.PutVector(fence, job, epoch, name, offset, total, piece), now)
        self.put(
            training.OpenTraining(
                fence,
                job,
                epoch,
                self.job.weights,
                opening.request,
                update,
                opening.sizes,
                opening.captions,
                opening.priors,
            ),
            now,
        )

    def bring(self, needed: Sequence[str], now: float) -> None:
        """Sends the features that it lacks; what was not used for longest makes room for them."""
        for name in needed:
            if name in self._features:
                self._features.move_to_end(name)
        fence, _, epoch = self.head()
        lacks = [
            self.names.put(name, fence, epoch) for name in needed if name not in self._features
        ]
        for features in lacks:
            self._features[features.name] = _bytes(features)
        dropped = []
        while sum(self._features.values()) > KEPT and next(iter(self._features)) not in needed:
            dropped.append(self._features.popitem(last=False)[0])
        if dropped:
            self.put(training.DropFeatures(*self.head(), tuple(dropped)), now)
        for features in lacks:
            self.put(features, now)

    def computed(self, seconds: float) -> None:
        """A micro-batch is done; the first one of an engine compiles, and tells nothing."""
        self._computed += 1
        if self._computed > 1:
            known = seconds if self.seconds is None else self.seconds
            self.seconds = known + SMOOTH * (seconds - known)


def _bytes(message: messages.Message) -> int:
    return sum(value.nbytes for value in vars(message).values() if isinstance(value, np.ndarray))
