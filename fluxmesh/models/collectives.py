"""A process's place among the ranks of a group: the only module with collectives.

Collectives carry no tag: two that ranks ran in different order would swap their data in silence.
`Ranks` therefore chains each to the one before. Who waits for their results, the graph or the host,
is a matter of the device (`waiting.py`): a collective that is begun gives a `Pending`, whose
`result` is asked for when all that can be computed without it is described. A group of one runs the
same code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from fluxmesh.models.waiting import Waiting, waiting_here


@dataclass
class Traffic:
    """Collectives called by this rank and the bytes that it sent in them, around a ring."""

    sums: int = 0
    gathers: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sums + other.sums, self.gathers + other.gathers, self.bytes + other.bytes
        )


@dataclass(frozen=True)
class Mark:
    """A moment between two collectives."""

    last: mx.array | None
    traffic: Traffic


class Pending:
    """A collective that was begun."""

    def __init__(self, every: mx.array, waiting: Waiting) -> None:
        self._every, self._waiting = every, waiting

    def result(self, *meanwhile: mx.array) -> mx.array:
        """What it gives, to compute with.

        `meanwhile` is what can be computed without it, and is wanted too: it may run while this
        waits for the other ranks.
        """
        self._waiting.end(self._every, meanwhile)
        return self._every


class Ranks:
    """This process's place in a group, and its two collectives, in one order on every rank."""

    def __init__(self, group: Any, stream: Any = None, waiting: Waiting | None = None) -> None:
        """`group` is from `mx.distributed.init`. `stream` carries the collectives, by default the
        one that the group's backend chooses; it must be of the kind of device that this uses.
        `waiting` is by default the way of the device that computes.
        """
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.traffic = Traffic()
        self._group, self._stream = group, stream
        self._waiting = waiting or waiting_here()
        self._last: mx.array | None = None

    @property
    def looks_ahead(self) -> bool:
        """Whether collectives may be described while those before are still to be computed."""
        return self._waiting.looks_ahead

    @classmethod
    def join(cls, backend: str = "ring") -> Ranks:
        """Joins the group that the environment describes; once a process, for MLX keeps it.

        Raises `RuntimeError` (MLX's) where there is none. Ask `agree` before trusting it.
        """
        return cls(mx.distributed.init(strict=True, backend=backend))

    def agree(self, nonce: bytes) -> bool:
        """Whether every rank gives the same `nonce`, of one length: waits for all of them.

        Finds a stale process or a stranger on a port, against whom a ring has no other defence.
        """
        every = self.gather(mx.array(np.frombuffer(nonce, dtype=np.uint8))[None])
        return bool(mx.all(every == every[:1]).item())

    def most(self, value: int) -> int:
        """The largest `value` of any rank: waits for all of them, who then do the same thing."""
        return max(np.array(self.ask(value)).tolist())

    def ask(self, value: int) -> mx.array:
        """Every rank's `value`, int32 [N]; where collectives look ahead, to be waited for later.

        A gather, which goes round once where a sum goes twice.
        """
        return self.gather(mx.array([value], dtype=mx.int32))

    def mark(self) -> Mark:
        """The collectives built so far, for `rewind`."""
        return Mark(self._last, replace(self.traffic))

    def rewind(self, mark: Mark) -> None:
        """Forgets collectives that were built after `mark` and that no rank will evaluate."""
        self._last, self.traffic = mark.last, mark.traffic

    def begin_anew(self) -> None:
        """Describes collectives as if there had been none: for a trace (`go_on`)."""
        self._last, self.traffic = None, Traffic()

    def go_on(self, last: mx.array, traffic: Traffic) -> None:
        """Counts collectives that a trace has put into the graph, with `last` behind them all.

        What such a trace computes with has to wait for the `mark().last` of before.
        """
        self._last, self.traffic = last, self.traffic + traffic

    def sum(self, x: mx.array) -> mx.array:
        """The sum of every rank's `x`; of one shape and dtype on all."""
        # A ring adds up 1/N of the array at each rank, then hands the sums round.
        self.traffic.sums += 1
        self.traffic.bytes += 2 * (self.size - 1) * x.nbytes // self.size
        total = mx.distributed.all_sum(self._after(x), group=self._group, stream=self._stream)
        return self._begun(total).result()

    def gather(self, x: mx.array) -> mx.array:
        """Every rank's `x` one after another along axis 0; of one shape and dtype on all."""
        return self.begin_gather(x).result()

    def begin_gather(self, x: mx.array) -> Pending:
        """As `gather`, for whoever has something to compute meanwhile."""
        self.traffic.gathers += 1
        self.traffic.bytes += (self.size - 1) * x.nbytes
        every = mx.distributed.all_gather(self._after(x), group=self._group, stream=self._stream)
        return self._begun(every)

    def _begun(self, result: mx.array) -> Pending:
        self._last = result
        self._waiting.begin(result)
        return Pending(result, self._waiting)

    def _after(self, x: mx.array) -> mx.array:
        """`x`, not to be sent before the last collective is done, whoever evaluates what."""
        return x if self._last is None else self._waiting.after(self._last, x)
