"""Who is painted for next: a line that is fair between clients, and bounded. Pure.

Clients take turns: each that waits has one of its requests painted before any has a second one, so
that who brings fifty does not keep out who brings one. Below `service.py`, which holds one line for
all lanes; who of the line begins on which hosts is `host_choice.py`'s.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fluxmesh.errors import FluxmeshError


class QueueFullError(FluxmeshError):
    """No more is taken in now; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(1, math.ceil(retry_after))


@dataclass(frozen=True, kw_only=True)
class QueueBounds:
    """How much may wait."""

    per_client: int = 16  # requests
    per_address: int = 48  # requests: clients of one address may call themselves what they like
    whole: int = 64  # requests
    held_bytes: int = 1 << 30  # of pictures that wait with them


@dataclass(frozen=True, kw_only=True)
class WaitingRequest:
    """One in line."""

    id: str
    client: str  # an address, and behind a space who speaks from there
    seconds: float  # that it will take, as far as is known; 0: nobody knows
    nbytes: int = 0  # of pictures that it holds


@dataclass(frozen=True)
class Place:
    """Where a request stands: 1 is next; `seconds_left` until its last picture, 0: unknown."""

    number: int
    seconds_left: float


class FairQueue:
    """The line."""

    def __init__(self, bounds: QueueBounds | None = None) -> None:
        self.bounds = bounds or QueueBounds()
        self._waiting: dict[str, deque[WaitingRequest]] = {}  # by client, in the order of turns
        self._coming: Counter[str] = Counter()  # by client: requests that are still looked at

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def check(self, client: str, nbytes: int = 0, retry_after: float = 1.0) -> None:
        """Raises `QueueFullError` where a request of `client` would not be taken in.

        Those that are still looked at count as well: they hold their pictures, too.
        """
        bounds = self.bounds
        if len(self._waiting.get(client, ())) + self._coming[client] >= bounds.per_client:
            raise QueueFullError(
                f"{bounds.per_client} of your requests wait already; send the next one when one "
                "of them is done.",
                retry_after,
            )
        address = _address(client)
        clients = [entry.client for entry in self.line()] + list(self._coming.elements())
        if sum(_address(each) == address for each in clients) >= bounds.per_address:
            raise QueueFullError(
                f"{bounds.per_address} requests of your address wait already; try again later.",
                retry_after,
            )
        if len(clients) >= bounds.whole:
            raise QueueFullError(
                f"The line is full with {bounds.whole} requests; try again later.", retry_after
            )
        if nbytes + sum(entry.nbytes for entry in self.line()) > bounds.held_bytes:
            raise QueueFullError(
                "The requests that wait hold too many pictures; try again later.", retry_after
            )

    @contextlib.contextmanager
    def coming(self, client: str, retry_after: float = 1.0) -> Iterator[None]:
        """As long as a request is looked at, before it is added. Raises `QueueFullError`."""
        self.check(client, retry_after=retry_after)
        self._coming[client] += 1
        try:
            yield
        finally:
            self._coming[client] -= 1
            if not self._coming[client]:
                del self._coming[client]

    def add(self, entry: WaitingRequest, retry_after: float = 1.0) -> None:
        """To the end of its client's own line. Raises `QueueFullError`."""
        self.check(entry.client, entry.nbytes, retry_after)
        self._waiting.setdefault(entry.client, deque()).append(entry)

    def take(self, id: str | None = None) -> WaitingRequest | None:
        """The next one, or that of this id, which leaves the line; None: it does not wait.

        Its client's turn is over, unless another of its requests stands before that one.
        """
        for client, entries in self._waiting.items():
            entry = next((each for each in entries if id in (None, each.id)), None)
            if entry is None:
                continue
            is_first = entry is entries[0]
            entries.remove(entry)
            if is_first or not entries:
                del self._waiting[client]
            if is_first and entries:  # it goes behind the others
                self._waiting[client] = entries
            return entry
        return None

    def remove(self, id: str) -> bool:
        """Takes a request out of the line; False: it is not in it."""
        for client, entries in self._waiting.items():
            for entry in entries:
                if entry.id == id:
                    entries.remove(entry)
                    if not entries:
                        del self._waiting[client]
                    return True
        return False

    def line(self) -> list[WaitingRequest]:
        """All that wait, in the order in which they will be painted if nobody else comes."""
        turns = [list(entries) for entries in self._waiting.values()]
        rounds = max(map(len, turns), default=0)
        return [entries[k] for k in range(rounds) for entries in turns if k < len(entries)]

    def places(self, running: Iterable[float | None]) -> dict[str, Place]:
        """Where each stands; `running` has the seconds that each lane still needs, None: unknown.

        A lane that has nothing to do needs none.
        """
        lanes = list(running) or [0.0]
        free = [0.0 if seconds is None else seconds for seconds in lanes]
        known = None not in lanes
        places: dict[str, Place] = {}
        for number, entry in enumerate(self.line(), 1):
            lane = free.index(min(free))
            free[lane] += entry.seconds
            known = known and entry.seconds > 0
            places[entry.id] = Place(number, free[lane] if known else 0.0)
        return places


def _address(client: str) -> str:
    return client.partition(" ")[0]
