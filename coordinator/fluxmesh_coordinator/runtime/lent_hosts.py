"""Which hosts of a mesh each job of this program may use, where several jobs run side by side.

Below `job_runner.py`, which plans and leases within what its job was lent, and `server/queue/`,
which lends. The leases of the agents stand beside it: they are between programs, and this is
between the jobs of one. Any thread may ask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable


class HostBook:
    """The hosts of one mesh, by rank, and who has them."""

    def __init__(self, ranks: Iterable[int], changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called when hosts have come free, in whichever thread they did."""
        self.ranks, self._changed = frozenset(ranks), changed
        self._lock = threading.Lock()
        self._lent: list[LentHosts] = []  # those that are lent

    @property
    def free(self) -> frozenset[int]:
        """Hosts that no job has."""
        with self._lock:
            return self._free

    @property
    def is_awaited(self) -> bool:
        """Whether a job that runs waits for hosts: they are its own before anybody begins."""
        with self._lock:
            return any(lent.is_short for lent in self._lent)

    def lend(self, ranks: Iterable[int]) -> LentHosts:
        """These hosts, or as many of them as are free."""
        with self._lock:
            lent = LentHosts(self, self._free & frozenset(ranks))
            self._lent.append(lent)
            return lent

    # For `LentHosts` alone

    @property
    def _free(self) -> frozenset[int]:
        return self.ranks.difference(*(lent.ranks for lent in self._lent))

    def _widen(self, lent: LentHosts) -> bool:
        with self._lock:
            before, lent.is_short = lent.ranks, True
            lent.ranks |= self._free
            return lent.ranks != before

    def _settle(self, lent: LentHosts, ranks: frozenset[int]) -> None:
        with self._lock:
            lent.ranks, lent.is_short = lent.ranks & ranks, False
        self._changed()

    def _take_back(self, lent: LentHosts) -> None:
        with self._lock:
            if lent not in self._lent:
                return
            self._lent.remove(lent)
        self._changed()

    def _come_free(self, lent: LentHosts) -> bool:
        with self._lock:
            if lent not in self._lent:
                return False
            later = self._lent[self._lent.index(lent) + 1 :]
            return any(
                other.ranks
                for other in self._lent
                if other is not lent and (other in later or not other.is_short)
            )


class LentHosts:
    """The hosts that one job may use, until it gives them back."""

    def __init__(self, book: HostBook, ranks: frozenset[int]) -> None:
        """`HostBook.lend` makes them."""
        self.book, self.ranks = book, ranks
        self.is_short = False  # the job can't go on with what it has
        self.is_cancelled = False  # somebody asked for its end, be it before it began

    def settle(self, ranks: Iterable[int]) -> None:
        """The job needs no other hosts than these: the rest is for others."""
        self.book._settle(self, frozenset(ranks))

    def widen(self) -> bool:
        """The job can't do with what it has: takes all that nobody has. Whether that is more.

        Until it has settled, no other job begins on hosts that come free.
        """
        return self.book._widen(self)

    @property
    def may_grow(self) -> bool:
        """Whether other jobs have hosts that come free some time.

        Of jobs that are short themselves, each waits for those alone that began after it: else two
        would wait for each other for ever, and the hosts of neither would be of use to anybody.
        """
        return self.book._come_free(self)

    def give_back(self) -> None:
        """The job is over; twice is harmless."""
        self.book._take_back(self)
