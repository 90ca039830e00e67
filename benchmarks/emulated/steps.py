"""A rank's step as pieces of computing between collectives: taken apart here, walked there.

`traced` runs the tree's own transformers as one rank of so many, alone, with collectives that send
nothing, and notes what each piece takes between one collective and the next. `walked` is such a
rank without the computing: it waits as long as each piece takes and makes the real collectives, of
the same sizes, in the same order. Collectives are waited for as on a Mac (`models/waiting.py`,
`OnHost`): what does not need one is computed while it travels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import mlx.core as mx

from benchmarks.peers import Fluxmesh
from benchmarks.placements import NoGroup
from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import CollectiveTime, Placement
from fluxmesh.engine.ring_probe import hidden_part
from fluxmesh.models.base import Architecture
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.registry import runtime_of
from fluxmesh.models.waiting import OnHost
from fluxmesh.sampling.denoise import denoise

LONGEST = 0.1  # seconds of the gather that is timed beside computing
WALKED = 5  # steps of each kind, of which the fastest counts

# What ends a piece: a collective that begins, one that is waited for, the step itself.
End = Literal["sum", "gather", "wait", "step"]


class StepPiece(NamedTuple):
    """What is computed since the piece before."""

    end: End
    nbytes: int  # of the array that this rank gives to a collective that begins
    seconds: float


def least(one: Sequence[StepPiece], other: Sequence[StepPiece]) -> list[StepPiece]:
    """Of two traces of one step, each piece as short as either has it."""
    return [min(pair, key=lambda piece: piece.seconds) for pair in zip(one, other, strict=True)]


def slower(pieces: Sequence[StepPiece], times: float) -> list[StepPiece]:
    """The same step on a host that takes so many times as long."""
    return [piece._replace(seconds=times * piece.seconds) for piece in pieces]


def computed(pieces: Sequence[StepPiece]) -> float:
    """Seconds of all that a step computes."""
    return sum(piece.seconds for piece in pieces)


# Taken apart


class _TracedRanks(Ranks):
    """This rank's place, alone: a gather repeats its own array, a sum is it."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(NoGroup(rank, size), waiting=OnHost())
        self.restart()

    def restart(self) -> None:
        """A step begins."""
        self.pieces: list[StepPiece] = []
        self.go_on()

    def go_on(self) -> None:
        """What was computed since the last piece counts for none."""
        self._begun_at = time.process_time()

    def note(self, end: End, nbytes: int = 0) -> None:
        """A piece is over."""
        self.pieces.append(StepPiece(end, nbytes, time.process_time() - self._begun_at))
        self.go_on()

    def sum(self, x: mx.array) -> mx.array:
        mx.eval(x)
        self.note("sum", x.nbytes)
        return x

    def begin_gather(self, x: mx.array) -> Pending:
        mx.eval(x)
        self.note("gather", x.nbytes)
        return _TracedGather(self, mx.concatenate([x] * self.size))


class _TracedGather(Pending):
    def __init__(self, ranks: _TracedRanks, every: mx.array) -> None:
        self._ranks, self._all = ranks, every

    def result(self, *meanwhile: mx.array) -> mx.array:
        mx.eval(*meanwhile)
        self._ranks.note("wait")
        mx.eval(self._all)  # what the link would have brought
        self._ranks.go_on()
        return self._all


def traced(
    peer: Fluxmesh,
    model: Architecture,
    size: tuple[int, int],
    placement: Placement,
    rank: int = 0,
    hosts: int = 1,
    shares: Shares = EVEN,
    steps: int = 4,
) -> list[StepPiece]:
    """A step of `rank` of `hosts`, in seconds of this process's processor; `peer` is whole.

    `size` is (height, width) in pixels. Of `steps` steps, after one that is not counted, each piece
    as short as it was in any. With `data` all is one piece.
    """
    whole, ranks = peer.flow, _TracedRanks(rank, hosts)
    if placement != "data":
        peer.flow = runtime_of(model).spread(whole, placement, ranks, shares)
    try:
        noise, made = peer.planned(*size, steps + 1, model.text_length)
        mx.eval(*made.arrays)
        walk = denoise(peer.flow, made, noise)
        found: list[list[StepPiece]] = []
        for _ in range(steps + 1):
            ranks.restart()
            mx.eval(next(walk).x)
            ranks.note("step")
            found.append(ranks.pieces)
    finally:
        peer.flow = whole
    best = found[1]
    for pieces in found[2:]:
        best = least(best, pieces)
    return best


# Walked


class _Device:
    """What computes: busy until some moment, whenever the process that waits for it wakes up."""

    def __init__(self) -> None:
        self._busy_until = time.perf_counter()

    def compute(self, seconds: float) -> None:
        """Comes back when it is done with what it was given now, or before."""
        self._busy_until += seconds
        time.sleep(max(0.0, self._busy_until - time.perf_counter()))

    def wait(self, ready: float) -> None:
        """It has nothing to do before that moment."""
        self._busy_until = max(self._busy_until, ready)


def hidden(ranks: Ranks, gathers: Sequence[CollectiveTime]) -> float:
    """The part of a gather that passes while a rank computes, which here is to wait.

    As `ring_probe` finds it with products: of the largest gather that takes no longer than
    `LONGEST`, beside computing of its length.
    """
    chosen = ([timing for timing in gathers if timing.seconds <= LONGEST] or list(gathers[:1]))[-1]
    bare, beside = (
        min(
            walked(
                ranks,
                [StepPiece("gather", chosen.nbytes, 0.0), StepPiece("wait", 0, spent)],
                WALKED,
            )
        )
        for spent in (0.0, chosen.seconds)
    )
    return hidden_part(chosen.seconds, bare, beside)


def walked(ranks: Ranks, pieces: Sequence[StepPiece], steps: int = WALKED) -> list[float]:
    """Makes `steps` steps of such pieces with the other ranks; seconds of each, on the slowest.

    After each step all agree on whether to go on, as engines do.
    """
    sizes = {piece.nbytes for piece in pieces} - {0}
    arrays = {nbytes: mx.zeros((nbytes // 2,), mx.bfloat16) for nbytes in sizes}
    mx.eval(*arrays.values())
    ranks.most(0)
    spent: list[int] = []
    device, begun = _Device(), time.perf_counter()
    for _ in range(steps):
        pending: Pending | None = None
        for piece in pieces:
            device.compute(piece.seconds)
            if piece.end == "gather":
                pending = ranks.begin_gather(arrays[piece.nbytes])
                continue
            if piece.end == "sum":
                ranks.sum(arrays[piece.nbytes])
            elif piece.end == "wait" and pending is not None:
                pending.result()
            else:
                continue
            device.wait(time.perf_counter())
        ranks.most(0)
        now = time.perf_counter()
        device.wait(now)
        spent.append(round(1e6 * (now - begun)))
        begun = now
    return [ranks.most(micros) / 1e6 for micros in spent]
