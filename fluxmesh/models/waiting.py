"""Who waits for what a collective gives: the graph that computes with it, or the host.

Below the collectives (`Ranks`), which ask here and nowhere else; models know of none of it.

A collective runs on a CPU stream. Where a GPU computes with its result in one graph, the GPU's
queue waits for it. CUDA waits as long as it takes. Metal's watchdog ends a command buffer after
about 5 s, whatever it waits for, and then a peer that comes late (it compiles its first kernels,
reads weights back from the disk, or its user plays) breaks the ring of everybody. On Metal the host
therefore waits before it describes what comes next: a thread of the host may wait for as long as it
likes. What does not need the result is committed before, so that the GPU has work meanwhile; what
is lost is one round trip to the host for each collective, 0.2 to 0.5 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from fluxmesh.kernels.ops import device


class Waiting(Protocol):
    """A way to wait. Results are the same bytes on every one."""

    looks_ahead: bool  # whether collectives may be described before those of the past are done

    def after(self, last: mx.array, x: mx.array) -> mx.array:
        """`x`, which is not sent before `last`, what the collective before gives, is there."""
        ...

    def begin(self, result: mx.array) -> None:
        """A collective is described that gives `result`."""
        ...

    def end(self, result: mx.array, meanwhile: Sequence[mx.array]) -> None:
        """What needs `result` is described next. `meanwhile` does not, and is wanted as well."""
        ...


class InGraph:
    """Nobody waits before the end: the graph holds the order of collectives, and their users."""

    looks_ahead = True

    def after(self, last: mx.array, x: mx.array) -> mx.array:
        return mx.depends(x, last)

    def begin(self, result: mx.array) -> None:
        pass

    def end(self, result: mx.array, meanwhile: Sequence[mx.array]) -> None:
        pass


class OnHost:
    """The host waits for each collective: nothing on a GPU ever waits for another host."""

    looks_ahead = False

    def after(self, last: mx.array, x: mx.array) -> mx.array:
        mx.eval(last)
        return x

    def begin(self, result: mx.array) -> None:
        mx.async_eval(result)

    def end(self, result: mx.array, meanwhile: Sequence[mx.array]) -> None:
        mx.async_eval(*meanwhile)
        mx.eval(result)


def waiting_here() -> Waiting:
    """The way of the device that computes by default."""
    return OnHost() if device() == "metal" else InGraph()
