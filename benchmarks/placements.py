"""Placements of a benchmark's transformer, and ranks whose group isn't there."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.models.collectives import Pending, Ranks
from fluxmesh.models.flux1.parallel import SequenceFlux, TensorFlux
from fluxmesh.models.flux2.parallel import SequenceFlux2, TensorFlux2
from fluxmesh.models.flux2.transformer import Flux2
from fluxmesh.models.waiting import InGraph


class NoGroup:
    """A group of which only this member is there."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class LoneRank(Ranks):
    """A rank without a link: what it sends comes back at once. What it computes is no picture."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(NoGroup(rank, size), waiting=InGraph())

    def sum(self, x: mx.array) -> mx.array:
        return x

    def begin_gather(self, x: mx.array) -> Pending:
        return self._begun(mx.concatenate([x] * self.size))


def spread(placement: str, whole: Any, ranks: Ranks, shares: Shares = EVEN) -> Any:
    """The transformer `whole`, which stays as it is, over `ranks`: `tensor` or `sequence`.

    Each call describes it anew; an engine's are `replayed`.
    """
    if isinstance(whole, Flux2):
        return (TensorFlux2 if placement == "tensor" else SequenceFlux2)(whole, ranks, shares)
    return (TensorFlux if placement == "tensor" else SequenceFlux)(whole, ranks, shares)
